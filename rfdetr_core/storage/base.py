"""What a location can do, whichever store it lies in: the shared half of `Location`."""

from __future__ import annotations

import json
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

from rfdetr_core.errors import ConfigError, MissingObjectError, StorageAccessError, VersionConflict
from rfdetr_core.storage.parallel import Job, Tick, ignore, run_jobs

CHUNK = 1024 * 1024
"""Bytes per read while hashing or copying."""


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file of a tree: its name relative to the tree ('/'-separated) and its size in bytes."""

    name: str
    size: int
    tag: str = field(default="", compare=False)
    """S3's entity tag, another one whenever the bytes change; empty in local folders."""


@dataclass(frozen=True, slots=True)
class FileDigest:
    """Size in bytes and lower-case hexadecimal SHA-256 of the bytes that were moved."""

    size: int
    sha256: str


class ConditionsUnsupportedError(StorageAccessError):
    """The store says openly that it has no conditional writes."""


def check_name(name: str, *, where: str) -> str:
    """`name`, if it is a relative path that stays below `where` in every store.

    Raises:
        ConfigError: it is empty or absolute, has an empty, '.' or '..' part, control characters, or
            bytes that are not UTF-8. Names found in a store pass here too: a key such as 'a/../../b'
            would otherwise be written outside the folder it is downloaded to.
    """
    if any(part in ("", ".", "..") for part in name.split("/")):
        problem = "a name has no empty, '.' or '..' part and does not start or end with '/'"
    elif not is_printable(name):
        problem = "a name has no control characters and is valid UTF-8"
    else:
        return name
    raise ConfigError(f"{name!r} is no legal name below {where}: {problem}", hint="for example 'train/result.json'")


def is_printable(text: str) -> bool:
    """Whether `text` can stand in a one-line message and in an S3 key."""
    return not any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) <= 0xDFFF for c in text)


def check_range(offset: int, length: int) -> None:
    """Refuse what S3 and files would each read in a way of their own."""
    if offset < 0 or length < 0:
        raise ValueError(f"offset and length are not negative: {offset}, {length}")


