"""The three stores that every promise of `Location` is tested on."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from moto import mock_aws
from moto.core.botocore_stubber import BotocoreStubber

from rfdetr_core.storage import Location, location
from rfdetr_core.storage.s3_client import s3_session
from tests.s3_server import clean_aws_environment, s3_root, s3_server

__all__ = ["s3_root", "s3_server"]

MOTO_BUCKET = "moto-tests"


@pytest.fixture
def moto_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[Location]:
    """A fresh bucket in moto, which honours conditional writes (rclone does not) and checks no credentials.

    It answers inside botocore, where requests would be sent, so it stands for Amazon's own endpoint. One
    request at a time: by itself it checks a condition, then writes, and another thread may come between.
    """
    clean_aws_environment(monkeypatch)
    lock, handle = threading.RLock(), BotocoreStubber.__call__

    def handle_alone(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return handle(*args, **kwargs)

    monkeypatch.setattr(BotocoreStubber, "__call__", handle_alone)
    with mock_aws():
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        s3_session().client.create_bucket(Bucket=MOTO_BUCKET)
        yield location(f"s3://{MOTO_BUCKET}/{secrets.token_hex(6)}")


@pytest.fixture(params=["local", "rclone", "moto"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """An empty folder in each store."""
    if request.param == "local":
        return location(str(tmp_path / "root"))
    found: Location = request.getfixturevalue({"rclone": "s3_root", "moto": "moto_root"}[request.param])
    return found


@pytest.fixture(params=["rclone", "moto"])
def remote_root(request: pytest.FixtureRequest) -> Location:
    """An empty prefix in each store from which files are copied."""
    found: Location = request.getfixturevalue({"rclone": "s3_root", "moto": "moto_root"}[request.param])
    return found


def use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Make `endpoint` the store of S3 locations, with credentials that nobody checks."""
    clean_aws_environment(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test-key-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-very-secret")
