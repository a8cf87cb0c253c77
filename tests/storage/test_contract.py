"""What holds for every location, whichever store it lies in."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path

import pytest

from rfdetr_core.errors import ConfigError, MissingObjectError, StorageAccessError
from rfdetr_core.storage import FileDigest, FileInfo, Location, location

LARGE = 20 * 1024 * 1024 + 17  # two full parts and a rest


def digest(data: bytes) -> FileDigest:
    return FileDigest(len(data), hashlib.sha256(data).hexdigest())


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A local folder with an empty, a small, a deep, an oddly named and a multi-part file."""
    folder = tmp_path / "tree"
    for name, data in tree_data().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def tree_data() -> dict[str, bytes]:
    large = hashlib.shake_128(b"large").digest(LARGE)
    return {"empty": b"", "a.txt": b"hello", "d/e/f.json": b"{}", "d/ü b+c=1%20#.txt": b"odd", "large.bin": large}


def test_bytes_text_and_json_come_back(root: Location) -> None:
    (root / "a.bin").write_bytes(b"\x00\xff")
    assert (root / "a.bin").read_bytes() == b"\x00\xff"
    (root / "a.bin").write_bytes("größer".encode())
    assert (root / "a.bin").read_text() == "größer"
    (root / "d/a.json").write_json({"b": [1, None], "a": "ü"})
    assert (root / "d/a.json").read_bytes() == b'{\n  "a": "\xc3\xbc",\n  "b": [\n    1,\n    null\n  ]\n}\n'
    assert (root / "d/a.json").read_json() == {"a": "ü", "b": [1, None]}


def test_json_has_no_nan(root: Location) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        (root / "a.json").write_json({"loss": float("nan")})
    assert not (root / "a.json").exists()


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"{,}", "not JSON, line 1 column 2: Expecting property name"), (b"{\xff", "byte 1 is not UTF-8")],
)
def test_what_is_no_json_is_named(root: Location, data: bytes, said: str) -> None:
    file = root / "a.json"
    file.write_bytes(data)
    with pytest.raises(StorageAccessError) as caught:
        file.read_json()
    assert f"cannot read {file.uri}: {said}" in str(caught.value)


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [(0, 4, b"0123"), (3, 2, b"34"), (8, 10, b"89"), (10, 1, b""), (50, 5, b""), (4, 0, b""), (50, 0, b"")],
)
def test_ranges(root: Location, offset: int, length: int, expected: bytes) -> None:
    (root / "a").write_bytes(b"0123456789")
    assert (root / "a").read_range(offset, length) == expected


def test_range_of_an_empty_file(root: Location) -> None:
    (root / "a").write_bytes(b"")
    assert (root / "a").read_range(0, 5) == b""


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1)])
def test_negative_ranges_are_refused(root: Location, offset: int, length: int) -> None:
    (root / "a").write_bytes(b"0123456789")
    with pytest.raises(ValueError, match="not negative"):
        (root / "a").read_range(offset, length)


def test_missing_files_are_named(root: Location, tmp_path: Path) -> None:
    (root / "here").write_bytes(b"1")
    gone = root / "gone.json"
    message = f"cannot read {gone.uri}: no such file"
    for read in (gone.read_bytes, gone.read_json, gone.read_versioned, gone.digest_file):
        with pytest.raises(MissingObjectError, match="no such file") as caught:
            read()
        assert caught.value.message == message
    with pytest.raises(MissingObjectError):
        gone.read_range(0, 0)
    with pytest.raises(MissingObjectError):
        gone.download_file(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(MissingObjectError):
        (root / "a").upload_file(tmp_path / "x")
    with pytest.raises(MissingObjectError):
        (root / "a").upload_tree(tmp_path / "x")
    assert [info.name for info in root.list_files()] == ["here"]


def test_exists_means_a_file_or_a_folder_with_files(root: Location) -> None:
    assert not root.exists()
    (root / "d/file-1").write_bytes(b"")
    assert root.exists()
    assert (root / "d").exists()
    assert (root / "d/file-1").exists()
    assert not (root / "d/file").exists()
    assert not (root / "d/file-1/x").exists()
    (root / "d/file-1").delete()
    assert not (root / "d").exists()
    assert not root.exists()


def test_names_join_and_come_back(root: Location) -> None:
    file = root / "a/b" / "c.txt"
    assert file.uri == f"{root.uri}/a/b/c.txt"
    assert str(file) == file.uri
    assert file.name == "c.txt"
    assert file == root / "a/b/c.txt" != root / "a/b/d.txt"
    assert len({file, root / "a/b/c.txt"}) == 1
    assert location(file.uri) == file
    assert pickle.loads(pickle.dumps(file)) == file
    for name in ("..", "a/../b", "/a", "", "a//b", "a/", ".", "a/./b", "a\nb", "a\x00b", "\ud800"):
        with pytest.raises(ConfigError, match="is no legal name below"):
            root / name


def test_trees_go_up_and_down(root: Location, tree: Path, tmp_path: Path) -> None:
    data = tree_data()
    expected = {name: digest(content) for name, content in sorted(data.items())}
    assert root.list_files() == []
    assert root.upload_tree(tree) == expected
    assert root.list_files() == [FileInfo(name, len(data[name])) for name in sorted(data)]
    assert (root / "d").list_files() == [FileInfo("e/f.json", 2), FileInfo("ü b+c=1%20#.txt", 3)]
    copy = tmp_path / "deep/copy"
    assert root.download_tree(copy) == expected
    assert {str(p.relative_to(copy)): p.read_bytes() for p in copy.rglob("*") if p.is_file()} == data
    assert (root / "large.bin").digest_file() == expected["large.bin"]
    assert (root / "large.bin").read_range(9 * 2**20, 5) == data["large.bin"][9 * 2**20 : 9 * 2**20 + 5]


def test_parts_of_trees(root: Location, tree: Path, tmp_path: Path) -> None:
    assert list(root.upload_tree(tree, names=["d/e/f.json", "a.txt"])) == ["a.txt", "d/e/f.json"]
    assert [info.name for info in root.list_files()] == ["a.txt", "d/e/f.json"]
    assert root.download_tree(tmp_path / "copy", names=["a.txt"]) == {"a.txt": digest(b"hello")}
    assert [p.name for p in (tmp_path / "copy").iterdir()] == ["a.txt"]
    with pytest.raises(MissingObjectError, match=r"b\.txt: no such file"):
        root.download_tree(tmp_path / "copy", names=["a.txt", "b.txt"])
    with pytest.raises(MissingObjectError, match=r"b\.txt: No such file|b\.txt: no such file"):
        root.upload_tree(tree, names=["b.txt"])
    with pytest.raises(ConfigError):
        root.download_tree(tmp_path / "copy", names=["../a.txt"])


def test_an_empty_prefix_is_no_success(root: Location, tmp_path: Path) -> None:
    with pytest.raises(MissingObjectError, match="no files there"):
        (root / "misspelt").download_tree(tmp_path / "copy")


def test_downloads_replace_whole_files_only(root: Location, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    target.write_bytes(b"old")
    with pytest.raises(MissingObjectError):
        (root / "gone").download_file(target)
    assert target.read_bytes() == b"old"
    (root / "a").write_bytes(b"new")
    assert (root / "a").download_file(target) == digest(b"new")
    assert target.read_bytes() == b"new"
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".rfdetr")] == []


