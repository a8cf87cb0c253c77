"""Where worst-case steps are run and measured: one engine, built as training builds its own."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from rfdetr_core.config import ModelConfig, TrainConfig
from rfdetr_core.data.annotations import AnnotationTable
from rfdetr_core.errors import DeviceMemoryError
from rfdetr_core.models.linear import constant_weights
from rfdetr_core.training.batch_search import MEMORY_SHARE, Attempt
from rfdetr_core.training.device_memory import DeviceMemory, memory_of
from rfdetr_core.training.engine import Engine, build_engine, first_device, memory_errors
from rfdetr_core.training.validation import evaluate_batch, models_to_evaluate
from rfdetr_core.training.worst_case import WorstCase, worst_case_batch

ADVICE = "lower model.resolution, or set model.gradient_checkpointing: true"
SLOW_STEP = 1.5  # seconds; a slower step is not repeated to be timed warm
KERNELS = 64 * 2**20
"""Bytes that oneDNN takes for those of a first step; it may crash the process if it does not get them."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mixed:
    """Steps of one batch at the smallest and the largest scale in turn, as training mixes them."""

    seconds: tuple[float, float]  # of a step at the smallest, at the largest
    micro_batches: int  # of each step
    peak_bytes: int


@dataclass(frozen=True)
class EvaluationStep:
    """A batch of evaluation, by all models that training evaluates."""

    batch_size: int
    seconds: float
    peak_bytes: int


@dataclass
class _Kept:
    """Bytes held after all was given back: at first, and beyond that for every shape that was computed since."""

    first: int = 0
    first_shapes: int = 0
    surplus: int = 0
    per_shape: int = 0

    def note(self, held: int, shapes: int) -> None:
        """So much is held now that steps of so many shapes were computed."""
        if not self.first or held < self.first:
            self.first, self.first_shapes = held, shapes
        self.surplus = held - self.first
        self.per_shape = self.surplus // max(1, shapes - self.first_shapes)


