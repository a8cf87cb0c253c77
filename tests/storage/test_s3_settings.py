"""Where endpoint, region, credentials and addresses come from, and that one client serves everybody."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from botocore.awsrequest import AWSPreparedRequest

from rfdetr_core.errors import ConfigError, RFDETRError, StorageAccessError
from rfdetr_core.storage import Location, location, s3_client
from rfdetr_core.storage.s3_client import s3_session
from tests.storage.conftest import use_endpoint

ENDPOINT = "http://minio.test:9000"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint(monkeypatch, ENDPOINT)


class SentError(Exception):
    """In place of an answer."""


def address() -> str:
    """Where a request for s3://bucket/key goes."""

    def stop(request: AWSPreparedRequest, **_: object) -> None:
        raise SentError(request.url)

    client = s3_session().client
    client.meta.events.register_first("before-send.s3", stop)
    try:
        with pytest.raises(SentError) as sent:
            location("s3://bucket/key").read_bytes()
    finally:
        client.meta.events.unregister("before-send.s3", stop)
    return str(sent.value)


def write_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    (tmp_path / "config").write_text(text)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "http://minio.test:9000/bucket/key"),
        ({"AWS_ENDPOINT_URL_S3": "https://ceph.test/"}, "https://ceph.test/bucket/key"),
        ({"RFDETR_S3_ADDRESSING_STYLE": "virtual"}, "http://bucket.minio.test:9000/key"),
        ({"RFDETR_S3_ADDRESSING_STYLE": "path"}, "http://minio.test:9000/bucket/key"),
        ({"AWS_ENDPOINT_URL": ""}, "https://bucket.s3.amazonaws.com/key"),
        ({"AWS_ENDPOINT_URL": "", "AWS_REGION": "eu-west-1"}, "https://bucket.s3.eu-west-1.amazonaws.com/key"),
        ({"AWS_ENDPOINT_URL": "https://s3.eu-west-1.amazonaws.com"}, "https://s3.eu-west-1.amazonaws.com/bucket/key"),
        ({"AWS_ENDPOINT_URL": "https://my.amazonaws.com.evil.test"}, "https://my.amazonaws.com.evil.test/bucket/key"),
    ],
)
def test_addresses(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert address() == expected


def test_the_profile_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_config(
        monkeypatch,
        tmp_path,
        """
[profile lab]
region = eu-north-1
endpoint_url = http://lab.test:8000
max_attempts = 7
s3 =
    addressing_style = virtual
""",
    )
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    assert address() == "http://bucket.lab.test:8000/key"
    client = s3_session().client
    assert client.meta.region_name == "eu-north-1"
    assert client.meta.config.retries["total_max_attempts"] == 7
    monkeypatch.setenv("RFDETR_S3_ADDRESSING_STYLE", "path")
    assert address() == "http://lab.test:8000/bucket/key"


@pytest.mark.parametrize(
    ("variables", "region"),
    [
        ({}, "us-east-1"),
        ({"AWS_DEFAULT_REGION": "eu-west-1"}, "eu-west-1"),
        ({"AWS_DEFAULT_REGION": "eu-west-1", "AWS_REGION": "eu-west-2"}, "eu-west-2"),
    ],
)
def test_regions(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], region: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert s3_session().client.meta.region_name == region


def test_what_every_store_understands() -> None:
    config = s3_session().client.meta.config
    assert config.signature_version == "s3v4"
    assert config.request_checksum_calculation == "when_required"
    assert config.response_checksum_validation == "when_required"
    assert config.retries == {"mode": "standard", "total_max_attempts": 3}


@pytest.mark.parametrize(
    ("variables", "kind", "text"),
    [
        (
            {"RFDETR_S3_ADDRESSING_STYLE": "dns"},
            ConfigError,
            "RFDETR_S3_ADDRESSING_STYLE='dns' is not one of path, virtual, auto (for example path)",
        ),
        ({"AWS_ENDPOINT_URL": "minio:9000"}, ConfigError, "check AWS_ENDPOINT_URL (for example http://minio:9000)"),
        ({"AWS_ENDPOINT_URL": "http://a b"}, ConfigError, "check AWS_ENDPOINT_URL"),
        ({"AWS_REGION": "not a region"}, ConfigError, "AWS_REGION"),
        ({"AWS_MAX_ATTEMPTS": "many"}, ConfigError, "the S3 settings cannot be used (ValueError)"),
        ({"AWS_CA_BUNDLE": "/gone.pem"}, ConfigError, "the CA bundle /gone.pem does not exist (correct AWS_CA_BUNDLE)"),
        ({"AWS_PROFILE": "lab"}, StorageAccessError, "the AWS profile 'lab' does not exist (correct AWS_PROFILE"),
    ],
)
def test_settings_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], kind: type[RFDETRError], text: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(kind) as caught:
        location("s3://bucket/a").read_bytes()
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_broken_config_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_config(monkeypatch, tmp_path, "no section")
    with pytest.raises(ConfigError, match=r"~/\.aws/config"):
        s3_session()


def test_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageAccessError) as caught:
        location("s3://bucket/a").read_bytes()
    assert str(caught.value) == (
        "cannot read s3://bucket/a: no AWS credentials found "
        "(set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the pod a role)"
    )


def test_half_of_the_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageAccessError, match="cannot use S3: the AWS credentials are incomplete"):
        location("s3://bucket/a").read_bytes()


def test_credentials_from_a_program_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_config(monkeypatch, tmp_path, "[default]\ncredential_process = false very-secret-argument\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageAccessError) as caught:
        location("s3://bucket/a").read_bytes()
    assert str(caught.value) == (
        "cannot use S3: credentials could not be fetched from 'custom-process' (log in again, or check ~/.aws/config)"
    )


def test_one_client_for_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SDK_UA_APP_ID", "fresh")  # an environment of its own
    start = threading.Barrier(8)

    def session(_: int) -> s3_client.S3Session:
        start.wait()
        return s3_session()

    with ThreadPoolExecutor(8) as pool:
        assert len({id(found) for found in pool.map(session, range(8))}) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="forking a process that has used the network is safe on Linux only")
@pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)  # Python 3.12: the very point
def test_a_forked_child_has_a_client_of_its_own(s3_root: Location) -> None:
    (s3_root / "a").write_bytes(b"1")
    mine = s3_session()

    def child() -> None:
        assert (s3_root / "a").read_bytes() == b"1"
        assert s3_session() is not mine
        os._exit(7)

    # Another thread holds the lock at the moment of the fork: the child must not wait for it.
    with s3_client._sessions.lock:
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(20)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == 7
    assert (s3_root / "a").read_bytes() == b"1"
