"""Which batch fits: found by running the real training step on its worst case (training spec section 7).

An integer `batch_size` is proven by one worst-case step and timed. `auto` doubles the batch until it no longer
fits or a bound stops it, then sets accumulation for the target effective batch.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from rfdetr_core import hardware
from rfdetr_core.config import ModelConfig, TrainConfig
from rfdetr_core.data.loading import Batch
from rfdetr_core.data.scales import configured_scales
from rfdetr_core.errors import DeviceMemoryError
from rfdetr_core.training.engine import Engine, build_engine, fabric_accelerator

log = logging.getLogger(__name__)

LARGEST_BATCH = 4096
CPU_SECONDS = 10.0  # a CPU has no natural end of doubling: stop looking after this
MEMORY_SHARE = 0.95  # of the free memory that a step may use

StoppedBy = Literal["given", "memory", "target", "images", "limit", "time"]


@dataclass(frozen=True)
class Attempt:
    """One worst-case step: its batch, its time, the peak of memory, and whether it fitted."""

    batch_size: int
    seconds: float | None
    peak_bytes: int | None
    fits: bool


@dataclass(frozen=True)
class ProbeResult:
    """What the training stage takes over, and how it was found; probe.json."""

    batch_size: int
    grad_accum_steps: int
    largest_that_fits: int
    stopped_by: StoppedBy
    side: int  # px of the worst-case step
    targets_per_image: int
    device: str
    memory_bytes: int  # what the device or the cgroup has
    seconds_per_optimizer_step: float
    attempts: tuple[Attempt, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain dict, with the effective batch spelled out."""
        return {**asdict(self), "effective_batch_size": self.batch_size * self.grad_accum_steps}


def accumulation(batch_size: int, target: int) -> int:
    """Micro-batches per optimizer step so that their product with the batch reaches the target."""
    return max(1, math.ceil(target / batch_size))


def with_headroom(batch_size: int, headroom: float, *, use_ema: bool) -> int:
    """The seed's rule: with EMA the largest batch that fits is scaled by the headroom; never below 1."""
    return max(1, math.floor(batch_size * headroom)) if use_ema else batch_size


def probe(model: ModelConfig, train: TrainConfig, *, images: int, max_boxes: int) -> ProbeResult:
    """Run worst-case steps: the largest side, and as many boxes in each image as the dataset's fullest has.

    Args:
        images: how many the train split has; a larger batch has no use.
        max_boxes: most boxes in one image; bounded by `auto_batch_max_targets_per_image`.

    The model it builds is its own, and torch's random stream is left as it was: training after a probe draws the
    same weights as without one.

    Raises:
        DeviceMemoryError: the given batch, or a batch of 1, does not fit.
    """
    # Only the device that is used: each of the others would get a CUDA context.
    on_cuda = fabric_accelerator(train.accelerator) == "cuda"
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if on_cuda else []):
        torch.manual_seed(0)
        result = _probe(model, train, images, max_boxes)
    if on_cuda:  # what a failed attempt left would fragment the memory of a training to come
        gc.collect()
        torch.cuda.empty_cache()
    return result


def _probe(model: ModelConfig, train: TrainConfig, images: int, max_boxes: int) -> ProbeResult:
    scales = configured_scales(model, train)
    side, targets = max(scales), max(1, min(max_boxes, train.auto_batch_max_targets_per_image))
    engine = build_engine(model, train)
    search = _Search(engine, side, targets, model.num_classes)
    if train.batch_size == "auto":
        stopped_by = _double(search, train, images)
        largest = search.largest
        batch_size = largest
        if stopped_by == "memory":
            batch_size = with_headroom(largest, train.auto_batch_ema_headroom, use_ema=train.use_ema)
        accum = accumulation(batch_size, train.auto_batch_target_effective)
        _tell_effective(batch_size * accum, train.auto_batch_target_effective)
    else:
        stopped_by, batch_size, accum = "given", train.batch_size, train.grad_accum_steps
        largest = batch_size
        search.attempt(batch_size)
        search.attempt(batch_size)  # the first step allocates the optimizer's state; the second tells the time
    return ProbeResult(
        batch_size=batch_size,
        grad_accum_steps=accum,
        largest_that_fits=largest,
        stopped_by=stopped_by,
        side=side,
        targets_per_image=targets,
        device=_device_name(engine.device),
        memory_bytes=_memory(engine.device),
        seconds_per_optimizer_step=search.seconds_per_image * batch_size * accum,
        attempts=tuple(search.attempts),
    )


