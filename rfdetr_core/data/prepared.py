"""The prepared dataset: what every later stage reads (DESIGN section 5).

    <digest>/dataset.json                 class map, counts, digest, source, options, statistics
    <digest>/<split>/annotations.coco.json
    <digest>/<split>/index.json           where each image lies: columns, one entry per image
    <digest>/<split>/images-00000.tar     uncompressed tar shards of at most 256 MB

Any tool reads the annotations and unpacks the shards; a training worker reads an image with one `pread`.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from rfdetr_core.data.annotations import SPLITS, AnnotationTable, ClassMap
from rfdetr_core.data.images import decode_image
from rfdetr_core.data.validation import ImageFile, ValidSplit
from rfdetr_core.errors import DatasetError

FORMAT_VERSION = 1
SHARD_BYTES = 256_000_000  # of a whole tar file; a larger image has one of its own
JPEG_QUALITY = 95


@dataclass(frozen=True)
class PrepareOptions:
    """What changes the prepared bytes; part of the digest.

    `train_short_side`: train images whose shorter side exceeds this many pixels are reduced to it once, since
    training never sees more; None keeps every byte.
    """

    train_short_side: int | None

    def to_json(self) -> dict[str, Any]:
        """Plain dict."""
        return {"train_short_side": self.train_short_side}


@dataclass(frozen=True)
class ImageIndex:
    """Columns of index.json: image i is `lengths[i]` bytes at `offsets[i]` of shard `shard_of[i]`."""

    shards: tuple[str, ...]
    shard_of: np.ndarray[Any, np.dtype[np.int64]]
    offsets: np.ndarray[Any, np.dtype[np.int64]]
    lengths: np.ndarray[Any, np.dtype[np.int64]]
    orientations: np.ndarray[Any, np.dtype[np.int64]]
    sha256: tuple[str, ...]


def dataset_digest(class_map: ClassMap, splits: dict[str, ValidSplit], options: PrepareOptions) -> str:
    """sha256 (hex) over all that decides the prepared bytes: equal sources give equal digests, wherever they lie."""
    content = {
        "format": FORMAT_VERSION,
        "classes": class_map.names,
        "source_ids": class_map.source_ids,
        "options": options.to_json(),
        "splits": {
            name: {
                "coco": split.table.to_coco(class_map),
                "images": [(file.sha256, file.orientation) for file in split.files],
            }
            for name, split in splits.items()
        },
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_prepared(
    folder: Path,
    class_map: ClassMap,
    splits: dict[str, ValidSplit],
    options: PrepareOptions,
    *,
    source: str,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write the whole prepared dataset into an empty folder; returns the content of dataset.json.

    Raises:
        DatasetError: an image is no longer the one that was validated.
    """
    digest = dataset_digest(class_map, splits, options)
    statistics = {}
    for name, split in splits.items():
        target = folder / name
        target.mkdir(parents=True)
        short_side = options.train_short_side if name == "train" else None
        table = _write_images(target, split, short_side, progress)
        (target / "annotations.coco.json").write_text(json.dumps(table.to_coco(class_map)))
        statistics[name] = split_statistics(table, class_map)
    document = {
        "format_version": FORMAT_VERSION,
        "digest": digest,
        "source": source,
        "options": options.to_json(),
        "classes": class_map.to_json(),
        "splits": statistics,
    }
    (folder / "dataset.json").write_text(json.dumps(document, indent=2) + "\n")
    return document


def split_statistics(table: AnnotationTable, class_map: ClassMap) -> dict[str, Any]:
    """Counts and histograms of one split that later stages and the report need; sizes in pixels."""
    usable = ~table.crowd
    image_of = np.repeat(np.arange(len(table)), table.counts)
    sides = np.sqrt(np.prod(table.boxes[usable, 2:] - table.boxes[usable, :2], axis=1))
    per_class = np.bincount(table.labels[usable], minlength=len(class_map))
    return {
        "images": len(table),
        "boxes": int(usable.sum()),
        "crowd_regions": int(table.crowd.sum()),
        "images_without_boxes": int((table.counts == 0).sum()),
        "max_boxes_per_image": int(np.bincount(image_of[usable]).max(initial=0)),
        "boxes_per_class": {name: int(n) for name, n in zip(class_map.names, per_class, strict=True)},
        "box_side_histogram": _histogram(sides, [0, 8, 16, 32, 64, 96, 128, 256, 512]),
        "image_short_side_histogram": _histogram(
            np.minimum(table.widths, table.heights), [0, 128, 256, 384, 512, 768, 1024, 2048, 4096]
        ),
        "extreme_images": _extreme_images(table),
    }


