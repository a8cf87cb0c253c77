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
    Severity,
    SourceCategory,
    SourceSplit,
    shown,
)
from rfdetr_core.data.formats.yolo_data_file import DataFile, find_data_file, is_folder, read_data_file
from rfdetr_core.errors import DatasetError

SHARE_TOLERANCE = 1e-3  # by which a share may leave 0 to 1: rounding of the exporter (training spec 2.5)
LAYOUT = "data.yaml with names, train and val; images in train/images/, labels in train/labels/"

_MESSAGES: dict[str, tuple[Severity, str]] = {
    "declared-folder-ignored": ("note", "folder that the data file names is not in the dataset: the usual one is used"),
    "labels-missing": ("error", "split has images and no folder of labels"),
    "bad-file-name": ("error", "file name holds an unprintable character"),
    "label-file-absent": ("note", "image without a label file: a negative"),
    "label-file-shared": ("warning", "images of one name share a label file: each has its boxes"),
    "label-without-image": ("warning", "label file without an image: not used"),
    "unreadable-labels": ("error", "label file cannot be read"),
    "bad-label-line": ("error", "label line cannot be understood"),
    "class-out-of-range": ("error", "label line names a class that the data file does not have"),
    "coordinate-out-of-range": ("error", "coordinate is not a share of the image from 0 to 1"),
    "pixel-coordinates": ("error", "coordinates are above 1 in most label lines: pixels instead of shares?"),
}
"""Code → severity and message of every remark."""


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
    """Where a split lies, links resolved; `labels` is None where there are none."""

    images: Path
    labels: Path | None


@dataclass
class _Remarks:
    """Rows by code, in the order in which they are come across."""

    rows: dict[str, list[str]] = field(default_factory=dict)

    def add(self, code: str, row: str) -> None:
        self.rows.setdefault(code, []).append(row)

    def all(self) -> tuple[Remark, ...]:
        return tuple(Remark(code, *_MESSAGES[code], tuple(rows)) for code, rows in self.rows.items())


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
        if found is not None:
            splits[split] = _read_split(split, folder, data_file, found, remarks)
    return splits


def _find_split(root: Path, data_file: DataFile, split: str, remarks: _Remarks) -> _Folders | None:
    """The declared folder if it lies in the dataset, else the usual one; None: the dataset has no such split."""
    declared = data_file.folders.get(split)
    found = None if declared is None else _folders(root, data_file.base(root) / declared.value)
    if declared is None or found is None:
        usual = next((n for n in _usual(split) if is_folder(root / n / "images")), None)
        found = None if usual is None else _folders(root, root / usual)
        if declared is not None and found is not None:
            remarks.add("declared-folder-ignored", f"{split}: {shown(declared.value)}, used {usual}/images")
    if found is not None:
        return found
    looked = " and ".join(f"{name}/images" for name in _usual(split))
    if split == "train":
        named = f"its train: {shown(declared.value)} and " if declared else ""
        raise DatasetError(
            f"{data_file.path}: no training images: {named}{looked} is no folder in the dataset",
            hint=f"a YOLO dataset has {LAYOUT}",
        )
    if declared is not None:
        raise DatasetError(
            f"{data_file.path}: {declared.key}: {shown(declared.value)} is no folder in the dataset, nor is {looked}",
            hint="mend or remove the entry; a split that is not named is taken from train",
        )
    return None


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
    return is_folder(folder) and folder.resolve().is_relative_to(root)


def _image_names(folder: Path) -> list[str]:
    names = (entry.name for entry in _entries(folder) if entry.is_file())
    return sorted(name for name in names if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES)


def _label_stems(folder: Path) -> set[str]:
    names = (entry.name for entry in _entries(folder) if entry.name.endswith(".txt"))
    return {name.removesuffix(".txt") for name in names} - {"classes"}  # labelImg's list of names


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(folder))
    except OSError as error:
        raise DatasetError(f"{folder}: cannot be read: {error.strerror}") from error


def _read_split(split: str, root: Path, data_file: DataFile, folders: _Folders, remarks: _Remarks) -> SourceSplit:
    names = _image_names(folders.images)
    for name in names:
        if UNPRINTABLE.search(name):
            remarks.add("bad-file-name", f"{split}/{name}")
    images: list[int] = []
    lines: list[int] = []
    boxes: list[LabelBox] = []
    if folders.labels is not None:
        images, lines, boxes = _read_labels(split, root.resolve(), folders.labels, names, data_file, remarks)
    elif names:
        remarks.add("labels-missing", f"{split}: none beside {folders.images.relative_to(root.resolve())}")
    unknown = np.full(len(names), -1, dtype=np.int64)
    return SourceSplit(
        name=split,
        root=root,
        path=data_file.path,
        image_folder=folders.images,
        image_ids=np.arange(len(names), dtype=np.int64),
        file_names=tuple(names),
        widths=unknown,
        heights=unknown,
        annotation_ids=np.arange(1, len(boxes) + 1, dtype=np.int64),
        annotation_images=np.array(images, dtype=np.int64),
        annotation_categories=np.array([box.label for box in boxes], dtype=np.int64),
        bboxes=np.array([box[1:] for box in boxes], dtype=np.float64).reshape(-1, 4),
        areas=np.full(len(boxes), np.nan),
        crowd=np.zeros(len(boxes), dtype=np.bool_),
        categories=tuple(SourceCategory(i, name, "") for i, name in enumerate(data_file.names)),
        relative=True,
        lines=np.array(lines, dtype=np.int64),
        remarks=remarks.all(),
    )


def _read_labels(
    split: str, root: Path, folder: Path, names: list[str], data_file: DataFile, remarks: _Remarks
) -> tuple[list[int], list[int], list[LabelBox]]:
    """Of each object: the position of its image, its line and its box."""
    images: list[int] = []
    lines: list[int] = []
    boxes: list[LabelBox] = []
    outside: list[str] = []
    stems, owner, read = _label_stems(folder), dict[str, str](), 0
    for i, name in enumerate(names):
        stem = PurePosixPath(name).stem
        if stem not in stems:
            remarks.add("label-file-absent", f"{split}/{name}")
            continue
        if (first := owner.setdefault(stem, name)) != name:
            remarks.add("label-file-shared", f"{split}: {first} and {name}")
        path = folder / f"{stem}.txt"
        text = _label_text(path, split, remarks)
        for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1):
            if not line.strip():
                continue
            read += 1
            found = read_label_line(line, len(data_file.names))
            if isinstance(found, LabelBox):
                images.append(i)
                lines.append(number)
                boxes.append(found)
                continue
            row = f"{path.relative_to(root)} line {number}: {found.why}"
            if found.code == "coordinate-out-of-range":
                outside.append(row)
            else:
                remarks.add(found.code, row)
    for row in outside:
        remarks.add("pixel-coordinates" if 2 * len(outside) > read else "coordinate-out-of-range", row)
    for stem in sorted(stems - {PurePosixPath(name).stem for name in names}):
        remarks.add("label-without-image", f"{split}/{stem}.txt")
    return images, lines, boxes


def _label_text(path: Path, split: str, remarks: _Remarks) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        remarks.add("unreadable-labels", f"{split}/{path.name}: {error.strerror}")
    except UnicodeDecodeError as error:
        remarks.add("unreadable-labels", f"{split}/{path.name}: not UTF-8 at byte {error.start}")
    return ""
