"""Conditional writes: of several writers one comes first, and the others learn it."""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rfdetr_core.errors import MissingObjectError, StorageAccessError, StorageUnavailableError, VersionConflict
from rfdetr_core.storage import Location, local, location
from rfdetr_core.storage.base import ConditionsUnsupportedError
from tests.storage.conftest import use_endpoint
from tests.storage.faulty_server import FaultyServer, error, faulty_server, hang_up, ok


@pytest.fixture(params=["local", "moto"])
def guarded_root(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """An empty folder in each store that honours conditions."""
    if request.param == "local":
        return location(str(tmp_path / "root"))
    found: Location = request.getfixturevalue("moto_root")
    return found


def test_versions(guarded_root: Location) -> None:
    file = guarded_root / "d/champion.json"
    with pytest.raises(MissingObjectError):
        file.read_versioned()
    with pytest.raises(VersionConflict):
        file.write_if(b"0", "a version of nothing")
    first = file.write_if(b"1", None)
    assert file.read_versioned() == (b"1", first)
    with pytest.raises(VersionConflict) as caught:
        file.write_if(b"x", None)
    assert str(caught.value) == (f"cannot write {file}: another writer came first (read it again, then decide again)")
    second = file.write_if(b"2", first)
    assert second != first
    with pytest.raises(VersionConflict):
        file.write_if(b"x", first)
    assert file.read_versioned() == (b"2", second)
    file.write_bytes(b"3")
    with pytest.raises(VersionConflict):
        file.write_if(b"x", second)
    file.delete()
    with pytest.raises(VersionConflict):
        file.write_if(b"x", second)
    assert not file.exists()
    assert [info.name for info in guarded_root.list_files()] == []


def test_one_of_eight_racers_wins(guarded_root: Location) -> None:
    file = guarded_root / "champion.json"
    start = threading.Barrier(8)

    def race(version: str | None, content: bytes) -> bool:
        start.wait()
        try:
            file.write_if(content, version)
        except VersionConflict:
            return False
        return True

    version = None
    with ThreadPoolExecutor(8) as pool:
        for lap in range(5):
            contents = [b"%d of %d" % (number, lap) for number in range(8)]
            won = list(pool.map(race, [version] * 8, contents))
            assert sum(won) == 1
            data, version = file.read_versioned()
            assert data == contents[won.index(True)]


def test_no_increment_is_lost_between_processes(tmp_path: Path) -> None:
    program = """
import sys
from rfdetr_core.errors import VersionConflict
from rfdetr_core.storage import location
file = location(sys.argv[1])
for _ in range(25):
    while True:
        data, version = file.read_versioned()
        try:
            file.write_if(b"%d" % (int(data) + 1), version)
            break
        except VersionConflict:
            pass
"""
    counter = location(str(tmp_path / "counter"))
    counter.write_if(b"0", None)
    racers = [subprocess.Popen([sys.executable, "-c", program, counter.uri]) for _ in range(8)]
    assert [racer.wait(60) for racer in racers] == [0] * 8
    assert counter.read_bytes() == b"200"
    assert [p.name for p in tmp_path.iterdir()] == ["counter"]


def test_the_lock_of_a_killed_writer_is_free(tmp_path: Path) -> None:
    program = """
import sys, time
from pathlib import Path
from rfdetr_core.storage.local import _locked
with _locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""
    file = tmp_path / "champion.json"
    with subprocess.Popen([sys.executable, "-c", program, str(file)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        holder.kill()
    assert [info.name for info in location(str(tmp_path)).list_files()] == []
    location(str(file)).write_if(b"1", None)
    assert [p.name for p in tmp_path.iterdir()] == ["champion.json"]


def test_a_lock_that_stays_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "LOCK_SECONDS", 0.1)
    file = tmp_path / "champion.json"
    lock = tmp_path / f".rfdetr-lock-{hashlib.sha256(b'champion.json').hexdigest()[:16]}"
    with lock.open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StorageUnavailableError, match="has been locked for 0 s"):
            location(str(file)).write_if(b"1", None)
    assert not file.exists()


# The probe


def test_the_probe_believes_what_it_sees(root: Location, request: pytest.FixtureRequest) -> None:
    store = request.node.callspec.params["root"]
    assert root.conditional_writes_work() is (store != "rclone")
    assert root.list_files() == []


def test_the_probe_of_a_store_that_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty_server() as server:
        use_endpoint(monkeypatch, server.endpoint)
        server.answers = [error(501, "NotImplemented"), ok(b"")]
        assert location("s3://bucket/p").conditional_writes_work() is False
        assert [request.split()[0] for request in server.requests] == ["PUT", "DELETE"]
        server.answers = [error(501, "NotImplemented")]
        with pytest.raises(ConditionsUnsupportedError, match="the store has no conditional writes"):
            location("s3://bucket/p/a").write_if(b"1", None)


def test_a_probe_that_may_not_write_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty_server() as server:
        use_endpoint(monkeypatch, server.endpoint)
        server.answers = [error(403, "AccessDenied")]
        with pytest.raises(StorageAccessError, match="access denied"):
            location("s3://bucket/p").conditional_writes_work()


# Answers that get lost


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FaultyServer:
    with faulty_server() as server:
        use_endpoint(monkeypatch, server.endpoint)
        yield server


def test_a_write_whose_answer_was_lost_has_won(server: FaultyServer) -> None:
    server.answers = [hang_up, error(412, "PreconditionFailed"), ok(b"mine", ETag='"v2"')]
    assert location("s3://bucket/a").write_if(b"mine", '"v1"') == '"v2"'
    assert [request.split()[0] for request in server.requests] == ["PUT", "PUT", "GET"]


def test_a_write_that_was_repeated_and_lost(server: FaultyServer) -> None:
    server.answers = [hang_up, error(412, "PreconditionFailed"), ok(b"theirs", ETag='"v2"')]
    with pytest.raises(VersionConflict):
        location("s3://bucket/a").write_if(b"mine", '"v1"')


@pytest.mark.parametrize(("status", "code"), [(412, "PreconditionFailed"), (409, "ConditionalRequestConflict")])
def test_equal_content_of_another_writer_is_no_win(server: FaultyServer, status: int, code: str) -> None:
    server.answers = [error(status, code), ok(b"mine", ETag='"v2"')]
    with pytest.raises(VersionConflict):
        location("s3://bucket/a").write_if(b"mine", None)
    assert len(server.requests) == 1