def _double(search: _Search, train: TrainConfig, images: int) -> StoppedBy:
    """1, 1, 2, 4, ... until memory or a bound says stop; returns which. The first step warms up."""
    started = time.monotonic()
    on_cpu = _on_cpu(search.engine.device)
    try:
        search.attempt(1)
        search.attempt(1)
    except DeviceMemoryError as error:
        raise DeviceMemoryError(
            error.message, hint="lower model.resolution, or set model.gradient_checkpointing: true"
        ) from error
    batch_size = 1
    while True:
        doubled = 2 * batch_size
        if on_cpu and search.predicted_peak(doubled) > MEMORY_SHARE * hardware.memory_limit():
            return "memory"
        if on_cpu and batch_size >= train.auto_batch_target_effective:
            return "target"
        if doubled > images:
            return "images"
        if doubled > LARGEST_BATCH:
            return "limit"
        if on_cpu and time.monotonic() - started > CPU_SECONDS:
            return "time"
        try:
            search.attempt(doubled)
        except DeviceMemoryError:
            return "memory"
        batch_size = doubled


def _on_cpu(device: torch.device) -> bool:
    """Where memory is shared with everything else and a failure ends the process: look ahead instead of trying."""
    return device.type == "cpu"


def _tell_effective(effective: int, target: int) -> None:
    if effective > 2 * target:
        log.warning(
            "the effective batch is %d, and train.auto_batch_target_effective asks for %d or more: at the same "
            "learning rate training makes fewer steps; scaling train.lr by %.1f or less may serve it",
            effective,
            target,
            effective / target,
        )


class _Search:
    """Runs worst-case steps on one engine and remembers them."""

    def __init__(self, engine: Engine, side: int, targets: int, num_classes: int) -> None:
        self.engine, self._side, self._targets, self._classes = engine, side, targets, num_classes
        self.attempts: list[Attempt] = []
        self._baseline = hardware.resident_bytes()

    @property
    def largest(self) -> int:
        """The largest batch that fitted."""
        return max(attempt.batch_size for attempt in self.attempts if attempt.fits)

    @property
    def seconds_per_image(self) -> float:
        """Of the last step that fitted."""
        last = [a for a in self.attempts if a.fits][-1]
        return (last.seconds or 0.0) / last.batch_size

    def predicted_peak(self, batch_size: int) -> float:
        """Bytes a CPU step of this batch will reach: what a step adds grows with its batch."""
        last = self.attempts[-1]
        return self._baseline + ((last.peak_bytes or 0) - self._baseline) * batch_size / last.batch_size

    def attempt(self, batch_size: int) -> None:
        """One optimizer step of this batch; raises DeviceMemoryError if it does not fit."""
        device = self.engine.device
        channels = self.engine.raw_model.config.num_channels
        batch = worst_case_batch(batch_size, self._side, self._targets, self._classes, channels)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        started = time.monotonic()
        try:
            self.engine.optimizer_step([batch], factor=1.0, global_step=len(self.attempts))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except DeviceMemoryError:
            self.attempts.append(Attempt(batch_size, None, None, fits=False))
            log.info("batch %d at %d px does not fit", batch_size, self._side)
            raise
        seconds = time.monotonic() - started
        peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else hardware.peak_rss()
        self.attempts.append(Attempt(batch_size, round(seconds, 4), peak, fits=True))
        log.info("batch %d at %d px: %.2f s, peak %.2f GB", batch_size, self._side, seconds, peak / 1e9)


def worst_case_batch(batch_size: int, side: int, targets: int, num_classes: int, channels: int = 3) -> Batch:
    """Random pixels and `targets` random boxes in each image: every assignment problem has its full size."""
    generator = torch.Generator().manual_seed(batch_size)
    centres = torch.rand((batch_size * targets, 2), generator=generator) * 0.8 + 0.1
    extents = torch.rand((batch_size * targets, 2), generator=generator) * 0.15 + 0.05
    return Batch(
        pixels=torch.randint(0, 256, (batch_size, channels, side, side), dtype=torch.uint8, generator=generator),
        boxes=torch.cat([centres, extents], dim=1),
        labels=torch.randint(0, num_classes, (batch_size * targets,), generator=generator),
        counts=(targets,) * batch_size,
        images=tuple(range(batch_size)),
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return hardware.memory_limit()
