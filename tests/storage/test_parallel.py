"""Several transfers at once, and the end of all when one fails."""

from __future__ import annotations

import threading
import time

import pytest

from rfdetr_core.storage.parallel import THREADS, Job, Tick, run_jobs


def test_results_keep_the_order_of_the_jobs() -> None:
    def slow_first(tick: Tick) -> str:
        time.sleep(0.05)
        return "slow"

    jobs = [Job("b", 1, slow_first), Job("a", 1, lambda tick: "fast")]
    assert list(run_jobs(jobs, title="t").items()) == [("b", "slow"), ("a", "fast")]
    assert run_jobs([], title="t") == {}


def test_jobs_run_at_once() -> None:
    all_there = threading.Barrier(THREADS, timeout=10)
    jobs = [Job(str(i), 0, lambda tick: all_there.wait()) for i in range(THREADS)]
    assert sorted(run_jobs(jobs, title="t").values()) == list(range(THREADS))


def test_the_first_failure_in_order_is_raised_and_later_jobs_stop() -> None:
    late_failed = threading.Event()
    ran: list[int] = []

    def early(tick: Tick) -> None:
        assert late_failed.wait(10)
        tick(1)  # goes on although a later one has failed
        raise KeyError("early")

    def late(tick: Tick) -> None:
        late_failed.set()
        raise ValueError("late")

    def endless(tick: Tick) -> None:
        while True:
            tick(1)
            time.sleep(0.001)

    jobs = [Job("early", 0, early), Job("late", 0, late), *[Job(f"e{i}", 0, endless) for i in range(4)]]
    jobs += [Job(f"n{i}", 0, lambda tick: ran.append(1)) for i in range(50)]
    with pytest.raises(KeyError, match="early"):
        run_jobs(jobs, title="t")
    assert len(ran) < 50


def test_an_interrupt_stops_what_is_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    running = threading.Event()
    ended = threading.Event()

    def endless(tick: Tick) -> None:
        try:
            while True:
                running.set()
                tick(1)
                time.sleep(0.001)
        finally:
            ended.set()

    def interrupt(futures: object) -> None:
        assert running.wait(10)
        raise KeyboardInterrupt

    monkeypatch.setattr("rfdetr_core.storage.parallel.wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_jobs([Job("endless", 0, endless)], title="t")
    assert ended.is_set()
