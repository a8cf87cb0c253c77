"""Writes prepared datasets: images decoded once, several at a time, into shards that leave as soon as they are full.

Memory does not grow with the dataset, nor does scratch space where the dataset goes to a store: a shard is removed
once it is there. Beside each stored shard lies a *part*, which says what it holds, so that an interrupted run
continues behind the last one. Equal input and options give equal bytes, whoever writes them and in whatever order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rfdetr_core.data.annotations import AnnotationTable, ClassMap
from rfdetr_core.data.boxes import ValidSplit
from rfdetr_core.data.findings import Report
from rfdetr_core.data.pixels import JPEG_QUALITY, JPEG_SUBSAMPLING, RESAMPLING, Encoded, encode
from rfdetr_core.data.prepared import FORMAT_VERSION
from rfdetr_core.data.shards import Row, ShardWriter, index_bytes, shard_name
from rfdetr_core.data.statistics import split_statistics
from rfdetr_core.data.survey import ImageFile, Problem, in_order
from rfdetr_core.errors import DatasetError, MissingObjectError
from rfdetr_core.storage import FileDigest, Location

PARTS = "parts"  # folder of what is known of the stored shards while the rest is being written
_WAITING = 2  # full shards that may wait for their upload before writing does

Progress = Callable[[int], None]


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
class Part:
    """What a shard holds: its images, those before them that could not be decoded, and how many both are."""

    rows: list[Row]
    dropped: list[tuple[str, str, str]]  # name, code of the report, why
    images: int


def dataset_digest(class_map: ClassMap, splits: dict[str, ValidSplit], options: PrepareOptions) -> str:
    """sha256 (hex) over all that decides the prepared bytes: equal sources give equal digests, wherever they lie."""
    head = {
        "format": FORMAT_VERSION,
        "encoder": [JPEG_QUALITY, JPEG_SUBSAMPLING, int(RESAMPLING)],
        "classes": class_map.names,
        "source_ids": class_map.source_ids,
        "options": options.to_json(),
        "splits": {name: [len(split.table), len(split.table.boxes)] for name, split in splits.items()},
    }
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for _, split in sorted(splits.items()):
        table = split.table
        for column in (table.widths, table.heights, table.offsets, table.labels, table.crowd):
            digest.update(column.astype("<i8").tobytes())
        for measure in (table.boxes, table.areas):
            digest.update((measure + 0.0).astype("<f8").tobytes())  # -0.0 is 0.0
        for name, file in zip(table.file_names.tolist(), split.files, strict=True):
            digest.update(f"{name}\0{file.sha256}{file.orientation}\n".encode())
    return digest.hexdigest()


class _Sink(Protocol):
    """Where a dataset is written to."""

    def stored(self, split: str) -> list[Part]:
        """Parts of an interrupted run, from the first shard on without a gap."""

    def folder(self, split: str) -> Path:
        """An existing folder for shards."""

    def shard(self, split: str, number: int, path: Path, part: Part) -> None:
        """A shard is whole."""

    def file(self, name: str, data: bytes) -> None:
        """One of the small files."""


def write_prepared(
    folder: Path,
    class_map: ClassMap,
    splits: dict[str, ValidSplit],
    options: PrepareOptions,
    *,
    source: str,
    report: Report | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the whole prepared dataset into an empty local folder; returns the content of dataset.json.

    Raises:
        DatasetError: an image is no longer the one that was validated, or its pixels cannot be decoded.
    """
    return _write(_Folder(folder), class_map, splits, options, source, report or Report(), progress)


def publish_prepared(
    target: Location,
    scratch: Path,
    class_map: ClassMap,
    splits: dict[str, ValidSplit],
    options: PrepareOptions,
    *,
    source: str,
    report: Report,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], dict[str, FileDigest]]:
    """Write the prepared dataset to a store, continuing where an interrupted run of the same input stopped.

    Returns the content of dataset.json and the digests of the files that were sent; whoever calls seals `target`.

    Raises:
        DatasetError: as `write_prepared`; nothing is left in `target`.
        StorageAccessError, StorageUnavailableError: see `Location`.
    """
    sink = _Store(target, scratch)
    try:
        document = _write(sink, class_map, splits, options, source, report, progress)
        sink.finish()
    except BaseException as error:
        sink.pool.shutdown(cancel_futures=True)
        if isinstance(error, DatasetError):
            target.delete_tree()  # of no use to anybody: mended, the dataset is another one
        raise
    sink.pool.shutdown()
    return document, sink.sent


def _write(
    sink: _Sink,
    class_map: ClassMap,
    splits: dict[str, ValidSplit],
    options: PrepareOptions,
    source: str,
    report: Report,
    progress: Progress | None,
) -> dict[str, Any]:
    digest = dataset_digest(class_map, splits, options)
    tables: dict[str, ValidSplit] = {}
    dropped: dict[str, list[tuple[str, str, str]]] = {}
    for name, split in splits.items():
        short_side = options.train_short_side if name == "train" else None
        parts = _write_split(sink, name, split, short_side, progress)
        dropped[name] = [row for part in parts for row in part.dropped]
        for file_name, code, why in dropped[name]:
            report.add(code, [f"{name}/{file_name}: {why}"])
        rows = [row for part in parts for row in part.rows]
        tables[name] = ValidSplit(_as_stored(split.table, rows), ())
        sink.file(f"{name}/index.json", index_bytes(1 + max((row[1] for row in rows), default=-1), rows))
    if any(dropped.values()):
        _refuse_what_is_left(tables, report)
    report.raise_errors(source)
    statistics = {}
    for name, kept in tables.items():
        sink.file(f"{name}/annotations.coco.json", kept.table.coco_bytes(class_map))
        statistics[name] = split_statistics(kept.table, class_map)
    document = {
        "format_version": FORMAT_VERSION,
        "digest": digest,
        "source": source,
        "options": options.to_json(),
        "classes": class_map.to_json(),
        "splits": statistics,
    }
    if any(dropped.values()):
        document["dropped_images"] = dropped
    sink.file("dataset.json", (json.dumps(document, indent=2) + "\n").encode())
    return document


