"""Where pretrained weights come from: a path, a published name, S3 or the web; and how they come into the store.

    fetch_weights("rf-detr-nano.pth")                              # the cache folder, else the publisher
    fetch_weights("s3://bucket/weights/<md5>/rf-detr-nano.pth")
    store_weights(path, md5, location("s3://bucket"))              # for pods without internet

Loads no torch: the first stage of a pipeline fetches weights as well.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import logging
import os
import re
import ssl
import time
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit

from rfdetr_core.errors import (
    CheckpointError,
    ConfigError,
    MissingObjectError,
    StorageAccessError,
    StorageUnavailableError,
)
from rfdetr_core.models.published import PUBLISHED, PublishedFile
from rfdetr_core.storage import Location, location
from rfdetr_core.storage.base import CHUNK, is_printable
from rfdetr_core.storage.local import LocalLocation, local_errors
from rfdetr_core.storage.s3 import S3Location
from rfdetr_core.storage.s3_client import s3_session
from rfdetr_core.storage.s3_errors import s3_errors

ATTEMPTS = 4
"""Tries in a row that bring no further byte, before a download is given up."""
PAUSE = 0.5
"""Seconds before the first repetition; each further one waits twice as long."""
TIMEOUT = 30.0
"""Seconds without an answer, or without a byte of it."""

_LEGAL = "for example https://example.org/weights.pth"

log = logging.getLogger(__name__)


def fetch_weights(source: str | os.PathLike[str], *, cache: Path | None = None) -> Path:
    """The local path of weights, which are downloaded at most once.

    Args:
        source: a path or file:// URI; the name of a published file (model spec 1.3), which the current folder
            and the cache folder are searched for before it is downloaded; an s3://, https:// or http:// URI.
        cache: folder of what is downloaded. Default: $RF_HOME, else $ROBOFLOW_HOME, else ~/.roboflow/models.

    Raises:
        ConfigError: no legal source, or an address with a user name or password in it, which is not repeated.
        MissingObjectError: there is no such file; the message says where it was looked for.
        StorageAccessError: refused, or the cache folder cannot be written.
        CheckpointError: a published file arrived with another MD5 than the published one.
        StorageUnavailableError: the network failed; worth a retry.
    """
    text = os.fspath(source)
    if re.match(r"[\w+.-]+:/{1,2}[^/?#]*@", text):
        raise ConfigError(
            "the address of the weights holds a user name or password, which would not be sent",
            hint="download the file, and give its path",
        )
    scheme = text.partition("://")[0].lower() if "://" in text else ""
    if scheme == "s3":
        return _from_s3(text, cache or cache_folder())
    if scheme in ("http", "https"):
        known = next((file for file in PUBLISHED.values() if file.url == text), None)
        return _published(known, cache or cache_folder()) if known else _from_web(text, cache or cache_folder())
    path = location(text).local_path
    if path is None:
        raise ConfigError(f"{text!r} is no source of weights", hint="give a path, a published name or an s3:// URI")
    if path.is_file():
        return _verified(path)
    if Path(text).name != text or path.is_dir():
        raise _missing(path)
    folder = cache or cache_folder()
    if (folder / text).is_file():
        return _verified(folder / text)
    if text in PUBLISHED:
        return _published(PUBLISHED[text], folder)
    raise MissingObjectError(
        f"{text}: neither in the current folder nor in {folder}, nor a published file",
        hint=f"published are {', '.join(name for name in PUBLISHED if not re.search('seg|keypoint', name))}",
    )


def cache_folder() -> Path:
    """Where upstream keeps weights too, so that nothing is downloaded twice.

    Raises:
        ConfigError: $RF_HOME is no local folder, or neither it nor a home folder is there.
    """
    chosen = os.environ.get("RF_HOME") or os.environ.get("ROBOFLOW_HOME") or "~/.roboflow/models"
    path = location(chosen).local_path
    if path is None:
        raise ConfigError(f"{chosen!r} cannot keep downloaded weights", hint="set RF_HOME to a local folder")
    return path


_STORED = re.compile(r"(?:^|/)weights/([0-9a-f]{32})/[^/]+$")
"""Where `store_weights` puts files."""


def store_weights(path: Path, md5: str, root: Location) -> tuple[Location, bool]:
    """Bring a weight file to `<root>/weights/<md5>/<file name>`, unless it is there already.

    One object, which the store shows whole or not at all. One of the same size is read to compare its content:
    nothing else tells that a file which all later runs begin with is the one it is named after.

    Returns:
        Its place, and whether it was sent now.
    """
    folder = root / f"weights/{md5}"
    place = folder / path.name
    with local_errors("read", path):
        size = path.stat().st_size
    there = any((info.name, info.size) == (path.name, size) for info in folder.list_files())
    if there and place.digest_file() == LocalLocation(path.absolute()).digest_file():
        return place, False
    place.upload_file(path)
    return place, True


# Sources


def _verified(path: Path) -> Path:
    """A file that is here already: under a published name it may be the user's own, so it is only remarked on."""
    known = PUBLISHED.get(path.name)
    if known is not None and (found := _md5(path)) != known.md5:
        warnings.warn(
            f"{path} is not the published file of that name: its MD5 is {found}, the published one {known.md5}; "
            "it is used as it is",
            UserWarning,
            stacklevel=3,
        )
    return path