def test_deleting(root: Location) -> None:
    for name in ("a", "a-b", "d/x", "d/e/y", "d/e/z"):
        (root / name).write_bytes(b"1")
    (root / "gone").delete()
    (root / "gone").delete_tree()
    (root / "a").delete()
    assert [info.name for info in root.list_files()] == ["a-b", "d/e/y", "d/e/z", "d/x"]
    root.delete_files(["d/e/y", "d/gone"])
    root.delete_files([])
    assert [info.name for info in root.list_files()] == ["a-b", "d/e/z", "d/x"]
    (root / "d").delete_tree()
    assert [info.name for info in root.list_files()] == ["a-b"]
    with pytest.raises(ConfigError):
        root.delete_files(["../a-b"])
    root.delete_tree()
    assert not root.exists()


def test_deleting_a_tree_spares_the_file_of_its_name(root: Location) -> None:
    (root / "a").write_bytes(b"1")
    (root / "a").delete_tree()
    assert (root / "a").exists()


def test_more_than_a_page_of_files(s3_root: Location, tmp_path: Path) -> None:
    """S3 lists and deletes at most 1000 at once."""
    root = s3_root
    folder = tmp_path / "many"
    folder.mkdir()
    names = [f"{i:04d}.txt" for i in range(1005)]
    for name in names:
        (folder / name).write_bytes(name.encode())
    assert list(root.upload_tree(folder)) == names
    assert root.list_files() == [FileInfo(name, 8) for name in names]
    root.delete_tree()
    assert root.list_files() == []


@pytest.mark.parametrize("progress", [True, None])
def test_progress_is_shown_when_asked_for(
    s3_root: Location, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], progress: bool | None
) -> None:
    root = s3_root
    root.upload_tree(tree, progress=progress)
    up = capsys.readouterr().err
    root.download_tree(tmp_path / "copy", progress=progress)
    down = capsys.readouterr().err
    if progress:
        assert f"upload {root.name}: 100%" in up
        assert f"download {root.name}: 100%" in down
        assert "21.0M/21.0M" in up.split("\r")[-1]
    else:
        assert up == down == ""  # not a terminal


def test_every_byte_is_ticked(root: Location, tmp_path: Path) -> None:
    source = tmp_path / "large"
    source.write_bytes(os.urandom(LARGE))
    for move in ((root / "a").upload_file, (root / "a").download_file):
        ticks: list[int] = []
        move(source, ticks.append)
        assert sum(ticks) == LARGE
        assert len(ticks) > 1
    ticks = []
    (root / "a").digest_file(ticks.append)
    assert sum(ticks) == LARGE


def test_a_tick_can_stop_a_transfer(root: Location, tmp_path: Path) -> None:
    def stop(count: int) -> None:
        raise KeyError("stop")

    source = tmp_path / "large"
    source.write_bytes(os.urandom(LARGE))
    with pytest.raises(KeyError):
        (root / "a").upload_file(source, stop)
    assert not (root / "a").exists()
    (root / "a").upload_file(source)
    with pytest.raises(KeyError):
        (root / "a").download_file(tmp_path / "copy", stop)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["large"]


def test_a_tag_is_another_one_when_the_bytes_change(root: Location) -> None:
    def tags() -> tuple[str, str]:
        [info] = (root / "d").list_files()
        assert (info.name, info.size) == ("f", 3)
        return info.tag, (root / "d/f").entity_tag()

    (root / "d/f").write_bytes(b"one")
    first = tags()
    (root / "d/f").write_bytes(b"two")
    if root.local_path is not None:
        assert first == tags() == ("", "")
    else:
        assert all(first) and all(old != new for old, new in zip(first, tags(), strict=True))
