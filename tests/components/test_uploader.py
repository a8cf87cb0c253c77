"""Checkpoints reach the store while training goes on, also when the store is away for a while."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from components.train import uploader as module
from components.train.uploader import Uploader
from rfdetr_core.errors import StorageAccessError, StorageUnavailableError
from rfdetr_core.storage import FileDigest, Location, location
from rfdetr_core.storage.local import LocalLocation


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    folder = tmp_path / "work" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Location:
    return location(str(tmp_path / "store"))


def hand_over(uploader: Uploader, folder: Path, name: str, content: str) -> None:
    temporary = folder / f".{name}"
    temporary.write_text(content)
    temporary.replace(folder / name)
    uploader.upload(folder / name)


def test_the_newest_version_of_every_file_is_in_the_store_at_the_end(checkpoints: Path, target: Location) -> None:
    with Uploader(target, last="a.pth") as uploader:
        for version in range(20):
            hand_over(uploader, checkpoints, "a.pth", f"a{version}")
            hand_over(uploader, checkpoints, "b.pth", f"b{version}")
    assert (target / "a.pth").read_text() == "a19" and (target / "b.pth").read_text() == "b19"
    assert uploader.uploaded == {name: (target / name).digest_file() for name in ("a.pth", "b.pth")}
    assert [p.name for p in checkpoints.parent.iterdir()] == ["checkpoints"]


def test_what_is_sent_is_what_was_handed_over(checkpoints: Path, target: Location) -> None:
    """The file may be replaced, or be gone, before its turn comes."""
    with Uploader(target, last="") as uploader:
        hand_over(uploader, checkpoints, "a.pth", "whole")
        (checkpoints / "a.pth").unlink()
    assert (target / "a.pth").read_text() == "whole"


def test_the_last_file_goes_after_those_it_tells_of(
    checkpoints: Path, target: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    held, gate = threading.Event(), threading.Event()
    real = LocalLocation.upload_file

    def slow(self: LocalLocation, path: Path) -> FileDigest:
        held.set()
        gate.wait(30)
        order.append(self.name)
        return real(self, path)

    monkeypatch.setattr(LocalLocation, "upload_file", slow)
    with Uploader(target, last="checkpoint.pth") as uploader:
        hand_over(uploader, checkpoints, "first.pth", "1")
        assert held.wait(30)  # the thread has it; the others wait
        hand_over(uploader, checkpoints, "checkpoint.pth", "state")
        hand_over(uploader, checkpoints, "best.pth", "best")
        gate.set()
    assert order == ["first.pth", "best.pth", "checkpoint.pth"]


def test_a_store_that_is_away_is_tried_again(
    checkpoints: Path, target: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.01)
    failures = [StorageUnavailableError("away"), StorageUnavailableError("still away")]
    real = LocalLocation.upload_file

    def flaky(self: LocalLocation, path: Path) -> FileDigest:
        if failures:
            raise failures.pop()
        return real(self, path)

    monkeypatch.setattr(LocalLocation, "upload_file", flaky)
    with Uploader(target, last="") as uploader:
        hand_over(uploader, checkpoints, "a.pth", "A")
        deadline = time.monotonic() + 30
        while not uploader.uploaded and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (target / "a.pth").read_text() == "A"
    assert not failures


def test_a_store_that_stays_away_fails_the_stage_at_the_end(
    checkpoints: Path, target: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(self: LocalLocation, path: Path) -> FileDigest:
        raise StorageUnavailableError("away")

    monkeypatch.setattr(LocalLocation, "upload_file", away)
    with pytest.raises(StorageUnavailableError), Uploader(target, last="") as uploader:
        hand_over(uploader, checkpoints, "a.pth", "A")


def test_a_refusal_for_good_ends_training_at_the_next_checkpoint(
    checkpoints: Path, target: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: LocalLocation, path: Path) -> FileDigest:
        raise StorageAccessError("no right to write")

    monkeypatch.setattr(LocalLocation, "upload_file", refused)
    with pytest.raises(StorageAccessError), Uploader(target, last="") as uploader:
        for _ in range(100):
            hand_over(uploader, checkpoints, "a.pth", "A")
            time.sleep(0.02)


def test_the_last_file_arrives_however_fast_others_follow(
    checkpoints: Path, target: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that improves faster than the store takes files: what it would be continued from must get there."""
    real = LocalLocation.upload_file

    def slow(self: LocalLocation, path: Path) -> FileDigest:
        time.sleep(0.02)
        return real(self, path)

    monkeypatch.setattr(LocalLocation, "upload_file", slow)
    seen = []
    with Uploader(target, last="checkpoint.pth") as uploader:
        for version in range(6):
            hand_over(uploader, checkpoints, "best.pth", str(version))
            hand_over(uploader, checkpoints, "checkpoint.pth", str(version))
            place = target / "checkpoint.pth"
            seen.append(place.read_text() if place.exists() else "")
    assert all(int(found) >= version - 1 for version, found in enumerate(seen) if version > 0)


def test_training_does_not_wait_for_a_store_that_is_away(
    checkpoints: Path, target: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 60.0)
    back = threading.Event()
    real = LocalLocation.upload_file

    def away(self: LocalLocation, path: Path) -> FileDigest:
        if not back.is_set():
            raise StorageUnavailableError("away")
        return real(self, path)

    monkeypatch.setattr(LocalLocation, "upload_file", away)
    with Uploader(target, last="checkpoint.pth") as uploader:
        for version in range(20):
            hand_over(uploader, checkpoints, "checkpoint.pth", str(version))
        back.set()
    assert (target / "checkpoint.pth").read_text() == "19"