def _missing(path: Path) -> MissingObjectError:
    if path.is_dir():
        return MissingObjectError(f"{path}: is a folder", hint="give the path of a file in it")
    known = path.name in PUBLISHED
    hint = f"for the published file give its bare name, {path.name}" if known else "check the path"
    return MissingObjectError(f"{path}: no such file", hint=hint)


def _published(file: PublishedFile, folder: Path) -> Path:
    path = folder / file.name
    if path.is_file():
        return _verified(path)
    try:
        _download(file.url, path, file.md5)
    except (StorageUnavailableError, StorageAccessError) as error:
        put = f"rfdetr-pipeline weights put {file.name} --root s3://..."
        hint = f"put {file.name} into {folder}, or, where there is internet, bring it into the store with: {put}"
        raise type(error)(error.message, hint=hint) from None
    return path


def _from_s3(uri: str, folder: Path) -> Path:
    """Kept under the object's version: a replaced object is fetched anew."""
    place = location(uri)
    assert isinstance(place, S3Location)
    session = s3_session()
    with s3_errors("read", place.uri, place.bucket, session.endpoint):
        head = session.client.head_object(Bucket=place.bucket, Key=place.key)
    version = _digest(f"{session.endpoint} {place.uri} {head['ETag']} {head['ContentLength']}")
    path = folder / "s3" / version / place.name
    if not path.is_file():
        place.download_file(path)
    return _arrived(path, place.uri)


def _from_web(url: str, folder: Path) -> Path:
    """Kept under the address, and asked for again only if the server names another version (ETag)."""
    try:
        parts = urlsplit(url)
        name = unquote(parts.path).rpartition("/")[2]
        legal = bool(parts.hostname and name) and parts.port != 0 and is_printable(url + name)
    except ValueError:  # brackets that do not match, or a port that is no number
        legal = False
    if not legal:
        raise ConfigError("the address of the weights names no file", hint=_LEGAL)
    path = folder / "web" / _digest(url) / name
    if not (path.is_file() and _unchanged(url, path)):
        _download(url, path)
    return _arrived(path, _shown(url))


def _arrived(path: Path, address: str) -> Path:
    """A download that is what its address says, if that holds the MD5, as `store_weights` makes it."""
    named = _STORED.search(address)
    if named is not None and (found := _md5(path)) != named[1]:
        path.unlink()
        _etag_file(path).unlink(missing_ok=True)
        raise CheckpointError(
            f"{address}: has MD5 {found}, and its address names another one", hint="bring it into the store again"
        )
    return _verified(path)


def _unchanged(url: str, path: Path) -> bool:
    """Whether the server still has the version of an earlier download."""
    etag = _read_etag(path)
    if not etag:
        return False
    try:
        with _answer(url, headers={"If-None-Match": etag}) as answer:
            return bool(answer.status == 304)
    except _BrokenOffError as error:
        warnings.warn(
            f"{_shown(url)} {error}: the copy of an earlier download is used, {path}", UserWarning, stacklevel=4
        )
        return True


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _md5(path: Path) -> str:
    with local_errors("read", path), path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


# HTTP


