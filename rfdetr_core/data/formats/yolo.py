"""Reads YOLO folders: data.yaml, folders of images, and a label file of the same name for each image.

    data.yaml            names; train, val, test (folders); optional path, nc (training spec 2.4)
    train/images/a.jpg
    train/labels/a.txt   a line per object, in shares of the image: `class cx cy w h`, or a polygon `class x y x y ...`

A data file that cannot be understood is an error at once; a label line that cannot is a remark with file and line,
so that all of them are seen in one report. An image without a label file has no objects.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from rfdetr_core.data.formats.source import (
    IMAGE_SUFFIXES,
    UNPRINTABLE,
    Remark,
    SourceCategory,
    SourceSplit,
    leads_into,
    read_annotation_file,
    shown,
)
from rfdetr_core.data.formats.yolo_data_file import DataFile, Declared, find_data_file, is_folder, read_data_file
from rfdetr_core.errors import DatasetError

MAX_LABEL_MB = 64  # of a label file, or of a list of images
SHARE_TOLERANCE = 1e-3  # by which a share may leave 0 to 1: rounding of the exporter (training spec 2.5)
LAYOUT = "data.yaml with names, train and val; images in train/images/, labels in train/labels/"


class LabelBox(NamedTuple):
    """An object: class index, and its box's left, top, width and height in shares of the image."""

    label: int
    x: float
    y: float
    w: float
    h: float


class LineProblem(NamedTuple):
    """Why a label line is no object: a code of the report, and words."""

    code: str
    why: str


def read_label_line(line: str, classes: int) -> LabelBox | LineProblem:
    """One line of a label file: 5 fields are a box, more are a polygon, of which the extent is taken.

    A width or height of zero or less is left to validation, which drops the box and says so.
    """
    name, *fields = line.split() or [""]
    if re.fullmatch(r"[-+]?\d{1,18}", name, re.ASCII) is None:
        return LineProblem("bad-label-line", f"the class {shown(name)} is not a whole number")
    if len(fields) < 4:
        return LineProblem("bad-label-line", f"{len(fields) + 1} fields where at least 5 belong: class cx cy w h")
    if len(fields) % 2:
        return LineProblem("bad-label-line", f"{len(fields)} coordinates: neither a box (4) nor pairs of a polygon")
    values = []
    for text in fields:
        value = _number(text)
        if value is None:
            return LineProblem("bad-label-line", f"{shown(text)} is not a number")
        values.append(value)
    if not 0 <= int(name) < classes:
        return LineProblem("class-out-of-range", f"class {int(name)}, the data file has 0 to {classes - 1}")
    box = len(values) == 4
    # Negative sizes are empty boxes, not misplaced ones.
    outside = next((v for v in values if v > 1 + SHARE_TOLERANCE), None)
    if outside is None:
        outside = next((v for v in (values[:2] if box else values) if v < -SHARE_TOLERANCE), None)
    if outside is not None:
        return LineProblem("coordinate-out-of-range", f"{outside:g}")
    if box:
        cx, cy, w, h = values
        return LabelBox(int(name), cx - w / 2, cy - h / 2, w, h)
    xs, ys = values[::2], values[1::2]
    return LabelBox(int(name), min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys))


