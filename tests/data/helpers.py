"""Small COCO datasets on disk, and prepared datasets made of them."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rfdetr_core.data.annotations import ClassMap
from rfdetr_core.data.boxes import ValidSplit
from rfdetr_core.data.findings import Report
from rfdetr_core.data.formats.coco import ANNOTATION_FILE, read_coco_folder
from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.data.preparing import PrepareOptions, write_prepared
from rfdetr_core.data.validation import validate

Box = tuple[float, float, float, float]
CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
STORED_BY = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}
"""Turning an upright image by the second orientation gives what a file with the first one holds."""


def picture(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    """Noise that no other seed gives."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def image_row(image_id: Any = 1, name: Any = "a.png", width: int = 64, height: int = 48) -> dict[str, Any]:
    return {"id": image_id, "file_name": name, "width": width, "height": height}


def annotation(
    row_id: Any = 1, image: Any = 1, category: Any = 1, bbox: Any = (4, 4, 20, 10), **more: Any
) -> dict[str, Any]:
    bbox = list(bbox) if isinstance(bbox, tuple) else bbox
    return {"id": row_id, "image_id": image, "category_id": category, "bbox": bbox, **more}


def document(
    images: Sequence[Any] | None = None,
    annotations: Sequence[Any] | None = None,
    categories: Sequence[Any] | None = None,
) -> dict[str, Any]:
    """A COCO document; by default one image with one box."""
    return {
        "images": [image_row()] if images is None else list(images),
        "annotations": [annotation()] if annotations is None else list(annotations),
        "categories": list(CATEGORIES if categories is None else categories),
    }


def write_split(folder: Path, split: str, content: dict[str, Any], *, draw: bool = True, seed: int = 0) -> Path:
    """Write annotations and, with `draw`, noise for every listed image that does not lie there yet."""
    target = folder / split
    target.mkdir(parents=True, exist_ok=True)
    (target / ANNOTATION_FILE).write_text(json.dumps(content))
    for i, row in enumerate(content["images"] if draw else ()):
        path = target / row["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            picture(row["width"], row["height"], seed=1000 * seed + i).save(path)
    return target


def write_dataset(folder: Path, train: dict[str, Any] | None = None, valid: dict[str, Any] | None = None) -> Path:
    """A dataset with train and valid; the images of the two differ."""
    write_split(folder, "train", document() if train is None else train, seed=1)
    write_split(folder, "valid", document() if valid is None else valid, seed=2)
    return folder


def validated(folder: Path) -> tuple[ClassMap, dict[str, ValidSplit], Report]:
    report = Report()
    class_map, splits = validate(read_coco_folder(folder), report)
    return class_map, splits, report


def prepared(source: Path, target: Path, *, short_side: int | None = None) -> PreparedDataset:
    """The prepared form of a COCO folder."""
    class_map, splits, _ = validated(source)
    target.mkdir(parents=True)
    write_prepared(target, class_map, splits, PrepareOptions(short_side), source="test")
    return PreparedDataset(target)


def grid_dataset(folder: Path, images: int, *, width: int = 64, height: int = 48, suffix: str = ".png") -> Path:
    """`images` train and two valid images of noise, each with up to three boxes of two classes."""
    rng = np.random.default_rng(7)
    for split, count in (("train", images), ("valid", 2)):
        rows = [image_row(i + 1, f"{split}{i:03d}{suffix}", width, height) for i in range(count)]
        boxes = []
        for i in range(count):
            for _ in range(int(rng.integers(1, 4))):
                x, y = rng.uniform(0, width / 2), rng.uniform(0, height / 2)
                w, h = rng.uniform(2, width / 2), rng.uniform(2, height / 2)
                boxes.append(annotation(len(boxes) + 1, i + 1, int(rng.integers(1, 3)), (x, y, w, h)))
        write_split(folder, split, document(rows, boxes), seed=len(split))
    return folder
