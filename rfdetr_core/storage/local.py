"""Locations in a local folder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import Self

from rfdetr_core.errors import (
    ConfigError,
    MissingObjectError,
    RFDETRError,
    StorageAccessError,
    StorageUnavailableError,
    VersionConflict,
)
from rfdetr_core.storage.base import CHUNK, FileDigest, FileInfo, Location, check_name, check_range
from rfdetr_core.storage.parallel import Tick, ignore

RESERVED = ".rfdetr-"
"""Temporaries and lock files start so; a crash can leave one behind, and it is never listed."""

LOCK_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class LocalLocation(Location):
    """A file or folder under an absolute path."""

    path: Path

    @property
    def uri(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def local_path(self) -> Path | None:
        return self.path

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str) -> Self:
        return type(self)(self.path / check_name(name, where=self.uri))

    def read_bytes(self) -> bytes:
        with local_errors("read", self.path):
            return self.path.read_bytes()

    def read_range(self, offset: int, length: int) -> bytes:
        check_range(offset, length)
        with local_errors("read", self.path), self.path.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def write_bytes(self, data: bytes) -> None:
        with local_errors("write", self.path), atomic_file(self.path, durable=True) as file:
            file.write(data)

    def exists(self) -> bool:
        with local_errors("look for", self.path):
            return self.path.is_file() or next(self._walk(), None) is not None

    def delete(self) -> None:
        with local_errors("delete", self.path):
            self.path.unlink(missing_ok=True)

    def read_versioned(self) -> tuple[bytes, str]:
        data = self.read_bytes()
        return data, _version(data)

    def write_if(self, data: bytes, version: str | None) -> str:
        with local_errors("write", self.path), _locked(self.path):
            current = _version(self.path.read_bytes()) if self.path.exists() else None
            if current != version:
                raise VersionConflict(
                    f"cannot write {self.uri}: another writer came first",
                    hint="read it again, then decide again",
                )
            with atomic_file(self.path, durable=True) as file:
                file.write(data)
        return _version(data)

    def upload_file(self, path: Path, tick: Tick = ignore) -> FileDigest:
        return _copy(path, self.path, tick, durable=True)

    def download_file(self, path: Path, tick: Tick = ignore) -> FileDigest:
        return _copy(self.path, path, tick, durable=False)

    def digest_file(self, tick: Tick = ignore) -> FileDigest:
        digest, size = hashlib.sha256(), 0
        with local_errors("read", self.path), self.path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
                tick(len(chunk))
        return FileDigest(size, digest.hexdigest())

    def list_files(self) -> list[FileInfo]:
        with local_errors("list", self.path):
            return sorted(self._walk(), key=lambda info: info.name)

    def delete_files(self, names: Iterable[str]) -> None:
        root = os.path.realpath(self.path)
        for name in names:
            path = (self / name).path
            if not _is_inside(str(path.parent), root):
                raise StorageAccessError(
                    f"cannot delete {path}: a symbolic link leads out of {self.uri}", hint="remove the link"
                )
            with local_errors("delete", path):
                path.unlink(missing_ok=True)

    def delete_tree(self) -> None:
        if self.path == Path(self.path.anchor):
            raise ConfigError(f"refusing to delete all of {self.uri}", hint="name a folder below it")
        with local_errors("delete", self.path):
            if self.path.is_symlink():
                self.path.unlink()
            elif self.path.is_dir():
                shutil.rmtree(self.path)

    def _walk(self) -> Iterator[FileInfo]:
        """All regular files below. Links are followed to files inside the tree only; one that leaves the
        tree, or ends nowhere, is an error: skipping it would lose data silently."""
        root = os.path.realpath(self.path)
        pending = [""] if self.path.is_dir() else []
        while pending:
            prefix = pending.pop()
            with os.scandir(os.path.join(root, prefix)) as entries:  # noqa: PTH118 - 100 000 entries, Path is slow
                for entry in entries:
                    name = prefix + entry.name
                    if entry.name.startswith(RESERVED):
                        continue
                    if entry.is_symlink() and not _is_inside(entry.path, root):
                        raise _unusable(entry.path, f"a symbolic link leads out of {self.uri}")
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(name + "/")
                    elif entry.is_file():
                        check_name(name, where=self.uri)
                        yield FileInfo(name, entry.stat().st_size)
                    elif not entry.is_dir():
                        # A link to a folder inside the tree adds nothing: its files are listed once already.
                        raise _unusable(entry.path, "neither a file nor a folder, or a broken link")


def _is_inside(path: str, root: str) -> bool:
    """Whether `path`, with its links followed, is the real path `root` or lies below it."""
    real = os.path.realpath(path)
    return real == root or real.startswith(root.rstrip("/") + "/")


def _unusable(path: str, why: str) -> StorageAccessError:
    return StorageAccessError(f"cannot list {path!r}: {why}", hint="remove it, or put the file itself there")


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _copy(source: Path, target: Path, tick: Tick, *, durable: bool) -> FileDigest:
    digest, size = hashlib.sha256(), 0
    with (
        local_errors("read", source),
        source.open("rb") as reader,
        local_errors("write", target),
        atomic_file(target, durable=durable) as writer,
    ):
        while chunk := reader.read(CHUNK):
            digest.update(chunk)
            writer.write(chunk)
            size += len(chunk)
            tick(len(chunk))
    return FileDigest(size, digest.hexdigest())


@contextmanager
def atomic_file(path: Path, *, durable: bool) -> Iterator[BufferedRandom]:
    """A binary file that appears under `path` whole, or not at all.

    Args:
        path: folders above it are made.
        durable: fsync before the rename, so that a power cut cannot leave an empty file either. Downloads
            into scratch space do without: 100 000 images would wait minutes for the disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{RESERVED}tmp-{secrets.token_hex(8)}"
    try:
        with temporary.open("x+b") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of `path` against other threads and processes; a killed holder loses it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.parent / f"{RESERVED}lock-{hashlib.sha256(path.name.encode()).hexdigest()[:16]}"
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        with lock.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The last holder removes the file: a lock on a removed file locks nobody out.
                held = os.path.samestat(os.fstat(file.fileno()), lock.stat())
            except (BlockingIOError, FileNotFoundError):
                held = False
            if held:
                try:
                    yield
                finally:
                    lock.unlink()
                return
        if time.monotonic() > deadline:
            raise StorageUnavailableError(
                f"cannot write {path}: {lock.name} has been locked for {LOCK_SECONDS:.0f} s",
                hint="another process holds it: wait, or stop that process",
            )
        time.sleep(0.01)


