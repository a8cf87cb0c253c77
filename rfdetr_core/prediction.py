"""Detections of a trained detector in pictures, through the same pre-processing as its evaluation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from rfdetr_core.data.images import to_rgb
from rfdetr_core.data.transforms import preprocess
from rfdetr_core.errors import ConfigError, DatasetError
from rfdetr_core.models.postprocess import postprocess
from rfdetr_core.models.weights import TrainedModel

Picture = Image.Image | str | os.PathLike[str]

AT_ONCE = 8  # pictures in one forward pass


@dataclass(frozen=True)
class Prediction:
    """The D detections of one image, best first; all arrays are of the same length."""

    boxes: NDArray[np.float64]  # (D, 4) x1, y1, x2, y2 in pixels of the upright image
    scores: NDArray[np.float64]  # (D,) in [0, 1]
    labels: NDArray[np.int64]  # (D,) positions in the model's class_names
    class_names: tuple[str, ...]  # (D,) the names of these labels


def predict_pictures(trained: TrainedModel, pictures: Sequence[Picture], threshold: float) -> list[Prediction]:
    """Detections with a score above `threshold`, one Prediction per picture; computed where the model lies.

    Raises:
        ConfigError: a threshold outside 0 to 1, or something that is no picture.
        DatasetError: a picture cannot be read.
    """
    if not 0 <= threshold <= 1:
        raise ConfigError(f"threshold: {threshold} is not allowed", hint="use 0 to 1")
    device = next(trained.module.parameters()).device
    found: list[Prediction] = []
    for start in range(0, len(pictures), AT_ONCE):
        images = [_upright(picture) for picture in pictures[start : start + AT_ONCE]]
        inputs = torch.cat([preprocess(image, trained.config.resolution) for image in images])
        sizes = torch.tensor([[image.height, image.width] for image in images], device=device)
        with torch.inference_mode():
            outputs = trained.module(inputs.to(device))
            rows = postprocess(outputs["pred_logits"], outputs["pred_boxes"], sizes, trained.config.num_select)
        found += [_prediction(row, trained.class_names, threshold) for row in rows]
    return found


def _upright(picture: Picture) -> Image.Image:
    """RGB, with the EXIF orientation applied."""
    if not isinstance(picture, (Image.Image, str, os.PathLike)):
        raise ConfigError(f"images: {type(picture).__name__} is no picture", hint="give Pillow images or paths")
    try:
        image = picture if isinstance(picture, Image.Image) else Image.open(picture)
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        name = "the image" if isinstance(picture, Image.Image) else os.fspath(picture)
        raise DatasetError(f"{name}: cannot be read: {error}", hint="give a picture that Pillow opens") from error


def _prediction(row: dict[str, torch.Tensor], names: tuple[str, ...], threshold: float) -> Prediction:
    """What is above the threshold; the spare last column of the head names no class."""
    scores, labels = row["scores"].cpu().numpy().astype(np.float64), row["labels"].cpu().numpy()
    kept = (scores > threshold) & (labels < len(names))
    boxes = row["boxes"].cpu().numpy().astype(np.float64)[kept]
    return Prediction(boxes, scores[kept], labels[kept], tuple(names[label] for label in labels[kept]))
