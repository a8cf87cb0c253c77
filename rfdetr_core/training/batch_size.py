"""Which batch fits, and what the training will cost: found by running the real step on its worst case.

The step is the training's own: model, loss, optimizer with its moments, average, precision, checkpointing; on the
largest batch that the dataset can give (see `worst_case`), accumulated over two micro-batches where training
accumulates, so that gradients are held while the next one runs. Then the evaluation of a batch. `auto` searches the
largest batch within 95 % of the free memory (see `batch_search`); a given one is proven (training spec section 7).
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from rfdetr_core.config import ModelConfig, TrainConfig
from rfdetr_core.errors import DeviceMemoryError
from rfdetr_core.training import checkpoint
from rfdetr_core.training.batch_search import (
    MEMORY_SHARE,
    Attempt,
    Bound,
    Found,
    StoppedBy,
    accumulation,
    bound,
    choose,
    fit,
    next_batch,
)
from rfdetr_core.training.bench import Bench, EvaluationStep, Mixed, build_bench
from rfdetr_core.training.cost import Cost, estimate
from rfdetr_core.training.device_memory import Device, describe
from rfdetr_core.training.engine import fabric_accelerator, first_device
from rfdetr_core.training.smaller_model import smallest_change
from rfdetr_core.training.worst_case import DatasetFacts, WorstCase, scale_weights, worst_case

log = logging.getLogger(__name__)

CPU_SECONDS = 10.0  # of searching: a CPU has no natural end of doubling
GIB = 2**30


@dataclass(frozen=True)
class ProbeResult:
    """What the training takes over, how it was found, and what it will cost; probe.json."""

    batch_size: int
    grad_accum_steps: int
    safe_batch_size: int  # the largest that was seen to fit, before the headroom; the given one
    headroom: float  # what it was scaled by; 1 without EMA, and for a given batch
    stopped_by: StoppedBy
    worst_case: WorstCase
    device: Device
    precision: str
    available_bytes: int  # that the process may hold; `limit_bytes` of them it may reach
    limit_bytes: int
    predicted_peak_bytes: int | None  # from the other sizes; None: there were no two
    peak_bytes: int  # of training steps at the chosen batch
    evaluation: EvaluationStep
    attempts: tuple[Attempt, ...]
    cost: Cost
    versions: dict[str, str]

    @property
    def effective_batch_size(self) -> int:
        """Images per optimizer step and device."""
        return self.batch_size * self.grad_accum_steps

    def to_json(self) -> dict[str, Any]:
        """Plain dict."""
        height, width = self.worst_case.largest
        attempts = [{**asdict(one), "fits": one.fits(self.limit_bytes)} for one in self.attempts]
        worst = {"height": height, "width": width, "padded": self.worst_case.padded}
        worst |= {"targets_per_image": self.worst_case.targets, "shapes_known": self.worst_case.shapes_known}
        cost = {**asdict(self.cost), "fits": self.cost.fits}
        return {
            **asdict(self),
            "effective_batch_size": self.effective_batch_size,
            "worst_case": worst,
            "attempts": attempts,
            "cost": cost,
        }


def probe(
    model: ModelConfig, train: TrainConfig, facts: DatasetFacts, *, price_per_hour: float | None = None
) -> ProbeResult:
    """Prove the given batch, or search the largest, and estimate what the training costs.

    Args:
        facts: of the dataset to train on; a batch of more images than it has is of no use.
        price_per_hour: of one device.

    The model it builds is its own, and torch's random stream is left as it was: training after a probe draws the
    same weights as without one.

    Raises:
        DeviceMemoryError: the given batch does not fit, and the message names the largest that does; or not even a
            batch of 1 does, and the hint is the smallest change that helps.
    """
    # Only the device that is used: each of the others would get a CUDA context.
    on_cuda = fabric_accelerator(train.accelerator) == "cuda"
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if on_cuda else []):
        torch.manual_seed(0)
        result = _probe(model, train, facts, price_per_hour)
    gc.collect()
    if on_cuda:  # what a failed attempt left would fragment the memory of a training to come
        torch.cuda.empty_cache()
    return result


def _probe(model: ModelConfig, train: TrainConfig, facts: DatasetFacts, price: float | None) -> ProbeResult:
    worst = worst_case(model, train, facts)
    _tell_worst_case(worst, train, facts)
    ranks = _ranks(train)
    bench = build_bench(model, train, worst)
    if bench is None or not _one_image_fits(bench, train, ranks):
        del bench  # what it holds is not there for what is tried next
        raise _nothing_fits(model, train, facts, ranks)
    if train.batch_size == "auto":
        found, batch_size, mixed = _search(bench, train, facts, ranks)
        accum = accumulation(batch_size, train.auto_batch_target_effective)
        headroom = train.auto_batch_ema_headroom if train.use_ema else 1.0
        _tell_effective(batch_size * accum, train.auto_batch_target_effective)
    else:
        batch_size, accum, headroom = train.batch_size, train.grad_accum_steps, 1.0
        found, mixed = Found(batch_size, "given"), _prove(bench, batch_size, accum, ranks)
    evaluation_batch = train.eval_batch_size or batch_size
    evaluation = bench.evaluate(evaluation_batch, max(1, min(facts.valid_max_boxes, worst.targets)))
    cost = estimate(
        train,
        facts,
        effective_batch=batch_size * accum * ranks,
        devices=ranks if bench.engine.device.type == "cuda" else 1,
        step_seconds=mean_step_seconds(train, worst, batch_size, mixed) * accum / mixed.micro_batches,
        eval_seconds_per_image=evaluation.seconds / evaluation_batch,
        price_per_hour=price,
    )
    _tell_budget(cost, train)
    line = fit(bench.attempts, without=batch_size)
    held = bench.gradient_bytes if mixed.micro_batches > 1 else 0
    return ProbeResult(
        batch_size=batch_size,
        grad_accum_steps=accum,
        safe_batch_size=found.safe,
        headroom=headroom,
        stopped_by=found.stopped_by,
        worst_case=worst,
        device=describe(bench.engine.device),
        precision=bench.engine.precision,
        available_bytes=bench.available,
        limit_bytes=bench.limit,
        predicted_peak_bytes=None if line is None else line.peak(batch_size) + held,
        peak_bytes=mixed.peak_bytes,
        evaluation=evaluation,
        attempts=tuple(bench.attempts),
        cost=cost,
        versions=checkpoint.versions(),
    )


def _on_cpu(bench: Bench) -> bool:
    """Where a larger batch is no faster, and the search would not end by itself in a time that anyone waits."""
    return bench.engine.device.type == "cpu"


def _ranks(train: TrainConfig) -> int:
    """Processes that will train, here or where the training runs: nothing is said if they are not here."""
    devices = train.devices
    if isinstance(devices, int):
        count = devices
    elif devices == "auto":
        count = max(1, torch.cuda.device_count()) if fabric_accelerator(train.accelerator) == "cuda" else 1
    else:
        count = len(devices.removesuffix(",").split(","))
    return count * train.num_nodes


def _micro_batches(accum: int, ranks: int) -> int:
    """Micro-batches of a probed step: two stand for any number, as the first leaves its gradients.

    With several ranks gradients lie in buckets that are always there: as if a micro-batch had gone before.
    """
    return 2 if accum > 1 or ranks > 1 else 1


def _one_image_fits(bench: Bench, train: TrainConfig, ranks: int) -> bool:
    """Try a batch of one, of which training accumulates as many as it needs."""
    automatic = train.batch_size == "auto"
    accum = train.auto_batch_target_effective if automatic else train.grad_accum_steps
    held = bench.gradient_bytes if _micro_batches(accum, ranks) > 1 else 0
    return bench.attempt(1).fits(bench.limit - held)


def _search(bench: Bench, train: TrainConfig, facts: DatasetFacts, ranks: int) -> tuple[Found, int, Mixed]:
    """Try batches until memory or a bound says stop; then prove the chosen one. A batch of 1 has been tried."""
    on_cpu = _on_cpu(bench)
    target = train.auto_batch_target_effective
    upper = bound(images=math.ceil(facts.train_images / ranks), target=target if on_cpu else None)
    found = _until_found(bench, upper, CPU_SECONDS if on_cpu else math.inf)
    batch_size = choose(
        bench.attempts,
        found,
        limit=bench.limit - bench.gradient_bytes,
        headroom=train.auto_batch_ema_headroom,
        use_ema=train.use_ema,
    )
    while True:
        try:
            mixed = bench.mixed(batch_size, _micro_batches(accumulation(batch_size, target), ranks))
            if mixed.peak_bytes <= bench.limit or batch_size == 1:
                return found, batch_size, mixed
        except DeviceMemoryError:
            if batch_size == 1:
                raise
        bench.failed(batch_size)
        log.info("batch %d does not hold where steps of all sizes follow each other", batch_size)
        batch_size = math.floor(0.9 * batch_size)
        found = Found(min(found.safe, batch_size), "memory")


def _until_found(bench: Bench, upper: Bound, seconds: float) -> Found:
    started = time.monotonic()
    while True:
        left = seconds - (time.monotonic() - started)
        limit = bench.limit - bench.gradient_bytes  # there is room for accumulation
        step = next_batch(bench.attempts, limit=limit, upper=upper, seconds_left=left / bench.micro_batches)
        if isinstance(step, Found):
            return replace(step, safe=max(1, step.safe))  # one image fits, as was seen
        bench.attempt(step)


def _prove(bench: Bench, wanted: int, accum: int, ranks: int) -> Mixed:
    """Worst-case steps of the given batch, unless two small ones tell that they are in vain.

    Raises:
        DeviceMemoryError: it does not fit; the message names the largest that does.
    """
    for batch_size in sorted({min(2, wanted), wanted} - {1}):
        line = fit(bench.attempts)
        if line is None or line.peak(batch_size) <= 1.1 * bench.available:
            bench.attempt(batch_size)
    if bench.attempts[-1].batch_size == wanted and bench.attempts[-1].peak_bytes is not None:
        try:
            mixed = bench.mixed(wanted, _micro_batches(accum, ranks))
            if mixed.peak_bytes > bench.limit:
                share = 100 * mixed.peak_bytes / bench.available
                log.warning("batch %d fits, and takes %.0f %% of the memory there is", wanted, share)
            return mixed
        except DeviceMemoryError:
            if wanted == 1:
                raise
        bench.failed(wanted)
    seconds = CPU_SECONDS if _on_cpu(bench) else math.inf
    found = _until_found(bench, Bound(wanted - 1, "given"), seconds)
    effective = wanted * accum
    divisor = next(size for size in range(found.safe, 0, -1) if effective % size == 0)
    raise DeviceMemoryError(
        f"train.batch_size: {wanted} does not fit on {describe(bench.engine.device).name}: the largest that does is "
        f"{found.safe}, within {bench.limit / GIB:.2f} of {bench.available / GIB:.2f} GiB",
        hint=f"use train.batch_size: {divisor} with train.grad_accum_steps: {effective // divisor}, the same effective "
        f"batch of {effective}; or batch_size: auto",
    )


def _nothing_fits(model: ModelConfig, train: TrainConfig, facts: DatasetFacts, ranks: int) -> DeviceMemoryError:
    """The error when a step of one image does not fit, with the smallest change that was seen to help."""
    gc.collect()
    available = 0

    def fits(other: ModelConfig) -> bool:
        nonlocal available
        small = build_bench(other, train, worst_case(other, train, facts))
        if small is None:
            return False
        available = small.available
        return _one_image_fits(small, train, ranks)

    hint = smallest_change(model, fits)
    worst = worst_case(model, train, facts)
    height, width = worst.largest
    return DeviceMemoryError(
        f"a training step does not fit on {describe(first_device(train)).name} even with batch size 1, of "
        f"{height} x {width} px and {worst.targets} boxes"
        + (f"; there are {available / GIB:.2f} GiB" if available else ""),
        hint=hint,
    )


def mean_step_seconds(train: TrainConfig, worst: WorstCase, batch_size: int, mixed: Mixed) -> float:
    """Seconds of such a step, averaged over the scales that training draws; between them time grows with the area."""
    areas = [height * width for height, width in worst.extents]
    weights = scale_weights(len(areas), per_sample=train.multi_scale == "per-sample", batch_size=batch_size)
    mean_area = sum(weight * area for weight, area in zip(weights, areas, strict=True))
    share = (mean_area - areas[0]) / (areas[-1] - areas[0]) if areas[-1] > areas[0] else 1.0
    small, large = mixed.seconds
    return small + share * (large - small)


def another_device(found: Mapping[str, Any], here: Device) -> str:
    """Why the result of a probe (probe.json) says nothing of this device; "" if it does."""
    there = Device(**found["device"])
    if (there.kind, there.name) != (here.kind, here.name):
        return f"it ran on {there.name}, and this is {here.name}"
    if found["peak_bytes"] > MEMORY_SHARE * here.memory_bytes:
        peak, memory = found["peak_bytes"] / GIB, here.memory_bytes / GIB
        return f"it measured a peak of {peak:.2f} GiB, and there are {memory:.2f} GiB here"
    return ""


def on_this_device(
    found: dict[str, Any], model: ModelConfig, train: TrainConfig, facts: DatasetFacts
) -> dict[str, Any]:
    """The result of a probe (probe.json); of a new one where it was made on another device.

    A batch that was searched is kept as long as it fits here, so that a training that continues takes the same steps.

    Raises:
        DeviceMemoryError: as `probe`.
    """
    reason = another_device(found, describe(first_device(train)))
    if not reason:
        return found
    log.warning("the batch size is probed again: %s", reason)
    kept = {"batch_size": found["batch_size"], "grad_accum_steps": found["grad_accum_steps"]}
    try:
        return probe(model, train.model_copy(update=kept), facts).to_json()
    except DeviceMemoryError as error:
        if train.batch_size != "auto":
            raise
        log.warning("%s", error.message)
    result = probe(model, train, facts)
    effective = found["batch_size"] * found["grad_accum_steps"]
    batch_size = next(size for size in range(result.batch_size, 0, -1) if effective % size == 0)
    kept = {"batch_size": batch_size, "grad_accum_steps": effective // batch_size}
    log.warning("batch %d x %d instead, the same effective batch", batch_size, effective // batch_size)
    return replace(result, **kept).to_json()


def _tell_worst_case(worst: WorstCase, train: TrainConfig, facts: DatasetFacts) -> None:
    if facts.max_boxes > worst.targets:
        log.warning(
            "an image has %d boxes, and train.auto_batch_max_targets_per_image lets the probe try %d: raise it, or "
            "training may run out of memory on that image",
            facts.max_boxes,
            worst.targets,
        )
    if not worst.shapes_known:
        log.warning(
            "the dataset was prepared before the shapes of its images were recorded: the probe takes the most that "
            "train.square_resize_div_64: false can give, %d x %d px",
            *worst.largest,
        )


def _tell_effective(effective: int, target: int) -> None:
    if effective > 2 * target:
        log.warning(
            "the effective batch is %d, and train.auto_batch_target_effective asks for %d or more: at the same "
            "learning rate training makes fewer steps; scaling train.lr by %.1f or less may serve it",
            effective,
            target,
            effective / target,
        )


def _tell_budget(cost: Cost, train: TrainConfig) -> None:
    if not cost.fits:
        log.warning(
            "train.max_hours: %g will not do for %d epochs, which take about %.2g h: training will end after about %d "
            "of them, with the best model so far",
            train.max_hours or 0.0,
            train.epochs,
            cost.hours,
            cost.epochs_within_max_hours or 0,
        )
