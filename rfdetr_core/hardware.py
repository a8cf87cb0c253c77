"""What this process may use: cores and memory of its cgroup, and the names of what it runs on. No torch."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
TOP_PAD = 32 << 20  # bytes that the heap grows by at once where freed memory is kept


def cpu_count() -> int:
    """Whole cores this process may use: the cgroup's quota (v2 or v1), else the affinity mask; at least 1.

    Threads beyond the quota do not run in parallel, they throttle each other.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota()
    return max(1, min(cores, math.floor(quota))) if quota is not None else cores


def memory_limit() -> int:
    """Bytes this process's cgroup, or one around it, may use; at most the machine's memory."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *(limit for _, limit in _limits())])


def available_memory() -> int:
    """Bytes this process may hold, those that it holds included, as long as the others hold what they do now.

    The others are those in its cgroup, and on the machine. Cached files do not count: the kernel gives them up.
    """
    own, held = resident_bytes(), _status_bytes("RssAnon") + _status_bytes("RssShmem")
    unclaimed = [
        line.split()[1] for line in (_read(Path("/proc/meminfo")) or "").splitlines() if "MemAvailable" in line
    ]
    there = [int(unclaimed[0]) * 1024 + own] if unclaimed else []
    for folder, limit in _limits():
        rows = dict(line.split() for line in (_read(folder / "memory.stat") or "").splitlines())
        names = ("total_rss", "total_shmem") if "total_rss" in rows else ("anon", "shmem")
        used = sum(int(rows.get(name, 0)) for name in names)
        there.append(limit - max(0, used - held))
    return max(0, min([memory_limit(), *there]))


def peak_rss() -> int:
    """Largest resident size of this process, in bytes, since it began or since `forget_peak`."""
    return _status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak() -> bool:
    """Let `peak_rss` begin anew; false where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return True
    except OSError:
        return False


def resident_bytes() -> int:
    """Resident size of this process now, in bytes; the peak where the system does not tell."""
    pages = _read(Path("/proc/self/statm"))
    return int(pages.split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages else peak_rss()


@contextmanager
def memory_guard(limit: int) -> Iterator[None]:
    """Inside, an allocation that would take this process beyond `limit` resident bytes fails.

    It raises MemoryError, or what a library makes of it. Beyond the limit of its cgroup the kernel would end the
    process without a word. What can be limited is the address space of private data: freed blocks that were given back
    to the system are in it, and when they are taken again that is not seen. So it is a net, for a process that has not
    freed much; who knows what a step takes should not begin one that is too large.
    """
    data = _status_bytes("VmData")
    if not data:  # no Linux
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    allowed = [data + limit - resident_bytes(), *(given for given in (soft, hard) if given != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (max(0, min(allowed)), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def return_freed_memory() -> None:
    """Give the blocks that glibc keeps back to the system, once."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return  # another C library


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed blocks for reuse instead of returning them to the system; true if it agreed.

    A training step on a CPU frees and takes the same blocks over and over; given back, each has to be paged in
    anew (19,000 page faults in a step of the smallest variant): 12 to 20 % of the step, and 2 to 5 % of an evaluation.
    """
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    try:
        libc = ctypes.CDLL(None)
        settings = ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, TOP_PAD))
        agreed = [libc.mallopt(option, value) == 1 for option, value in settings]
        return all(agreed)
    except (OSError, AttributeError):
        return False  # another C library: nothing to tell, nothing lost


def processor_name() -> str:
    """The processor's name as people know it, else the architecture."""
    lines = (_read(Path("/proc/cpuinfo")) or "").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe() -> dict[str, str | int]:
    """For status files and provenance."""
    return {
        "machine": platform.machine(),
        "system": platform.platform(),
        "cpus": cpu_count(),
        "memory_bytes": memory_limit(),
    }


def _cpu_quota() -> float | None:
    text = _read(CGROUP / "cpu.max")
    if text is not None:
        quota, period = text.split()
        return None if quota == "max" else int(quota) / int(period)
    quota_v1 = _read(CGROUP / "cpu" / "cpu.cfs_quota_us")
    period_v1 = _read(CGROUP / "cpu" / "cpu.cfs_period_us")
    if quota_v1 is None or period_v1 is None or int(quota_v1) <= 0:
        return None
    return int(quota_v1) / int(period_v1)


def _limits() -> Iterator[tuple[Path, int]]:
    """The memory cgroups that this process is in, each with its limit in bytes, where it has one.

    In a container its own cgroup is the root of what is mounted; elsewhere it is found by its path.
    """
    paths = {"": "/", "memory": "/"}
    for line in (_read(Path("/proc/self/cgroup")) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        paths |= {name: path for name in controllers.split(",") if name in paths}
    for base, name, path in (
        (CGROUP, "memory.max", paths[""]),
        (CGROUP / "memory", "memory.limit_in_bytes", paths["memory"]),
    ):
        own = base / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(base):
                limit = _read(folder / name)
                if limit is not None and limit.isdigit():
                    yield folder, int(limit)


def _status_bytes(name: str) -> int:
    """A row of /proc/self/status in bytes; 0 where there is none."""
    for line in (_read(Path("/proc/self/status")) or "").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
