"""What every reader gives: a split as its author wrote it, nothing dropped and nothing judged."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Severity = Literal["error", "warning", "note"]

IMAGE_SUFFIXES = frozenset({".bmp", ".dng", ".jpg", ".jpeg", ".mpo", ".png", ".tif", ".tiff", ".webp"})
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # cannot stand in a line of UTF-8


@dataclass(frozen=True)
class SourceCategory:
    """A class as the source lists it."""

    id: int
    name: str
    supercategory: str


class Remark(NamedTuple):
    """What a reader saw and does not judge; it becomes a finding of the report."""

    code: str
    severity: Severity
    message: str
    rows: tuple[str, ...]


@dataclass(frozen=True)
class SourceSplit:
    """One split: I images, A annotations."""

    name: str
    root: Path  # the dataset's folder, for messages
    path: Path  # the file that lists the classes, for messages
    image_folder: Path
    image_ids: NDArray[np.int64]  # (I,)
    file_names: tuple[str, ...]  # (I,) relative to image_folder
    widths: NDArray[np.int64]  # (I,) as declared; -1 where absent
    heights: NDArray[np.int64]  # (I,)
    annotation_ids: NDArray[np.int64]  # (A,)
    annotation_images: NDArray[np.int64]  # (A,) image ids
    annotation_categories: NDArray[np.int64]  # (A,) category ids
    bboxes: NDArray[np.float64]  # (A, 4) x, y, w, h: in pixels, or in shares of the displayed image if `relative`
    areas: NDArray[np.float64]  # (A,) square pixels; NaN where absent
    crowd: NDArray[np.bool_]  # (A,)
    categories: tuple[SourceCategory, ...]
    relative: bool = False
    lines: NDArray[np.int64] | None = None  # (A,) line in the label file named as the image; None: ids tell them apart
    remarks: tuple[Remark, ...] = ()

    def annotation_name(self, annotation: int, file_name: str) -> str:
        """What a person looks for to find the annotation at this position, which is of this image."""
        if self.lines is None:
            return f"annotation {self.annotation_ids[annotation]}"
        return f"{PurePosixPath(file_name).stem}.txt line {self.lines[annotation]}"


def shown(value: Any) -> str:
    """A value as JSON has it, short and on one line."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]} ..."
