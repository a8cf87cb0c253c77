"""Publications: folders that are whole, or that nobody reads.

A folder is published by `_SUCCESS.json`, written last: name, size and SHA-256 of every file, the `inputs`
it was made from, and when. A reader finds the manifest first and holds every file against it, so that an
interrupted, altered or half-replaced publication is refused instead of used (DESIGN sections 1 and 4).

    publish(work, run / "evaluate", inputs=digest)    # upload, then the manifest
    seal(run / "train", inputs=digest)                # the files are there already; only the manifest
    folder = fetch(run / "train", scratch)            # download and verify; a local folder stays where it is
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rfdetr_core.errors import ConfigError, MissingObjectError, PublicationError, StorageUnavailableError
from rfdetr_core.storage import FileDigest, Location, location
from rfdetr_core.storage.base import check_name
from rfdetr_core.storage.local import RESERVED, local_errors
from rfdetr_core.storage.parallel import Job, Tick, run_jobs

MANIFEST = "_SUCCESS.json"

_OWN_KEYS = {"files", "inputs", "created"}
_AGAIN = "re-run the stage that writes it with --force"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What `_SUCCESS.json` says."""

    files: dict[str, FileDigest]
    """Name relative to the publication -> size in bytes and SHA-256."""
    inputs: str
    """Digest of everything the files were made from; the stage decides what that is."""
    created: str
    """When, as ISO 8601 in UTC."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further entries, such as versions; not part of the digest."""

    @property
    def digest(self) -> str:
        """SHA-256 over files and inputs, but neither `created` nor `extra`: equal content, equal digest."""
        said = {"files": _as_json(self.files), "inputs": self.inputs}
        return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def publish(
    folder: Path,
    target: Location,
    *,
    inputs: str,
    extra: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> Manifest:
    """Copy a local folder to `target` and publish it there, in place of an older publication.

    The older manifest goes first and the new one comes last: a reader finds the old publication whole, none,
    or the new one whole. Files that are published there already and equal are not sent again, and the older
    manifest stays valid: two runs that publish the same dataset do not disturb each other's readers.

    Args:
        folder: what to publish; a `_SUCCESS.json` at its top is not part of it.
        target: where to; files there that belong to no publication stay, unlisted.
        inputs: digest of what the files were made from.
        extra: further entries of the manifest.
        progress: show a bar; None shows one on a terminal only.

    Raises:
        PublicationError: the folder has no files.
        StorageAccessError, StorageUnavailableError: see `Location`.
    """
    local = location(str(folder.absolute()))
    sizes = _sizes(local)
    if not sizes:
        raise PublicationError(f"cannot publish {folder} at {target.uri}: it has no files", hint="check the path")
    old = _intact(target)
    if old is not None and {name: known.size for name, known in old.files.items()} == sizes:
        files = _digests(local, sizes, title=f"compare {target.name}", progress=progress)
        if files == old.files and _sizes(target).items() >= sizes.items():
            return _write(target, files, inputs, extra, old)
    unpublish(target)
    files = target.upload_tree(folder, names=sizes, progress=progress)
    if old is not None:
        target.delete_files(old.files.keys() - files.keys())
    return _write(target, files, inputs, extra, None)


def seal(
    target: Location,
    *,
    inputs: str,
    extra: Mapping[str, Any] | None = None,
    known: Mapping[str, FileDigest] | None = None,
    progress: bool | None = None,
) -> Manifest:
    """Publish the files that lie in `target` already, all of them.

    Args:
        target: a folder whose files nobody changes any more.
        inputs: digest of what the files were made from.
        extra: further entries of the manifest.
        known: what `upload_file` returned for files of this folder; the others are read back to be digested.
        progress: show a bar; None shows one on a terminal only.

    Raises:
        PublicationError: there are no files.
        StorageAccessError, StorageUnavailableError: see `Location`.
    """
    sizes = _sizes(target)
    if not sizes:
        raise PublicationError(f"cannot publish {target.uri}: it has no files", hint="check the URI")
    # A known digest of another size is of an older version of the file.
    files = {name: digest for name, digest in (known or {}).items() if sizes.get(name) == digest.size}
    unread = {name: size for name, size in sizes.items() if name not in files}
    files |= _digests(target, unread, title=f"verify {target.name}", progress=progress)
    return _write(target, files, inputs, extra, None)


def unpublish(target: Location) -> None:
    """Remove the manifest, so that nobody reads the files from now on; no error if there is none."""
    (target / MANIFEST).delete()


def read_manifest(target: Location) -> Manifest | None:
    """The manifest, or None if nothing is published there.

    Raises:
        PublicationError: there is one, and it is not in the form that `publish` writes.
    """
    try:
        data = (target / MANIFEST).read_bytes()
    except MissingObjectError:
        return None
    try:
        said = json.loads(data)
        files = {
            check_name(name, where=target.uri): FileDigest(int(entry["size"]), str(entry["sha256"]))
            for name, entry in said["files"].items()
        }
        extra = {key: value for key, value in said.items() if key not in _OWN_KEYS}
        return Manifest(files, str(said["inputs"]), str(said["created"]), extra)
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise PublicationError(
            f"{(target / MANIFEST).uri} is no manifest ({type(error).__name__})", hint=_AGAIN
        ) from None


def manifest_digest(target: Location) -> str:
    """`Manifest.digest` of what is published there; `PublicationError` if nothing is."""
    return _published(target).digest


def fetch(
    target: Location,
    folder: Path,
    *,
    names: Iterable[str] | None = None,
    reuse: bool = False,
    progress: bool | None = None,
) -> Path:
    """Bring a publication here and verify size and SHA-256 of every file of it.

    Args:
        target: a published folder.
        folder: where to download to; made if absent, other files in it stay. A file is visible there only
            once it is verified. Unused if `target` is a local folder: that is verified where it is.
        names: only these files of the manifest.
        reuse: keep files of `folder` that agree with the manifest already.
        progress: show a bar; None shows one on a terminal only.

    Returns:
        The folder in which the files lie.

    Raises:
        PublicationError: nothing is published there, or a file (the first one is named) is missing or differs.
        StorageUnavailableError: as for `Location`, or it was published anew meanwhile.
    """
    manifest = _published(target)
    wanted = dict(sorted(manifest.files.items()))
    if names is not None:
        wanted = {name: _entry(manifest, name, target) for name in sorted(set(names))}
    try:
        if target.local_path is not None:
            _verify(target, wanted, progress)
            return target.local_path
        _download(target, wanted, folder, reuse, progress)
        return folder
    except PublicationError:
        if _intact(target) != manifest:
            raise StorageUnavailableError(
                f"cannot read {target.uri}: it is being published anew", hint="wait for that stage, then try again"
            ) from None
        raise


def _verify(target: Location, wanted: Mapping[str, FileDigest], progress: bool | None) -> None:
    def job(name: str, expected: FileDigest) -> Job[None]:
        def run(tick: Tick) -> None:
            try:
                found = (target / name).digest_file(tick)
            except MissingObjectError:
                raise _missing(target, name) from None
            _compare(target, name, found, expected)

        return Job(name, expected.size, run)

    run_jobs([job(*item) for item in wanted.items()], title=f"verify {target.name}", progress=progress)


def _download(
    target: Location, wanted: Mapping[str, FileDigest], folder: Path, reuse: bool, progress: bool | None
) -> None:
    here = location(str(folder.absolute()))

    def job(name: str, expected: FileDigest, scratch: Path) -> Job[None]:
        final, unverified = folder / name, scratch / name

        def run(tick: Tick) -> None:
            if reuse and _same_size(final, expected) and (here / name).digest_file(tick) == expected:
                return
            try:
                found = (target / name).download_file(unverified, tick)
            except MissingObjectError:
                raise _missing(target, name) from None
            _compare(target, name, found, expected)
            with local_errors("write", final):
                final.parent.mkdir(parents=True, exist_ok=True)
                unverified.replace(final)

        return Job(name, expected.size, run)

    with local_errors("write", folder):
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=f"{RESERVED}fetch-") as scratch:
            jobs = [job(name, expected, Path(scratch)) for name, expected in wanted.items()]
            run_jobs(jobs, title=f"fetch {target.name}", progress=progress)


