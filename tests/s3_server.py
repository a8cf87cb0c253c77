"""Fixtures around a real S3 server; a conftest that wants them imports `s3_server` and `s3_root`."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest

from pipelines.s3_server import LocalS3Server
from rfdetr_core.storage import Location, location

BUCKET = "tests"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalS3Server]:
    """One `rclone serve s3` for the whole session; `s3_server.environment` is needed to use it."""
    server = LocalS3Server(tmp_path_factory.mktemp("s3") / "data", bucket=BUCKET)
    with server:
        yield server


@pytest.fixture
def s3_root(s3_server: LocalS3Server, monkeypatch: pytest.MonkeyPatch) -> Location:
    """A fresh prefix on the session's server, with the environment that reaches it and nothing else."""
    clean_aws_environment(monkeypatch)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return location(f"s3://{BUCKET}/{secrets.token_hex(6)}")


def clean_aws_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away whatever this machine knows of AWS: variables, files and the metadata service."""
    for name in [*os.environ]:
        if name.startswith("AWS_") or name.upper().endswith("_PROXY") or name == "RFDETR_S3_ADDRESSING_STYLE":
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
