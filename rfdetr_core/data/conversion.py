"""Writes datasets for other tools: COCO as Roboflow lays it out, and YOLO.

Images are copied as they are, never decoded and encoded again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from rfdetr_core.data.annotations import AnnotationTable, ClassMap
from rfdetr_core.data.boxes import ValidSplit
from rfdetr_core.data.formats.coco import ANNOTATION_FILE
from rfdetr_core.data.images import REVERSES_X, REVERSES_Y, SWAPS_AXES
from rfdetr_core.data.pixels import read_unchanged
from rfdetr_core.data.survey import ImageFile
from rfdetr_core.storage.local import local_errors


def write_coco(folder: Path, class_map: ClassMap, splits: dict[str, ValidSplit]) -> None:
    """{train,valid,test}/_annotations.coco.json and the images beside it; category ids count from 1.

    Raises:
        DatasetError: an image is no longer the one that was validated.
        StorageAccessError: the folder cannot be written.
    """
    for name, split in splits.items():
        _copy_images(folder / name, split.table.file_names.tolist(), split.files)
        with local_errors("write", folder):
            (folder / name / ANNOTATION_FILE).write_bytes(split.table.coco_bytes(class_map))


def write_yolo(folder: Path, class_map: ClassMap, splits: dict[str, ValidSplit]) -> list[str]:
    """data.yaml, {train,valid,test}/images/ and labels/; returns what YOLO cannot say, a line each.

    Crowd regions have no place in YOLO and are left out. Images lie flat there and share a label file with any other
    of their stem, so names are made unique where they would not be.

    Raises:
        DatasetError, StorageAccessError: as `write_coco`.
    """
    lost = []
    for name, split in splits.items():
        names = _flat_names(split.table.file_names.tolist())
        renamed = sum(new != old for new, old in zip(names, split.table.file_names.tolist(), strict=True))
        if renamed:
            lost.append(f"{name}: {renamed} images renamed, since YOLO has no folders and one label file per stem")
        if split.table.crowd.any():
            lost.append(f"{name}: {int(split.table.crowd.sum())} crowd regions left out")
        _copy_images(folder / name / "images", names, split.files)
        with local_errors("write", folder):
            (folder / name / "labels").mkdir()
            for i, image in enumerate(names):
                text = _label_lines(split.table, i, split.files[i])
                (folder / name / "labels" / f"{PurePosixPath(image).stem}.txt").write_text(text)
    keys = {"train": "train", "valid": "val", "test": "test"}
    lines = [f"{keys[name]}: {name}/images" for name in splits]
    lines += [f"nc: {len(class_map)}", f"names: {json.dumps(list(class_map.names), ensure_ascii=False)}", ""]
    with local_errors("write", folder):
        (folder / "data.yaml").write_text("\n".join(lines), encoding="utf-8")
    return lost


def _copy_images(folder: Path, names: Sequence[str], files: Sequence[ImageFile]) -> None:
    with local_errors("write", folder):
        folder.mkdir(parents=True)
    for name, file in zip(names, files, strict=True):
        data = read_unchanged(file)
        with local_errors("write", folder / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)


def _flat_names(names: Sequence[str]) -> list[str]:
    """Each name once, without folders, and each stem once."""
    taken: set[str] = set()
    flat = []
    for name in names:
        plain = PurePosixPath(name.replace("/", "__"))
        stem, number = plain.stem, 1
        while stem.casefold() in taken:
            number += 1
            stem = f"{plain.stem}_{number}"
        taken.add(stem.casefold())
        flat.append(f"{stem}{plain.suffix}")
    return flat


def _label_lines(table: AnnotationTable, image: int, file: ImageFile) -> str:
    """A line per box: label, centre and size in shares of the image as it is displayed, with every digit."""
    rows = np.arange(table.offsets[image], table.offsets[image + 1])
    rows = rows[~table.crowd[rows]]
    size = np.array([table.widths[image], table.heights[image]], dtype=np.float64)
    corners = (table.boxes[rows].reshape(-1, 2, 2) / size).reshape(-1, 4)
    if file.exif_orientation != file.orientation:
        corners = _displayed(corners, file.exif_orientation)
    low, high = corners[:, :2], corners[:, 2:]
    shares = np.concatenate([(low + high) / 2, high - low], axis=1)
    lines = zip(table.labels[rows].tolist(), shares.tolist(), strict=True)
    return "".join(f"{label} {' '.join(map(repr, values))}\n" for label, values in lines)


def _displayed(corners: NDArray[np.float64], orientation: int) -> NDArray[np.float64]:
    """Boxes meant for the stored frame, as whoever applies the EXIF orientation sees them; shares, (N, 4)."""
    x1, y1, x2, y2 = corners.T
    if orientation in SWAPS_AXES:
        x1, y1, x2, y2 = y1, x1, y2, x2
    if orientation in REVERSES_X:
        x1, x2 = 1 - x2, 1 - x1
    if orientation in REVERSES_Y:
        y1, y2 = 1 - y2, 1 - y1
    return np.stack([x1, y1, x2, y2], axis=1)
