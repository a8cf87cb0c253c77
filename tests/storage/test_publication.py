"""A publication is whole, or it is refused."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from rfdetr_core.errors import PublicationError, RFDETRError, StorageUnavailableError
from rfdetr_core.publication import (
    MANIFEST,
    Manifest,
    fetch,
    manifest_digest,
    publish,
    read_manifest,
    seal,
    unpublish,
)
from rfdetr_core.storage import FileDigest, Location, location

FILES = {"a.json": b"{}", "d/b.bin": b"12345", "d/c.txt": b""}
SHA = {text: hashlib.sha256(text.encode()).hexdigest()[:12] for text in ("12345", "12346")}
AGAIN = "(re-run the stage that writes it with --force)"


def write(folder: Path, files: dict[str, bytes]) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def read(folder: Path) -> dict[str, bytes]:
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    files.pop(MANIFEST, None)
    return files


def digests(files: dict[str, bytes]) -> dict[str, FileDigest]:
    return {name: FileDigest(len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "work", FILES)


def test_what_is_published_is_fetched(root: Location, folder: Path, tmp_path: Path) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    manifest = publish(folder, root, inputs="abc", extra={"versions": {"code": "1"}})
    assert manifest.files == digests(FILES)
    assert before <= datetime.fromisoformat(manifest.created) <= datetime.now(UTC)
    assert read_manifest(root) == manifest
    assert (root / MANIFEST).read_json() == {
        "files": {name: {"size": d.size, "sha256": d.sha256} for name, d in digests(FILES).items()},
        "inputs": "abc",
        "created": manifest.created,
        "versions": {"code": "1"},
    }
    copy = fetch(root, tmp_path / "copy")
    assert read(copy) == FILES
    assert [p.name for p in copy.iterdir() if p.name.startswith(".")] == []


def test_a_local_publication_is_read_where_it_is(tmp_path: Path, folder: Path) -> None:
    target = location(str(tmp_path / "target"))
    publish(folder, target, inputs="")
    assert fetch(target, tmp_path / "copy") == tmp_path / "target"
    assert not (tmp_path / "copy").exists()


def test_only_some_files(root: Location, folder: Path, tmp_path: Path) -> None:
    publish(folder, root, inputs="")
    (root / "a.json").delete()
    copy = fetch(root, tmp_path / "copy", names=["d/b.bin"])
    assert (copy / "d/b.bin").read_bytes() == b"12345"
    if root.local_path is None:
        assert list(read(copy)) == ["d/b.bin"]
    with pytest.raises(PublicationError, match=re.escape(f"{root} is published without 'x' {AGAIN}")):
        fetch(root, tmp_path / "copy", names=["x"])


def test_nothing_there(root: Location, folder: Path, tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        (root / name).write_bytes(b"{}")
    assert read_manifest(root) is None
    for act in (lambda: fetch(root, tmp_path / "copy"), lambda: manifest_digest(root)):
        with pytest.raises(PublicationError) as caught:
            act()
        assert str(caught.value) == (
            f"{root} is not published: it has no {MANIFEST} (run the stage that writes it to its end)"
        )
    publish(folder, root, inputs="")
    unpublish(root)
    unpublish(root)
    assert read_manifest(root) is None
    assert (root / "d/b.bin").exists()


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (
            lambda root: (root / "d/b.bin").write_bytes(b"12346"),
            f"d/b.bin has SHA-256 {SHA['12346']}…, and {SHA['12345']}… was published",
        ),
        (lambda root: (root / "d/b.bin").write_bytes(b"1234"), "d/b.bin has 4 bytes, and 5 were published"),
        (lambda root: (root / "d/b.bin").delete(), "d/b.bin was published, and is missing"),
        (lambda root: (root / "d/c.txt").write_bytes(b"x"), "d/c.txt has 1 bytes, and 0 were published"),
        (lambda root: root.delete_files(["a.json", "d/b.bin", "d/c.txt"]), "a.json was published, and is missing"),
    ],
)
def test_the_first_file_that_differs_is_named(
    root: Location, folder: Path, tmp_path: Path, harm: Callable[[Location], object], text: str
) -> None:
    publish(folder, root, inputs="")
    harm(root)
    with pytest.raises(PublicationError) as caught:
        fetch(root, tmp_path / "copy")
    assert str(caught.value) == f"{root}/{text} {AGAIN}"
    name = text.split()[0]
    assert not (tmp_path / "copy" / name).exists()


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"null", b"\xff", b'{"files": []}', b'{"files": {}, "inputs": ""}',
        b'{"files": {"a": 1}, "inputs": "", "created": ""}',
        b'{"files": {"../a": {"size": 1, "sha256": ""}}, "inputs": "", "created": ""}',
    ],
)  # fmt: skip
def test_what_is_no_manifest(tmp_path: Path, folder: Path, data: bytes) -> None:
    target = location(str(tmp_path / "target"))
    (target / MANIFEST).write_bytes(data)
    with pytest.raises(PublicationError, match="is no manifest") as caught:
        fetch(target, tmp_path / "copy")
    assert "\n" not in str(caught.value)
    publish(folder, target, inputs="")
    assert fetch(target, tmp_path / "copy") == tmp_path / "target"


def test_fetched_files_are_used_again(remote_root: Location, folder: Path, tmp_path: Path) -> None:
    root = remote_root
    publish(folder, root, inputs="")
    copy = fetch(root, tmp_path / "copy", reuse=True)
    kept = {name: (copy / name).stat().st_ino for name in FILES}
    (copy / "d/b.bin").write_bytes(b"54321")
    (copy / "a.json").unlink()
    (root / "d/c.txt").delete()  # need not be there: nobody asks for it again
    fetch(root, tmp_path / "copy", reuse=True)
    assert read(copy) == FILES
    assert (copy / "d/c.txt").stat().st_ino == kept["d/c.txt"]
    with pytest.raises(PublicationError, match=r"c\.txt was published, and is missing"):
        fetch(root, tmp_path / "copy")


def test_publishing_anew_removes_what_is_stale(root: Location, folder: Path, tmp_path: Path) -> None:
    (root / "foreign").write_bytes(b"not ours")
    publish(folder, root, inputs="1")
    newer = {"a.json": b"{ }", "new": b"1"}
    publish(write(folder, newer), root, inputs="2")
    assert [info.name for info in root.list_files()] == sorted([MANIFEST, "foreign", *newer])
    found = read_manifest(root)
    assert found is not None
    assert (found.files, found.inputs) == (digests(newer), "2")
    assert read(fetch(root, tmp_path / "copy")).keys() >= newer.keys()


def test_publishing_the_same_is_no_work(root: Location, folder: Path) -> None:
    first = publish(folder, root, inputs="1", extra={"by": "r1"})
    _, version = (root / "a.json").read_versioned()
    stamp = None if root.local_path is None else (root.local_path / "a.json").stat().st_mtime_ns
    assert publish(folder, root, inputs="1", extra={"by": "r1"}) == first
    assert publish(folder, root, inputs="2", extra={"by": "r2"}).inputs == "2"
    found = read_manifest(root)
    assert found is not None
    assert (found.inputs, found.extra, found.files) == ("2", {"by": "r2"}, first.files)
    if root.local_path is not None:
        assert (root.local_path / "a.json").stat().st_mtime_ns == stamp
    (root / "a.json").delete()
    publish(folder, root, inputs="2", extra={"by": "r2"})
    assert (root / "a.json").read_versioned() == (b"{}", version)


def test_an_equal_dataset_stays_readable_while_it_is_published_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = location(str(tmp_path / "target"))
    publish(folder, target, inputs="1")
    disturbed: list[Location] = []
    monkeypatch.setattr("rfdetr_core.publication.unpublish", disturbed.append)
    publish(folder, target, inputs="1")
    assert not disturbed


def test_an_empty_folder_is_not_published(root: Location, tmp_path: Path) -> None:
    folder = write(tmp_path / "work", {MANIFEST: b"{}"})
    with pytest.raises(PublicationError, match="it has no files"):
        publish(folder, root, inputs="")
    with pytest.raises(PublicationError, match="it has no files"):
        seal(root, inputs="")
    assert root.list_files() == []


def test_a_manifest_among_the_files_is_not_one_of_them(root: Location, folder: Path, tmp_path: Path) -> None:
    (folder / MANIFEST).write_bytes(b"stale")
    assert MANIFEST not in publish(folder, root, inputs="").files
    assert read(fetch(root, tmp_path / "copy")) == FILES


def test_the_manifest_has_its_own_words(root: Location, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"the manifest says \['files', 'inputs'\] itself"):
        publish(folder, root, inputs="", extra={"files": 1, "inputs": 2, "other": 3})


def test_a_folder_may_be_published_where_it_is(folder: Path, tmp_path: Path) -> None:
    here = location(str(folder))
    publish(folder, here, inputs="1")
    (folder / "a.json").write_bytes(b"changed")
    publish(folder, here, inputs="1")
    assert read(fetch(here, tmp_path)) == {**FILES, "a.json": b"changed"}


def test_sealing_what_lies_there(root: Location, folder: Path, tmp_path: Path) -> None:
    known = root.upload_tree(folder)
    stale = FileDigest(17, "0" * 64)
    manifest = seal(root, inputs="1", extra={"epochs": 3}, known={"a.json": known["a.json"], "d/b.bin": stale})
    assert manifest.files == digests(FILES)
    assert (manifest.inputs, manifest.extra) == ("1", {"epochs": 3})
    assert read(fetch(root, tmp_path / "copy")) == FILES
    (root / "d/c.txt").delete()
    assert seal(root, inputs="1", known={"d/c.txt": known["d/c.txt"]}).files.keys() == {"a.json", "d/b.bin"}


def test_sealing_trusts_what_was_uploaded(root: Location, folder: Path) -> None:
    """Known files are not read back: gigabytes of checkpoints."""
    root.upload_tree(folder)
    said = FileDigest(5, "f" * 64)
    assert seal(root, inputs="", known={"d/b.bin": said}).files["d/b.bin"] == said


def test_digests_are_of_content(root: Location, folder: Path) -> None:
    first = publish(folder, root, inputs="1", extra={"when": "today"})
    text = (
        '{"files":{' + ",".join(
            f'"{name}":{{"sha256":"{hashlib.sha256(data).hexdigest()}","size":{len(data)}}}'
            for name, data in sorted(FILES.items())
        ) + '},"inputs":"1"}'
    )  # fmt: skip
    assert manifest_digest(root) == first.digest == hashlib.sha256(text.encode()).hexdigest()
    same = Manifest(dict(reversed(first.files.items())), "1", "another day", {})
    assert same.digest == first.digest
    assert Manifest(first.files, "2", first.created, {}).digest != first.digest
    assert Manifest({**first.files, "x": FileDigest(0, "")}, "1", first.created, {}).digest != first.digest


def test_a_reader_beside_a_writer_gets_one_version(remote_root: Location, tmp_path: Path) -> None:
    """Whatever is fetched while publications alternate is wholly the one or wholly the other."""
    root = remote_root
    versions = [{f"{i}.txt": b"%d" % version * (i + 1) for i in range(6)} for version in range(2)]
    folders = [write(tmp_path / f"v{i}", files) for i, files in enumerate(versions)]
    publish(folders[0], root, inputs="0")
    stop = threading.Event()
    failures: list[BaseException] = []

    def alternate() -> None:
        try:
            for lap in range(1, 1000):
                if stop.is_set():
                    break
                publish(folders[lap % 2], root, inputs=str(lap % 2))
                time.sleep(0.02)
        except BaseException as error:
            failures.append(error)

    seen: list[str] = []

    def met() -> bool:
        """Whether a publication came between: on a machine with other work the writer's turn may be late."""
        return "refused" in seen or len(set(seen)) > 1

    writer = threading.Thread(target=alternate)
    writer.start()
    started = time.monotonic()
    try:
        while time.monotonic() < started + (1 if met() else 30):
            try:
                copy = fetch(root, tmp_path / "copy")
            except (PublicationError, StorageUnavailableError):
                seen.append("refused")
                continue
            seen.append(str(versions.index(read(copy))))
    finally:
        stop.set()
        writer.join()
    assert failures == []
    assert met()


def test_a_republication_meanwhile_is_worth_a_retry(
    folder: Path, moto_root: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(folder, moto_root, inputs="1")
    original = type(moto_root).download_file

    def republish_first(self: Location, *args: object) -> FileDigest:
        monkeypatch.undo()
        publish(write(folder, {"a.json": b"new"}), location(moto_root.uri), inputs="2")
        return original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(type(moto_root), "download_file", republish_first)
    with pytest.raises(RFDETRError) as caught:
        fetch(moto_root, tmp_path / "copy")
    assert type(caught.value) is StorageUnavailableError
    assert str(caught.value) == (
        f"cannot read {moto_root}: it is being published anew (wait for that stage, then try again)"
    )


def test_the_manifest_is_valid_json_for_any_reader(root: Location, folder: Path) -> None:
    publish(folder, root, inputs="1")
    text = (root / MANIFEST).read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
