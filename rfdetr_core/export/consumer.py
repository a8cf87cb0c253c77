"""A consumer of an exported model: raw image files in, detections out, by what the file says of itself and no more.

Nothing but onnxruntime, numpy and Pillow, and none of our own pre-processing: the parity gate runs this beside the
trained model, so that a wrong word in the metadata is found as a wrong weight is. `examples/onnx_inference.py` is the
same for one's own programs.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image, ImageOps

from rfdetr_core.errors import ExportError

Array = NDArray[Any]

RESIZE = {
    "bilinear-antialias": Image.Resampling.BILINEAR,
    "bicubic-antialias": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}
"""Words that the metadata may use -> Pillow's filters."""


LOGITS = "detection_logits"
"""An output that parity adds to a file with post-processing: a score near 1 tells little of its logit."""


class Found(NamedTuple):
    """K detections of one image, best first."""

    labels: NDArray[np.int64]  # (K,) positions in class_names
    logits: NDArray[np.float64]  # (K,)
    boxes: NDArray[np.float64]  # (K, 4) x1, y1, x2, y2 in fractions of the image


class Consumer:
    """An ONNX file in ONNX Runtime.

    `model` is the file or its bytes; `threads` 0 takes all cores.

    Raises:
        ExportError: ONNX Runtime does not open it, or its metadata is not that of a detector of ours.
    """

    def __init__(self, model: Path | bytes, *, threads: int = 0, provider: str = "CPUExecutionProvider") -> None:
        name = model.name if isinstance(model, Path) else "model.onnx"
        self.session = open_session(model, threads=threads, provider=provider)
        facts = self.session.get_modelmeta().custom_metadata_map
        try:
            self.class_names: list[str] = json.loads(facts["class_names"])
            self.height, self.width = json.loads(facts["resolution"])
            self.channels = facts["channels"]
            self.filter = RESIZE[facts["resize"]]
            self.mean, self.std = (np.array(json.loads(facts[key]), np.float32) for key in ("mean", "std"))
            self.num_select = int(facts["num_select"])
        except (KeyError, ValueError, TypeError) as error:
            raise ExportError(f"{name}: its metadata does not tell how to use it: {error}") from error
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.post_processing = facts.get("post_processing") == "true"
        batch = self.session.get_inputs()[0].shape[0]
        self.fixed_batch: int | None = batch if isinstance(batch, int) else None

    def read(self, data: bytes | NDArray[np.uint8]) -> tuple[Array, tuple[int, int]]:
        """The network's input (1, C, H, W) of an encoded picture, or of pixels (H, W, C); and its height and width."""
        if isinstance(data, bytes):
            bands, size = self._bands(data)
        else:
            bands = [Image.fromarray(np.ascontiguousarray(data[..., i])) for i in range(data.shape[2])]
            size = (data.shape[0], data.shape[1])
        resized = [np.asarray(band.resize((self.width, self.height), self.filter), np.float32) for band in bands]
        mean, std = self.mean[:, None, None], self.std[:, None, None]
        return ((np.stack(resized) / np.float32(255) - mean) / std)[None], size

    def _bands(self, data: bytes) -> tuple[list[Image.Image], tuple[int, int]]:
        picture: Image.Image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        if picture.mode.startswith("I;16"):
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        mode = "RGB" if self.channels == "BGR" else self.channels
        bands = list((picture if picture.mode == mode else picture.convert(mode)).split())
        return bands[::-1] if self.channels == "BGR" else bands, (picture.height, picture.width)

    def run(self, batch: Array, sizes: list[tuple[int, int]]) -> dict[str, Array]:
        """Every output of the file for a batch (B, C, H, W) of images of these heights and widths."""
        inputs: dict[str, Array] = {"input": batch}
        if self.post_processing:
            inputs["sizes"] = np.array(sizes, np.int64)
        return dict(zip(self.outputs, self.session.run(None, inputs), strict=True))

    def detections(self, outputs: dict[str, Array], sizes: list[tuple[int, int]]) -> list[Found]:
        """What `run` gave, per image: the num_select best, less those of columns without a name."""
        return [self._found({key: value[i] for key, value in outputs.items()}, *sizes[i]) for i in range(len(sizes))]

    def _found(self, outputs: dict[str, Array], height: int, width: int) -> Found:
        if not self.post_processing:
            return raw_found(outputs["dets"], outputs["labels"], self.class_names, self.num_select)
        kept = outputs["labels"] >= 0
        boxes = outputs["boxes"][kept] / np.array([width, height, width, height], np.float64)
        if LOGITS in outputs:
            return Found(outputs["labels"][kept], outputs[LOGITS][kept].astype(np.float64), boxes)
        scores = np.clip(outputs["scores"][kept].astype(np.float64), 1e-30, 1 - 1e-12)
        return Found(outputs["labels"][kept], np.log(scores / (1 - scores)), boxes)


def raw_found(dets: Array, logits: Array, class_names: Sequence[str], num_select: int) -> Found:
    """Detections of one image from `dets` (Q, 4) and raw logits (Q, C + 1): model spec section 5."""
    logits = logits.astype(np.float64)
    best = np.argsort(-logits, axis=None, kind="stable")[:num_select]
    queries, labels = np.divmod(best, logits.shape[1])
    named = np.array([label < len(class_names) and class_names[label] != "" for label in labels], bool)
    centre, extent = np.split(dets[queries[named]].astype(np.float64), 2, axis=1)
    boxes = np.concatenate([centre - extent / 2, centre + extent / 2], axis=1).clip(0, 1)
    return Found(labels[named].astype(np.int64), logits.ravel()[best][named], boxes)


def open_session(
    model: Path | bytes, *, threads: int = 0, provider: str = "CPUExecutionProvider"
) -> onnxruntime.InferenceSession:
    """An ONNX file, or its bytes, in ONNX Runtime.

    Raises:
        ExportError: it is torn, or nothing that ONNX Runtime can run.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(
            str(model) if isinstance(model, Path) else model, options, providers=[provider]
        )
    except Exception as error:  # its own exceptions have no common base
        name = model.name if isinstance(model, Path) else "the model"
        reason = " ".join(str(error).split())[:200]
        raise ExportError(f"{name}: ONNX Runtime cannot run it: {reason}", hint="export it again") from error