class Location(ABC):
    """A file or folder in a store: like a `pathlib.Path`, with the same surface for S3 and local folders.

    Nothing torn is ever visible under a final name: a file is the old one or the new one. Folders exist
    by their files only. In local folders names starting with '.rfdetr-' are temporaries, never listed.
    Instances are immutable, comparable, hashable, picklable and may be used from several threads.

    Every method raises `StorageAccessError` (the user must change something: credentials, bucket, rights,
    disk space; `MissingObjectError` for a file that is not there) or `StorageUnavailableError` (worth a
    retry: network, 5xx, throttling).
    """

    __slots__ = ()

    @property
    @abstractmethod
    def uri(self) -> str:
        """The canonical URI; `location(uri)` gives this location back."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The last part of the URI."""

    @property
    @abstractmethod
    def local_path(self) -> Path | None:
        """The path, if this location lies in a local folder."""

    @abstractmethod
    def __truediv__(self, name: str) -> Self:
        """The location `name` below this one; raises `ConfigError` for '..', absolute or empty parts."""

    def __str__(self) -> str:
        return self.uri

    # One file

    @abstractmethod
    def read_bytes(self) -> bytes:
        """The whole file."""

    @abstractmethod
    def read_range(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`; fewer where the file ends before. Negative ones: ValueError."""

    @abstractmethod
    def write_bytes(self, data: bytes) -> None:
        """Replace the file, atomically."""

    @abstractmethod
    def exists(self) -> bool:
        """Whether a file of this name exists, or a folder with at least one file in it."""

    def entity_tag(self) -> str:
        """S3's entity tag of this file, another one whenever its bytes change; empty in local folders."""
        return ""

    @abstractmethod
    def delete(self) -> None:
        """Remove this file; no error if there is none."""

    @abstractmethod
    def read_versioned(self) -> tuple[bytes, str]:
        """The whole file, and the version to give to `write_if`."""

    @abstractmethod
    def write_if(self, data: bytes, version: str | None) -> str:
        """Replace the file if it still is `version` (None: if there is none); returns the new version.

        Of several writers with the same `version` exactly one succeeds, if `conditional_writes_work()`. Equal
        contents are one version (so it is in S3): write something that no other writer writes.

        Raises:
            VersionConflict: the file is another one by now.
        """

    @abstractmethod
    def upload_file(self, path: Path, tick: Tick = ignore) -> FileDigest:
        """Replace this file by a local one; returns size and digest of the bytes that were sent."""

    @abstractmethod
    def download_file(self, path: Path, tick: Tick = ignore) -> FileDigest:
        """Copy this file to `path`, which changes only once all bytes are there."""

    @abstractmethod
    def digest_file(self, tick: Tick = ignore) -> FileDigest:
        """Read this file to its end, keeping nothing but its size and digest."""

    def read_text(self) -> str:
        """The whole file as UTF-8."""
        data = self.read_bytes()
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise StorageAccessError(
                f"cannot read {self.uri}: byte {error.start} is not UTF-8", hint="is it the right file?"
            ) from None

    def read_json(self) -> Any:
        """The file parsed as JSON."""
        text = self.read_text()
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise StorageAccessError(
                f"cannot read {self.uri}: not JSON, line {error.lineno} column {error.colno}: {error.msg}",
                hint="is it the right file?",
            ) from None

    def write_json(self, value: Any) -> None:
        """Replace the file by `value` as JSON: sorted keys, two spaces, no NaN (ValueError)."""
        self.write_bytes(encode_json(value))

    # A folder

    @abstractmethod
    def list_files(self) -> list[FileInfo]:
        """All files below, at any depth, sorted by name; empty if there is no such folder."""

    @abstractmethod
    def delete_files(self, names: Iterable[str]) -> None:
        """Remove these files below; no error for those that are not there."""

    @abstractmethod
    def delete_tree(self) -> None:
        """Remove everything below; no error if there is nothing. A bucket or '/' itself is refused."""

    def upload_tree(
        self, folder: Path, *, names: Iterable[str] | None = None, progress: bool | None = None
    ) -> dict[str, FileDigest]:
        """Copy all files of a local folder here, or only `names`, several at a time; other files here stay.

        Args:
            folder: an existing local folder; links that leave it are an error.
            names: file names relative to the folder.
            progress: show a bar on standard error; None shows one on a terminal only.

        Returns:
            name -> digest of the bytes that were sent.
        """
        from rfdetr_core.storage.local import LocalLocation

        sizes = {info.name: info.size for info in LocalLocation(folder.absolute()).list_files()}
        if not folder.is_dir():
            raise MissingObjectError(f"cannot upload {folder}: no such folder", hint="check the path")
        jobs = [
            Job(name, sizes.get(name, 0), partial((self / name).upload_file, folder / name))
            for name in sorted(sizes if names is None else set(names))
        ]
        return run_jobs(jobs, title=f"upload {self.name}", progress=progress)

    def download_tree(
        self, folder: Path, *, names: Iterable[str] | None = None, progress: bool | None = None
    ) -> dict[str, FileDigest]:
        """Copy all files below, or only `names`, into a local folder, several at a time.

        Args:
            folder: made if absent; its other files stay.
            names: file names relative to this location.
            progress: show a bar on standard error; None shows one on a terminal only.

        Returns:
            name -> digest of the bytes that arrived.

        Raises:
            MissingObjectError: a name is not there, or there is no file at all: an empty or misspelt
                prefix is never a success.
        """
        if names is None:
            sizes = {info.name: info.size for info in self.list_files()}
            if not sizes:
                raise MissingObjectError(f"cannot download {self.uri}: no files there", hint="check the URI")
        else:
            sizes = dict.fromkeys(sorted(set(names)), 0)
        jobs = [Job(name, size, partial((self / name).download_file, folder / name)) for name, size in sizes.items()]
        return run_jobs(jobs, title=f"download {self.name}", progress=progress)

    def conditional_writes_work(self) -> bool:
        """Whether this store honours conditions, found out by writing a probe object that is removed again.

        Some stores accept the condition and overwrite all the same (`rclone serve s3`): nothing but trying
        can tell.
        """
        probe = self / f".probe-{secrets.token_hex(8)}"
        try:
            first = probe.write_if(b"1", None)
            second = probe.write_if(b"2", first)
            return _refuses(probe, None) and _refuses(probe, first) and probe.read_versioned() == (b"2", second)
        except (ConditionsUnsupportedError, VersionConflict):
            return False
        finally:
            probe.delete()


def encode_json(value: Any) -> bytes:
    """The one way in which JSON is written: sorted keys, two spaces, a newline at the end, UTF-8."""
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _refuses(probe: Location, version: str | None) -> bool:
    try:
        probe.write_if(b"3", version)
    except VersionConflict:
        return True
    return False
