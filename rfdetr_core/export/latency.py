"""latency.json: milliseconds per image of the exported model, and of the trained one, on this machine."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import torch

from rfdetr_core import hardware
from rfdetr_core.export.consumer import Consumer
from rfdetr_core.models.linear import constant_weights
from rfdetr_core.models.weights import TrainedModel

RUNS, WARM_UP = 20, 3
CUDA = "CUDAExecutionProvider"


class _Contender(NamedTuple):
    runtime: str
    device: str
    threads: int
    call: Callable[[], object]


def measure_latency(trained: TrainedModel, path: Path) -> dict[str, Any]:
    """Of one image, already resized and normalised, to the file's outputs.

    ONNX Runtime and PyTorch on the CPU with 1 thread and with all cores, and on a GPU where both a GPU and the runtime
    for it are there; the two of a row take turns. `rows` hold runtime, device, threads, the median in `milliseconds`,
    and `p90_milliseconds`.
    """
    consumer = Consumer(path)
    size = (consumer.height, consumer.width)
    batch = torch.zeros((consumer.fixed_batch or 1, trained.config.num_channels, *size))
    before = torch.get_num_threads()
    module = copy.deepcopy(trained.module).cpu().eval()
    rows: list[dict[str, Any]] = []
    try:
        with torch.inference_mode(), constant_weights(module):
            for threads in sorted({1, hardware.cpu_count()}):
                torch.set_num_threads(threads)  # once: each change starts threads anew
                pytorch = _Contender("pytorch", "cpu", threads, lambda: module(batch))
                rows += _take_turns([_onnxruntime(path, batch, threads), pytorch], len(batch))
            if torch.cuda.is_available():
                rows += _take_turns(_on_gpu(trained, path, batch), len(batch))
    finally:
        torch.set_num_threads(before)
    return {
        "rows": sorted(rows, key=lambda row: str(row["runtime"])),
        "batch_size": len(batch),
        "input": list(size),
        "runs": RUNS,
        "hardware": hardware.describe(),
        "versions": {"onnxruntime": onnxruntime.__version__, "torch": str(torch.__version__)},
    }


def _take_turns(contenders: Sequence[_Contender], images: int) -> Iterator[dict[str, Any]]:
    """The rows of these; a machine whose speed drifts slows all of them."""
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(RUNS + WARM_UP):
        for contender, taken in zip(contenders, times, strict=True):
            started = time.perf_counter()
            contender.call()
            taken.append(1000 * (time.perf_counter() - started) / images)
    for contender, taken in zip(contenders, times, strict=True):
        yield {
            "runtime": contender.runtime,
            "device": contender.device,
            "threads": contender.threads,
            "milliseconds": round(statistics.median(taken[WARM_UP:]), 3),
            "p90_milliseconds": round(float(np.percentile(taken[WARM_UP:], 90)), 3),
        }


def _onnxruntime(path: Path, batch: torch.Tensor, threads: int, provider: str = "CPUExecutionProvider") -> _Contender:
    consumer, array = Consumer(path, threads=threads, provider=provider), batch.numpy()
    sizes = [(consumer.height, consumer.width)] * len(batch)
    device = "cuda" if provider == CUDA else "cpu"
    return _Contender("onnxruntime", device, threads, lambda: consumer.run(array, sizes))


def _on_gpu(trained: TrainedModel, path: Path, batch: torch.Tensor) -> list[_Contender]:
    module, there = copy.deepcopy(trained.module).cuda().eval(), batch.cuda()

    def call() -> None:
        module(there)
        torch.cuda.synchronize()

    contenders = [_Contender("pytorch", "cuda", 1, call)]
    if CUDA in onnxruntime.get_available_providers():
        contenders.append(_onnxruntime(path, batch, 1, CUDA))
    return contenders