def _extreme_images(table: AnnotationTable) -> dict[str, list[int]]:
    """Width and height of the image with the largest aspect, and of the one with the smallest; empty without images."""
    if not len(table):
        return {}
    aspects = table.widths / table.heights
    chosen = {"widest": aspects.argmax(), "tallest": aspects.argmin()}
    return {name: [int(table.widths[image]), int(table.heights[image])] for name, image in chosen.items()}


def _histogram(values: np.ndarray[Any, Any], edges: list[int]) -> dict[str, int]:
    counts = np.bincount(np.searchsorted(edges, values, side="right") - 1, minlength=len(edges))
    labels = [f"{low}-{high}" for low, high in pairwise(edges)] + [f"{edges[-1]}+"]
    return {label: int(n) for label, n in zip(labels, counts, strict=True)}


def _write_images(
    target: Path, split: ValidSplit, short_side: int | None, progress: Callable[[int], None] | None
) -> AnnotationTable:
    """Write shards and index; returns the table as it now is (boxes scaled where an image was reduced)."""
    table = split.table
    boxes, areas = table.boxes.copy(), table.areas.copy()
    widths, heights = table.widths.copy(), table.heights.copy()
    with _ShardWriter(target) as writer:
        for i, (name, file) in enumerate(zip(table.file_names, split.files, strict=True)):
            data, orientation = _read_unchanged(file), file.orientation
            if short_side is not None and min(file.width, file.height) > short_side:
                data, (width, height) = _reduce(data, file, short_side)
                scale = np.array([width / file.width, height / file.height] * 2)
                boxes[table.rows(i)] *= scale
                areas[table.rows(i)] *= scale[0] * scale[1]
                widths[i], heights[i], orientation = width, height, 1
            writer.add(str(name), data, int(widths[i]), int(heights[i]), orientation)
            if progress is not None:
                progress(1)
    return AnnotationTable(table.file_names, widths, heights, table.offsets, boxes, table.labels, areas, table.crowd)


def _read_unchanged(file: ImageFile) -> bytes:
    """The bytes that were validated: the digest, which names the dataset, was taken from them."""
    try:
        data = file.path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{file.path}: cannot be read any more: {error.strerror}", hint="run again") from error
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise DatasetError(f"{file.path}: changed since it was validated", hint="run again when nobody writes to it")
    return data


def _reduce(data: bytes, file: ImageFile, short_side: int) -> tuple[bytes, tuple[int, int]]:
    """Shrink an image so that its shorter side is `short_side` pixels; upright afterwards."""
    image = decode_image(data, file.orientation)
    scale = short_side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue(), size


class _ShardWriter:
    """Appends images to numbered tar files and remembers where each one's bytes begin; the index comes last."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tar: tarfile.TarFile | None = None
        self._shards: list[str] = []
        self._columns: dict[str, list[Any]] = {
            key: [] for key in ("name", "shard", "offset", "length", "width", "height", "orientation", "sha256")
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        if self._tar is not None:
            self._tar.close()
        if kind is None:
            document = {"shards": self._shards, "images": self._columns}
            (self._folder / "index.json").write_text(json.dumps(document))

    def add(self, name: str, data: bytes, width: int, height: int, orientation: int) -> None:
        info = tarfile.TarInfo(name)  # mtime, uid and names stay at their zero defaults: same bytes every time
        info.size = len(data)
        header = len(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict"))
        tar = self._tar
        if tar is None or (tar.offset and _closed_size(tar.offset + header + len(data)) > SHARD_BYTES):
            tar = self._open_next()
        row = (name, len(self._shards) - 1, tar.offset + header, len(data), width, height, orientation)
        for column, value in zip(self._columns.values(), (*row, hashlib.sha256(data).hexdigest()), strict=True):
            column.append(value)
        tar.addfile(info, io.BytesIO(data))

    def _open_next(self) -> tarfile.TarFile:
        if self._tar is not None:
            self._tar.close()
        path = self._folder / f"images-{len(self._shards):05d}.tar"
        self._shards.append(path.name)
        self._tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT, encoding="utf-8", errors="strict")  # noqa: SIM115
        return self._tar


def _closed_size(end_of_data: int) -> int:
    """Bytes of a tar file whose last member ends here: padding, two empty blocks, and whole records."""
    blocks = math.ceil(end_of_data / tarfile.BLOCKSIZE) + 2
    return math.ceil(blocks * tarfile.BLOCKSIZE / tarfile.RECORDSIZE) * tarfile.RECORDSIZE


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
