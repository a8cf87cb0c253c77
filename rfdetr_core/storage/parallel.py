"""Run many transfers at once, with one progress bar, and stop the rest when one fails."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Lock
from typing import Generic, TypeVar

THREADS = 8
"""Files in flight. S3 gives one connection 50 to 100 MB/s; eight fill what a pod usually has."""

Tick = Callable[[int], None]
"""Told the number of bytes that just moved; raises when the transfer shall stop."""


def ignore(_: int) -> None:
    """The tick of those who do not count."""


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Job(Generic[T]):
    """`run` moves `size` bytes (0: unknown), ticks as it goes, and returns a result."""

    name: str
    size: int
    run: Callable[[Tick], T]


class _StoppedError(Exception):
    """An earlier job failed: give up in the middle of the file."""


def run_jobs(jobs: Sequence[Job[T]], *, title: str, progress: bool | None = None) -> dict[str, T]:
    """Name -> result of all jobs; of several failures the one that comes first in `jobs` is raised.

    Args:
        jobs: started in this order.
        title: stands before the bar.
        progress: show a bar of bytes on standard error; None shows one on a terminal only.
    """
    lock = Lock()
    failures: dict[int, BaseException] = {}
    results: dict[str, T] = {}
    # Jobs behind a failed one stop; those before it go on, so that the failure reported is the first one.
    end = len(jobs)

    with ExitStack() as stack:
        bar = None
        if sys.stderr.isatty() if progress is None else progress:
            from tqdm import tqdm

            total = sum(job.size for job in jobs) or None
            bar = stack.enter_context(tqdm(total=total, desc=title, unit="B", unit_scale=True))

        def work(index: int, job: Job[T]) -> None:
            nonlocal end

            def tick(count: int) -> None:
                with lock:
                    if index > end:
                        raise _StoppedError
                    if bar is not None:
                        bar.update(count)

            try:
                tick(0)
                result = job.run(tick)
            except BaseException as error:
                with lock:
                    failures[index] = error
                    end = min(end, index)
            else:
                with lock:
                    results[job.name] = result

        pool = stack.enter_context(ThreadPoolExecutor(THREADS, thread_name_prefix="transfer"))
        futures = [pool.submit(work, index, job) for index, job in enumerate(jobs)]
        try:
            wait(futures)
        except BaseException:
            # Ctrl-C, or the exception of a SIGTERM handler: all stop at their next chunk.
            end = -1
            raise
    if failures:
        raise failures[min(failures)]
    return {job.name: results[job.name] for job in jobs}