_LOST = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENODEV, errno.ENOLCK, errno.EINTR}
_FULL = {errno.ENOSPC, errno.EDQUOT}
_HINTS = {
    errno.EACCES: "give this user the right to do so",
    errno.EPERM: "give this user the right to do so",
    errno.EROFS: "use a folder on a writable file system",
    errno.ENOTDIR: "a part of the path is a file: rename it, or use another folder",
    errno.EISDIR: "it is a folder, and a file is wanted",
    errno.ENAMETOOLONG: "shorten the name",
}


@contextmanager
def local_errors(action: str, path: Path) -> Iterator[None]:
    """Turn an `OSError` into the storage error that says what to do."""
    try:
        yield
    except RFDETRError:
        raise
    except OSError as error:
        what = f"cannot {action} {path}"
        if error.errno == errno.ENOENT:
            raise MissingObjectError(f"{what}: no such file", hint="check the path") from None
        if error.errno in _FULL:
            raise StorageAccessError(
                f"{what}: the disk is full", hint="free space or give it a larger volume"
            ) from None
        why = os.strerror(error.errno) if error.errno else type(error).__name__
        if error.errno in _LOST:
            raise StorageUnavailableError(f"{what}: {why}", hint="the file system is lost; try again") from None
        hint = _HINTS.get(error.errno or 0, "check the path and its file system")
        raise StorageAccessError(f"{what}: {why}", hint=hint) from None
