"""Locations in an S3 bucket."""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self, TypeVar

from rfdetr_core.errors import ConfigError, VersionConflict
from rfdetr_core.storage.base import (
    CHUNK,
    ConditionsUnsupportedError,
    FileDigest,
    FileInfo,
    Location,
    check_name,
    check_range,
)
from rfdetr_core.storage.local import atomic_file, local_errors
from rfdetr_core.storage.parallel import Tick, ignore
from rfdetr_core.storage.s3_client import PART_BYTES, S3Session, s3_session
from rfdetr_core.storage.s3_errors import error_code, http_status, s3_errors

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from mypy_boto3_s3.type_defs import GetObjectOutputTypeDef

T = TypeVar("T")

BODY_ATTEMPTS = 3
"""botocore repeats a request until its answer begins; a body that breaks off is ours to ask for again."""

DELETE_BATCH = 1000
"""Most keys in one DeleteObjects request (S3 API)."""


@dataclass(frozen=True, slots=True)
class S3Location(Location):
    """The object `key` in `bucket`, and all objects under `key/`; an empty key is the bucket itself."""

    bucket: str
    key: str

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.key}" if self.key else f"s3://{self.bucket}"

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2] or self.bucket

    @property
    def local_path(self) -> Path | None:
        return None

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str) -> Self:
        return type(self)(self.bucket, self._prefix + check_name(name, where=self.uri))

    def read_bytes(self) -> bytes:
        with self._errors("read") as s3:
            return self._get(s3, _body)

    def read_range(self, offset: int, length: int) -> bytes:
        check_range(offset, length)
        from botocore.exceptions import ClientError

        # An empty range cannot be said in HTTP: one byte is asked for and dropped.
        wanted = f"bytes={offset}-{offset + max(length, 1) - 1}"
        with self._errors("read") as s3:
            try:
                return self._get(s3, _body, Range=wanted)[:length]
            except ClientError as error:
                if http_status(error) == 416:  # the file ends before `offset`
                    return b""
                raise

    def write_bytes(self, data: bytes) -> None:
        with self._errors("write") as s3:
            s3.client.put_object(Bucket=self.bucket, Key=self._file, Body=data, ContentType=self._type)

    def exists(self) -> bool:
        from botocore.exceptions import ClientError

        with self._errors("look for") as s3:
            if self.key:
                try:
                    s3.client.head_object(Bucket=self.bucket, Key=self.key)
                    return True
                except ClientError as error:
                    if http_status(error) != 404:
                        raise
            # Also tells a missing bucket from a missing file, which HEAD cannot.
            found = s3.client.list_objects_v2(Bucket=self.bucket, Prefix=self._prefix, MaxKeys=1)
            return bool(found.get("Contents"))

    def entity_tag(self) -> str:
        with self._errors("look for") as s3:
            return s3.client.head_object(Bucket=self.bucket, Key=self._file).get("ETag", "")

    def delete(self) -> None:
        with self._errors("delete") as s3:
            s3.client.delete_object(Bucket=self.bucket, Key=self._file)

    def read_versioned(self) -> tuple[bytes, str]:
        with self._errors("read") as s3:
            return self._get(s3, lambda answer: (_body(answer), answer["ETag"]))

    def write_if(self, data: bytes, version: str | None) -> str:
        from botocore.exceptions import ClientError

        condition: Any = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        with self._errors("write") as s3:
            try:
                answer = s3.client.put_object(
                    Bucket=self.bucket, Key=self._file, Body=data, ContentType=self._type, **condition
                )
                return answer["ETag"]
            except ClientError as error:
                status = http_status(error)
                gone = version is not None and error_code(error) == "NoSuchKey"
                if status == 501:
                    raise ConditionsUnsupportedError(
                        f"cannot write {self.uri}: the store has no conditional writes",
                        hint="use another store",
                    ) from None
                if status not in (409, 412) and not gone:
                    raise
                retried = bool(error.response["ResponseMetadata"].get("RetryAttempts"))
        # A request whose answer was lost is repeated by botocore, and then refused because of itself.
        if retried and not gone:
            present, now = self.read_versioned()
            if present == data:
                return now
        raise VersionConflict(
            f"cannot write {self.uri}: another writer came first", hint="read it again, then decide again"
        )

    def list_files(self) -> list[FileInfo]:
        files = []
        for key, size, tag in self._objects():
            name = key.removeprefix(self._prefix)
            # 'folder/' objects of no bytes are how consoles draw an empty folder.
            if size or not key.endswith("/"):
                files.append(FileInfo(check_name(name, where=self.uri), size, tag))
        return sorted(files, key=lambda info: info.name)

    def delete_files(self, names: Iterable[str]) -> None:
        self._delete_keys([(self / name).key for name in names])

    def delete_tree(self) -> None:
        if not self.key:
            raise ConfigError(f"refusing to delete all of {self.uri}", hint="name a folder below it")
        self._delete_keys([key for key, _, _ in self._objects()])

    def upload_file(self, path: Path, tick: Tick = ignore) -> FileDigest:
        with local_errors("read", path), path.open("rb") as file, self._errors("write") as s3:
            reader = _HashingReader(file, tick)
            if path.stat().st_size <= PART_BYTES:
                s3.client.put_object(Bucket=self.bucket, Key=self._file, Body=reader.read(), ContentType=self._type)
            else:
                # A reader that cannot seek is read once and in order, so that the digest is of what was sent.
                body: Any = reader
                s3.transfers.upload(body, self.bucket, self._file, {"ContentType": self._type}).result()
            return reader.digest()

    def download_file(self, path: Path, tick: Tick = ignore) -> FileDigest:
        with local_errors("write", path), atomic_file(path, durable=False) as file, self._errors("read") as s3:
            # Most files come whole with the first answer; a large one is then asked for in parts.
            data = self._get(s3, lambda answer: None if answer["ContentLength"] > PART_BYTES else _body(answer))
            if data is None:
                progress: Any = _Progress(tick)
                s3.transfers.download(self.bucket, self._file, file, subscribers=[progress]).result()
            else:
                file.write(data)
                tick(len(data))
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return FileDigest(file.tell(), digest)

    def digest_file(self, tick: Tick = ignore) -> FileDigest:
        def read(answer: GetObjectOutputTypeDef) -> FileDigest:
            reader = _HashingReader(answer["Body"], tick)
            while reader.read(CHUNK):
                pass
            return reader.digest()

        with self._errors("read") as s3:
            return self._get(s3, read)

    @property
    def _prefix(self) -> str:
        return f"{self.key}/" if self.key else ""

    @property
    def _file(self) -> str:
        if not self.key:
            raise ConfigError(f"{self.uri} is a bucket, and a file is wanted", hint=f"for example {self.uri}/a.json")
        return self.key

    @property
    def _type(self) -> str:
        # So that a browser shows a report instead of downloading it.
        return mimetypes.guess_type(self.key)[0] or "application/octet-stream"

    @contextmanager
    def _errors(self, action: str) -> Iterator[S3Session]:
        session = s3_session()
        with s3_errors(action, self.uri, self.bucket, session.endpoint):
            yield session

    def _get(self, s3: S3Session, use: Callable[[GetObjectOutputTypeDef], T], **request: Any) -> T:
        """What `use` makes of the answer; it starts over when the body breaks off."""
        from botocore.exceptions import HTTPClientError, IncompleteReadError

        for attempt in count(1):
            answer = s3.client.get_object(Bucket=self.bucket, Key=self._file, **request)
            # Not `with body`: that hands out the raw stream, which takes a truncated body for a whole one.
            with closing(answer["Body"]):
                try:
                    return use(answer)
                except (HTTPClientError, IncompleteReadError):
                    if attempt == BODY_ATTEMPTS:
                        raise
        raise AssertionError("count() does not end")

    def _objects(self) -> Iterator[tuple[str, int, str]]:
        """Key, size and entity tag."""
        with self._errors("list") as s3:
            for page in s3.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._prefix):
                for item in page.get("Contents", []):
                    yield item["Key"], item["Size"], item.get("ETag", "")

    def _delete_keys(self, keys: Sequence[str]) -> None:
        from botocore.exceptions import ClientError

        with self._errors("delete") as s3:
            for start in range(0, len(keys), DELETE_BATCH):
                batch: Any = {
                    "Objects": [{"Key": key} for key in keys[start : start + DELETE_BATCH]],
                    "Quiet": True,
                }
                failed = s3.client.delete_objects(Bucket=self.bucket, Delete=batch).get("Errors")
                if failed:
                    # One answer for many keys: give it the form in which a single request fails.
                    status = 403 if failed[0].get("Code") == "AccessDenied" else 400
                    answer: Any = {"Error": failed[0], "ResponseMetadata": {"HTTPStatusCode": status}}
                    raise ClientError(answer, "DeleteObjects")


def _body(answer: GetObjectOutputTypeDef) -> bytes:
    return answer["Body"].read()


class _HashingReader:
    """Reads a file once, in order, and remembers the digest of what it gave away."""

    def __init__(self, file: BinaryIO | StreamingBody, tick: Tick) -> None:
        self._file, self._tick = file, tick
        self._hash, self._size = hashlib.sha256(), 0

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._hash.update(data)
        self._size += len(data)
        self._tick(len(data))
        return data

    def digest(self) -> FileDigest:
        return FileDigest(self._size, self._hash.hexdigest())


class _Progress:
    """A subscriber of s3transfer that passes on the bytes."""

    def __init__(self, tick: Tick) -> None:
        self._tick = tick

    def on_progress(self, bytes_transferred: int, **_: Any) -> None:
        self._tick(bytes_transferred)
