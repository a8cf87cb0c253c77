"""ONNX export with everything a consumer needs in the file's metadata (model spec section 10)."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import onnx
import torch
from torch.jit._trace import TracerWarning
from torch.onnx.errors import OnnxExporterError, OnnxExporterWarning

from rfdetr_core import __version__
from rfdetr_core.data.images import MODES
from rfdetr_core.data.transforms import mean_and_std
from rfdetr_core.errors import ExportError
from rfdetr_core.models.detector import prepare_for_export
from rfdetr_core.models.weights import TrainedModel

INPUT, OUTPUTS = "input", ("dets", "labels")


def export_onnx(trained: TrainedModel, path: Path, *, opset: int, dynamic_batch: bool) -> None:
    """Write the detector as ONNX.

    Input `input` (B, channels, R, R) float32, normalised; outputs `dets` (B, Q, 4) cx, cy, w, h in [0, 1] and
    `labels` (B, Q, C + 1) raw logits. B is 1, or open with `dynamic_batch`. The file passes onnx's checker.
    `trained` stays as it is, and where it is.

    Raises:
        ExportError: PyTorch cannot write this model, or what it wrote is not legal ONNX.
    """
    try:
        _write(trained, path, opset, dynamic_batch)
    except (OnnxExporterError, RuntimeError, ValueError, onnx.checker.ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ExportError(
            f"{path.name}: cannot be written with opset {opset}: {reason}", hint="use opset 17"
        ) from error


def _write(trained: TrainedModel, path: Path, opset: int, dynamic_batch: bool) -> None:
    side = trained.config.resolution
    module = prepare_for_export(trained.module, side, side).cpu()
    example = torch.zeros((1, trained.config.num_channels, side, side))
    axes = {name: {0: "batch"} for name in (INPUT, *OUTPUTS)} if dynamic_batch else None
    with torch.no_grad(), warnings.catch_warnings():
        # The tracer warns of every Python number that it fixes (level shapes, by intent) and of its own age.
        warnings.simplefilter("ignore", TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        # It knows opsets up to 20 only and writes 21 to 23 all the same: the checker and parity prove those.
        warnings.simplefilter("ignore", OnnxExporterWarning)
        torch.onnx.export(
            module,
            (example,),
            str(path),
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            dynamic_axes=axes,
            opset_version=opset,
            dynamo=False,
        )
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    for key, value in _metadata(trained).items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    onnx.save(model, str(path))


def _metadata(trained: TrainedModel) -> dict[str, str]:
    mean, std = mean_and_std(trained.config.num_channels)
    channels = MODES.get(trained.config.num_channels, f"{trained.config.num_channels} channels")
    return {
        "class_names": json.dumps(list(trained.class_names)),
        "resolution": str(trained.config.resolution),
        "mean": json.dumps(mean),
        "std": json.dumps(std),
        "resize": "Pillow bilinear with antialias to the square, aspect not kept; "
        f"{channels}, EXIF orientation applied",
        "num_select": str(trained.config.num_select),
        "variant": trained.config.variant,
        "rfdetr_core": __version__,
        "weights_sha256": trained.sha256,
    }
