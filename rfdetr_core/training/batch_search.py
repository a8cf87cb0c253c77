"""Which batch to try next, and which to take: pure functions of what was measured (training spec section 7.3).

The peak of a step is nearly a line in its batch, so that two measured sizes predict the others: the search doubles,
then goes where the line meets the limit, and bisects only where the line was wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

StoppedBy = Literal["given", "memory", "target", "images", "limit", "time"]

LARGEST_BATCH = 4096
MEMORY_SHARE = 0.95  # of the memory there is that a step may reach
PRECISION = 20  # a batch larger by less than a twentieth is not worth another step


@dataclass(frozen=True)
class Attempt:
    """A worst-case step: its batch, the seconds of a micro-batch, and the peak of memory, moments included.

    Without a peak it ran out of memory; then `left_bytes` is what was reserved and of no use after all was freed.
    """

    batch_size: int
    seconds: float | None
    peak_bytes: int | None
    left_bytes: int | None = None

    def fits(self, limit: float) -> bool:
        """Whether it came to its end within `limit` bytes."""
        return self.peak_bytes is not None and self.peak_bytes <= limit


@dataclass(frozen=True)
class MemoryModel:
    """The peak of a step of n images: `fixed_bytes + n * bytes_per_image`."""

    fixed_bytes: float
    bytes_per_image: float

    def peak(self, batch_size: int) -> int:
        """Bytes at this batch."""
        return round(self.fixed_bytes + batch_size * self.bytes_per_image)

    def largest(self, limit: float) -> int:
        """The largest batch within the limit, at most LARGEST_BATCH."""
        if self.bytes_per_image <= 0:
            return LARGEST_BATCH if self.fixed_bytes <= limit else 0
        found = math.floor((limit - self.fixed_bytes) / self.bytes_per_image)
        return max(0, min(LARGEST_BATCH, found))


def fit(attempts: Sequence[Attempt], *, without: int | None = None) -> MemoryModel | None:
    """The line through the largest size that was measured and one of at most half of it; None if there are no two.

    Smaller ones lie above the line of the large ones: what is allocated once weighs more. Sizes close to each other
    give no slope on a CPU, where a peak depends on what the heap has seen. `without` leaves out a size, to predict it.
    """
    peaks: dict[int, int] = {}
    for attempt in attempts:
        if attempt.peak_bytes is not None and attempt.batch_size != without:
            peaks[attempt.batch_size] = max(attempt.peak_bytes, peaks.get(attempt.batch_size, 0))
    if len(peaks) < 2:
        return None
    *smaller, (large, high) = sorted(peaks.items())
    small, low = next((one for one in reversed(smaller) if 2 * one[0] <= large), smaller[0])
    slope = max(0.0, (high - low) / (large - small))
    return MemoryModel(fixed_bytes=high - slope * large, bytes_per_image=slope)


@dataclass(frozen=True)
class Bound:
    """The largest batch that is of use, and why."""

    batch_size: int
    reason: StoppedBy


def bound(*, images: int, target: int | None) -> Bound:
    """The smallest of: the images of a device, the target where there is no gain beyond it (a CPU), 4,096."""
    bounds = [Bound(max(1, images), "images"), Bound(LARGEST_BATCH, "limit")]
    if target is not None:
        bounds.append(Bound(target, "target"))
    return min(bounds, key=lambda one: one.batch_size)


@dataclass(frozen=True)
class Found:
    """The largest batch whose step was seen to stay within the limit (0: not even one image), and what ended it."""

    safe: int
    stopped_by: StoppedBy


def next_batch(
    attempts: Sequence[Attempt], *, limit: float, upper: Bound, seconds_left: float = math.inf
) -> int | Found:
    """The batch of the next step, or the end of the search.

    Args:
        limit: bytes that a step may reach.
        seconds_left: a step that would take longer is not begun.
    """
    fitting = [attempt for attempt in attempts if attempt.fits(limit)]
    if not fitting:
        return Found(0, "memory") if attempts else 1
    last = max(fitting, key=lambda attempt: attempt.batch_size)
    largest = last.batch_size
    if largest >= upper.batch_size:
        return Found(largest, upper.reason)
    failed = min((one.batch_size for one in attempts if not one.fits(limit)), default=None)
    wanted = min(largest * (2 if largest < 4 else 4), upper.batch_size)
    model = fit(attempts)
    if model is not None:
        wanted = min(wanted, model.largest(limit))
    if failed is not None and wanted >= failed:  # the line was wrong
        wanted = (largest + failed) // 2
    if wanted < largest + max(1, largest // PRECISION) and wanted < upper.batch_size:
        return Found(largest, "memory")
    affordable = seconds_left * largest / (last.seconds or 1e-9)
    if wanted > affordable:
        wanted = math.floor(affordable)
        if wanted < largest + max(1, largest // 4):
            return Found(largest, "time")
    return wanted


def with_headroom(batch_size: int, headroom: float, *, use_ema: bool) -> int:
    """The seed's rule: with EMA the largest safe batch is scaled by the headroom; never below 1."""
    return max(1, math.floor(batch_size * headroom + 1e-9)) if use_ema else batch_size


def choose(attempts: Sequence[Attempt], found: Found, *, limit: float, headroom: float, use_ema: bool) -> int:
    """The batch to train with: the safe one, less the headroom.

    Where a bound ended the search before memory did, what memory would have allowed is scaled, and the bound stands.
    """
    room, model = found.safe, fit(attempts)
    if found.stopped_by != "memory" and model is not None:
        room = max(room, model.largest(limit))
    return min(found.safe, with_headroom(room, headroom, use_ema=use_ema))


def accumulation(batch_size: int, target: int) -> int:
    """Micro-batches per optimizer step so that their product with the batch reaches the target."""
    return max(1, math.ceil(target / batch_size))
