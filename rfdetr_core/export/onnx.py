"""ONNX export with everything a consumer needs in the file's metadata (model spec section 10)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning
from torch.onnx.errors import OnnxExporterError, OnnxExporterWarning

from rfdetr_core import __version__
from rfdetr_core.config import ExportConfig
from rfdetr_core.data.images import MODES
from rfdetr_core.data.transforms import mean_and_std
from rfdetr_core.errors import ExportError
from rfdetr_core.models.boxes import cxcywh_to_xyxy
from rfdetr_core.models.detector import ExportableDetector, prepare_for_export
from rfdetr_core.models.weights import TrainedModel

INPUT, SIZES = "input", "sizes"
RAW_OUTPUTS = ("dets", "labels")
DETECTIONS = ("boxes", "scores", "labels")
NO_DETECTION = -1
"""Label of a row of a file with post-processing that holds nothing."""


def export_onnx(
    trained: TrainedModel, path: Path, config: ExportConfig, *, facts: Mapping[str, Any] | None = None
) -> None:
    """Write the detector as ONNX; the file passes onnx's checker. `trained` stays as it is, and where it is.

    Input `input` (B, channels, H, W) float32, normalised. Outputs `dets` (B, Q, 4) cx, cy, w, h in [0, 1] and `labels`
    (B, Q, C + 1) raw logits. With `post_processing` there is a second input `sizes` (B, 2) int64, height and width of
    the original images, and the outputs are `boxes` (B, K, 4) x1, y1, x2, y2 in pixels, `scores` (B, K) and `labels`
    (B, K) int64, best first; a row of the label -1 and the score 0 holds no detection. K is num_select.

    Args:
        facts: more entries of the metadata; what is no text is written as JSON.

    Raises:
        ExportError: PyTorch cannot write this model, or what it wrote is not legal ONNX.
        ConfigError: `config.shape` does not fit the model.
    """
    try:
        _write(trained, path, config)
        model = onnx.load(str(path))
        if config.precision == "fp16":
            model = _to_float16(model)
        onnx.checker.check_model(model, full_check=True)
        for key, value in {**metadata(trained, config), **(facts or {})}.items():
            entry = model.metadata_props.add()
            entry.key, entry.value = key, value if isinstance(value, str) else json.dumps(value)
        onnx.save(model, str(path))
    except (OnnxExporterError, RuntimeError, ValueError, onnx.checker.ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ExportError(
            f"{path.name}: cannot be written with opset {config.opset}: {reason}", hint="use opset 17"
        ) from error


def metadata(trained: TrainedModel, config: ExportConfig) -> dict[str, Any]:
    """What a consumer must know to use the file, and whose weights they are; `Consumer` reads it."""
    model = trained.config
    mean, std = mean_and_std(model.num_channels)
    channels = MODES.get(model.num_channels, str(model.num_channels))
    height, width = config.input_shape(model.resolution, model.block)
    return {
        "class_names": list(trained.class_names),
        "resolution": [height, width],
        "channels": channels,
        "resize": "bilinear-antialias",
        "mean": mean,
        "std": std,
        "pre_processing": f"EXIF orientation applied; channels {channels}; each resized by Pillow's BILINEAR (with "
        f"antialias) to {height} x {width}, aspect not kept; / 255; minus mean, divided by std",
        "post_processing": str(config.post_processing).lower(),
        "num_select": model.num_select,
        "opset": config.opset,
        "precision": config.precision,
        "variant": model.variant,
        "rfdetr_core": __version__,
        "weights_sha256": trained.sha256,
    }


class WithPostProcessing(nn.Module):
    """A detector whose graph ends with detections in pixels (model spec section 5)."""

    named: Tensor

    def __init__(self, detector: ExportableDetector, num_select: int, names: Sequence[str]) -> None:
        super().__init__()
        self.detector = detector
        config = detector.model.config
        self.columns = config.num_classes + 1
        self.selected = min(num_select, config.num_queries * self.columns)
        # The spare last column, and unused ids of COCO, have no name: what they find is no detection.
        named = [column < len(names) and names[column] != "" for column in range(self.columns)]
        self.register_buffer("named", torch.tensor(named))

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        boxes, logits = self.detector(images)
        best, flat = logits.flatten(1).topk(self.selected)  # ONNX takes the first of equal ones, as we do
        labels = flat % self.columns
        queries = torch.div(flat, self.columns, rounding_mode="floor")
        height, width = sizes.to(boxes.dtype).unsqueeze(1).unbind(-1)  # (B, 1) each
        extent = torch.stack([width, height, width, height], dim=-1)  # (B, 1, 4)
        corners = cxcywh_to_xyxy(boxes) * extent
        corners = torch.minimum(corners.clamp(min=0), extent).gather(1, queries[..., None].expand(-1, -1, 4))
        named = self.named[labels]
        return corners, best.sigmoid() * named.to(best.dtype), torch.where(named, labels, NO_DETECTION)


def _write(trained: TrainedModel, path: Path, config: ExportConfig) -> None:
    model = trained.config
    height, width = config.input_shape(model.resolution, model.block)
    module: nn.Module = prepare_for_export(trained.module, height, width).cpu()
    batch = 1 if config.dynamic_batch else config.fixed_batch
    example: tuple[Tensor, ...] = (torch.zeros((batch, model.num_channels, height, width)),)
    inputs, outputs = [INPUT], list(RAW_OUTPUTS)
    if config.post_processing:
        module = WithPostProcessing(module, model.num_select, trained.class_names).eval()  # type: ignore[arg-type]
        example = (*example, torch.tensor([[height, width]] * batch))
        inputs, outputs = [INPUT, SIZES], list(DETECTIONS)
    axes = {name: {0: "batch"} for name in (*inputs, *outputs)} if config.dynamic_batch else None
    with torch.no_grad(), warnings.catch_warnings():
        # The tracer warns of every Python number that it fixes (level shapes, by intent) and of its own age.
        warnings.simplefilter("ignore", TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        # It knows opsets up to 20 only and writes 21 to 23 all the same: the checker and parity prove those.
        warnings.simplefilter("ignore", OnnxExporterWarning)
        torch.onnx.export(
            module,
            example,
            str(path),
            input_names=inputs,
            output_names=outputs,
            dynamic_axes=axes,
            opset_version=config.opset,
            dynamo=False,
        )


def _to_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights and arithmetic in half precision where ONNX Runtime's own converter holds it to be safe."""
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of each weight that becomes a subnormal or zero: parity judges the whole
        converted: onnx.ModelProto = convert_float_to_float16(model, keep_io_types=True)
    OnnxModel(converted).topological_sort()  # the casts of the inputs were put at the end
    return converted
