"""What is peculiar to local folders: links, rights, leftovers."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from rfdetr_core.errors import MissingObjectError, StorageAccessError, StorageUnavailableError
from rfdetr_core.storage import FileInfo, Location, location
from rfdetr_core.storage.local import atomic_file, local_errors


@pytest.fixture
def root(tmp_path: Path) -> Location:
    found = location(str(tmp_path / "root"))
    (found / "d/file").write_bytes(b"12")
    return found


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    (tmp_path / "outside/deep").mkdir(parents=True)
    (tmp_path / "outside/precious").write_bytes(b"1")
    return tmp_path / "outside"


def test_links_inside_are_followed_to_files_once(root: Location) -> None:
    folder = Path(root.uri)
    (folder / "link").symlink_to("d/file")
    (folder / "folder-link").symlink_to("d")
    (folder / "loop").symlink_to(".")
    assert root.list_files() == [FileInfo("d/file", 2), FileInfo("link", 2)]


@pytest.mark.parametrize("target", ["outside/precious", "outside", "rootless"])
def test_links_that_leave_are_refused_by_name(root: Location, outside: Path, target: str) -> None:
    link = Path(root.uri) / "d/link"
    link.symlink_to(outside.parent / target)
    with pytest.raises(StorageAccessError) as caught:
        root.list_files()
    assert str(caught.value) == (
        f"cannot list '{link}': a symbolic link leads out of {root.uri} (remove it, or put the file itself there)"
    )
    with pytest.raises(StorageAccessError, match="symbolic link"):
        (root / "copy").upload_tree(Path(root.uri))


def test_broken_links_and_pipes_are_refused(root: Location) -> None:
    odd = Path(root.uri) / "odd"
    odd.symlink_to("gone")
    with pytest.raises(StorageAccessError, match="neither a file nor a folder, or a broken link"):
        root.list_files()
    odd.unlink()
    os.mkfifo(odd)
    with pytest.raises(StorageAccessError, match="neither a file nor a folder"):
        root.list_files()


def test_a_root_that_is_a_link_is_followed(root: Location, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(root.uri)
    assert location(str(tmp_path / "alias")).list_files() == root.list_files()


def test_deleting_never_leaves_the_tree(root: Location, outside: Path, tmp_path: Path) -> None:
    (Path(root.uri) / "link").symlink_to(outside)
    with pytest.raises(StorageAccessError, match="a symbolic link leads out of"):
        root.delete_files(["link/precious"])
    (root / "link").delete_tree()
    (Path(root.uri) / "link").symlink_to(outside)
    (Path(root.uri) / "precious").symlink_to(outside / "precious")
    (root / "precious").delete()
    root.delete_tree()
    assert not Path(root.uri).exists()
    assert {p.name for p in outside.iterdir()} == {"deep", "precious"}
    (tmp_path / "alias").symlink_to(outside)
    location(str(tmp_path / "alias")).delete_tree()
    assert not (tmp_path / "alias").is_symlink()
    assert (outside / "precious").exists()


def test_leftovers_of_a_crash_are_not_listed(root: Location) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_file(Path(root.uri) / "x", durable=True) as file:
        file.write(b"1")
        left = [p for p in Path(root.uri).iterdir() if p.name.startswith(".rfdetr-")]
        assert len(left) == 1
        assert root.list_files() == [FileInfo("d/file", 2)]
        raise KeyboardInterrupt
    assert [p.name for p in Path(root.uri).iterdir()] == ["d"]
    (Path(root.uri) / ".rfdetr-tmp-1").write_bytes(b"torn")
    assert not (root / "d2").exists()
    assert root.list_files() == [FileInfo("d/file", 2)]


def test_files_get_the_rights_of_the_umask(root: Location) -> None:
    before = os.umask(0o027)
    try:
        (root / "shared").write_bytes(b"1")
    finally:
        os.umask(before)
    assert stat.S_IMODE((Path(root.uri) / "shared").stat().st_mode) == 0o640


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may do anything, so be somebody else for a while."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_missing_rights_are_named() -> None:
    with TemporaryDirectory() as folder:  # not below pytest's, which nobody but its owner may enter
        path = Path(folder)
        path.chmod(0o755)
        root = location(folder)
        (root / "d/file").write_bytes(b"1")
        (path / "d/file").chmod(0)
        (path / "d").chmod(0o111)
        acts: dict[str, Callable[[], object]] = {
            "read": (root / "d/file").read_bytes,
            "write": lambda: (root / "d/new").write_bytes(b""),
            "delete": (root / "d/file").delete,
            "list": (root / "d").list_files,
        }
        with as_nobody():
            for action, act in acts.items():
                with pytest.raises(StorageAccessError) as caught:
                    act()
                assert caught.value.message.startswith(f"cannot {action} {folder}/d")
                assert str(caught.value).endswith("Permission denied (give this user the right to do so)")
        (path / "d").chmod(0o700)


@pytest.mark.parametrize(
    ("code", "kind", "text"),
    [
        (errno.ENOSPC, StorageAccessError, "cannot write /x: the disk is full (free space or give it a larger volume)"),
        (errno.EDQUOT, StorageAccessError, "cannot write /x: the disk is full"),
        (errno.EROFS, StorageAccessError, "Read-only file system (use a folder on a writable file system)"),
        (errno.EIO, StorageUnavailableError, "Input/output error (the file system is lost; try again)"),
        (errno.ESTALE, StorageUnavailableError, "the file system is lost; try again"),
        (errno.ENOENT, MissingObjectError, "cannot write /x: no such file (check the path)"),
        (errno.ELOOP, StorageAccessError, "check the path and its file system"),
    ],
)
def test_system_errors_say_what_to_do(code: int, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught, local_errors("write", Path("/x")):
        raise OSError(code, os.strerror(code))
    assert type(caught.value) is kind
    assert text in str(caught.value)


def test_files_and_folders_in_each_others_way(root: Location) -> None:
    with pytest.raises(StorageAccessError, match="a part of the path is a file"):
        (root / "d/file/x").read_bytes()
    with pytest.raises(StorageAccessError, match="it is a folder, and a file is wanted"):
        (root / "d").read_bytes()
    with pytest.raises(StorageAccessError, match="it is a folder, and a file is wanted"):
        (root / "d").write_bytes(b"")
    with pytest.raises(StorageAccessError, match="shorten the name"):
        (root / ("n" * 300)).write_bytes(b"")
    assert root.list_files() == [FileInfo("d/file", 2)]
