"""The S3 client of this process: made from the usual AWS environment and configuration files.

Endpoint, credentials, profile, CA bundle and proxy are found by botocore (AWS_ENDPOINT_URL(_S3),
AWS_PROFILE, ~/.aws/config, AWS_CA_BUNDLE, web identity, …). What differs from its defaults:

* signature v4, and checksums only where the operation requires them: rclone, Ceph and older MinIO answer
  botocore's own choice (a CRC32 on everything) with errors.
* AWS_REGION counts, before AWS_DEFAULT_REGION; without any region it is us-east-1.
* path-style addresses when the endpoint is not Amazon's, unless ~/.aws/config says otherwise;
  RFDETR_S3_ADDRESSING_STYLE (path, virtual, auto) goes first.
* three attempts and 2.5 s to connect, unless AWS_MAX_ATTEMPTS says otherwise: an endpoint that does not
  answer is reported within about ten seconds.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rfdetr_core.errors import ConfigError, StorageAccessError
from rfdetr_core.storage.s3_errors import credentials_error

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from s3transfer.manager import TransferManager

STYLE_VARIABLE = "RFDETR_S3_ADDRESSING_STYLE"
STYLES = ("path", "virtual", "auto")

PART_BYTES = 8 * 1024 * 1024
"""Larger files travel in parts of this size; S3's limit of 10 000 parts makes 80 GB the largest file."""


@dataclass(frozen=True, slots=True)
class S3Session:
    """A client and the transfer manager on top of it, both safe to use from several threads."""

    client: S3Client
    transfers: TransferManager
    endpoint: str
    """scheme://host:port, without credentials that someone may have put into the URL."""


class _Sessions:
    """One session per environment: tests and the local pipeline change endpoints within a process."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.by_environment: dict[tuple[tuple[str, str], ...], S3Session] = {}


_sessions = _Sessions()


def _forget() -> None:
    global _sessions
    _sessions = _Sessions()


# A forked child must not share sockets, pool threads or a held lock with its parent.
os.register_at_fork(after_in_child=_forget)


def s3_session() -> S3Session:
    """The session of this process for the present environment.

    Raises:
        ConfigError: a setting is malformed.
        StorageAccessError: the named AWS profile does not exist.
    """
    relevant = {STYLE_VARIABLE, "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "HOME"}
    key = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_") or k.upper() in relevant))
    sessions = _sessions
    with sessions.lock:
        if key not in sessions.by_environment:
            sessions.by_environment[key] = _connect()
        return sessions.by_environment[key]


def _connect() -> S3Session:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ProfileNotFound
    from botocore.session import Session
    from s3transfer.manager import TransferConfig, TransferManager

    style = os.environ.get(STYLE_VARIABLE, "")
    if style and style not in STYLES:
        raise ConfigError(f"{STYLE_VARIABLE}={style!r} is not one of {', '.join(STYLES)}", hint="for example path")
    try:
        core = Session()
        session = boto3.session.Session(botocore_session=core)
        bundle = core.get_config_variable("ca_bundle")
        if bundle and not Path(bundle).exists():
            raise ConfigError(f"the CA bundle {bundle} does not exist", hint="correct AWS_CA_BUNDLE")
        region = os.environ.get("AWS_REGION") or session.region_name or "us-east-1"
        style = style or (core.get_config_variable("s3") or {}).get("addressing_style") or ""

        def client(style: str) -> S3Client:
            s3: Any = {"addressing_style": style}
            config = Config(
                signature_version="s3v4",
                s3=s3,
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                retries={
                    "mode": "standard",
                    "total_max_attempts": core.get_config_variable("max_attempts") or 3,
                },
                connect_timeout=2.5,
                read_timeout=60,
                max_pool_connections=32,
            )
            return session.client("s3", region_name=region, config=config)

        made = client(style or "auto")
        if not style and not _is_amazon(made.meta.endpoint_url):
            made = client("path")
    except ProfileNotFound as error:
        raise StorageAccessError(
            f"the AWS profile {error.kwargs['profile']!r} does not exist",
            hint="correct AWS_PROFILE or ~/.aws/config",
        ) from None
    except (BotoCoreError, ValueError) as error:
        if (credentials := credentials_error(error, "cannot use S3")) is not None:
            raise credentials from None
        raise ConfigError(
            f"the S3 settings cannot be used ({type(error).__name__})",
            hint="check AWS_ENDPOINT_URL (for example http://minio:9000), AWS_REGION and ~/.aws/config",
        ) from None
    # At most 10 + 5 parts in memory for all uploads of the process together: 120 MB.
    limits = TransferConfig(
        multipart_threshold=PART_BYTES,
        multipart_chunksize=PART_BYTES,
        max_request_concurrency=10,
        max_submission_concurrency=5,
        max_in_memory_upload_chunks=10,
    )
    return S3Session(made, TransferManager(made, limits), _without_userinfo(made.meta.endpoint_url))


def _is_amazon(endpoint: str) -> bool:
    host = urlsplit(endpoint).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))


def _without_userinfo(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
