"""The parity gate: proof that an ONNX file finds in raw images what the trained model finds in them.

Two paths from the encoded bytes of an image to detections: ours, with PyTorch, and a consumer's, with ONNX Runtime and
what the file says of itself (`rfdetr_core.export.consumer`). Compared are the num_select best detections of a sample of
images, one by one, and AP on the whole split.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch.overrides import TorchFunctionMode

from rfdetr_core.config import ExportConfig
from rfdetr_core.data.annotations import ClassMap
from rfdetr_core.data.prepared import PreparedSplit
from rfdetr_core.data.transforms import preprocess
from rfdetr_core.errors import ExportError
from rfdetr_core.evaluation.detections import Detections
from rfdetr_core.evaluation.evaluate import by_name
from rfdetr_core.evaluation.inference import detections_of
from rfdetr_core.evaluation.metrics import coco_metrics
from rfdetr_core.export.consumer import LOGITS, Array, Consumer, Found, raw_found
from rfdetr_core.models.linear import constant_weights
from rfdetr_core.models.weights import TrainedModel

BATCH = 4
SELECTION = "selected_tokens"
_NEVER = 1e9  # cost of a pair that is none


class Tolerances(NamedTuple):
    """Largest absolute differences: of a detection's logit, of its box in fractions of the image, and of AP."""

    logits: float
    boxes: float
    ap: float


DEFAULTS = {"fp32": Tolerances(1e-3, 1e-4, 0.001), "fp16": Tolerances(0.1, 0.01, 0.005)}


def tolerances(config: ExportConfig) -> Tolerances:
    """Those of the configuration, where it gives none the precision's."""
    given = (config.logits_tolerance, config.boxes_tolerance, config.ap_tolerance)
    filled = [
        mine if mine is not None else usual for mine, usual in zip(given, DEFAULTS[config.precision], strict=True)
    ]
    return Tolerances(*filled)


class Sample(NamedTuple):
    """An image as it lies in the store (or pixels (H, W, C) where no file holds them), and as our path decodes it."""

    name: str
    data: bytes | NDArray[np.uint8]
    picture: Image.Image | NDArray[np.uint8]


class Difference(NamedTuple):
    """Between the detections of one image; `selection` is of the scores of the tokens that became queries."""

    logits: float
    boxes: float
    selection: float

    def of(self, limits: Tolerances) -> float:
        """The largest in multiples of what is tolerated."""
        return max(self.logits / limits.logits, self.boxes / limits.boxes, self.selection / limits.logits)


@dataclass
class Parity:
    """What parity.json says; differences are the largest over all images and batch sizes."""

    images: int
    batch_sizes: tuple[int, ...]
    logits: float
    boxes: float
    selection: float
    worst_image: str
    logits_tolerance: float
    boxes_tolerance: float
    passed: bool = False
    ap: dict[str, Any] | None = None
    """AP 50:95 of both on the split, their difference and its tolerance, and how many images; None if not compared."""

    def to_json(self) -> dict[str, Any]:
        """Plain dict."""
        return asdict(self)


def split_samples(split: PreparedSplit, count: int, channels: int) -> list[Sample]:
    """`count` images evenly spread over a split, or all of a smaller one."""
    chosen = np.unique(np.linspace(0, len(split) - 1, min(count, len(split))).round().astype(int))
    return [
        Sample(str(split.table.file_names[i]), split.read_bytes(int(i)), split.decode(int(i), channels=channels))
        for i in chosen
    ]


def check_parity(trained: TrainedModel, path: Path, samples: Sequence[Sample], config: ExportConfig) -> Parity:
    """Compare the detections in these images, at batch 1 and 4, or at the file's own batch size.

    Queries start from the tokens of the highest scores. Among hundreds of scores some differ by less than
    float32 resolves, so that two correct programs may rank them differently, and give query i what the other
    gives query i + 1: a quarter of nano's images showed it. PyTorch is therefore run with the selection of ONNX
    Runtime, which has to be as good as its own: every selected score within the tolerance of the rank's own.
    The detections that follow are matched by class, logit and box, so that equal scores may stand in either order.

    Raises:
        ExportError: a difference above the tolerance; the image of the largest is named.
    """
    limits = tolerances(config)
    consumer = _opened(path, trained.config.two_stage)
    if consumer.class_names != list(trained.class_names):
        raise ExportError(f"{path.name} names other classes than the trained model", hint="export it again")
    sizes = (consumer.fixed_batch,) if consumer.fixed_batch else (1, BATCH)
    reference = _Reference(trained, (consumer.height, consumer.width))
    found: list[tuple[str, Difference]] = []
    for size in sizes:
        for batch in _batches(samples, size):
            found += _compare(consumer, reference, batch, size, limits)
    worst_image, worst = max(found, key=lambda row: row[1].of(limits))
    logits, boxes, selection = (max(values) for values in zip(*(row for _, row in found), strict=True))
    parity = Parity(len(samples), sizes, logits, boxes, selection, worst_image, limits.logits, limits.boxes)
    if worst.of(limits) > 1:
        raise ExportError(
            f"{path.name} differs from the trained model: on {worst_image} logits by {worst.logits:.2e}, boxes by "
            f"{worst.boxes:.2e}, scores of selected tokens by {worst.selection:.2e}",
            hint=f"export.logits_tolerance is {limits.logits:g}, export.boxes_tolerance {limits.boxes:g}; "
            "a difference this large is no rounding",
        )
    parity.passed = True
    return parity


