"""Archives: a dataset in one is that dataset; one that leads out of its folder, or is broken, is refused whole."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rfdetr_core.data.findings import Report
from rfdetr_core.data.formats.archive import unpack
from rfdetr_core.data.intake import local_dataset, take_in
from rfdetr_core.data.preparing import PrepareOptions, dataset_digest
from rfdetr_core.errors import DatasetError
from tests.data.helpers import grid_dataset

GB = 1.0


def digest(folder: Path) -> str:
    return dataset_digest(*take_in(folder, "auto", Report()), PrepareOptions(600))


def pack(source: Path, target: Path, inside: str = "") -> Path:
    """Everything below `source`, under the folder `inside`."""
    files = sorted(path for path in source.rglob("*") if path.is_file())
    names = {path: inside + path.relative_to(source).as_posix() for path in files}
    if target.suffix == ".zip":
        with zipfile.ZipFile(target, "w") as archive:
            for path, name in names.items():
                archive.write(path, name)
    else:
        with tarfile.open(target, "w:gz" if target.name.endswith("gz") else "w") as tar:
            tar.add(source, inside.rstrip("/") or ".")
    return target


@pytest.mark.parametrize("inside", ["", "export/"])
@pytest.mark.parametrize("name", ["d.zip", "d.tar", "d.tar.gz"])
def test_an_archive_is_the_dataset_in_it(tmp_path: Path, name: str, inside: str) -> None:
    source = grid_dataset(tmp_path / "s", 9)
    archive = pack(source, tmp_path / name, inside)
    unpacked = local_dataset(str(archive), tmp_path / "scratch", max_unpacked_gb=GB)
    assert digest(unpacked) == digest(source)
    assert archive.exists()


def tar_of(*members: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 3) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size if kind == tarfile.REGTYPE else 0
    return info


def zip_of(*names: str, mode: int = 0) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, b"abc")
    return buffer.getvalue()


OUT = "leads out of it or has no plain name"
BAD: dict[str, tuple[str, bytes, str]] = {
    "..": ("d.tar", tar_of(member("a"), member("../evil")), OUT),
    ".. within": ("d.tar", tar_of(member("a/../../evil")), OUT),
    "absolute": ("d.tar", tar_of(member("/evil")), OUT),
    "a folder ..": ("d.tar", tar_of(member("../evil", tarfile.DIRTYPE)), OUT),
    "symlink": ("d.tar", tar_of(member("a", tarfile.SYMTYPE, "/etc")), "is a link or a device"),
    "hard link": ("d.tar", tar_of(member("a", tarfile.LNKTYPE, "/etc/passwd")), "is a link or a device"),
    "device": ("d.tar", tar_of(member("a", tarfile.CHRTYPE)), "is a link or a device"),
    "pipe": ("d.tar", tar_of(member("a", tarfile.FIFOTYPE)), "is a link or a device"),
    "twice": ("d.tar", tar_of(member("a"), member("a")), "is in it twice"),
    "twice but for case": ("d.tar", tar_of(member("a"), member("A")), "is in it twice"),
    "file as folder": ("d.tar", tar_of(member("a"), member("a/b")), "cannot write"),
    "cut": ("d.tar", tar_of(member("a", size=5000))[:3000], "not a whole archive"),
    "no tar": ("d.tar", b"hello" * 999, "not a whole archive"),
    "empty file": ("d.tar", b"", "not a whole archive"),
    "empty": ("d.tar", tar_of(), "holds no files"),
    "large": ("d.tar", tar_of(member("a", size=2_000_001)), "unpacks to more than allowed"),
    "zip ..": ("d.zip", zip_of("../evil"), OUT),
    "zip absolute": ("d.zip", zip_of("/evil"), OUT),
    "zip backslash": ("d.zip", zip_of("a\\..\\..\\evil"), OUT),
    "zip control": ("d.zip", zip_of("a\nb"), OUT),
    "zip symlink": ("d.zip", zip_of("a", mode=0o120777), "is a link or a device"),
    "no zip": ("d.zip", b"PK\x03\x04" + bytes(50), "not a whole archive"),
    "zip large": ("d.zip", zip_of(*(f"{i}" for i in range(9))), "unpacks to more than allowed"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_archive_is_refused_and_writes_nothing_outside(tmp_path: Path, case: str) -> None:
    name, data, expected = BAD[case]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(data)
    limit = 20 if case == "zip large" else 2_000_000
    with pytest.raises(Exception, match=expected) as caught:
        unpack(tmp_path / "in" / name, tmp_path / "in" / "out", limit)
    assert getattr(caught.value, "exit_code", None) == 2 and "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
    assert {p.name for p in (tmp_path / "in").iterdir()} <= {name, "out"}
    assert not list(tmp_path.rglob("evil"))


MAKE: list[Callable[[], bytes]] = [lambda: tar_of(member("a"), member("b/c")), lambda: zip_of("a", "b/c")]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from([0, 1]),
    changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 400),
)
def test_mutated_archives_are_unpacked_or_refused(
    tmp_path_factory: pytest.TempPathFactory, kind: int, changes: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(MAKE[kind]())
    for place, value in changes:
        data[place % len(data)] = value
    folder = tmp_path_factory.mktemp("a")
    path = folder / ("d.tar", "d.zip")[kind]
    path.write_bytes(bytes(data[: len(data) - cut]))
    try:
        unpack(path, folder / "out", 10**6)
    except Exception as error:
        assert getattr(error, "exit_code", None) == 2, repr(error)
        assert "\n" not in str(error)
    assert {p.name for p in folder.iterdir()} <= {path.name, "out"}


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    for name, words in (("gone.zip", "no such file"), ("gone", "no such folder")):
        with pytest.raises(DatasetError, match=words):
            local_dataset(str(tmp_path / name), tmp_path / "scratch", max_unpacked_gb=GB)