def report_dropped(document: dict[str, Any], report: Report) -> None:
    """What the pixels of a dataset showed when it was prepared, for a run that takes it over."""
    for split, rows in document.get("dropped_images", {}).items():
        for name, code, why in rows:
            report.add(code, [f"{split}/{name}: {why}"])


def _refuse_what_is_left(tables: dict[str, ValidSplit], report: Report) -> None:
    for name, split in tables.items():
        if not len(split.table):
            report.add("empty-split", [name])
    if "train" in tables and tables["train"].table.crowd.all():
        report.add("no-boxes", ["train"])


def _write_split(
    sink: _Sink, name: str, split: ValidSplit, short_side: int | None, progress: Progress | None
) -> list[Part]:
    parts = sink.stored(name)
    done = sum(part.images for part in parts)
    first = len(parts)
    if progress is not None and done:
        progress(done)
    dropped: list[tuple[str, str, str]] = []
    count = 0

    def closed(number: int, path: Path, rows: list[Row]) -> None:
        nonlocal dropped, count
        # The image that did not fit is taken already, and what failed before it may belong to either side.
        part = Part(rows, dropped, len(rows) + len(dropped))
        dropped = []
        parts.append(part)
        sink.shard(name, number, path, part)

    def work(item: tuple[str, ImageFile]) -> Encoded | Problem:
        return encode(item[1], short_side)

    items = list(zip(split.table.file_names.tolist(), split.files, strict=True))[done:]
    with ShardWriter(sink.folder(name), closed, first) as writer:
        for (file_name, _), outcome in zip(items, in_order(work, items), strict=True):
            if isinstance(outcome, Problem):
                dropped.append((file_name, outcome.code, outcome.why))
            else:
                writer.add(file_name, outcome)
            if progress is not None:
                progress(1)
    if dropped:  # behind the last image that went into a shard
        parts.append(Part([], dropped, len(dropped)))
    return parts


def _as_stored(table: AnnotationTable, rows: Sequence[Row]) -> AnnotationTable:
    """The table of the images that were stored, at the size at which they were."""
    if len(rows) < len(table):
        place = {name: i for i, name in enumerate(table.file_names.tolist())}
        table = table.select(np.array([place[row[0]] for row in rows], dtype=np.int64))
    sizes = np.array([row[4:6] for row in rows], dtype=np.int64).reshape(-1, 2)
    return table.resized(sizes[:, 0], sizes[:, 1])


@dataclass(frozen=True)
class _Folder:
    """A local folder that nobody looks at before it is whole."""

    root: Path

    def stored(self, split: str) -> list[Part]:
        return []

    def folder(self, split: str) -> Path:
        (self.root / split).mkdir(parents=True)
        return self.root / split

    def shard(self, split: str, number: int, path: Path, part: Part) -> None:
        pass

    def file(self, name: str, data: bytes) -> None:
        (self.root / name).write_bytes(data)


@dataclass
class _Store:
    """A place that shards are sent to, each with its part behind it."""

    target: Location
    scratch: Path
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(_WAITING, "upload"))
    sent: dict[str, FileDigest] = field(default_factory=dict)
    waiting: list[Future[None]] = field(default_factory=list)

    def stored(self, split: str) -> list[Part]:
        parts: list[Part] = []
        sizes = {info.name: info.size for info in self.target.list_files()}
        while True:
            number = len(parts)
            shard = f"{split}/{shard_name(number)}"
            try:
                said = self._part(split, number).read_json()
            except MissingObjectError:
                return parts
            digest = FileDigest(**said["shard"])
            if sizes.get(shard) != digest.size:
                return parts
            self.sent[shard] = digest
            parts.append(
                Part([tuple(row) for row in said["rows"]], [tuple(r) for r in said["dropped"]], said["images"])
            )

    def folder(self, split: str) -> Path:
        (self.scratch / split).mkdir(parents=True)
        return self.scratch / split

    def shard(self, split: str, number: int, path: Path, part: Part) -> None:
        def send() -> None:
            digest = (self.target / f"{split}/{path.name}").upload_file(path)
            path.unlink()
            said = {"rows": part.rows, "dropped": part.dropped, "images": part.images, "shard": asdict(digest)}
            self._part(split, number).write_json(said)
            self.sent[f"{split}/{path.name}"] = digest

        while len(self.waiting) >= _WAITING:
            self.waiting.pop(0).result()
        self.waiting.append(self.pool.submit(send))

    def file(self, name: str, data: bytes) -> None:
        path = self.scratch / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self.sent[name] = (self.target / name).upload_file(path)

    def finish(self) -> None:
        """Wait for what is under way, and remove what only an interrupted run needs."""
        for future in self.waiting:
            future.result()
        (self.target / PARTS).delete_tree()

    def _part(self, split: str, number: int) -> Location:
        return self.target / f"{PARTS}/{split}-{number:05d}.json"
