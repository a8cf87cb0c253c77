"""Where the time of a training goes."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

PARTS = ("data_wait", "step", "eval", "checkpoint")
WAITING_SHARE = 0.05
WAITING_SECONDS = 1.0  # the start of the loading processes of a toy training is no matter

log = logging.getLogger(__name__)


class Clock:
    """Seconds by part of the work: of this lap, which is an epoch, and in all.

    Args:
        spent: seconds that earlier processes spent on the same training.
    """

    def __init__(self, spent: float) -> None:
        now = time.monotonic()
        self._origin, self._published = now - spent, now
        self._lap = dict.fromkeys(PARTS, 0.0)
        self._last = self._lap

    @property
    def total(self) -> float:
        """Seconds spent on the training, over all processes."""
        return time.monotonic() - self._origin

    @property
    def since_publication(self) -> float:
        """Seconds since `published` was called."""
        return time.monotonic() - self._published

    def published(self) -> None:
        """The newest checkpoint was handed over."""
        self._published = time.monotonic()

    @contextmanager
    def running(self, part: str) -> Iterator[None]:
        """Count the time inside for a part."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._lap[part] += time.monotonic() - started

    def lap(self) -> dict[str, float]:
        """Columns `seconds/<part>` of the epoch; the save at its end counts for the next one."""
        self._last = self._lap
        self._lap = dict.fromkeys(PARTS, 0.0)
        return {f"seconds/{part}": round(seconds, 4) for part, seconds in self._last.items()}

    def warn_of_waiting(self, num_workers: int) -> None:
        """Say what to change when the last epoch waited for images for more than a twentieth of its steps."""
        waited, steps = self._last["data_wait"], self._last["step"]
        if waited > WAITING_SECONDS and waited > WAITING_SHARE * (waited + steps):
            log.warning(
                "training waited %.1f s for images, %.0f %% of the epoch's steps: raise train.num_workers (now %d)%s",
                waited,
                100.0 * waited / (waited + steps),
                num_workers,
                "" if num_workers == 0 else " or train.prefetch_factor, or give the pod more CPU",
            )
