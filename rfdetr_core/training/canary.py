"""The worst step of a training, tried before its first one: a run that would run out of memory does so at once."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from rfdetr_core.training.device_memory import DeviceMemory
from rfdetr_core.training.engine import Engine, memory_errors, smaller_batch
from rfdetr_core.training.state import TrainingJob
from rfdetr_core.training.worst_case import DatasetFacts, worst_case, worst_case_batch

log = logging.getLogger(__name__)


def run_canary(job: TrainingJob, engine: Engine, memory: DeviceMemory) -> int:
    """Forward and backward of the largest batch that the dataset can give; returns the peak in bytes.

    Everything is afterwards what it was (see `Engine.rehearse`). What is not there yet and will be is held meanwhile.

    Raises:
        DeviceMemoryError: it does not fit; the hint is a smaller batch of the same effective one.
    """
    worst = worst_case(job.model, job.train, DatasetFacts.of(job.dataset.document))
    height, width = worst.largest
    what = f"{job.batch_size} images of {height} x {width} px with {worst.targets} boxes each"
    memory.begin()
    with (
        memory_errors(
            f"on {engine.device} before the first step, with the largest batch that this dataset can give: {what}",
            hint=smaller_batch(job.batch_size, job.grad_accum_steps),
            device=engine.device,
        ),
        memory.guarded(),
    ):
        kept = _what_will_be_there(engine, accumulates=job.grad_accum_steps > 1)
        batch = worst_case_batch(
            job.batch_size,
            worst.largest,
            worst.targets,
            job.model.num_classes,
            channels=job.model.num_channels,
            padded=worst.padded,
        )
        engine.rehearse(batch)
        peak = memory.peak()
    del kept
    text = "the largest batch that this dataset can give fits: %s; peak %.2f GiB"
    log.info(text, what, peak / 2**30)
    return peak


def _what_will_be_there(engine: Engine, *, accumulates: bool) -> Tensor:
    """As many bytes as the optimizer's moments will have, and the gradients that a micro-batch leaves for the next."""
    trained = sum(p.numel() for p in engine.raw_model.parameters() if p.requires_grad)
    copies = 0 if engine.optimizer.state else 2
    if accumulates and engine.world.size == 1:  # of several ranks the gradients' buckets are there already
        copies += 1
    return torch.ones(copies * trained, dtype=torch.float32, device=engine.device)  # written: on a CPU, else no memory
