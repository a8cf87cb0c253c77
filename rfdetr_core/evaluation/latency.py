"""How long a detector takes for one image."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rfdetr_core.hardware import processor_name
from rfdetr_core.models.linear import constant_weights
from rfdetr_core.models.postprocess import postprocess
from rfdetr_core.models.weights import TrainedModel

RUNS = 20
WARM_UP = 3


@torch.inference_mode()
def measure_latency(
    models: Sequence[TrainedModel], device: torch.device, *, autocast: torch.dtype | None = None
) -> list[dict[str, Any]]:
    """Milliseconds from one image, already resized, to boxes and scores on the host, of each model.

    They take turns, so that a machine that is busy with something else slows all of them alike. See docs/evaluation.md
    for the fields.
    """
    calls = [_call(model, device, autocast) for model in models]
    times: list[list[float]] = [[] for _ in models]
    with constant_weights(*(model.module.to(device) for model in models)):
        for _ in range(WARM_UP + RUNS):
            for call, taken in zip(calls, times, strict=True):
                started = time.perf_counter()
                call()
                taken.append(1000 * (time.perf_counter() - started))
    return [_row(taken[WARM_UP:], device, autocast) for taken in times]


def _call(model: TrainedModel, device: torch.device, autocast: torch.dtype | None) -> Callable[[], object]:
    side = model.config.resolution
    pixels = torch.zeros((1, model.config.num_channels, side, side), device=device)
    size = torch.tensor([[side, side]], device=device)

    def call() -> object:
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            outputs = model.module(pixels)
        logits, boxes = outputs["pred_logits"].float(), outputs["pred_boxes"].float()
        [found] = postprocess(logits, boxes, size, model.config.num_select)
        return {name: value.cpu() for name, value in found.items()}  # waits for the device

    return call


def _row(times: list[float], device: torch.device, autocast: torch.dtype | None) -> dict[str, Any]:
    median = statistics.median(times)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return {
        "milliseconds": round(median, 3),
        "p90_milliseconds": round(statistics.quantiles(times, n=10, method="inclusive")[-1], 3),
        "images_per_second": round(1000 / median, 3),
        "batch_size": 1,
        "runs": len(times),
        "device": device.type,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "precision": "float32" if autocast is None else str(autocast).removeprefix("torch."),
    }
