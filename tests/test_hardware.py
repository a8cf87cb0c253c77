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


def test_a_limit_around_the_own_cgroup_counts(cgroup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a systemd service has it: its own cgroup is not the root of what is mounted."""
    read = hardware._read
    own = "4:cpu,memory:/pod/box\n0::/pod/box"
    monkeypatch.setattr(hardware, "_read", lambda path: own if path == Path("/proc/self/cgroup") else read(path))
    (cgroup / "pod" / "box").mkdir(parents=True)
    (cgroup / "pod" / "memory.max").write_text("2000000\n")
    (cgroup / "pod" / "box" / "memory.max").write_text("max\n")
    assert hardware.memory_limit() == 2_000_000
    (cgroup / "memory" / "pod").mkdir(parents=True)
    (cgroup / "memory" / "pod" / "memory.limit_in_bytes").write_text("1000000\n")
    assert hardware.memory_limit() == 1_000_000


@pytest.mark.parametrize(
    ("names", "limit_file", "folder"),
    [(("anon", "shmem"), "memory.max", ""), (("total_rss", "total_shmem"), "memory.limit_in_bytes", "memory")],
)
def test_what_others_in_the_cgroup_hold_is_not_available(
    cgroup: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, str], limit_file: str, folder: str
) -> None:
    place = cgroup / folder
    place.mkdir(exist_ok=True)
    (place / limit_file).write_text("6000000000\n")
    held = hardware._status_bytes("RssAnon") + hardware._status_bytes("RssShmem")
    (place / "memory.stat").write_text(f"{names[0]} {held + 1_000_000_000}\n{names[1]} 500000000\nfile 3000000000\n")
    monkeypatch.setattr(hardware, "memory_limit", lambda: 6_000_000_000)
    read = hardware._read
    monkeypatch.setattr(hardware, "_read", lambda path: "" if path == Path("/proc/meminfo") else read(path))
    assert hardware.available_memory() == pytest.approx(4_500_000_000, abs=20_000_000)


def test_without_a_limit_the_machine_decides(cgroup: Path) -> None:
    assert hardware.resident_bytes() < hardware.available_memory() <= TOTAL


def test_the_guard_refuses_what_goes_beyond_and_the_peak_can_be_forgotten() -> None:
    """In a process of its own: freed blocks of this one would be taken again without growing."""
    program = """
        from rfdetr_core import hardware
        base = hardware.resident_bytes()
        with hardware.memory_guard(base + 60_000_000):
            held = bytearray(b"x") * 40_000_000
            try:
                more = bytearray(b"x") * 40_000_000
            except MemoryError:
                print("refused")
        more = bytearray(b"x") * 40_000_000
        print(hardware.peak_rss() - base)
        del held, more
        hardware.return_freed_memory()
        print(hardware.forget_peak(), hardware.peak_rss() - base)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    refused, peak, forgotten, after = done.stdout.split()
    assert refused == "refused"
    assert 75_000_000 < int(peak) < 120_000_000
    assert forgotten == "True" and int(after) < 10_000_000
