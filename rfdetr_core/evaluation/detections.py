"""What a detector found on a split: flat arrays, as the annotations are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rfdetr_core.data.annotations import ClassMap

ROWS_AT_ONCE = 20_000  # as Python objects, of which a row takes a kilobyte


@dataclass(frozen=True)
class Detections:
    """D detections of a split as flat arrays; boxes x1, y1, x2, y2 in pixels of the displayed image."""

    images: NDArray[np.int64]  # (D,) position of the image in the split's table
    labels: NDArray[np.int64]  # (D,)
    scores: NDArray[np.float64]  # (D,) in [0, 1]
    boxes: NDArray[np.float64]  # (D, 4)

    @classmethod
    def concatenate(cls, parts: list[Detections]) -> Detections:
        """One after the other; an empty list gives no detections."""
        if not parts:
            empty = np.empty(0, dtype=np.int64)
            return cls(empty, empty, np.empty(0), np.empty((0, 4)))
        return cls(
            np.concatenate([p.images for p in parts]),
            np.concatenate([p.labels for p in parts]),
            np.concatenate([p.scores for p in parts]),
            np.concatenate([p.boxes for p in parts]),
        )

    def select(self, rows: NDArray[Any]) -> Detections:
        """Some of them, by position or by mask."""
        return Detections(self.images[rows], self.labels[rows], self.scores[rows], self.boxes[rows])

    def to_coco(self, class_map: ClassMap) -> list[dict[str, Any]]:
        """COCO results format, against the ids of `AnnotationTable.to_coco`."""
        return [
            {
                "image_id": int(image) + 1,
                "category_id": class_map.category_id(int(label)),
                "bbox": [float(x1), float(y1), float(x2 - x1), float(y2 - y1)],
                "score": float(score),
            }
            for image, label, score, (x1, y1, x2, y2) in zip(
                self.images, self.labels, self.scores, self.boxes, strict=True
            )
        ]

    def write_coco(self, path: Path, class_map: ClassMap) -> None:
        """`to_coco` as a JSON file, a detection a line."""
        with path.open("w") as file:
            file.write("[")
            for start in range(0, len(self.scores), ROWS_AT_ONCE):
                rows = self.select(np.arange(start, min(start + ROWS_AT_ONCE, len(self.scores)))).to_coco(class_map)
                file.write((",\n" if start else "\n") + ",\n".join(map(json.dumps, rows)))
            file.write("\n]\n")
