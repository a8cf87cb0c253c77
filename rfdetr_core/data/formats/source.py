"""What every reader gives: a split as its author wrote it, nothing dropped and nothing judged."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rfdetr_core.errors import DatasetError

IMAGE_SUFFIXES = frozenset({".bmp", ".dng", ".jpg", ".jpeg", ".mpo", ".png", ".tif", ".tiff", ".webp"})
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # cannot stand in a line of UTF-8


MAX_ANNOTATION_MB = 2048
"""Default of dataset.max_annotation_mb: parsed, a file takes some seven times its size of memory."""


def leads_into(path: Path, root: Path) -> bool:
    """Whether a path, with its links followed, lies below `root`; a loop of links leads nowhere."""
    return f"{os.path.realpath(path)}/".startswith(f"{os.path.realpath(root).rstrip('/')}/")


def read_annotation_file(path: Path, root: Path, max_mb: float) -> bytes:
    """The bytes of a file that describes images; no byte of one that is too large, or lies outside of `root`.

    Raises:
        DatasetError: see above, or it cannot be read.
    """
    try:
        if not leads_into(path, root):
            raise DatasetError(f"{path}: leads out of the dataset's folder", hint="put the file itself there")
        size = path.stat().st_size
        if size > max_mb * 1e6:
            raise DatasetError(
                f"{path}: {size / 1e6:.0f} MB, and {max_mb:g} are read at most", hint="raise dataset.max_annotation_mb"
            )
        return path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class SourceCategory:
    """A class as the source lists it."""

    id: int
    name: str
    supercategory: str


class Remark(NamedTuple):
    """What a reader saw and does not judge; it becomes a finding of the report under this code."""

    code: str
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
    label_suffix: str = ".txt line"  # what stands between that file's stem and the number
    remarks: tuple[Remark, ...] = ()

    def path_of(self, name: str) -> str:
        """Where an image of this split lies."""
        return f"{self.image_folder}/{name}"

    def annotation_name(self, annotation: int, file_name: str) -> str:
        """What a person looks for to find the annotation at this position, which is of this image."""
        if self.lines is None:
            return f"annotation {self.annotation_ids[annotation]}"
        return f"{PurePosixPath(file_name).stem}{self.label_suffix} {self.lines[annotation]}"


def shown(value: Any) -> str:
    """A value as JSON has it, short and on one line."""
    if isinstance(value, list | dict) and not _is_flat(value):
        # It may be endless: aliases of YAML, or a file that is one row.
        return f"{'a list' if isinstance(value, list) else 'a mapping'} of {len(value)}"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]} ..."


def _is_flat(value: list[Any] | dict[Any, Any]) -> bool:
    inner = value.values() if isinstance(value, dict) else value
    return len(value) <= 8 and not any(isinstance(part, list | dict) for part in inner)
