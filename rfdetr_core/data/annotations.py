"""The one annotation table: flat numpy arrays, no Python object per box.

Workers of a data loader share the arrays after a fork; a list of dicts would be copied page by page as
reference counts change.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class ClassMap:
    """source id <-> label <-> name. Labels are 0..N-1, the positions in these tuples (DESIGN section 5)."""

    source_ids: tuple[int, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def category_id(self, label: int) -> int:
        """The id in every JSON we write: label + 1."""
        return label + 1

    def to_json(self) -> list[dict[str, Any]]:
        """One row per class, in label order."""
        return [
            {"label": label, "category_id": self.category_id(label), "source_id": source_id, "name": name}
            for label, (source_id, name) in enumerate(zip(self.source_ids, self.names, strict=True))
        ]

    @classmethod
    def from_json(cls, rows: Sequence[dict[str, Any]]) -> ClassMap:
        """Inverse of `to_json`."""
        return cls(tuple(int(row["source_id"]) for row in rows), tuple(str(row["name"]) for row in rows))


@dataclass(frozen=True)
class AnnotationTable:
    """One split. Boxes of image i are the rows `offsets[i]:offsets[i + 1]`.

    Shapes: I images, N boxes. Boxes are x1, y1, x2, y2 in pixels of the displayed image (EXIF orientation
    applied), `areas` in square pixels as annotated.
    """

    file_names: NDArray[np.str_]  # (I,)
    widths: NDArray[np.int64]  # (I,)
    heights: NDArray[np.int64]  # (I,)
    offsets: NDArray[np.int64]  # (I + 1,)
    boxes: NDArray[np.float64]  # (N, 4)
    labels: NDArray[np.int64]  # (N,)
    areas: NDArray[np.float64]  # (N,)
    crowd: NDArray[np.bool_]  # (N,)

    def __len__(self) -> int:
        return len(self.file_names)

    def rows(self, image: int) -> slice:
        """The rows of one image's boxes."""
        return slice(int(self.offsets[image]), int(self.offsets[image + 1]))

    @property
    def counts(self) -> NDArray[np.int64]:
        """Boxes per image, crowd regions included. (I,)"""
        return np.diff(self.offsets)

    def select(self, images: NDArray[np.int64]) -> AnnotationTable:
        """The table of some images, in the order given."""
        row_lists = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in images]
        rows = np.concatenate(row_lists) if row_lists else np.empty(0, dtype=np.int64)
        counts = np.array([len(r) for r in row_lists], dtype=np.int64)
        return AnnotationTable(
            file_names=self.file_names[images],
            widths=self.widths[images],
            heights=self.heights[images],
            offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            boxes=self.boxes[rows],
            labels=self.labels[rows],
            areas=self.areas[rows],
            crowd=self.crowd[rows],
        )

    def resized(self, widths: NDArray[np.int64], heights: NDArray[np.int64]) -> AnnotationTable:
        """The same images at other sizes in pixels, (I,) each."""
        scales = np.stack([widths / np.maximum(self.widths, 1), heights / np.maximum(self.heights, 1)], axis=1)
        per_box = np.repeat(scales, self.counts, axis=0)
        return replace(
            self,
            widths=widths,
            heights=heights,
            boxes=self.boxes * np.concatenate([per_box, per_box], axis=1),
            areas=self.areas * per_box[:, 0] * per_box[:, 1],
        )

    def coco_bytes(self, class_map: ClassMap) -> bytes:
        """`to_coco` as JSON, made a thousand images at a time: as objects, a million boxes are a gigabyte."""
        parts = []
        for start in range(0, len(self), 1000):
            images = np.arange(start, min(start + 1000, len(self)))
            part = self.select(images).to_coco(class_map, start, int(self.offsets[start]))
            parts.append([json.dumps(part[key])[1:-1].encode() for key in ("images", "annotations")])
        categories = json.dumps(self._categories(class_map)).encode()
        images_json, annotations_json = (b", ".join(filter(None, (part[i] for part in parts))) for i in (0, 1))
        return (
            b"".join(
                (
                    b'{"images": [',
                    images_json,
                    b'], "annotations": [',
                    annotations_json,
                    b'], "categories": ',
                    categories,
                )
            )
            + b"}"
        )

    @staticmethod
    def _categories(class_map: ClassMap) -> list[dict[str, Any]]:
        return [{"id": class_map.category_id(label), "name": name} for label, name in enumerate(class_map.names)]

    def to_coco(self, class_map: ClassMap, images_before: int = 0, boxes_before: int = 0) -> dict[str, Any]:
        """A COCO document; image and annotation ids count from 1, or behind those before, category_id is label + 1.

        Ids start at 1 because pycocotools reads annotation id 0 as "no match".
        """
        images = [
            {"id": images_before + i + 1, "file_name": str(name), "width": int(w), "height": int(h)}
            for i, (name, w, h) in enumerate(zip(self.file_names, self.widths, self.heights, strict=True))
        ]
        image_ids = np.repeat(np.arange(images_before + 1, images_before + len(self) + 1), self.counts)
        annotations = [
            {
                "id": boxes_before + row + 1,
                "image_id": int(image_ids[row]),
                "category_id": class_map.category_id(int(self.labels[row])),
                "bbox": [float(x1), float(y1), float(x2 - x1), float(y2 - y1)],
                "area": float(self.areas[row]),
                "iscrowd": int(self.crowd[row]),
            }
            for row, (x1, y1, x2, y2) in enumerate(self.boxes)
        ]
        return {"images": images, "annotations": annotations, "categories": self._categories(class_map)}

    @classmethod
    def from_coco(cls, document: dict[str, Any]) -> AnnotationTable:
        """Inverse of `to_coco`: reads what we wrote, not the world's COCO (see formats/coco.py)."""
        images, annotations = document["images"], document["annotations"]
        image_ids = np.array([a["image_id"] for a in annotations], dtype=np.int64)
        counts = np.bincount(image_ids - 1, minlength=len(images)) if len(image_ids) else np.zeros(len(images))
        xywh = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
        return cls(
            file_names=np.array([i["file_name"] for i in images], dtype=np.str_),
            widths=np.array([i["width"] for i in images], dtype=np.int64),
            heights=np.array([i["height"] for i in images], dtype=np.int64),
            offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            boxes=np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1),
            labels=np.array([a["category_id"] - 1 for a in annotations], dtype=np.int64),
            areas=np.array([a["area"] for a in annotations], dtype=np.float64),
            crowd=np.array([bool(a["iscrowd"]) for a in annotations], dtype=np.bool_),
        )
