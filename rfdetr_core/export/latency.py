"""latency.json: milliseconds per image of the exported model, and of the trained one, on this machine."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
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
    """Of one image, already resized and normalised, to the file's outputs; all take turns in one run.

    ONNX Runtime and PyTorch on the CPU with 1 thread and with all cores, and on a GPU where both a GPU and the runtime
    for it are there. `rows` hold runtime, device, threads, the median in `milliseconds`, and `p90_milliseconds`.
    """
    consumer = Consumer(path)
    size = (consumer.height, consumer.width)
    batch = torch.zeros((consumer.fixed_batch or 1, trained.config.num_channels, *size))
    before = torch.get_num_threads()
    module = copy.deepcopy(trained.module).cpu().eval()
    counts = sorted({1, hardware.cpu_count()})
    contenders = [_onnxruntime(path, batch, threads) for threads in counts]
    contenders += [_pytorch(module, batch, threads) for threads in counts]
    if torch.cuda.is_available():
        contenders.append(_pytorch_cuda(trained, batch))
        if CUDA in onnxruntime.get_available_providers():
            contenders.append(_onnxruntime(path, batch, 1, CUDA))
    times: list[list[float]] = [[] for _ in contenders]
    try:
        with torch.inference_mode(), constant_weights(module):
            for _ in range(RUNS + WARM_UP):
                for contender, taken in zip(contenders, times, strict=True):
                    started = time.perf_counter()
                    contender.call()
                    taken.append(1000 * (time.perf_counter() - started) / len(batch))
    finally:
        torch.set_num_threads(before)
    return {
        "rows": [_row(contender, taken[WARM_UP:]) for contender, taken in zip(contenders, times, strict=True)],
        "batch_size": len(batch),
        "input": list(size),
        "runs": RUNS,
        "hardware": hardware.describe(),
        "versions": {"onnxruntime": onnxruntime.__version__, "torch": str(torch.__version__)},
    }


def _row(contender: _Contender, milliseconds: list[float]) -> dict[str, Any]:
    return {
        "runtime": contender.runtime,
        "device": contender.device,
        "threads": contender.threads,
        "milliseconds": round(statistics.median(milliseconds), 3),
        "p90_milliseconds": round(float(np.percentile(milliseconds, 90)), 3),
    }


def _onnxruntime(path: Path, batch: torch.Tensor, threads: int, provider: str = "CPUExecutionProvider") -> _Contender:
    consumer, array = Consumer(path, threads=threads, provider=provider), batch.numpy()
    sizes = [(consumer.height, consumer.width)] * len(batch)
    device = "cuda" if provider == CUDA else "cpu"
    return _Contender("onnxruntime", device, threads, lambda: consumer.run(array, sizes))


def _pytorch(module: torch.nn.Module, batch: torch.Tensor, threads: int) -> _Contender:
    def call() -> None:
        torch.set_num_threads(threads)
        module(batch)

    return _Contender("pytorch", "cpu", threads, call)


def _pytorch_cuda(trained: TrainedModel, batch: torch.Tensor) -> _Contender:
    module, there = copy.deepcopy(trained.module).cuda().eval(), batch.cuda()

    def call() -> None:
        module(there)
        torch.cuda.synchronize()

    return _Contender("pytorch", "cuda", 1, call)
