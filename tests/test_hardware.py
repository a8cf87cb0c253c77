"""Cores and memory of a cgroup."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from rfdetr_core import hardware

TOTAL = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
V1_UNLIMITED = "9223372036854771712"


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cgroup file system on a machine of eight cores."""
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    return tmp_path


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text + "\n")


def test_without_a_cgroup_the_affinity_mask_decides(cgroup: Path) -> None:
    assert hardware.cpu_count() == 8
    assert hardware.memory_limit() == TOTAL


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("max 100000", 8), ("400000 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8),
        ("30000 10000", 3),
    ],
)  # fmt: skip
def test_quota_of_version_2(cgroup: Path, text: str, cores: int) -> None:
    write(cgroup, cpu_dot_max=text)
    assert hardware.cpu_count() == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", 8), ("400000", 4), ("150000", 1), ("20000", 1)])
def test_quota_of_version_1(cgroup: Path, quota: str, cores: int) -> None:
    write(cgroup, cpu__cpu_dot_cfs_quota_us=quota, cpu__cpu_dot_cfs_period_us="100000")
    assert hardware.cpu_count() == cores


def test_half_a_version_1_is_no_quota(cgroup: Path) -> None:
    write(cgroup, cpu__cpu_dot_cfs_quota_us="100000")
    assert hardware.cpu_count() == 8


@pytest.mark.parametrize(("text", "limit"), [("max", TOTAL), ("1048576", 1048576), (str(10 * TOTAL), TOTAL)])
def test_memory_of_version_2(cgroup: Path, text: str, limit: int) -> None:
    write(cgroup, memory_dot_max=text)
    assert hardware.memory_limit() == limit


@pytest.mark.parametrize(("text", "limit"), [(V1_UNLIMITED, TOTAL), ("2097152", 2097152)])
def test_memory_of_version_1(cgroup: Path, text: str, limit: int) -> None:
    write(cgroup, memory__memory_dot_limit_in_bytes=text)
    assert hardware.memory_limit() == limit


def test_description(cgroup: Path) -> None:
    write(cgroup, cpu_dot_max="200000 100000", memory_dot_max="4096")
    described = hardware.describe()
    assert (described["cpus"], described["memory_bytes"]) == (2, 4096)
    assert set(described) == {"machine", "system", "cpus", "memory_bytes"}


def test_resident_memory_grows_with_what_is_held() -> None:
    """In a process of its own: this one may hold freed blocks, from which 50 MB are taken without growing."""
    program = """
        from rfdetr_core import hardware
        before = hardware.resident_bytes()
        held = bytearray(b"x") * 50_000_000
        print(before, hardware.resident_bytes(), hardware.peak_rss())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    before, during, peak = map(int, done.stdout.split())
    assert 40_000_000 < during - before < 80_000_000
    assert during <= peak * 1.05 < TOTAL


def test_without_proc_the_peak_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_read", lambda path: None)
    assert hardware.resident_bytes() == pytest.approx(hardware.peak_rss(), rel=0.01)
