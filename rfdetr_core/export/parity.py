"""Proof that an ONNX file computes what the trained model computes, on the same raw images."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from PIL import Image

from rfdetr_core.data.transforms import preprocess
from rfdetr_core.errors import ExportError
from rfdetr_core.export.onnx import INPUT, OUTPUTS
from rfdetr_core.models.weights import TrainedModel

TIMED_RUNS = 20


@dataclass(frozen=True)
class Parity:
    """Largest absolute differences over all images and batch sizes; `logits` are raw, `boxes` in [0, 1]."""

    images: int
    batch_sizes: tuple[int, ...]
    logits: float
    boxes: float
    tolerance: float

    def to_json(self) -> dict[str, Any]:
        """Plain dict."""
        return asdict(self)


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """The model in ONNX Runtime on the CPU."""
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def check_parity(
    trained: TrainedModel, path: Path, images: Sequence[Image.Image], *, dynamic_batch: bool, tolerance: float
) -> Parity:
    """Run the images through both, one by one and, with `dynamic_batch`, all at once.

    Raises:
        ExportError: a difference above the tolerance, or a value that is not finite.
    """
    session, module = open_session(path), trained.module.cpu().eval()
    inputs = torch.cat([preprocess(image, trained.config.resolution) for image in images])
    batch_sizes = (1, len(images)) if dynamic_batch and len(images) > 1 else (1,)
    worst = dict.fromkeys(OUTPUTS, 0.0)
    for batch_size in batch_sizes:
        for batch in torch.split(inputs, batch_size):
            with torch.inference_mode():
                reference = module(batch)
            expected = {"dets": reference["pred_boxes"].numpy(), "labels": reference["pred_logits"].numpy()}
            found = run(session, batch.numpy())
            for name in OUTPUTS:
                difference = float(np.abs(expected[name] - found[name]).max())
                # NaN compares false with everything: it must not pass as small.
                worst[name] = max(worst[name], difference) if np.isfinite(difference) else float("inf")
    parity = Parity(len(images), batch_sizes, worst["labels"], worst["dets"], tolerance)
    if max(parity.logits, parity.boxes) > tolerance:
        raise ExportError(
            f"{path.name} differs from the trained model: logits by {parity.logits:.2e}, boxes by {parity.boxes:.2e}",
            hint=f"export.tolerance is {tolerance:g}; a difference this large is no rounding",
        )
    return parity


def run(session: onnxruntime.InferenceSession, batch: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """dets (B, Q, 4) and labels (B, Q, C + 1) of a normalised batch (B, 3, R, R)."""
    return dict(zip(OUTPUTS, session.run(list(OUTPUTS), {INPUT: batch}), strict=True))


def measure_latency(trained: TrainedModel, path: Path) -> dict[str, Any]:
    """Milliseconds per image at batch 1 on the CPU, ONNX Runtime and PyTorch alternating in one run."""
    session, module = open_session(path), trained.module.cpu().eval()
    side = trained.config.resolution
    batch = torch.zeros((1, 3, side, side))
    times: dict[str, list[float]] = {"onnxruntime": [], "pytorch": []}
    with torch.inference_mode():
        for _ in range(TIMED_RUNS + 3):
            for name, call in (
                ("onnxruntime", lambda: run(session, batch.numpy())),
                ("pytorch", lambda: module(batch)),
            ):
                started = time.perf_counter()
                call()
                times[name].append(1000 * (time.perf_counter() - started))
    medians = {name: statistics.median(values[3:]) for name, values in times.items()}  # the first ones warm up
    return {
        "milliseconds": {name: round(value, 3) for name, value in medians.items()},
        "speedup_over_pytorch": round(medians["pytorch"] / medians["onnxruntime"], 3),
        "batch_size": 1,
        "runs": TIMED_RUNS,
        "threads": torch.get_num_threads(),
        "device": "cpu",
    }
