"""The local S3 server: it starts, it keeps its secrets, and it never stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from pipelines import s3_server
from pipelines.s3_server import LocalS3Server
from rfdetr_core.errors import StorageAccessError
from rfdetr_core.storage import location
from tests.s3_server import clean_aws_environment


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone_within(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not is_running(pid)


def use(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_a_hostile_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxies, other endpoints, foreign sessions, rclone's own settings and an empty PATH change nothing."""
    clean_aws_environment(monkeypatch)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "example.com")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "foreign")
    monkeypatch.setenv("RFDETR_S3_ADDRESSING_STYLE", "virtual")
    monkeypatch.setenv("RCLONE_READ_ONLY", "true")
    monkeypatch.setenv("PATH", "")
    server = LocalS3Server(tmp_path / "a folder:with colon", bucket="demo")
    with server as environment:
        use(monkeypatch, environment)
        assert environment["no_proxy"] == "example.com,127.0.0.1"
        (location("s3://demo") / "a/b").write_bytes(b"1")
        assert (tmp_path / "a folder:with colon/demo/a/b").read_bytes() == b"1"
        pid = server.pid
        assert is_running(pid)
    assert not is_running(pid)


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    server = LocalS3Server(tmp_path / "data", bucket="demo", log=tmp_path / "logs/s3.log")
    with server as environment:
        shown = Path(f"/proc/{server.pid}/cmdline").read_text() + (tmp_path / "logs/s3.log").read_text()
    assert "rclone" in shown
    assert "Starting s3 server" in shown
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert len(environment[name]) >= 20
        assert environment[name] not in shown + repr(server)


def test_data_outlives_the_server_and_credentials_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clean_aws_environment(monkeypatch)
    with LocalS3Server(tmp_path / "data", bucket="demo") as first:
        use(monkeypatch, first)
        (location("s3://demo") / "a").write_bytes(b"1")
    with LocalS3Server(tmp_path / "data", bucket="demo") as second:
        use(monkeypatch, second)
        assert (location("s3://demo") / "a").read_bytes() == b"1"
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", first["AWS_ACCESS_KEY_ID"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", first["AWS_SECRET_ACCESS_KEY"])
        with pytest.raises(StorageAccessError):
            (location("s3://demo") / "a").read_bytes()


def test_it_stops_when_the_block_fails(tmp_path: Path) -> None:
    server = LocalS3Server(tmp_path / "data", bucket="demo")
    with pytest.raises(KeyboardInterrupt), server:
        pid = server.pid
        raise KeyboardInterrupt
    assert not is_running(pid)
    with pytest.raises(RuntimeError, match="not running"):
        _ = server.pid


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_it_stops_with_its_parent(tmp_path: Path, how: signal.Signals) -> None:
    program = """
import sys, time
from pathlib import Path
from pipelines.s3_server import LocalS3Server
server = LocalS3Server(Path(sys.argv[1]), bucket="demo")
with server:
    print(server.pid, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.send_signal(how)
        parent.wait(20)
    assert gone_within(pid, 5)


def test_ctrl_c_leaves_time_to_store_something(tmp_path: Path) -> None:
    """A terminal sends Ctrl-C to all processes of the group; the server goes only when the block is left."""
    program = """
import os, sys, time
from pathlib import Path
from pipelines.s3_server import LocalS3Server
from rfdetr_core.storage import location
with LocalS3Server(Path(sys.argv[1]), bucket="demo") as environment:
    os.environ.update(environment)
    try:
        print("started", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0.3)
        (location("s3://demo") / "last-words").write_bytes(b"stored")
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        os.killpg(parent.pid, signal.SIGINT)
        assert parent.wait(20) == 0
    assert (tmp_path / "demo/last-words").read_bytes() == b"stored"


def test_a_server_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "rclone"
    broken.write_text("#!/bin/sh\necho first\necho cannot bind the address >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(s3_server, "_rclone", lambda: broken)
    with pytest.raises(StorageAccessError) as caught, LocalS3Server(tmp_path / "data", bucket="demo"):
        pass
    assert str(caught.value) == (
        f"the local S3 server over {tmp_path}/data did not start; its last words: cannot bind the address "
        f"(see {tmp_path}/data/server.log)"
    )


def test_a_server_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "rclone"
    broken.write_text("#!/bin/sh\ntrap '' TERM\necho $$\nwhile :; do sleep 0.1; done\n")
    broken.chmod(0o755)
    monkeypatch.setattr(s3_server, "_rclone", lambda: broken)
    monkeypatch.setattr(s3_server, "START_SECONDS", 0.5)
    monkeypatch.setattr(s3_server, "STOP_SECONDS", 0.2)
    with pytest.raises(StorageAccessError) as caught, LocalS3Server(tmp_path / "data", bucket="demo"):
        pass
    pid = int((tmp_path / "data/server.log").read_text())
    assert f"its last words: {pid}" in str(caught.value)
    assert gone_within(pid, 5)


def test_what_keeps_it_from_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageAccessError, match="a part of the path is a file"):
        LocalS3Server(tmp_path / "file", bucket="demo").__enter__()

    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(s3_server, "distribution", missing)
    with pytest.raises(StorageAccessError, match=r"pip install 'rfdetr-pipeline\[pipelines\]'"):
        LocalS3Server(tmp_path / "data", bucket="demo").__enter__()


def test_environment_names_the_store_and_nothing_else(tmp_path: Path) -> None:
    with LocalS3Server(tmp_path, bucket="demo") as environment:
        assert os.environ.get("AWS_ACCESS_KEY_ID") != environment["AWS_ACCESS_KEY_ID"]
        assert environment["AWS_ENDPOINT_URL"] == environment["AWS_ENDPOINT_URL_S3"]
        assert environment["AWS_ENDPOINT_URL"].startswith("http://127.0.0.1:")
        assert environment["AWS_REGION"] == "us-east-1"
        assert environment["AWS_SESSION_TOKEN"] == ""  # a foreign one would be sent with our keys
