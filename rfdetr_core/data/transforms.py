"""From an image and its boxes to what the network sees: one resampling, uint8 until the device.

Evaluation, prediction, parity and the ONNX example share one pre-processing (DESIGN section 5): RGB (or what else
the detector takes), upright, Pillow bilinear (antialiased) to the square, /255, mean and std. Training adds random
crop and flip.
"""

from __future__ import annotations

from itertools import cycle, islice
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from rfdetr_core.data.scales import CROP_SHORT_SIDES

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# The random crop cuts a square of 384 to 600 px after the shorter side was resized (training spec 3.3).
CROP_MIN, CROP_MAX = 384, 600

LONGEST_SIDE = 1333
"""Pixels that the longer side may reach where the aspect is kept."""


class View(NamedTuple):
    """The part of an image that training looks at: a window in pixels, and whether it is mirrored."""

    left: float
    top: float
    width: float
    height: float
    flip: bool
    cropped: bool = False  # the recipe's square window, not the whole image


def whole_pixels(view: View, size: tuple[int, int]) -> View:
    """The nearest window of whole pixels, at least one, of an image of `size` = (width, height)."""
    (left, width), (top, height) = (
        _run_of_pixels(start, length, limit) for start, length, limit in zip(view[:2], view[2:4], size, strict=True)
    )
    return view._replace(left=left, top=top, width=width, height=height)


def _run_of_pixels(start: float, length: float, limit: int) -> tuple[int, int]:
    first = min(round(start), limit - 1)
    return first, max(1, min(round(start + length), limit) - first)


def resample(pixels: NDArray[np.uint8], size: tuple[int, int], view: View) -> NDArray[np.uint8]:
    """Resample a window of whole pixels of (H, W, C) to `size` = (width, height): (height, width, C).

    Bilinear with antialias by torch, for training: Pillow's filter within one of 256 levels in a third of the time.
    """
    left, top = int(view.left), int(view.top)
    window = pixels[top : top + int(view.height), left : left + int(view.width)]
    if window.shape[:2] != (size[1], size[0]):
        source = torch.from_numpy(window).permute(2, 0, 1)[None]  # (1, C, h, w), channels last in memory
        resized = F.interpolate(source, size=(size[1], size[0]), mode="bilinear", antialias=True)
        window = resized[0].permute(1, 2, 0).numpy()
    return window[:, ::-1] if view.flip else window


def to_square(picture: Image.Image | NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Resample a whole picture, an image or an array (H, W, C), to (side, side, C) uint8; each channel by itself."""
    return to_size(picture, side, side)


def to_size(picture: Image.Image | NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """The same to (height, width, C)."""
    if isinstance(picture, np.ndarray):
        bands = [Image.fromarray(np.ascontiguousarray(picture[..., c])) for c in range(picture.shape[2])]
    elif picture.mode == "RGB":
        bands = [picture]
    else:
        bands = list(picture.split())  # of RGBA as a whole, Pillow would weight the colours by their alpha
    resized = [np.asarray(band.resize((width, height), Image.Resampling.BILINEAR)) for band in bands]
    return resized[0] if resized[0].ndim == 3 else np.stack(resized, axis=2)


def aspect_size(view: View, side: int) -> tuple[int, int]:
    """Width and height in pixels of a view whose aspect is kept (training spec 3.3, non-square mode).

    The shorter side becomes `side` as long as the longer one stays within 1333 px; the recipe's crop is square.
    """
    if view.cropped:
        return (min(side, LONGEST_SIDE),) * 2
    scale = min(side / min(view.width, view.height), LONGEST_SIDE / max(view.width, view.height))
    return max(1, round(view.width * scale)), max(1, round(view.height * scale))


def mean_and_std(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """ImageNet's, per channel; repeated cyclically where there are more, or fewer, than three (model spec 8)."""
    return tuple(islice(cycle(MEAN), channels)), tuple(islice(cycle(STD), channels))


def normalise(images: Tensor) -> Tensor:
    """uint8 (B, C, H, W) to the network's float32 input: /255, then mean and std."""
    mean, std = (torch.tensor(row, device=images.device).view(-1, 1, 1) for row in mean_and_std(images.shape[1]))
    return images.to(torch.float32).div_(255.0).sub_(mean).div_(std)


def preprocess(picture: Image.Image | NDArray[np.uint8], resolution: int | tuple[int, int]) -> Tensor:
    """The one pre-processing: an upright picture of C channels to the network's input (1, C, R, R).

    A `resolution` of height and width gives (1, C, height, width).
    """
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    pixels = torch.from_numpy(to_size(picture, height, width).copy())
    return normalise(pixels.permute(2, 0, 1)[None])


def draw_view(rng: np.random.Generator, width: int, height: int, *, scale_jitter: bool, flip: bool) -> View:
    """Draw the training view of an image of width x height pixels (training spec 3.3).

    With `scale_jitter`, half of the views are a random square crop; with `flip`, half are mirrored.
    """
    mirrored = bool(flip and rng.random() < 0.5)
    if not scale_jitter or rng.random() < 0.5:
        return View(0.0, 0.0, float(width), float(height), mirrored)
    # The published recipe resizes the shorter side first and then crops in that frame; crop and resize compose
    # to one window of the source, so the image is resampled once.
    scale = int(rng.choice(CROP_SHORT_SIDES)) / min(width, height)
    scaled_width, scaled_height = round(width * scale), round(height * scale)
    largest = min(CROP_MAX, scaled_width, scaled_height)
    side = int(rng.integers(min(CROP_MIN, largest), largest + 1))
    left = int(rng.integers(scaled_width - side + 1))
    top = int(rng.integers(scaled_height - side + 1))
    x_scale, y_scale = width / scaled_width, height / scaled_height
    return View(left * x_scale, top * y_scale, side * x_scale, side * y_scale, mirrored, cropped=True)


def view_boxes(boxes: NDArray[np.float64], view: View) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """Boxes x1, y1, x2, y2 in source pixels to cx, cy, w, h in [0, 1] of the view.

    Returns the boxes (M, 4) that are not empty after clipping to the view, and their rows in the input.
    """
    unit = (boxes - [view.left, view.top] * 2) / ([view.width, view.height] * 2)
    unit = np.clip(unit, 0.0, 1.0)
    kept = np.flatnonzero((unit[:, 2] > unit[:, 0]) & (unit[:, 3] > unit[:, 1]))
    x1, y1, x2, y2 = unit[kept].T
    if view.flip:
        x1, x2 = 1.0 - x2, 1.0 - x1
    centres = np.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], axis=1)
    return centres.astype(np.float32), kept
