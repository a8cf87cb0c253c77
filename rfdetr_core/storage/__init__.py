"""URIs, and what lies behind them: S3 (any store that speaks it) and local folders, with one surface.

    root = location("s3://models/demo")     # or file:///data/demo, or a plain path
    (root / "runs/r1/config.yaml").write_bytes(b"...")
    root.download_tree(Path("copy"))

The only package that imports boto3, and only when the first S3 location is used.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from rfdetr_core.errors import ConfigError
from rfdetr_core.storage.base import FileDigest, FileInfo, Location, encode_json, is_printable
from rfdetr_core.storage.local import LocalLocation
from rfdetr_core.storage.s3 import S3Location

__all__ = ["FileDigest", "FileInfo", "Location", "encode_json", "location"]

_LEGAL = "for example s3://bucket/prefix, file:///folder or a path"
# What botocore lets pass, less names that are no names; Amazon's own rule is narrower, Ceph's is not.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]")
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*):(?P<slashes>/*)(?P<rest>.*)", re.DOTALL)


def location(uri: str) -> Location:
    """The location that a URI names; nothing is read.

    Args:
        uri: `s3://bucket/prefix`, `file:///absolute/path` (percent-encoded as in RFC 8089), or a plain path,
            where a relative one is relative to the current folder and a leading `~/` is the home folder.

    Raises:
        ConfigError: another scheme, a bucket or key that cannot be, or an empty or unprintable URI.
    """
    if not uri or not is_printable(uri):
        raise ConfigError(f"{uri!r} is no legal URI", hint=_LEGAL)
    match = _SCHEME.fullmatch(uri)
    scheme = match["scheme"].lower() if match else ""
    if match and scheme == "s3":
        return _s3(uri, match["slashes"], match["rest"])
    if match and scheme == "file":
        return _file(uri, match["slashes"], match["rest"])
    if match and match["slashes"]:
        raise ConfigError(f"{uri!r}: storage in {scheme!r} is not supported", hint=_LEGAL)
    return LocalLocation(_absolute(uri))


def _s3(uri: str, slashes: str, rest: str) -> S3Location:
    bucket, _, key = rest.partition("/")
    if slashes != "//" or not _BUCKET.fullmatch(bucket) or ".." in bucket:
        raise ConfigError(f"{uri!r} names no bucket", hint="for example s3://bucket/prefix")
    key = key.removesuffix("/")
    if key and any(part in ("", ".", "..") for part in key.split("/")):
        clean = "/".join(part for part in key.split("/") if part not in ("", ".", ".."))
        raise ConfigError(f"{uri!r} has an empty, '.' or '..' part", hint=f"for example s3://{bucket}/{clean}")
    return S3Location(bucket, key)


def _file(uri: str, slashes: str, rest: str) -> LocalLocation:
    path = unquote(f"/{rest}", errors="surrogateescape")
    if slashes != "///" or not is_printable(path):
        raise ConfigError(f"{uri!r} is no absolute path on this machine", hint="for example file:///data/models")
    return LocalLocation(_absolute(path))


def _absolute(text: str) -> Path:
    path = Path(text)
    if text == "~" or text.startswith("~/"):
        try:
            path = path.expanduser()
        except RuntimeError:
            raise ConfigError(f"{text!r}: this user has no home folder", hint="write the path in full") from None
    # Resolved only where it must be: messages show the path that the user wrote.
    return path.resolve() if ".." in path.parts else path.absolute()
