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
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from rfdetr_core.data.annotations import SPLITS, AnnotationTable, ClassMap
from rfdetr_core.data.validation import ImageFile, ValidSplit
from rfdetr_core.errors import DatasetError

FORMAT_VERSION = 1
SHARD_BYTES = 256_000_000
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
    """Write the whole prepared dataset into an empty folder; returns the content of dataset.json."""
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
    sides = np.sqrt(np.prod(table.boxes[usable, 2:] - table.boxes[usable, :2], axis=1))
    per_class = np.bincount(table.labels[usable], minlength=len(class_map))
    return {
        "images": len(table),
        "boxes": int(usable.sum()),
        "crowd_regions": int(table.crowd.sum()),
        "images_without_boxes": int((table.counts == 0).sum()),
        "max_boxes_per_image": int(table.counts.max(initial=0)),
        "boxes_per_class": {name: int(n) for name, n in zip(class_map.names, per_class, strict=True)},
        "box_side_histogram": _histogram(sides, [0, 8, 16, 32, 64, 96, 128, 256, 512]),
        "image_short_side_histogram": _histogram(
            np.minimum(table.widths, table.heights), [0, 128, 256, 384, 512, 768, 1024, 2048, 4096]
        ),
    }


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
    writer = _ShardWriter(target)
    for i, (name, file) in enumerate(zip(table.file_names, split.files, strict=True)):
        data, orientation = file.path.read_bytes(), file.orientation
        if short_side is not None and min(file.width, file.height) > short_side:
            data, (width, height) = _reduce(data, file, short_side)
            scale = np.array([width / file.width, height / file.height] * 2)
            boxes[table.rows(i)] *= scale
            areas[table.rows(i)] *= scale[0] * scale[1]
            widths[i], heights[i], orientation = width, height, 1
        writer.add(str(name), data, int(widths[i]), int(heights[i]), orientation)
        if progress is not None:
            progress(1)
    writer.close()
    return AnnotationTable(table.file_names, widths, heights, table.offsets, boxes, table.labels, areas, table.crowd)


def _reduce(data: bytes, file: ImageFile, short_side: int) -> tuple[bytes, tuple[int, int]]:
    """Shrink an image so that its shorter side is `short_side` pixels; upright afterwards."""
    image = decode_image(data, file.orientation)
    scale = short_side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue(), size


def decode_image(data: bytes, orientation: int, *, at_least: int | None = None) -> Image.Image:
    """Decode to RGB, upright.

    `orientation` is the EXIF orientation that the index holds (1: as stored). With `at_least`, a JPEG may be
    decoded at 1/2, 1/4 or 1/8 of its size as long as both sides stay that many pixels long: for training only.
    """
    image: Image.Image = Image.open(io.BytesIO(data))
    if at_least is not None:
        image.draft("RGB", (at_least, at_least))
    image = image.convert("RGB")
    if orientation != 1:
        image.getexif()[0x0112] = orientation
        image = ImageOps.exif_transpose(image)
    return image


class _ShardWriter:
    """Appends images to numbered tar files and remembers where each one's bytes begin."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tar: tarfile.TarFile | None = None
        self._shards: list[str] = []
        self._columns: dict[str, list[Any]] = {
            key: [] for key in ("name", "shard", "offset", "length", "width", "height", "orientation", "sha256")
        }

    def add(self, name: str, data: bytes, width: int, height: int, orientation: int) -> None:
        if self._tar is None or self._tar.offset + len(data) > SHARD_BYTES:
            self._open_next()
        assert self._tar is not None
        info = tarfile.TarInfo(name)  # mtime, uid and names stay at their zero defaults: same bytes every time
        info.size = len(data)
        header = len(info.tobuf(self._tar.format, self._tar.encoding, self._tar.errors))
        row = (name, len(self._shards) - 1, self._tar.offset + header, len(data), width, height, orientation)
        for column, value in zip(self._columns.values(), (*row, hashlib.sha256(data).hexdigest()), strict=True):
            column.append(value)
        self._tar.addfile(info, io.BytesIO(data))

    def _open_next(self) -> None:
        if self._tar is not None:
            self._tar.close()
        self._shards.append(f"images-{len(self._shards):05d}.tar")
        self._tar = tarfile.open(self._folder / self._shards[-1], "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def close(self) -> None:
        if self._tar is not None:
            self._tar.close()
        document = {"shards": self._shards, "images": self._columns}
        (self._folder / "index.json").write_text(json.dumps(document))


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
        except (OSError, ValueError, KeyError) as error:
            raise DatasetError(
                f"{folder}: not a split of a prepared dataset: {error}", hint="run validate_dataset again"
            ) from error
        self._descriptors: dict[tuple[int, int], int] = {}  # (process, shard) -> file descriptor

    def __len__(self) -> int:
        return len(self.table)

    def read_bytes(self, image: int) -> bytes:
        """The encoded bytes of one image, by a single positioned read."""
        shard = int(self.index.shard_of[image])
        key = (os.getpid(), shard)
        if key not in self._descriptors:
            self._descriptors[key] = os.open(self._folder / self.index.shards[shard], os.O_RDONLY)
        return os.pread(self._descriptors[key], int(self.index.lengths[image]), int(self.index.offsets[image]))

    def decode(self, image: int, *, at_least: int | None = None) -> Image.Image:
        """One image, RGB and upright."""
        return decode_image(self.read_bytes(image), int(self.index.orientations[image]), at_least=at_least)


class PreparedDataset:
    """A prepared dataset on local disk.

    Raises:
        DatasetError: not a prepared dataset, or of another format version.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self.document: dict[str, Any] = json.loads((folder / "dataset.json").read_bytes())
        except (OSError, ValueError) as error:
            raise DatasetError(
                f"{folder}: not a prepared dataset: {error}", hint="run validate_dataset first"
            ) from error
        if self.document.get("format_version") != FORMAT_VERSION:
            raise DatasetError(
                f"{folder}: format version {self.document.get('format_version')}, this program reads {FORMAT_VERSION}",
                hint="prepare the dataset again",
            )
        self.folder = folder
        self.digest = str(self.document["digest"])
        self.class_map = ClassMap.from_json(self.document["classes"])

    def split(self, name: str) -> PreparedSplit:
        """Open train, valid or test."""
        if name not in SPLITS:
            raise DatasetError(f"{name}: no such split", hint=f"one of {', '.join(SPLITS)}")
        return PreparedSplit(self.folder / name)

    @property
    def max_boxes_per_image(self) -> int:
        """Over the train split."""
        return int(self.document["splits"]["train"]["max_boxes_per_image"])