def _number(text: str) -> float | None:
    """A finite number, or None; Python's own float() also takes 1_000."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and "_" not in text else None


@dataclass(frozen=True)
class _Folders:
    """Where images of a split lie, links resolved; `labels` is None where there are none."""

    images: Path
    labels: Path | None
    only: tuple[str, ...] | None = None  # the images that a list names; None: all of them

    def names(self) -> list[str]:
        """The images of the split in this folder."""
        return _image_names(self.images) if self.only is None else sorted(self.only)


@dataclass
class _Remarks:
    """Rows by code, in the order in which they are come across."""

    rows: dict[str, list[str]] = field(default_factory=dict)

    def add(self, code: str, row: str) -> None:
        self.rows.setdefault(code, []).append(row)

    def all(self) -> tuple[Remark, ...]:
        return tuple(Remark(code, tuple(rows)) for code, rows in self.rows.items())


def read_yolo_folder(folder: Path) -> dict[str, SourceSplit]:
    """All splits found in `folder`, keyed by train, valid, test; one that the data file does not name may be absent.

    Raises:
        DatasetError: no folder, no data file or one that cannot be understood, no folder of training images, or a
            split that the data file names and that is not there.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder", hint="give the folder that holds data.yaml")
    path = find_data_file(folder)
    if path is None:
        raise DatasetError(f"{folder}: no data.yaml or data.yml", hint=f"a YOLO dataset has {LAYOUT}")
    data_file = read_data_file(path)
    splits: dict[str, SourceSplit] = {}
    for split in ("train", "valid", "test"):
        remarks = _Remarks()
        found = _find_split(folder.resolve(), data_file, split, remarks)
        if found:
            splits[split] = _read_split(split, folder, data_file, found, remarks)
    return splits


def _find_split(root: Path, data_file: DataFile, split: str, remarks: _Remarks) -> list[_Folders]:
    """What is declared if it lies in the dataset, else the usual folder; empty: the dataset has no such split."""
    declared = data_file.folders.get(split)
    found = None if declared is None else _declared(root, data_file, declared, split, remarks)
    if found is None:
        usual = next((n for n in _usual(split) if is_folder(root / n / "images")), None)
        folders = None if usual is None else _folders(root, root / usual)
        if folders is not None:
            found = [folders]
            if declared is not None:
                remarks.add("declared-folder-ignored", f"{split}: {_shown(declared)}, used {usual}/images")
    if found is not None:
        return found
    looked = " and ".join(f"{name}/images" for name in _usual(split))
    if split == "train":
        named = f"its train: {_shown(declared)} and " if declared else ""
        raise DatasetError(
            f"{data_file.path}: no training images: {named}{looked} is no folder in the dataset",
            hint=f"a YOLO dataset has {LAYOUT}",
        )
    if declared is not None:
        raise DatasetError(
            f"{data_file.path}: {declared.key}: {_shown(declared)} is no folder in the dataset, nor is {looked}",
            hint="mend or remove the entry; a split that is not named is taken from train",
        )
    return []


def _shown(declared: Declared) -> str:
    return ", ".join(shown(value) for value in declared.values[:3])


def _declared(
    root: Path, data_file: DataFile, declared: Declared, split: str, remarks: _Remarks
) -> list[_Folders] | None:
    """Each of the declared places; None if a single one is not in the dataset, which of several is an error."""
    base, found = data_file.base(root), []
    for value in declared.values:
        # Exporters write ../train/images and mean train/images: the file once lay one folder deeper.
        places = [base / value, root / re.sub(r"^(\.\./)+", "", value)]
        if value.lower().endswith(".txt"):
            place = next((p for p in places if _is_file_within(p, root)), None)
            folders = None if place is None else _listed(root, base, place, split, remarks)
        else:
            each = (_folders(root, p) for p in places)
            folders = next(([f] for f in each if f is not None), None)
        if folders is None and len(declared.values) == 1:
            return None
        if folders is None:
            raise DatasetError(
                f"{data_file.path}: {declared.key}: {shown(value)} is nothing in the dataset",
                hint="mend or remove the entry",
            )
        found += folders
    return found


def _is_file_within(path: Path, root: Path) -> bool:
    try:
        return path.is_file() and leads_into(path, root)
    except OSError:
        return False