class Bench:
    """Runs worst-case steps and remembers them."""

    def __init__(self, engine: Engine, memory: DeviceMemory, train: TrainConfig, worst: WorstCase) -> None:
        self.engine = engine
        self._memory, self._train, self._worst = memory, train, worst
        self._model = engine.raw_model.config
        # Blocks of a CPU's heap that freed memory leaves in between add up over two micro-batches, and hardly after.
        self.micro_batches = 2 if engine.device.type == "cpu" else 1
        self._steps = 0
        self._shapes: set[tuple[int, tuple[int, int]]] = set()  # of which steps were run: batch, extent
        self._kept = _Kept()
        self.attempts: list[Attempt] = []
        self.available = memory.available()

    @property
    def limit(self) -> int:
        """Bytes that a step may reach."""
        return int(MEMORY_SHARE * self.available)

    @property
    def gradient_bytes(self) -> int:
        """What a micro-batch leaves for those after it; 0 where attempts have two and measure it."""
        if self.micro_batches > 1:
            return 0
        return learned_bytes(self.engine)

    def attempt(self, batch_size: int) -> Attempt:
        """A worst-case step of this batch.

        Before the first of all, a step of one image lets the optimizer take its moments.
        """
        attempt = self._measured(1) if not self._steps else None
        if attempt is None or attempt.peak_bytes is not None:
            attempt = self._measured(batch_size)
        self.attempts.append(attempt)
        # Libraries that load with the first steps, and others on the device, take from what there was.
        self.available = min(self.available, self._memory.available())
        height, width = self._worst.largest
        if attempt.peak_bytes is None:
            log.info("batch %d at %d x %d px does not fit", batch_size, height, width)
        else:
            peak, limit = attempt.peak_bytes / 2**30, self.limit / 2**30
            text = "batch %d at %d x %d px: %.2f s, peak %.2f GiB of %.2f that it may reach"
            log.info(text, batch_size, height, width, attempt.seconds, peak, limit)
        return attempt

    def mixed(self, batch_size: int, micro_batches: int) -> Mixed:
        """Steps as training mixes them: nothing is given back in between, so that fragmentation counts.

        What the scales in between will keep is added to the peak.

        Raises:
            DeviceMemoryError: it does not fit.
        """
        smallest, largest = self._worst.extents[0], self._worst.largest
        self._begin()
        with self._guarded(f"batch size {batch_size}"):
            large = small = self._step(batch_size, largest, micro_batches)
            if smallest != largest:
                small = self._step(batch_size, smallest, micro_batches)
            if large < SLOW_STEP:
                large = self._step(batch_size, largest, micro_batches)
        peak = self._peak() + max(0, len(self._worst.extents) - 2) * self._kept.per_shape
        text = "batch %d x %d, steps of all sizes: %.2f s the largest, peak %.2f GiB"
        log.info(text, batch_size, micro_batches, large, peak / 2**30)
        return Mixed((small if smallest != largest else large, large), micro_batches, peak)

    def failed(self, batch_size: int) -> None:
        """Take it that this batch does not fit: single steps of it did, those of `mixed` did not."""
        self.engine.optimizer.zero_grad(set_to_none=True)
        self.attempts = [one for one in self.attempts if one.batch_size != batch_size]
        self.attempts.append(Attempt(batch_size, None, None, left_bytes=self._memory.left()))

    def evaluate(self, batch_size: int, targets: int) -> EvaluationStep:
        """One batch of evaluation.

        Raises:
            DeviceMemoryError: it does not fit.
        """
        engine, side = self.engine, self._model.resolution
        models = models_to_evaluate(self._train, engine)
        batch = worst_case_batch(
            batch_size, (side, side), targets, self._model.num_classes, channels=self._model.num_channels
        )
        rows = [{"file_name": str(image), "width": side, "height": side} for image in range(batch_size)]
        table = AnnotationTable.from_coco({"images": rows, "annotations": []})
        for module in (*models.values(), engine.criterion):
            module.eval()
        self._begin()
        seconds = 0.0
        with self._guarded(f"evaluation at batch size {batch_size}"), constant_weights(*models.values()):
            for _ in range(2):  # what is derived from the weights is derived in the first
                started = time.monotonic()
                evaluate_batch(
                    engine,
                    models,
                    table,
                    batch,
                    num_select=self._model.num_select,
                    num_classes=self._model.num_classes,
                    compute_loss=self._train.compute_val_loss is True,
                )
                seconds = time.monotonic() - started
                if seconds > SLOW_STEP:
                    break
        engine.model.train()
        engine.criterion.train()
        return EvaluationStep(batch_size, round(seconds, 4), self._peak())

    def _begin(self) -> None:
        """Measure anew; what is kept of other shapes than a training's own is surplus from here on."""
        self._memory.begin()
        if self._steps:
            self._kept.note(self._memory.kept(), len(self._shapes))

    def _peak(self) -> int:
        """What a training of the same shapes would have held at most."""
        return self._memory.peak() - self._kept.surplus

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        """Inside, running out of memory is a DeviceMemoryError; it is made of what was raised when there is memory."""
        device = self.engine.device
        with memory_errors(f"on {device} at {what}", hint=ADVICE, device=device), self._memory.guarded():
            yield

    def _measured(self, batch_size: int) -> Attempt:
        self._begin()
        try:
            with self._guarded(f"batch size {batch_size}"):
                seconds = self._step(batch_size, self._worst.largest, self.micro_batches)
            return Attempt(batch_size, round(seconds / self.micro_batches, 4), self._peak())
        except DeviceMemoryError:
            pass  # with the error go the frames that hold the step's tensors
        self.engine.optimizer.zero_grad(set_to_none=True)
        return Attempt(batch_size, None, None, left_bytes=self._memory.left())

    def _step(self, batch_size: int, extent: tuple[int, int], micro_batches: int) -> float:
        """Seconds of one optimizer step that changes no weight: the learning rate is zero."""
        batch = worst_case_batch(
            batch_size,
            extent,
            self._worst.targets,
            self._model.num_classes,
            channels=self._model.num_channels,
            padded=self._worst.padded,
        )
        started = time.monotonic()
        self.engine.optimizer_step([batch] * micro_batches, factor=0.0, global_step=self._steps)
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize(self.engine.device)
        self._steps += 1
        self._shapes.add((batch_size, extent))
        return time.monotonic() - started


def learned_bytes(engine: Engine) -> int:
    """Bytes of the trained parameters: so much take their gradients, too, and each of the optimizer's moments."""
    return sum(p.numel() * p.element_size() for p in engine.raw_model.parameters() if p.requires_grad)


def build_bench(model: ModelConfig, train: TrainConfig, worst: WorstCase) -> Bench | None:
    """A bench on this process's device; None if not even the model fits."""
    memory = memory_of(first_device(train))
    try:
        with memory_errors("while the model is built", hint="", device=first_device(train)), memory.guarded():
            engine = build_engine(model, train)
    except DeviceMemoryError:
        return None
    kept = memory.kept()
    if kept and kept + 3 * learned_bytes(engine) + KERNELS > memory.available():
        return None
    return Bench(engine, memory, train, worst)
