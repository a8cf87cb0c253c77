"""Proof that an ONNX file computes what the trained model computes, on the same raw images."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.overrides import TorchFunctionMode

from rfdetr_core.data.transforms import preprocess
from rfdetr_core.errors import ExportError
from rfdetr_core.export.onnx import INPUT, OUTPUTS
from rfdetr_core.models.linear import constant_weights
from rfdetr_core.models.weights import TrainedModel

TIMED_RUNS = 20
SELECTION = "selected_tokens"


@dataclass(frozen=True)
class Parity:
    """Largest absolute differences over all images and batch sizes.

    `logits` are raw, `boxes` in [0, 1]; `selection` is of the scores of the tokens that became queries.
    """

    images: int
    batch_sizes: tuple[int, ...]
    logits: float
    boxes: float
    selection: float
    tolerance: float

    def to_json(self) -> dict[str, Any]:
        """Plain dict."""
        return asdict(self)


def open_session(model: Path | bytes) -> onnxruntime.InferenceSession:
    """An ONNX file, or its bytes, in ONNX Runtime on the CPU."""
    source = str(model) if isinstance(model, Path) else model
    return onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])


def check_parity(
    trained: TrainedModel,
    path: Path,
    images: Sequence[Image.Image | NDArray[np.uint8]],
    *,
    dynamic_batch: bool,
    tolerance: float,
) -> Parity:
    """Run upright pictures of the model's channels through both, one by one and, with `dynamic_batch`, all at once.

    Queries start from the tokens of the highest scores. Among hundreds of scores some differ by less than
    float32 resolves, so that two correct programs may rank them differently, and give query i what the other
    gives query i + 1: a quarter of nano's images showed it. PyTorch is therefore run with the selection of ONNX
    Runtime, which has to be as good as its own: every selected score within the tolerance of the rank's own.

    Raises:
        ExportError: a difference above the tolerance, or a value that is not finite.
    """
    session, module = open_session(_with_selection(path)), copy.deepcopy(trained.module).cpu().eval()
    inputs = torch.cat([preprocess(image, trained.config.resolution) for image in images])
    if dynamic_batch and len(inputs) == 1:
        inputs = inputs.repeat(2, 1, 1, 1)  # one image proves nothing of larger batches
    batch_sizes = (1, len(inputs)) if dynamic_batch else (1,)
    worst = {"dets": 0.0, "labels": 0.0, SELECTION: 0.0}
    for batch_size in batch_sizes:
        for batch in torch.split(inputs, batch_size):
            values = session.run(None, {INPUT: batch.numpy()})
            found = dict(zip([output.name for output in session.get_outputs()], values, strict=True))
            with torch.inference_mode(), _GivenSelection(found.get(SELECTION)) as given:
                reference = module(batch)
            differences = {
                "dets": _difference(reference["pred_boxes"].numpy(), found["dets"]),
                "labels": _difference(reference["pred_logits"].numpy(), found["labels"]),
                SELECTION: given.difference,
            }
            worst = {name: max(value, differences[name]) for name, value in worst.items()}
    parity = Parity(len(images), batch_sizes, worst["labels"], worst["dets"], worst[SELECTION], tolerance)
    if max(worst.values()) > tolerance:
        raise ExportError(
            f"{path.name} differs from the trained model: logits by {parity.logits:.2e}, boxes by {parity.boxes:.2e}, "
            f"scores of selected tokens by {parity.selection:.2e}",
            hint=f"export.tolerance is {tolerance:g}; a difference this large is no rounding",
        )
    return parity


def _with_selection(path: Path) -> bytes:
    """The same graph with one more output: the tokens that its top-k selected."""
    model = onnx.load(str(path))
    for node in model.graph.node:
        if node.op_type == "TopK":
            renamed = onnx.helper.make_node("Identity", [node.output[1]], [SELECTION])
            model.graph.node.append(renamed)
            model.graph.output.append(onnx.helper.make_tensor_value_info(SELECTION, onnx.TensorProto.INT64, None))
            break
    return bytes(model.SerializeToString())


class _GivenSelection(TorchFunctionMode):
    """Inside, torch's topk selects what it is told to; `difference` says how far that is from its own choice."""

    def __init__(self, indices: NDArray[np.int64] | None) -> None:
        super().__init__()
        self._indices = indices
        self.difference = 0.0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not torch.Tensor.topk or self._indices is None:
            return result
        indices = torch.from_numpy(self._indices).view_as(result.indices)
        values = args[0].gather(-1, indices)
        self.difference = max(self.difference, _difference(result.values.numpy(), values.numpy()))
        return torch.return_types.topk((values, indices))


def _difference(expected: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Largest absolute difference; infinite where one is not finite, as NaN would pass every comparison."""
    difference = float(np.abs(expected - found).max())
    return difference if np.isfinite(difference) else float("inf")


def run(session: onnxruntime.InferenceSession, batch: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """dets (B, Q, 4) and labels (B, Q, C + 1) of a normalised batch (B, C, R, R)."""
    return dict(zip(OUTPUTS, session.run(list(OUTPUTS), {INPUT: batch}), strict=True))


def measure_latency(trained: TrainedModel, path: Path) -> dict[str, Any]:
    """Milliseconds per image at batch 1 on the CPU, ONNX Runtime and PyTorch alternating in one run."""
    session, module = open_session(path), copy.deepcopy(trained.module).cpu().eval()
    side = trained.config.resolution
    batch = torch.zeros((1, trained.config.num_channels, side, side))
    times: dict[str, list[float]] = {"onnxruntime": [], "pytorch": []}
    with torch.inference_mode(), constant_weights(module):
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