def _listed(root: Path, base: Path, path: Path, split: str, remarks: _Remarks) -> list[_Folders]:
    """The images that a text file lists, a path per line: relative to it, to `path:` or to the dataset."""
    try:
        text = read_annotation_file(path, root, MAX_LABEL_MB).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not UTF-8 at byte {error.start}", hint="save it as UTF-8") from error
    by_folder: dict[str, dict[str, None]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        name = line.strip()
        if not name:
            continue
        candidates = [os.path.normpath(f"{parent}/{name}") for parent in (path.parent, base, root)]
        candidates = [os.path.normpath(name)] if name.startswith("/") else candidates
        within = [place for place in candidates if f"{place}/".startswith(f"{root}/") and place != str(root)]
        if not within or UNPRINTABLE.search(name):
            remarks.add("outside-dataset", f"{split}: {path.name} line {number}: {shown(name)}")
            continue
        place = next((place for place in within if _exists(place)), within[0])
        folder, _, file_name = place.rpartition("/")
        by_folder.setdefault(folder, {})[file_name] = None
    found = []
    for folder, names in sorted(by_folder.items()):
        beside = _folders(root, Path(folder))
        labels = beside.labels if beside is not None and str(beside.images) == folder else None
        found.append(_Folders(Path(folder), labels, tuple(names)))
    return found


def _exists(path: str) -> bool:
    try:
        return os.path.exists(path)  # noqa: PTH110
    except ValueError:
        return False


def _usual(split: str) -> tuple[str, ...]:
    return ("valid", "val") if split == "valid" else (split,)


def _folders(root: Path, declared: Path) -> _Folders | None:
    """Images and labels of a declared folder: labels/ for images/ in its path, or both below it, or together in it."""
    if not is_folder(declared):
        return None
    images = declared.resolve()
    if not images.is_relative_to(root):
        return None
    parts = images.relative_to(root).parts
    for i in reversed([i for i, part in enumerate(parts) if part == "images"]):
        labels = root.joinpath(*parts[:i], "labels", *parts[i + 1 :])
        if _is_within(labels, root):
            return _Folders(images, labels)
    if _is_within(images / "images", root):
        labels = images / "labels"
        return _Folders(images / "images", labels if _is_within(labels, root) else None)
    together = {PurePosixPath(name).stem for name in _image_names(images)} & _label_stems(images)
    return _Folders(images, images if together else None)


def _is_within(folder: Path, root: Path) -> bool:
    return is_folder(folder) and leads_into(folder, root)


def _image_names(folder: Path) -> list[str]:
    names = (entry.name for entry in _entries(folder) if _is_file(entry))
    return sorted(name for name in names if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES)


def _is_file(entry: os.DirEntry[str]) -> bool:
    """A link that leads nowhere, or round in circles, is none: validation lists it among what is not used."""
    try:
        return entry.is_file()
    except OSError:
        return False


def _label_stems(folder: Path) -> set[str]:
    names = (entry.name for entry in _entries(folder) if entry.name.endswith(".txt"))
    return {name.removesuffix(".txt") for name in names} - {"classes"}  # labelImg's list of names


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(folder))
    except OSError as error:
        raise DatasetError(f"{folder}: cannot be read: {error.strerror}") from error


def _read_split(split: str, root: Path, data_file: DataFile, folders: list[_Folders], remarks: _Remarks) -> SourceSplit:
    real = root.resolve()
    alone = folders[0].images if len(folders) == 1 and folders[0].only is None else None
    names: list[str] = []
    labels = _Labels()
    for place in folders:
        prefix = "" if alone else f"{place.images.relative_to(real).as_posix()}/"
        own = place.names()
        for name in own:
            if UNPRINTABLE.search(name):
                remarks.add("bad-file-name", f"{split}/{name}")
        if place.labels is not None:
            _read_labels(split, real, place, own, len(names), data_file, labels, remarks)
        elif own:
            remarks.add("labels-missing", f"{split}: none beside {place.images.relative_to(real)}")
        names += [prefix + name for name in own]
    _tell_outside(labels, remarks)
    unknown = np.full(len(names), -1, dtype=np.int64)
    return SourceSplit(
        name=split,
        root=root,
        path=data_file.path,
        image_folder=alone or real,
        image_ids=np.arange(len(names), dtype=np.int64),
        file_names=tuple(names),
        widths=unknown,
        heights=unknown,
        annotation_ids=np.arange(1, len(labels.boxes) + 1, dtype=np.int64),
        annotation_images=np.array(labels.images, dtype=np.int64),
        annotation_categories=np.array([box.label for box in labels.boxes], dtype=np.int64),
        bboxes=np.array([box[1:] for box in labels.boxes], dtype=np.float64).reshape(-1, 4),
        areas=np.full(len(labels.boxes), np.nan),
        crowd=np.zeros(len(labels.boxes), dtype=np.bool_),
        categories=tuple(SourceCategory(i, name, "") for i, name in enumerate(data_file.names)),
        relative=True,
        lines=np.array(labels.lines, dtype=np.int64),
        remarks=remarks.all(),
    )


