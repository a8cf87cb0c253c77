"""Unpacks .zip and .tar archives; a member that would land outside, a link or a device refuses the whole archive."""

from __future__ import annotations

import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from lzma import LZMAError
from pathlib import Path
from typing import IO, Any

from rfdetr_core.errors import DatasetError, RFDETRError
from rfdetr_core.storage.base import is_printable
from rfdetr_core.storage.local import local_errors

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_MEMBERS = 5_000_000


@dataclass(frozen=True)
class _Member:
    """A file in an archive: where it goes, its size as declared, and how to read it."""

    name: str
    size: int
    open: Any  # () -> IO[bytes]


def is_archive(name: str) -> bool:
    """Whether a file of this name is taken for an archive."""
    return name.lower().endswith(SUFFIXES)


def unpack(path: Path, folder: Path, max_bytes: float) -> None:
    """Unpack all files of an archive into a new folder.

    Raises:
        DatasetError: it is broken or encrypted, has a member that leads out of it, a link or a device, one name
            twice, or more than `max_bytes` of content.
        StorageAccessError: the folder cannot be written, or the disk is full.
    """
    seen: set[str] = set()
    total = 0
    try:
        with ExitStack() as stack:
            members = _zip_members(path, stack) if path.name.lower().endswith(".zip") else _tar_members(path, stack)
            for member in members:
                name = _legal(member.name, path)
                if name.casefold() in seen:
                    raise DatasetError(f"{path}: {name!r} is in it twice", hint="pack it again")
                seen.add(name.casefold())
                if len(seen) > MAX_MEMBERS:
                    raise DatasetError(f"{path}: more than {MAX_MEMBERS} files", hint="split the dataset")
                total += _copy(member, folder / name, max_bytes - total, path)
    except RFDETRError:
        raise
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, LZMAError, EOFError, OSError, ValueError) as error:
        raise DatasetError(f"{path}: {_why(error)}", hint="pack or upload it again") from error
    except (RuntimeError, NotImplementedError) as error:  # encrypted, or an unknown method
        raise DatasetError(f"{path}: {_why(error)}", hint="pack it as a plain .zip or .tar") from error
    if not seen:
        raise DatasetError(f"{path}: holds no files", hint="pack it again")


def _zip_members(path: Path, stack: ExitStack) -> Iterator[_Member]:
    archive = stack.enter_context(zipfile.ZipFile(path))
    for info in archive.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise _special(path, info.filename)
        if not info.is_dir():
            yield _Member(info.filename, info.file_size, partial(archive.open, info))
        else:
            _legal(info.filename.rstrip("/"), path)


def _tar_members(path: Path, stack: ExitStack) -> Iterator[_Member]:
    # As a stream: what follows a member is not looked for before it is read.
    archive = stack.enter_context(tarfile.open(path, "r:*"))  # noqa: SIM115
    for info in archive:
        if not (info.isreg() or info.isdir()):
            raise _special(path, info.name)
        if info.isreg():
            yield _Member(info.name, info.size, partial(archive.extractfile, info))
        elif info.name not in (".", "./"):
            _legal(info.name, path)
        archive.members = []  # type: ignore[attr-defined]  # or every member stays in memory


def _legal(name: str, path: Path) -> str:
    plain = name.removeprefix("./")
    parts = plain.split("/")
    if not is_printable(plain) or "\\" in plain or any(part in ("", ".", "..") for part in parts):
        raise DatasetError(
            f"{path}: the member {name[:80]!r} leads out of it or has no plain name", hint="pack it anew"
        )
    return plain


def _copy(member: _Member, target: Path, most: float, path: Path) -> int:
    written = 0
    with local_errors("write", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        out = target.open("xb")
    with out:
        reader: IO[bytes] | None = member.open()
        if reader is None:
            raise _special(path, member.name)
        with reader:
            while chunk := reader.read(1 << 20):
                written += len(chunk)
                if written > most:
                    shutil.rmtree(target.parent, ignore_errors=True)
                    raise DatasetError(
                        f"{path}: unpacks to more than allowed", hint="raise dataset.max_unpacked_gb if it is meant so"
                    )
                with local_errors("write", target):
                    out.write(chunk)
    return written


def _special(path: Path, name: str) -> DatasetError:
    return DatasetError(f"{path}: the member {name[:80]!r} is a link or a device", hint="pack the files themselves")


def _why(error: Exception) -> str:
    return f"not a whole archive: {' '.join(str(error).split()) or type(error).__name__}"
