"""What this process may use: cores and memory of its cgroup, and the names of what it runs on. No torch."""

from __future__ import annotations

import ctypes
import math
import os
import platform
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def cpu_count() -> int:
    """Whole cores this process may use: the cgroup's quota (v2 or v1), else the affinity mask; at least 1.

    Threads beyond the quota do not run in parallel, they throttle each other.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota()
    return max(1, min(cores, math.floor(quota))) if quota is not None else cores


def memory_limit() -> int:
    """Bytes this process's cgroup may use, at most the machine's memory."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [_read(CGROUP / "memory.max"), _read(CGROUP / "memory" / "memory.limit_in_bytes")]
    return min([total, *(int(limit) for limit in limits if limit is not None and limit.isdigit())])


def peak_rss() -> int:
    """Largest resident size of this process so far, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    """Resident size of this process now, in bytes; the peak where the system does not tell."""
    pages = _read(Path("/proc/self/statm"))
    return int(pages.split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages else peak_rss()


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed blocks for reuse instead of returning them to the system; true if it agreed.

    A training step on a CPU frees and takes the same blocks over and over; given back, each has to be paged in
    anew (19,000 page faults in a step of the smallest variant): 12 to 20 % of the step, and 2 to 5 % of an evaluation.
    """
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    try:
        libc = ctypes.CDLL(None)
        settings = ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, 256 << 20))
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


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
