"""Reads COCO folders in two layouts.

Roboflow's: {train,valid,test}/_annotations.coco.json with the images beside it. The standard one:
annotations/instances_<split>*.json and the images in <split>*/.

This module reads and judges the form only (is it JSON, are the keys there, are ids whole numbers); whether
the content can be trained on is `validation.py`'s question.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rfdetr_core.data.formats.source import (
    MAX_ANNOTATION_MB,
    UNPRINTABLE,
    Remark,
    SourceCategory,
    SourceSplit,
    read_annotation_file,
    shown,
)
from rfdetr_core.errors import DatasetError

ANNOTATION_FILE = "_annotations.coco.json"
INSTANCES = re.compile(r"instances_(?P<split>train|valid|val|test)(?P<suffix>.*)\.json")


def find_roboflow_coco(folder: Path) -> dict[str, Path]:
    """The annotation files of a Roboflow export, keyed by train, valid, test; without train it is none: empty."""
    found = {split: folder / name / ANNOTATION_FILE for split, name in _split_folders(folder).items()}
    return {split: path for split, path in found.items() if path.is_file()} if found["train"].is_file() else {}


def read_coco_folder(folder: Path, max_mb: float = MAX_ANNOTATION_MB) -> dict[str, SourceSplit]:
    """All splits of a Roboflow export in `folder`, keyed by train, valid, test.

    Raises:
        DatasetError: no folder, no train split, a split's folder without annotations, or a file that is not a COCO
            document.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder", hint="give the folder that holds train/ and valid/")
    found = find_roboflow_coco(folder)
    if not found:
        raise DatasetError(
            f"{folder}: no annotations found (looked for train/{ANNOTATION_FILE})",
            hint="a COCO dataset has train/, valid/ and test/, each with images and that file",
        )
    for split, name in _split_folders(folder).items():
        if split not in found and (folder / name).is_dir():
            # Not a split that the dataset does not have: taking it from train would hide that its labels are lost.
            raise DatasetError(
                f"{folder / name}: the {split} split has no {ANNOTATION_FILE}",
                hint="export it again, or remove the folder to have the split taken from train",
            )
    return {split: read_coco_split(split, path, max_mb=max_mb) for split, path in found.items()}


def _split_folders(folder: Path) -> dict[str, str]:
    valid = "val" if (folder / "val").is_dir() and not (folder / "valid").is_dir() else "valid"
    return {"train": "train", "valid": valid, "test": "test"}


def find_standard_coco(folder: Path) -> dict[str, Path]:
    """The annotation files of the standard layout, keyed by train, valid, test; without train it is none: empty.

    Raises:
        DatasetError: two files for one split.
    """
    found: dict[str, Path] = {}
    for path in sorted((folder / "annotations").glob("instances_*.json")):
        if (match := INSTANCES.fullmatch(path.name)) is None:
            continue
        split = "valid" if match["split"] == "val" else match["split"]
        if split in found:
            raise DatasetError(
                f"{folder / 'annotations'}: {found[split].name} and {path.name} both describe the {split} split",
                hint="leave one of them there",
            )
        found[split] = path
    return found if "train" in found else {}


def read_standard_coco_folder(folder: Path, max_mb: float = MAX_ANNOTATION_MB) -> dict[str, SourceSplit]:
    """All splits of a folder with annotations/instances_<split>*.json and images in <split>*/ (training spec 2.1).

    <split> is train, val or valid, test. The images may also lie in images/<split>*/, or all in images/.

    Raises:
        DatasetError: no train split, two files for one split, no folder of images for a split, or a file that is not
            a COCO document.
    """
    found = find_standard_coco(folder)
    if not found:
        raise DatasetError(
            f"{folder}: no annotations found (looked for annotations/instances_train*.json)",
            hint="the standard layout of COCO has annotations/instances_train*.json and a train*/ folder of images",
        )
    return {
        split: read_coco_split(split, path, root=folder, image_folder=_standard_images(folder, path), max_mb=max_mb)
        for split, path in found.items()
    }


