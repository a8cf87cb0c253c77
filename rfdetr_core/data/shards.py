"""Uncompressed tar shards: any tool unpacks them, and an image is one positioned read."""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

from rfdetr_core.data.pixels import Encoded

SHARD_BYTES = 256_000_000  # of a whole tar file; a larger image has one of its own
COLUMNS = ("name", "shard", "offset", "length", "width", "height", "orientation", "sha256")
Row = tuple[str, int, int, int, int, int, int, str]
"""Of one image, in the order of COLUMNS; `shard` is a position, offset and length are bytes."""


def shard_name(number: int) -> str:
    """images-00000.tar, …"""
    return f"images-{number:05d}.tar"


def index_bytes(shards: int, rows: Iterable[Row]) -> bytes:
    """index.json: where each image lies, a list per column."""
    columns: dict[str, list[Any]] = {key: [] for key in COLUMNS}
    for row in rows:
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    return json.dumps({"shards": [shard_name(i) for i in range(shards)], "images": columns}).encode()


class ShardWriter:
    """Appends images to numbered tar files and remembers where each one's bytes begin.

    Args:
        first: number of the first shard.
        closed: told the number, path and rows of each shard that is whole.
    """

    def __init__(self, folder: Path, closed: Callable[[int, Path, list[Row]], None], first: int = 0) -> None:
        self._folder, self._closed, self._next = folder, closed, first
        self._tar: tarfile.TarFile | None = None
        self._rows: list[Row] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        if kind is None:
            self._close()
        elif self._tar is not None:
            self._tar.close()

    def add(self, name: str, image: Encoded) -> None:
        """Append an image."""
        info = tarfile.TarInfo(name)  # mtime, uid and names stay at their zero defaults: same bytes every time
        info.size = len(image.data)
        header = len(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict"))
        if self._tar is not None and _closed_size(self._tar.offset + header + info.size) > SHARD_BYTES:
            self._close()
        if self._tar is None:
            path = self._folder / shard_name(self._next)
            self._tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT, encoding="utf-8", errors="strict")  # noqa: SIM115
        place = (name, self._next, self._tar.offset + header, info.size)
        self._rows.append((*place, image.width, image.height, image.orientation, image.sha256))
        self._tar.addfile(info, io.BytesIO(image.data))

    def _close(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        number, rows, self._tar, self._rows = self._next, self._rows, None, []
        self._next += 1
        self._closed(number, self._folder / shard_name(number), rows)


def _closed_size(end_of_data: int) -> int:
    """Bytes of a tar file whose last member ends here: padding, two empty blocks, and whole records."""
    blocks = math.ceil(end_of_data / tarfile.BLOCKSIZE) + 2
    return math.ceil(blocks * tarfile.BLOCKSIZE / tarfile.RECORDSIZE) * tarfile.RECORDSIZE