class _BrokenOffError(Exception):
    """No answer, or not all of it: worth another try."""


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """An encrypted address must not lead to an unencrypted one, and neither to another protocol."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        scheme = urlsplit(newurl).scheme.lower()
        if scheme != "https" and (scheme != "http" or req.type == "https"):
            raise StorageAccessError(
                f"{_shown(req.full_url)} leads to {_shown(newurl)}, which is not safe", hint="give the final address"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(url: str, path: Path, md5: str | None = None) -> None:
    """Fetch `url` to `path`, which appears once it is whole; a `.part` file is continued, now or next time."""
    part = path.with_name(f"{path.name}.part")
    with local_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.stat() if path.exists() else None
        with _locked(part) as file:
            if path.exists() and (before is None or not os.path.samestat(before, path.stat())):
                part.unlink()  # another process was faster
                return
            started = time.monotonic()
            log.info("downloading %s", _shown(url))
            try:
                _fetch(url, file, part)
            except BaseException:
                if file.seek(0, os.SEEK_END) == 0:  # nothing to continue from
                    part.unlink()
                    _etag_file(part).unlink(missing_ok=True)
                raise
            file.flush()
            os.fsync(file.fileno())
            found = _md5(part) if md5 is not None else None
            if found != md5:
                part.unlink()
                _etag_file(part).unlink(missing_ok=True)
                raise CheckpointError(
                    f"{_shown(url)}: what arrived has MD5 {found}, and {md5} is published; it was removed",
                    hint="try again; if it stays so, something on the way alters it",
                )
            part.replace(path)
            if md5 is not None:
                _etag_file(part).unlink(missing_ok=True)  # a published file has one version only
            elif _etag_file(part).exists():
                _etag_file(part).replace(_etag_file(path))
            log.info("downloaded %s in %.1f s", path, time.monotonic() - started)


@contextmanager
def _locked(part: Path) -> Iterator[BinaryIO]:
    """The `.part` file, for this process alone; a second one that wants the same file waits."""
    while True:
        with part.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever held it may have moved it to its final name, or removed it, meanwhile.
            if part.exists() and os.path.samestat(os.fstat(file.fileno()), part.stat()):
                yield file
                return


def _fetch(url: str, file: BinaryIO, part: Path) -> None:
    """Repeat until all bytes are there, or `ATTEMPTS` tries in a row brought none."""
    furthest, failures = file.seek(0, os.SEEK_END), 0
    while True:
        try:
            return _continue(url, file, part)
        except _BrokenOffError as error:
            size = file.seek(0, os.SEEK_END)
            furthest, failures = (size, 0) if size > furthest else (furthest, failures + 1)
            if failures >= ATTEMPTS:
                raise StorageUnavailableError(
                    f"cannot read {_shown(url)}: {error}", hint="check the network, and try again"
                ) from None
            log.info("%s %s: trying again", _shown(url), error)
            time.sleep(PAUSE * 2 ** max(failures - 1, 0))


def _continue(url: str, file: BinaryIO, part: Path) -> None:
    """One request: from where the `.part` file ends if the server still has that version, else from the start."""
    from tqdm import tqdm

    have, etag = file.seek(0, os.SEEK_END), _read_etag(part)
    # A weak ETag stands for equal content, not for equal bytes: nothing can be appended on its word.
    strong = etag and not etag.startswith("W/")
    resume = {"Range": f"bytes={have}-", "If-Range": etag} if have and strong else {}
    with _answer(url, headers=resume) as answer:
        total = _announced(answer)
        if answer.status == 416 and total == have:
            return  # it was whole already, and not yet renamed
        if answer.status != 206 or not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            file.truncate(0)
            _etag_file(part).write_text(answer.headers.get("ETag") or "")
            if answer.status != 200:
                raise _BrokenOffError(f"answers with status {answer.status} to a request for the rest of the file")
            have = 0
        with tqdm(
            total=total, initial=have, desc=part.name.removesuffix(".part"), unit="B", unit_scale=True, disable=None
        ) as bar:
            while chunk := _read(answer):
                file.write(chunk)
                have += len(chunk)
                bar.update(len(chunk))
    file.flush()
    if total is not None and have != total:
        raise _BrokenOffError(f"broke off after {have} of {total} bytes")


def _announced(answer: Any) -> int | None:
    """Size of the whole file, where the server says it."""
    text = answer.headers.get("Content-Range", "").rpartition("/")[2] or answer.headers.get("Content-Length", "")
    return int(text) if text.isdecimal() else None


def _read(answer: Any) -> bytes:
    try:
        chunk: bytes = answer.read1(CHUNK)  # what is there: `read` would lose a chunk that is not whole
        return chunk
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenOffError(f"broke off: {_cause(error)}") from None


@contextmanager
def _answer(url: str, *, headers: dict[str, str] | None = None, method: str = "GET") -> Iterator[Any]:
    """The answer of a server that has the file."""
    opener = urllib.request.build_opener(_SafeRedirects)
    given = {"Accept-Encoding": "identity", "User-Agent": "rfdetr-pipeline", **(headers or {})}
    try:
        answer = opener.open(urllib.request.Request(url, headers=given, method=method), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code not in (304, 416):  # answers to conditions and ranges that were asked for
            error.close()
            raise _refused(url, error.code) from None
        answer = error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _no_answer(url, error) from None
    with answer:
        yield answer


def _refused(url: str, status: int) -> Exception:
    what = f"cannot read {_shown(url)}"
    if status in (404, 410):
        return MissingObjectError(f"{what}: no such file (status {status})", hint="check the address")
    if status >= 500 or status in (408, 429):
        return _BrokenOffError(f"answers with status {status}")
    return StorageAccessError(
        f"{what}: refused with status {status}", hint="check the address and your right to read it"
    )


def _no_answer(url: str, error: Exception) -> Exception:
    reason = error.reason if isinstance(error, URLError) else error
    if isinstance(reason, ssl.SSLCertVerificationError):
        return StorageAccessError(
            f"cannot read {_shown(url)}: the server's certificate is not trusted",
            hint="set SSL_CERT_FILE to the file with its certificate authority",
        )
    if isinstance(reason, OSError | http.client.HTTPException | str) and not isinstance(reason, http.client.InvalidURL):
        return _BrokenOffError(f"cannot be reached: {_cause(reason)}")
    return ConfigError("the address of the weights is not legal", hint=_LEGAL)


def _cause(error: Exception | str) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__


def _shown(url: str) -> str:
    """Without what may be secret: a user's password, and the signature in a query."""
    parts = urlsplit(url)
    return ascii(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")[1:-1]


def _etag_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.etag")


def _read_etag(path: Path) -> str:
    """The server's name for the version of the bytes in `path`, if it gave one."""
    try:
        return _etag_file(path).read_text()
    except FileNotFoundError:
        return ""