def check_ap(
    trained: TrainedModel, path: Path, split: PreparedSplit, class_map: ClassMap, config: ExportConfig, *, max_dets: int
) -> dict[str, Any]:
    """AP 50:95 at `max_dets` detections of both paths over a whole split, each with its own selection of tokens.

    Raises:
        ExportError: they differ by more than is tolerated.
    """
    consumer, limit = Consumer(path), tolerances(config).ap
    size = (consumer.height, consumer.width)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = copy.deepcopy(trained.module).to(device).eval()
    ours: list[Detections] = []
    theirs: list[Detections] = []
    with torch.inference_mode(), constant_weights(module):
        for start in range(0, len(split), consumer.fixed_batch or BATCH):
            images = list(range(start, min(start + (consumer.fixed_batch or BATCH), len(split))))
            pictures = [split.decode(i, channels=trained.config.num_channels) for i in images]
            outputs = module(torch.cat([preprocess(picture, size) for picture in pictures]).to(device))
            ours.append(
                detections_of(
                    outputs,
                    images,
                    split.table,
                    num_select=trained.config.num_select,
                    num_classes=len(trained.class_names),
                )
            )
            theirs += _consumed(consumer, split, images)
    names = tuple(consumer.class_names)
    scores = [
        coco_metrics(split.table, class_map, by_name(Detections.concatenate(part), names, class_map), max_dets=max_dets)
        for part in (ours, theirs)
    ]
    pytorch, onnxruntime = (float(score.map) for score in scores)
    difference = abs(pytorch - onnxruntime)
    if difference > limit:
        raise ExportError(
            f"{path.name} differs from the trained model: AP {onnxruntime:.4f}, PyTorch {pytorch:.4f} on "
            f"{len(split)} images",
            hint=f"export.ap_tolerance is {limit:g}",
        )
    return {
        "pytorch": pytorch,
        "onnxruntime": onnxruntime,
        "difference": difference,
        "tolerance": limit,
        "images": len(split),
        "max_dets": max_dets,
    }


def _consumed(consumer: Consumer, split: PreparedSplit, images: Sequence[int]) -> Iterator[Detections]:
    read = [consumer.read(split.read_bytes(i)) for i in images]
    sizes = [size for _, size in read]
    batch, of_all = _filled(np.concatenate([pixels for pixels, _ in read]), sizes, consumer.fixed_batch)
    outputs = consumer.run(batch, of_all)
    for image, found, (height, width) in zip(images, consumer.detections(outputs, sizes), sizes, strict=True):
        scores = 1 / (1 + np.exp(-found.logits))
        place = np.full(len(scores), image, np.int64)
        yield Detections(place, found.labels, scores, found.boxes * [width, height, width, height])


def _batches(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def _filled(batch: Array, sizes: list[tuple[int, int]], full: int | None) -> tuple[Array, list[tuple[int, int]]]:
    """A batch of `full` images and their sizes, if so many are wanted: its last image again and again."""
    missing = 0 if full is None else full - len(batch)
    return np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)]), sizes + sizes[-1:] * missing


def _compare(
    consumer: Consumer, reference: _Reference, batch: Sequence[Sample], size: int, limits: Tolerances
) -> Iterator[tuple[str, Difference]]:
    read = [consumer.read(sample.data) for sample in batch]
    sizes = [shape for _, shape in read]
    full = size if consumer.fixed_batch or size > 1 else None  # one image proves nothing of larger batches
    pixels, of_all = _filled(np.concatenate([pixels for pixels, _ in read]), sizes, full)
    outputs = consumer.run(pixels, of_all)
    selections = outputs.pop(SELECTION, None)
    for row, (sample, found) in enumerate(zip(batch, consumer.detections(outputs, sizes), strict=True)):
        selection = None if selections is None else selections.reshape(len(pixels), -1)[row]
        expected, selected = reference.detect(sample, selection)
        if not all(np.isfinite(value).all() for value in found):
            yield sample.name, Difference(float("inf"), float("inf"), float("inf"))
            continue
        logits, boxes = difference_of(expected, found, limits)
        yield sample.name, Difference(logits, boxes, selected)


