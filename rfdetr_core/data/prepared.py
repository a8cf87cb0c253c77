"""The prepared dataset: what every later stage reads (DESIGN section 5).

    <digest>/dataset.json                 class map, counts, digest, source, options, statistics
    <digest>/<split>/annotations.coco.json
    <digest>/<split>/index.json           where each image lies: columns, one entry per image
    <digest>/<split>/images-00000.tar     uncompressed tar shards of at most 256 MB

Any tool reads the annotations and unpacks the shards; a training worker reads an image with one `pread`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rfdetr_core.data.annotations import SPLITS, AnnotationTable, ClassMap
from rfdetr_core.data.images import decode_image
from rfdetr_core.errors import DatasetError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class ImageIndex:
    """Columns of index.json: image i is `lengths[i]` bytes at `offsets[i]` of shard `shard_of[i]`."""

    shards: tuple[str, ...]
    shard_of: np.ndarray[Any, np.dtype[np.int64]]
    offsets: np.ndarray[Any, np.dtype[np.int64]]
    lengths: np.ndarray[Any, np.dtype[np.int64]]
    orientations: np.ndarray[Any, np.dtype[np.int64]]
    sha256: tuple[str, ...]


class PreparedSplit:
    """One split of a prepared dataset on local disk; safe to share with forked workers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self.table = AnnotationTable.from_coco(json.loads((folder / "annotations.coco.json").read_bytes()))
            document = json.loads((folder / "index.json").read_bytes())
            columns = document["images"]
            self.index = ImageIndex(
                shards=tuple(document["shards"]),
                shard_of=np.array(columns["shard"], dtype=np.int64),
                offsets=np.array(columns["offset"], dtype=np.int64),
                lengths=np.array(columns["length"], dtype=np.int64),
                orientations=np.array(columns["orientation"], dtype=np.int64),
                sha256=tuple(columns["sha256"]),
            )
            if len(self.index.sha256) != len(self.table):
                raise ValueError(f"{len(self.table)} annotated images, {len(self.index.sha256)} in the index")
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise DatasetError(
                f"{folder}: not a split of a prepared dataset: {_reason(error)}", hint="run validate_dataset again"
            ) from error
        self._descriptors: dict[tuple[int, int], int] = {}  # (process, shard) -> file descriptor

    def __len__(self) -> int:
        return len(self.table)

    def read_bytes(self, image: int) -> bytes:
        """The encoded bytes of one image, by a single positioned read.

        Raises:
            DatasetError: the shard is absent, unreadable or cut short.
        """
        shard, length = int(self.index.shard_of[image]), int(self.index.lengths[image])
        path = self._folder / self.index.shards[shard]
        key = (os.getpid(), shard)
        try:
            if key not in self._descriptors:
                self._descriptors[key] = os.open(path, os.O_RDONLY)
            data = os.pread(self._descriptors[key], length, int(self.index.offsets[image]))
        except OSError as error:
            raise DatasetError(f"{path}: cannot be read: {error.strerror}", hint="prepare the dataset again") from error
        if len(data) != length:
            raise DatasetError(f"{path}: cut short within image {image}", hint="prepare the dataset again")
        return data

    def close(self) -> None:
        """Close the shards that this process opened; the next read opens them again."""
        for key in [key for key in self._descriptors if key[0] == os.getpid()]:
            os.close(self._descriptors.pop(key))

    def __del__(self) -> None:
        if hasattr(self, "_descriptors"):  # not if the constructor raised
            self.close()

    def decode(self, image: int, *, channels: int = 3) -> Image.Image:
        """One image, RGB or of another number of channels, and upright."""
        return decode_image(self.read_bytes(image), int(self.index.orientations[image]), channels=channels)


class PreparedDataset:
    """A prepared dataset on local disk.

    Raises:
        DatasetError: not a prepared dataset, or of another format version.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self.document: dict[str, Any] = json.loads((folder / "dataset.json").read_bytes())
            version = self.document["format_version"]
            if version == FORMAT_VERSION:
                self.digest = str(self.document["digest"])
                self.class_map = ClassMap.from_json(self.document["classes"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DatasetError(
                f"{folder}: not a prepared dataset: {_reason(error)}", hint="run validate_dataset first"
            ) from error
        if version != FORMAT_VERSION:
            raise DatasetError(
                f"{folder}: format version {version}, this program reads {FORMAT_VERSION}",
                hint="prepare the dataset again",
            )
        self.folder = folder

    def split(self, name: str) -> PreparedSplit:
        """Open train, valid or test."""
        if name not in SPLITS:
            raise DatasetError(f"{name}: no such split", hint=f"one of {', '.join(SPLITS)}")
        return PreparedSplit(self.folder / name)

    @property
    def max_boxes_per_image(self) -> int:
        """Over the train split."""
        return int(self.document["splits"]["train"]["max_boxes_per_image"])


def _reason(error: Exception) -> str:
    """One line on why a file is not one of ours; a bare KeyError would only say a word."""
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)