@dataclass
class _Labels:
    """Of each object the position of its image, its line and its box; and what is no object."""

    images: list[int] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    boxes: list[LabelBox] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    read: int = 0  # lines, of whatever kind


def _read_labels(
    split: str,
    root: Path,
    place: _Folders,
    names: list[str],
    first: int,
    data_file: DataFile,
    labels: _Labels,
    remarks: _Remarks,
) -> None:
    """The label files of one folder; `first` is the position of its first image in the split."""
    folder = place.labels
    assert folder is not None
    stems, owner = _label_stems(folder), dict[str, str]()
    for i, name in enumerate(names, start=first):
        stem = PurePosixPath(name).stem
        if stem not in stems:
            remarks.add("label-file-absent", f"{split}/{name}")
            continue
        if (other := owner.setdefault(stem, name)) != name:
            remarks.add("label-file-shared", f"{split}: {other} and {name}")
        path = folder / f"{stem}.txt"
        for number, line in enumerate(re.split(r"\r\n|\r|\n", _label_text(path, root, split, remarks)), start=1):
            if line.strip():
                _read_line(line, f"{path.relative_to(root)} line {number}", (i, number), data_file, labels, remarks)
    every = names if place.only is None else _image_names(place.images)
    for stem in sorted(stems - {PurePosixPath(name).stem for name in every}):
        remarks.add("label-without-image", f"{split}/{stem}.txt")


def _read_line(
    line: str, where: str, place: tuple[int, int], data_file: DataFile, labels: _Labels, remarks: _Remarks
) -> None:
    labels.read += 1
    found = read_label_line(line, len(data_file.names))
    if isinstance(found, LabelBox):
        labels.images.append(place[0])
        labels.lines.append(place[1])
        labels.boxes.append(found)
    elif found.code == "coordinate-out-of-range":
        labels.outside.append(f"{where}: {found.why}")
    else:
        remarks.add(found.code, f"{where}: {found.why}")


def _tell_outside(labels: _Labels, remarks: _Remarks) -> None:
    """Many of them are one mistake: pixels."""
    code = "pixel-coordinates" if 2 * len(labels.outside) > labels.read else "coordinate-out-of-range"
    for row in labels.outside:
        remarks.add(code, row)


def _label_text(path: Path, root: Path, split: str, remarks: _Remarks) -> str:
    try:
        if path.is_symlink() and not leads_into(path, root):
            remarks.add("outside-dataset", f"{split}/{path.name}")
            return ""
        with path.open("rb") as file:
            data = file.read(int(MAX_LABEL_MB * 1e6) + 1)
        if len(data) > MAX_LABEL_MB * 1e6:
            remarks.add("unreadable-labels", f"{split}/{path.name}: over {MAX_LABEL_MB} MB")
            return ""
        return data.decode("utf-8-sig")
    except OSError as error:
        remarks.add("unreadable-labels", f"{split}/{path.name}: {error.strerror}")
    except UnicodeDecodeError as error:
        remarks.add("unreadable-labels", f"{split}/{path.name}: not UTF-8 at byte {error.start}")
    return ""