def _same_size(path: Path, expected: FileDigest) -> bool:
    return path.is_file() and path.stat().st_size == expected.size


def _compare(target: Location, name: str, found: FileDigest, expected: FileDigest) -> None:
    if found.size != expected.size:
        problem = f"has {found.size} bytes, and {expected.size} were published"
    elif found.sha256 != expected.sha256:
        problem = f"has SHA-256 {found.sha256[:12]}…, and {expected.sha256[:12]}… was published"
    else:
        return
    raise PublicationError(f"{(target / name).uri} {problem}", hint=_AGAIN)


def _missing(target: Location, name: str) -> PublicationError:
    return PublicationError(f"{(target / name).uri} was published, and is missing", hint=_AGAIN)


def _entry(manifest: Manifest, name: str, target: Location) -> FileDigest:
    if name not in manifest.files:
        raise PublicationError(f"{target.uri} is published without {name!r}", hint=_AGAIN)
    return manifest.files[name]


def _published(target: Location) -> Manifest:
    manifest = read_manifest(target)
    if manifest is None:
        raise PublicationError(
            f"{target.uri} is not published: it has no {MANIFEST}", hint="run the stage that writes it to its end"
        )
    return manifest


def _intact(target: Location) -> Manifest | None:
    """The manifest there, if there is one that can be read."""
    try:
        return read_manifest(target)
    except PublicationError:
        return None


def _sizes(target: Location) -> dict[str, int]:
    return {info.name: info.size for info in target.list_files() if info.name != MANIFEST}


def _digests(target: Location, sizes: Mapping[str, int], *, title: str, progress: bool | None) -> dict[str, FileDigest]:
    jobs = [Job(name, size, (target / name).digest_file) for name, size in sizes.items()]
    return run_jobs(jobs, title=title, progress=progress)


def _write(
    target: Location,
    files: Mapping[str, FileDigest],
    inputs: str,
    extra: Mapping[str, Any] | None,
    old: Manifest | None,
) -> Manifest:
    extra = dict(extra or {})
    if taken := _OWN_KEYS & extra.keys():
        raise ValueError(f"the manifest says {sorted(taken)} itself")
    if old is not None and (old.inputs, old.extra) == (inputs, extra):
        return old
    created = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = Manifest(dict(sorted(files.items())), inputs, created, extra)
    (target / MANIFEST).write_json({**extra, "files": _as_json(files), "inputs": inputs, "created": created})
    return manifest


def _as_json(files: Mapping[str, FileDigest]) -> dict[str, dict[str, int | str]]:
    return {name: {"size": known.size, "sha256": known.sha256} for name, known in files.items()}