def difference_of(expected: Found, found: Found, limits: Tolerances) -> tuple[float, float]:
    """Largest differences of logits and boxes between the detections of one image, matched one to one.

    The match is the one of least total cost, where no pair is of different classes. What is weaker than the last one
    was cut off on each side: pairs that only the cut made are left out, if both logits are within the tolerance of it.
    """
    if not len(expected.labels) or not len(found.labels):
        alone = max(len(expected.labels), len(found.labels))
        return (float("inf"), float("inf")) if alone else (0.0, 0.0)
    of_logits = np.abs(expected.logits[:, None] - found.logits[None])  # (E, F)
    of_boxes = np.abs(expected.boxes[:, None] - found.boxes[None]).max(-1)
    cost = np.maximum(of_logits / limits.logits, of_boxes / limits.boxes).clip(max=1e6)
    cost[expected.labels[:, None] != found.labels[None]] = _NEVER
    rows, columns = linear_sum_assignment(cost)
    wrong = cost[rows, columns] > 1
    cut = min(expected.logits.min(), found.logits.min()) + limits.logits
    weak = np.maximum(expected.logits[rows], found.logits[columns]) <= cut
    kept = ~(wrong & weak)
    unmatched = [
        side.logits[np.setdiff1d(np.arange(len(side.labels)), taken)]
        for side, taken in ((expected, rows), (found, columns))
    ]
    if any((logits > cut).any() for logits in unmatched):
        return float("inf"), float("inf")
    if not kept.any():
        return 0.0, 0.0
    rows, columns = rows[kept], columns[kept]
    if (cost[rows, columns] >= _NEVER).any():  # a detection whose class the other side does not find
        return float("inf"), float("inf")
    return float(of_logits[rows, columns].max()), float(of_boxes[rows, columns].max())


class _Reference:
    """The trained model on the CPU, on single images at the file's input size."""

    def __init__(self, trained: TrainedModel, size: tuple[int, int]) -> None:
        self._module, self._size, self._config = copy.deepcopy(trained.module).cpu().eval(), size, trained.config
        self._names = trained.class_names
        self._known: dict[tuple[str, bytes], tuple[Found, float]] = {}

    def detect(self, sample: Sample, selection: NDArray[np.int64] | None) -> tuple[Found, float]:
        """Detections from these tokens, and how far their scores are from those of its own choice."""
        key = (sample.name, b"" if selection is None else selection.tobytes())
        if key not in self._known:
            pixels = preprocess(sample.picture, self._size)
            with torch.inference_mode(), _GivenSelection(selection) as given:
                outputs = self._module(pixels)
            logits, boxes = (outputs[name][0].numpy() for name in ("pred_logits", "pred_boxes"))
            found = raw_found(boxes, logits, self._names, self._config.num_select)
            self._known[key] = (found, given.difference)
        return self._known[key]


def _opened(path: Path, two_stage: bool) -> Consumer:
    """The same graph with more outputs: the tokens that its first top-k selected, the logits of its last one."""
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf's errors, by where the file is torn
        raise ExportError(f"{path.name}: not a readable ONNX file", hint="export it again") from error
    nodes = [node for node in model.graph.node if node.op_type == "TopK"]
    facts = {entry.key: entry.value for entry in model.metadata_props}
    more = [(SELECTION, nodes[0].output[1], onnx.TensorProto.INT64)] if two_stage and nodes else []
    if facts.get("post_processing") == "true" and nodes:
        more.append((LOGITS, nodes[-1].output[0], onnx.TensorProto.FLOAT))
    for name, source, kind in more:
        model.graph.node.append(onnx.helper.make_node("Identity", [source], [name]))
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    return Consumer(bytes(model.SerializeToString()))


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
        indices = torch.from_numpy(self._indices.copy()).view_as(result.indices)
        values = args[0].gather(-1, indices)
        difference = float((result.values - values).abs().max())
        self.difference = max(self.difference, difference if np.isfinite(difference) else float("inf"))
        return torch.return_types.topk((values, indices))
