"""Detections of a detector in pictures, through the same pre-processing as its evaluation."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from rfdetr_core.data.images import MODES, upright
from rfdetr_core.data.transforms import preprocess
from rfdetr_core.errors import ConfigError, DatasetError
from rfdetr_core.models.linear import constant_weights
from rfdetr_core.models.postprocess import postprocess
from rfdetr_core.models.weights import TrainedModel

Picture = Image.Image | str | os.PathLike[str] | NDArray[Any] | Tensor
"""A path, a Pillow image, an array (H, W, C) uint8 (grey also (H, W) or (H, W, 1)), or a tensor (C, H, W) in [0, 1]."""

AT_ONCE = 8  # pictures in one forward pass
_RGB = 3


@dataclass(frozen=True, eq=False)
class Prediction:
    """The D detections of one image, best first; all fields are of the same length."""

    boxes: NDArray[np.float64]  # (D, 4) x1, y1, x2, y2 in pixels of the upright image
    scores: NDArray[np.float64]  # (D,) in [0, 1]
    class_ids: NDArray[np.int64]  # (D,) positions in the model's class_names
    class_names: tuple[str, ...]  # (D,) the names of these classes

    def __len__(self) -> int:
        return len(self.scores)

    def to_supervision(self) -> Any:
        """The same as supervision.Detections: xyxy, confidence, class_id, and data["class_name"].

        Raises:
            ConfigError: the package is not installed.
        """
        try:
            supervision = importlib.import_module("supervision")
        except ModuleNotFoundError as error:
            raise ConfigError("supervision is not installed", hint="pip install supervision") from error
        return supervision.Detections(
            xyxy=self.boxes.astype(np.float32),
            confidence=self.scores.astype(np.float32),
            class_id=self.class_ids.astype(int),
            data={"class_name": np.array(self.class_names, dtype=str)},
        )


def predict_pictures(trained: TrainedModel, pictures: Sequence[Picture], threshold: float) -> list[Prediction]:
    """Detections with a score above `threshold`, one Prediction per picture; computed where the model lies.

    Raises:
        ConfigError: a threshold outside 0 to 1, or something that is no picture for this model.
        DatasetError: a picture cannot be read, has no pixels, or a tensor has values outside [0, 1].
    """
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise ConfigError(f"threshold: {threshold!r} is not allowed", hint="use 0 to 1")
    device = next(trained.module.parameters()).device
    found: list[Prediction] = []
    with torch.inference_mode(), constant_weights(trained.module):
        for start in range(0, len(pictures), AT_ONCE):
            batch = [
                _network_input(picture, start + row, trained.config.resolution, trained.config.num_channels)
                for row, picture in enumerate(pictures[start : start + AT_ONCE])
            ]
            sizes = torch.tensor([size for _, size in batch], device=device)  # (B, 2) height, width
            outputs = trained.module(torch.cat([pixels for pixels, _ in batch]).to(device))  # of (B, C, R, R)
            rows = postprocess(outputs["pred_logits"], outputs["pred_boxes"], sizes, trained.config.num_select)
            found += [_prediction(row, trained.class_names, threshold) for row in rows]
    return found


def _network_input(picture: Picture, index: int, resolution: int, channels: int) -> tuple[Tensor, tuple[int, int]]:
    """The network's input (1, C, R, R), and height and width of the upright picture."""
    if isinstance(picture, Tensor):
        picture = _as_array(picture, index, channels)
    if isinstance(picture, np.ndarray):
        array = _checked_array(picture, index, channels)
        if array.ndim == 3 and channels != _RGB:
            return preprocess(array, resolution), (array.shape[0], array.shape[1])
        picture = Image.fromarray(array)
    image = _upright(picture, index, channels)
    return preprocess(image, resolution), (image.height, image.width)


def _as_array(tensor: Tensor, index: int, channels: int) -> NDArray[np.uint8]:
    """(H, W, C) of 8 bits: no image in training had more, and equal pictures give equal detections in any form."""
    what = f"images[{index}]: a tensor {tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.ndim != 3 or tensor.shape[0] != channels or not tensor.is_floating_point():
        raise ConfigError(f"{what} is no picture", hint=f"give ({channels}, height, width) of floats in [0, 1]")
    if not tensor.numel():
        raise DatasetError(f"{what} has no pixels", hint="leave it out")
    values = tensor.detach().cpu().float()
    if not ((values >= 0) & (values <= 1)).all():  # also refuses NaN
        least, most = values.min().item(), values.max().item()
        raise DatasetError(f"{what} has values from {least:g} to {most:g}", hint="scale it to [0, 1]: 8 bits / 255")
    return values.mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def _checked_array(array: NDArray[Any], index: int, channels: int) -> NDArray[np.uint8]:
    """(H, W, C) uint8, or (H, W) of one channel, in one block of memory."""
    what = f"images[{index}]: an array {array.shape} of {array.dtype}"
    if array.ndim == 3 and array.shape[2] == 1 and channels == _RGB:
        array = array[..., 0]
    grey = array.ndim == 2 and channels in (1, _RGB)
    if array.dtype != np.uint8 or not (grey or (array.ndim == 3 and array.shape[2] == channels)):
        raise ConfigError(f"{what} is no picture", hint=f"give (height, width, {channels}) of uint8")
    if not array.size:
        raise DatasetError(f"{what} has no pixels", hint="leave it out")
    return np.ascontiguousarray(array)


def _upright(picture: Image.Image | str | os.PathLike[str], index: int, channels: int) -> Image.Image:
    """In the model's channels, with the EXIF orientation applied."""
    if not isinstance(picture, (Image.Image, str, os.PathLike)):
        kind = type(picture).__name__
        raise ConfigError(
            f"images[{index}]: {kind} is no picture", hint="give a path, a Pillow image, an array or a tensor"
        )
    if channels not in MODES:
        raise ConfigError(
            f"images[{index}]: files and Pillow images are grey, RGB or RGBA, the model takes {channels} channels",
            hint=f"give an array (height, width, {channels}) of uint8",
        )
    try:
        if isinstance(picture, Image.Image):
            image = upright(picture, channels)
        else:
            with Image.open(picture) as file:
                image = upright(file, channels)
        if not image.width or not image.height:
            raise ValueError(f"{image.width} x {image.height} pixels")
    except Exception as error:  # Pillow's decoders let a broken file raise whatever it leads them to
        name = f"images[{index}]" if isinstance(picture, Image.Image) else os.fspath(picture)
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DatasetError(f"{name}: cannot be read: {reason}", hint="give a picture that Pillow opens") from error
    return image


def _prediction(row: dict[str, Tensor], names: tuple[str, ...], threshold: float) -> Prediction:
    """What is above the threshold, and of a class that has a name: the spare column of the head has none."""
    scores, labels = row["scores"].cpu().numpy().astype(np.float64), row["labels"].cpu().numpy()
    named = np.array([label < len(names) and names[label] != "" for label in labels], dtype=bool)
    kept = (scores > threshold) & named
    boxes = row["boxes"].cpu().numpy().astype(np.float64)[kept]
    return Prediction(boxes, scores[kept], labels[kept], tuple(names[label] for label in labels[kept]))
