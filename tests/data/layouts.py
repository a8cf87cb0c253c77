"""One dataset written in other layouts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rfdetr_core.data.annotations import AnnotationTable
from rfdetr_core.data.formats.coco import ANNOTATION_FILE
from tests.data.helpers import picture

YOLO_NAMES = {"train": "train", "valid": "val", "test": "test"}  # keys of data.yaml


def write_labels(folder: Path, table: AnnotationTable) -> None:
    """A label file for each image of a table, with every digit that a float has."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(table.file_names):
        size = np.array([table.widths[i], table.heights[i]])
        lines = []
        for row in range(table.offsets[i], table.offsets[i + 1]):
            low, high = table.boxes[row, :2] / size, table.boxes[row, 2:] / size
            shares = [*((low + high) / 2), *(high - low)]
            lines.append(" ".join([str(table.labels[row]), *(repr(float(share)) for share in shares)]))
        (folder / f"{Path(name).stem}.txt").write_text("".join(f"{line}\n" for line in lines))


def write_yolo(folder: Path, source: Path, tables: dict[str, AnnotationTable], names: Sequence[str]) -> Path:
    """The splits of a Roboflow COCO folder, validated as `tables`, as YOLO."""
    text = [f"{YOLO_NAMES[split]}: {split}/images" for split in tables]
    for split, table in tables.items():
        (folder / split / "images").mkdir(parents=True)
        for name in table.file_names:
            shutil.copyfile(source / split / name, folder / split / "images" / name)
        write_labels(folder / split / "labels", table)
    (folder / "data.yaml").write_text("\n".join([*text, f"nc: {len(names)}", f"names: {json.dumps(list(names))}", ""]))
    return folder


def write_standard_coco(folder: Path, source: Path, year: str = "2017") -> Path:
    """The splits of a Roboflow COCO folder, in the layout of COCO itself."""
    (folder / "annotations").mkdir(parents=True)
    for path in sorted(source.glob(f"*/{ANNOTATION_FILE}")):
        split = {"valid": "val"}.get(path.parent.name, path.parent.name)
        shutil.copytree(path.parent, folder / f"{split}{year}", ignore=shutil.ignore_patterns(ANNOTATION_FILE))
        shutil.copyfile(path, folder / "annotations" / f"instances_{split}{year}.json")
    return folder


def small_yolo(folder: Path, *, names: Sequence[str] = ("cat", "dog")) -> Path:
    """Train and valid with an image `a.png` of 64 x 48 and a box of each class: nothing to find."""
    for seed, split in enumerate(("train", "valid")):
        (folder / split / "images").mkdir(parents=True)
        (folder / split / "labels").mkdir()
        picture(seed=seed).save(folder / split / "images" / "a.png")
        (folder / split / "labels" / "a.txt").write_text("0 0.5 0.5 0.25 0.5\n1 0.25 0.25 0.5 0.5\n")
    (folder / "data.yaml").write_text(f"train: train/images\nval: valid/images\nnames: {json.dumps(list(names))}\n")
    return folder


def voc_xml(filename: str, *objects: str, more: str = "") -> str:
    """An annotation file of an image of 64 x 48."""
    inner = "".join(f"<object>{each}</object>" for each in objects)
    size = "<size><width>64</width><height>48</height><depth>3</depth></size>"
    return f"<annotation><filename>{filename}</filename>{size}{inner}{more}</annotation>"


def small_voc(folder: Path) -> Path:
    """Train with a.png and b.png, valid with v.png, each with a cat and a dog: nothing to find."""
    (folder / "Annotations").mkdir(parents=True)
    (folder / "JPEGImages").mkdir()
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    for seed, stem in enumerate("abv"):
        picture(seed=seed).save(folder / "JPEGImages" / f"{stem}.png")
        boxes = [
            f"<name>{name}</name><bndbox><xmin>{4 + i}</xmin><ymin>4</ymin><xmax>24.5</xmax><ymax>14</ymax></bndbox>"
            for i, name in enumerate(("cat", "dog"))
        ]
        (folder / "Annotations" / f"{stem}.xml").write_text(voc_xml(f"{stem}.png", *boxes))
    (folder / "ImageSets" / "Main" / "train.txt").write_text("a\nb\n")
    (folder / "ImageSets" / "Main" / "val.txt").write_text("v\n")
    return folder
