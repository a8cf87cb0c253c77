"""Reads COCO folders in the layout of Roboflow exports: {train,valid,test}/_annotations.coco.json and images.

This module reads and judges the form only (is it JSON, are the keys there, are ids whole numbers); whether
the content can be trained on is `validation.py`'s question.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rfdetr_core.data.annotations import SPLITS
from rfdetr_core.errors import DatasetError

ANNOTATION_FILE = "_annotations.coco.json"
IMAGE_SUFFIXES = frozenset({".bmp", ".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp"})
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # cannot stand in a line of UTF-8


@dataclass(frozen=True)
class SourceCategory:
    """A row of `categories`."""

    id: int
    name: str
    supercategory: str


@dataclass(frozen=True)
class SourceSplit:
    """One split as its author wrote it: I images, A annotations, nothing dropped and nothing judged."""

    name: str
    path: Path  # the annotation file, for messages
    image_folder: Path
    image_ids: NDArray[np.int64]  # (I,)
    file_names: tuple[str, ...]  # (I,) relative to image_folder
    widths: NDArray[np.int64]  # (I,) as declared; -1 where absent
    heights: NDArray[np.int64]  # (I,)
    annotation_ids: NDArray[np.int64]  # (A,)
    annotation_images: NDArray[np.int64]  # (A,) image ids
    annotation_categories: NDArray[np.int64]  # (A,) category ids
    bboxes: NDArray[np.float64]  # (A, 4) x, y, w, h in pixels
    areas: NDArray[np.float64]  # (A,) NaN where absent
    crowd: NDArray[np.bool_]  # (A,)
    categories: tuple[SourceCategory, ...]


def read_coco_folder(folder: Path) -> dict[str, SourceSplit]:
    """All splits found in `folder`, keyed by train, valid, test.

    Raises:
        DatasetError: no folder, no train split, or a file that is not a COCO document.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder", hint="give the folder that holds train/ and valid/")
    found = {split: folder / split / ANNOTATION_FILE for split in SPLITS}
    splits = {split: read_coco_split(split, path) for split, path in found.items() if path.is_file()}
    if "train" not in splits:
        raise DatasetError(
            f"{folder}: no annotations found (looked for train/{ANNOTATION_FILE})",
            hint="a COCO dataset has train/, valid/ and test/, each with images and that file",
        )
    return splits


def read_coco_split(split: str, path: Path) -> SourceSplit:
    """Read one annotation file; images lie beside it.

    Raises:
        DatasetError: unreadable, not JSON, a required key absent or of the wrong type.
    """
    document = _load(path)
    images = _rows(document, "images", path)
    annotations = _rows(document, "annotations", path)
    categories = _rows(document, "categories", path)
    file_names = tuple(_file_name(row, index, path) for index, row in enumerate(images))
    return SourceSplit(
        name=split,
        path=path,
        image_folder=path.parent,
        image_ids=_integers(images, "images", "id", path),
        file_names=file_names,
        widths=_integers(images, "images", "width", path, absent=-1),
        heights=_integers(images, "images", "height", path, absent=-1),
        annotation_ids=_integers(annotations, "annotations", "id", path),
        annotation_images=_integers(annotations, "annotations", "image_id", path),
        annotation_categories=_integers(annotations, "annotations", "category_id", path),
        bboxes=_bboxes(annotations, path),
        areas=_areas(annotations, path),
        crowd=_crowd(annotations, path),
        categories=_categories(categories, path),
    )


def _load(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror}") from error
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
    values = np.empty(len(rows), dtype=np.int64)
    for index, row in enumerate(rows):
        value = row.get(key, absent)
        if value is None and absent is not None:
            value = absent
        number = _whole_number(value)
        if number is None:
            found = "absent" if key not in row else _shown(value)
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
        raise DatasetError(f"{path}: {table}[{index}].{key} must be a text, found {_shown(text)}")
    if UNPRINTABLE.search(text):
        raise DatasetError(f"{path}: {table}[{index}].{key} {_shown(text)} holds an unprintable character")
    return text


def _file_name(row: dict[str, Any], index: int, path: Path) -> str:
    name = _text(row, "images", index, "file_name", path)
    relative = PurePosixPath(name)
    if not relative.parts or relative.is_absolute() or ".." in relative.parts or "\\" in name:
        raise DatasetError(
            f"{path}: images[{index}].file_name {_shown(name)} leaves its split's folder",
            hint="use names relative to the annotation file, with /",
        )
    return str(relative)  # "./a.jpg" is the same file as "a.jpg"


def _bboxes(rows: list[dict[str, Any]], path: Path) -> NDArray[np.float64]:
    boxes = np.empty((len(rows), 4), dtype=np.float64)
    for index, row in enumerate(rows):
        bbox = row.get("bbox")
        if not (isinstance(bbox, list) and len(bbox) == 4 and all(_is_number(v) for v in bbox)):
            raise DatasetError(
                f"{path}: annotations[{index}].bbox must be four numbers x, y, w, h, found {_shown(bbox)}"
            )
        boxes[index] = bbox
    return boxes


def _areas(rows: list[dict[str, Any]], path: Path) -> NDArray[np.float64]:
    areas = np.full(len(rows), np.nan)
    for index, row in enumerate(rows):
        area = row.get("area")
        if area is None:
            continue
        if not _is_number(area):
            raise DatasetError(f"{path}: annotations[{index}].area must be a number, found {_shown(area)}")
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


def _shown(value: Any) -> str:
    """A value as JSON has it, short and on one line."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]} ..."


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