def _standard_images(folder: Path, path: Path) -> Path:
    """The folder named as the annotation file says, else the only one whose name begins so, else images/."""
    match = INSTANCES.fullmatch(path.name)
    split, suffix = (match["split"], match["suffix"]) if match else ("", "")
    begins = "val" if split == "valid" else split
    for parent in (folder, folder / "images"):
        if (parent / f"{split}{suffix}").is_dir():
            return parent / f"{split}{suffix}"
    for parent in (folder, folder / "images"):
        alike = sorted(p for p in parent.glob(f"{begins}*") if p.is_dir())
        if len(alike) > 1:
            raise DatasetError(
                f"{path}: {' and '.join(f'{p.name}/' for p in alike)} may both hold its images",
                hint=f"name the right one {split}{suffix}/",
            )
        if alike:
            return alike[0]
    if (folder / "images").is_dir():
        return folder / "images"
    raise DatasetError(f"{path}: no folder of images for it", hint=f"put them into {folder / f'{split}{suffix}'}/")


def read_coco_split(
    split: str,
    path: Path,
    *,
    root: Path | None = None,
    image_folder: Path | None = None,
    max_mb: float = MAX_ANNOTATION_MB,
) -> SourceSplit:
    """Read one annotation file; images lie beside it, in a split's folder of `root`, if nothing else is said.

    Raises:
        DatasetError: unreadable, larger than `max_mb`, not JSON, a required key absent or of the wrong type.
    """
    root = root or path.parent.parent
    with _collector_at_rest():
        document = _load(path, root, max_mb)
        images = _rows(document, "images", path)
        annotations = _rows(document, "annotations", path)
        categories = _rows(document, "categories", path)
        return SourceSplit(
            name=split,
            root=root,
            path=path,
            image_folder=image_folder or path.parent,
            image_ids=_integers(images, "images", "id", path),
            file_names=_file_names(images, path),
            widths=_integers(images, "images", "width", path, absent=-1),
            heights=_integers(images, "images", "height", path, absent=-1),
            annotation_ids=_integers(annotations, "annotations", "id", path),
            annotation_images=_integers(annotations, "annotations", "image_id", path),
            annotation_categories=_integers(annotations, "annotations", "category_id", path),
            bboxes=_bboxes(annotations, path),
            areas=_areas(annotations, path),
            crowd=_crowd(annotations, path),
            categories=_categories(categories, path),
            remarks=_remarks(split, annotations),
        )


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """No garbage collection while millions of objects are made, none of them garbage: it takes half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _remarks(split: str, annotations: list[dict[str, Any]]) -> tuple[Remark, ...]:
    encoded = tuple(
        f"{split}: annotation {row.get('id')}"
        for row in annotations
        if isinstance(row.get("segmentation"), dict) and not row.get("iscrowd")
    )
    return (Remark("mask-only-box", encoded),) if encoded else ()


def _load(path: Path, root: Path, max_mb: float) -> dict[str, Any]:
    data = read_annotation_file(path, root, max_mb)
    try:
        document = json.loads(data)
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not UTF-8 at byte {error.start}", hint="save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"{path}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}", hint="export it again"
        ) from error
    except ValueError as error:
        raise DatasetError(f"{path}: not JSON: {error}", hint="export it again") from error
    except RecursionError as error:
        raise DatasetError(f"{path}: nested too deeply to be a COCO document", hint="export it again") from error
    if not isinstance(document, dict):
        raise DatasetError(f"{path}: a JSON object is wanted, not {_kind(document)}", hint="export it again")
    return document


def _rows(document: dict[str, Any], key: str, path: Path) -> list[dict[str, Any]]:
    rows = document.get(key)
    if not isinstance(rows, list):
        found = "absent" if key not in document else _kind(rows)
        raise DatasetError(f"{path}: '{key}' must be a list, found {found}", hint="export it as COCO detection")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DatasetError(f"{path}: {key}[{index}] must be an object, found {_kind(row)}")
    return rows


def _integers(
    rows: list[dict[str, Any]], table: str, key: str, path: Path, absent: int | None = None
) -> NDArray[np.int64]:
    plain = [row.get(key, absent) for row in rows]
    if set(map(type, plain)) == {int}:
        try:
            whole = np.array(plain, dtype=np.int64)
        except OverflowError:  # said below, with the row
            whole = np.array([2**62])
        if whole.min() > -(2**62) and whole.max() < 2**62:
            return whole
    values = np.empty(len(rows), dtype=np.int64)
    for index, row in enumerate(rows):
        value = row.get(key, absent)
        if value is None and absent is not None:
            value = absent
        number = _whole_number(value)
        if number is None:
            found = "absent" if key not in row else shown(value)
            raise DatasetError(f"{path}: {table}[{index}].{key} must be a whole number, found {found}")
        values[index] = number
    return values


def _whole_number(value: Any) -> int | None:
    """The value as an integer of less than 63 bits; some exporters write ids as text, or as 7.0."""
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d{1,19}\s*", value, re.ASCII):
        value = int(value)
    if isinstance(value, bool) or not (isinstance(value, int) or (isinstance(value, float) and value.is_integer())):
        return None
    return int(value) if abs(value) < 2**62 else None


def _crowd(rows: list[dict[str, Any]], path: Path) -> NDArray[np.bool_]:
    # true and false say what 1 and 0 say; as an id they would be a mistake
    plain = [{**row, "iscrowd": int(row["iscrowd"])} if isinstance(row.get("iscrowd"), bool) else row for row in rows]
    return np.not_equal(_integers(plain, "annotations", "iscrowd", path, absent=0), 0)


def _text(row: dict[str, Any], table: str, index: int, key: str, path: Path) -> str:
    text = row.get(key)
    if not isinstance(text, str) or not text.strip():
        raise DatasetError(f"{path}: {table}[{index}].{key} must be a text, found {shown(text)}")
    if UNPRINTABLE.search(text):
        raise DatasetError(f"{path}: {table}[{index}].{key} {shown(text)} holds an unprintable character")
    return text


def _file_names(rows: list[dict[str, Any]], path: Path) -> tuple[str, ...]:
    return tuple(_file_name(row, index, path) for index, row in enumerate(rows))


def _file_name(row: dict[str, Any], index: int, path: Path) -> str:
    name = _text(row, "images", index, "file_name", path)
    relative = PurePosixPath(name)
    if not relative.parts or relative.is_absolute() or ".." in relative.parts or "\\" in name:
        raise DatasetError(
            f"{path}: images[{index}].file_name {shown(name)} leaves its split's folder",
            hint="use names relative to the annotation file, with /",
        )
    return str(relative)  # "./a.jpg" is the same file as "a.jpg"


def _bboxes(rows: list[dict[str, Any]], path: Path) -> NDArray[np.float64]:
    plain = [row.get("bbox") for row in rows]
    if set(map(type, plain)) == {list} and set(map(len, plain)) == {4}:  # type: ignore[arg-type]
        flat = list(chain.from_iterable(plain))  # type: ignore[arg-type]
        if set(map(type, flat)) <= {int, float}:
            try:
                return np.array(flat, dtype=np.float64).reshape(-1, 4)
            except OverflowError:  # said below, with the row
                pass
    boxes = np.empty((len(rows), 4), dtype=np.float64)
    for index, row in enumerate(rows):
        bbox = row.get("bbox")
        if not (isinstance(bbox, list) and len(bbox) == 4 and all(_is_number(v) for v in bbox)):
            raise DatasetError(
                f"{path}: annotations[{index}].bbox must be four numbers x, y, w, h, found {shown(bbox)}"
            )
        boxes[index] = bbox
    return boxes


def _areas(rows: list[dict[str, Any]], path: Path) -> NDArray[np.float64]:
    plain = [row.get("area") for row in rows]
    if set(map(type, plain)) <= {int, float, type(None)}:
        try:
            return np.array(plain, dtype=np.float64)  # None becomes NaN
        except OverflowError:
            pass
    areas = np.full(len(rows), np.nan)
    for index, row in enumerate(rows):
        area = row.get("area")
        if area is None:
            continue
        if not _is_number(area):
            raise DatasetError(f"{path}: annotations[{index}].area must be a number, found {shown(area)}")
        areas[index] = area
    return areas


def _categories(rows: list[dict[str, Any]], path: Path) -> tuple[SourceCategory, ...]:
    ids = _integers(rows, "categories", "id", path)
    categories = []
    for index, row in enumerate(rows):
        name = _text(row, "categories", index, "name", path)
        categories.append(SourceCategory(int(ids[index]), name, str(row.get("supercategory") or "")))
    return tuple(categories)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, int):
        return abs(value) < 10**300  # beyond that the conversion to float64 overflows
    return isinstance(value, float)  # NaN and infinity are numbers here; validation refuses them


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
