"""What the entries of `train.aug_config` do to an image and its boxes (training spec 3.5).

Images are uint8 tensors (C, H, W) and stay of that size; a change of colours sees grey as RGB, and leaves a fourth
channel alone; boxes are x1, y1, x2, y2 in pixels, 0 at the left edge of
the first pixel. A transform that moves pixels is one 3 x 3 matrix, applied to both: the pixels are resampled
bilinearly, the four corners of a box are moved exactly and the box becomes their hull. Every random number comes
from the generator that is handed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from rfdetr_core.config.augment import Augmentation, Span

Values = Mapping[str, Any]
Random = np.random.Generator
Matrix = NDArray[np.float64]  # (3, 3): where a point (x, y, 1) of the image goes

# A corner of Perspective moves inwards by at most this share of the side: no box comes near the horizon.
_INWARDS = 0.3


class _Sample(NamedTuple):
    image: Tensor  # (C, H, W) uint8, C 1, 3 or 4
    boxes: NDArray[np.float64]  # (n, 4) x1 y1 x2 y2 in pixels
    rows: NDArray[Any]  # (n,) which of the given boxes these are

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.image.shape[-1], self.image.shape[-2]


def augment(
    pixels: NDArray[np.uint8], boxes: NDArray[np.float32], augmentations: Sequence[Augmentation], rng: Random
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[Any]]:
    """Apply the augmentations in their order, each with its own probability.

    Args:
        pixels: (H, W, C), C 1 (grey), 3 or 4 (RGBA).
        boxes: (n, 4) cx cy w h in [0, 1].

    Returns the pixels, (H, W, C) again; the boxes (m, 4) of which something is left in the image, clipped to it; and
    their rows among those given.
    """
    image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    extent = np.array([pixels.shape[1], pixels.shape[0]] * 2, dtype=np.float64)
    centre, half = boxes[:, :2].astype(np.float64), boxes[:, 2:].astype(np.float64) / 2
    corners = np.concatenate([centre - half, centre + half], axis=1) * extent
    sample = _Sample(image, corners, np.arange(len(boxes)))
    for entry in augmentations:
        sample = _maybe(sample, entry, rng)
    x1, y1, x2, y2 = (sample.boxes / extent).T
    unit = np.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], axis=1).astype(np.float32)
    return sample.image.permute(1, 2, 0).numpy(), unit, sample.rows


def _maybe(sample: _Sample, entry: Augmentation, rng: Random) -> _Sample:
    return _applied(sample, entry, rng) if rng.random() < entry.p else sample


def _applied(sample: _Sample, entry: Augmentation, rng: Random) -> _Sample:
    if entry.name == "Sequential":
        for inner in entry.inner:
            sample = _maybe(sample, inner, rng)
        return sample
    if entry.name in ("OneOf", "SomeOf"):
        # Inside, p is the weight of being chosen; who is chosen is applied.
        weights = np.array([inner.p for inner in entry.inner])
        count = entry.values.get("n", 1)
        chosen = rng.choice(len(weights), size=count, replace=False, p=weights / weights.sum())
        for position in sorted(chosen):
            sample = _applied(sample, entry.inner[position], rng)
        return sample
    if entry.name in _MOVES:
        return _moved(sample, _MOVES[entry.name](entry.values, sample.size, rng), entry.values)
    if entry.name in _FLIPS:
        flip, mirror = _FLIPS[entry.name]
        return sample._replace(image=flip(sample.image), boxes=mirror(sample.boxes, sample.size))
    return sample._replace(image=_coloured(sample.image, entry, rng))


def _coloured(image: Tensor, entry: Augmentation, rng: Random) -> Tensor:
    channels = len(image)
    rgb = image.expand(3, -1, -1) if channels == 1 else image[:3]
    changed = _COLOURS[entry.name](rgb, entry.values, rng)
    return changed if channels == 3 else torch.cat([changed, image[3:]])[:channels]


# ---- transforms that move pixels --------------------------------------------------------------------------


def _moved(sample: _Sample, matrix: Matrix, values: Values) -> _Sample:
    """Resample the pixels and move the boxes; what lies outside of the image is gone."""
    back = np.linalg.inv(matrix)
    image = tv.perspective(
        sample.image,
        None,
        None,
        interpolation=InterpolationMode.BILINEAR,
        fill=_fill(values.get("fill", (0.0, 0.0, 0.0)), len(sample.image)),
        coefficients=(back / back[2, 2]).ravel()[:8].tolist(),
    )
    hulls = np.clip(hull(sample.boxes, matrix), 0.0, [*sample.size, *sample.size])
    left = np.flatnonzero((hulls[:, 2] > hulls[:, 0]) & (hulls[:, 3] > hulls[:, 1]))
    return _Sample(image, hulls[left], sample.rows[left])


def _fill(rgb: tuple[float, float, float], channels: int) -> list[float]:
    """The colour behind the image: of grey its mean; transparent."""
    return [sum(rgb) / 3.0] if channels == 1 else [*rgb, 0.0][:channels]


def hull(boxes: NDArray[np.float64], matrix: Matrix) -> NDArray[np.float64]:
    """The smallest upright boxes (n, 4) around the moved corners of boxes (n, 4) x1 y1 x2 y2."""
    corners = boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3]]]  # (n, 4, 2)
    moved = corners @ matrix[:, :2].T + matrix[:, 2]  # (n, 4, 3)
    points = moved[..., :2] / moved[..., 2:]
    return np.concatenate([points.min(axis=1), points.max(axis=1)], axis=1)


def _about_the_centre(linear: NDArray[np.float64], size: tuple[int, int], shift: tuple[float, float]) -> Matrix:
    """A 2 x 2 map about the middle of the image, then a shift in pixels."""
    centre = np.array(size) / 2
    matrix = np.eye(3)
    matrix[:2, :2] = linear
    matrix[:2, 2] = centre + shift - linear @ centre
    return matrix


def _rotation(degrees: float) -> NDArray[np.float64]:
    """Counter-clockwise as displayed: y points down."""
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    return np.array([[cosine, sine], [-sine, cosine]])


def _rotate(values: Values, size: tuple[int, int], rng: Random) -> Matrix:
    return _about_the_centre(_rotation(rng.uniform(*values["limit"])), size, (0.0, 0.0))


def _affine(values: Values, size: tuple[int, int], rng: Random) -> Matrix:
    scale_x, scale_y = _draw_axes(values["scale"], rng, together=True)
    shift_x, shift_y = _draw_axes(values["translate_percent"], rng)
    angle = rng.uniform(*values["rotate"])
    shear_x, shear_y = (math.tan(math.radians(degrees)) for degrees in _draw_axes(values["shear"], rng))
    # One shear after the other: together they could fold the image onto a line.
    shear = np.array([[1.0, shear_x], [0.0, 1.0]]) @ np.array([[1.0, 0.0], [shear_y, 1.0]])
    linear = _rotation(angle) @ shear @ np.diag([scale_x, scale_y])
    return _about_the_centre(linear, size, (shift_x * size[0], shift_y * size[1]))


def _draw_axes(spans: tuple[Span, Span | None], rng: Random, *, together: bool = False) -> tuple[float, float]:
    """A value for x and one for y; with `together` the same, unless y has a span of its own."""
    x_span, y_span = spans
    x = rng.uniform(*x_span)
    return x, x if together and y_span is None else rng.uniform(*(y_span or x_span))


def _shift_scale_rotate(values: Values, size: tuple[int, int], rng: Random) -> Matrix:
    shift_x, shift_y = _draw_axes((values["shift_limit"], None), rng)
    scale = 1.0 + rng.uniform(*values["scale_limit"])
    angle = rng.uniform(*values["rotate_limit"])
    return _about_the_centre(scale * _rotation(angle), size, (shift_x * size[0], shift_y * size[1]))


def _perspective(values: Values, size: tuple[int, int], rng: Random) -> Matrix:
    """A quadrilateral of the image fills it: each corner goes inwards by |normal(0, scale)| of the sides."""
    deviation = rng.uniform(*values["scale"])
    inwards = np.minimum(np.abs(rng.normal(0.0, deviation, size=(4, 2))), _INWARDS)
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    quadrilateral = (corners + inwards * np.where(corners > 0, -1.0, 1.0)) * size
    return homography(quadrilateral, corners * size)


def homography(given: NDArray[np.float64], wanted: NDArray[np.float64]) -> Matrix:
    """The matrix that takes four points (4, 2), no three of them on a line, to four others."""
    rows, right = [], []
    for (x, y), (u, v) in zip(given, wanted, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        right += [u, v]
    return np.append(np.linalg.solve(np.array(rows), np.array(right)), 1.0).reshape(3, 3)


def _mirrored_x(boxes: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float64]:
    return np.stack([size[0] - boxes[:, 2], boxes[:, 1], size[0] - boxes[:, 0], boxes[:, 3]], axis=1)


def _mirrored_y(boxes: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float64]:
    return np.stack([boxes[:, 0], size[1] - boxes[:, 3], boxes[:, 2], size[1] - boxes[:, 1]], axis=1)


# ---- transforms of colours and sharpness ------------------------------------------------------------------


def _to_uint8(image: Tensor) -> Tensor:
    return image.round_().clamp_(0, 255).to(torch.uint8)


def _color_jitter(image: Tensor, values: Values, rng: Random) -> Tensor:
    adjust = {
        "brightness": tv.adjust_brightness,
        "contrast": tv.adjust_contrast,
        "saturation": tv.adjust_saturation,
        "hue": tv.adjust_hue,
    }
    for name in rng.permutation(list(adjust)):
        image = adjust[name](image, rng.uniform(*values[name]))
    return image


def _to_gray(image: Tensor, values: Values, rng: Random) -> Tensor:
    gray: Tensor = tv.rgb_to_grayscale(image, num_output_channels=3)
    return gray


def _brightness_contrast(image: Tensor, values: Values, rng: Random) -> Tensor:
    contrast, brightness = (rng.uniform(*values[name]) for name in ("contrast_limit", "brightness_limit"))
    return _to_uint8(image.float().mul_(1.0 + contrast).add_(255.0 * brightness))


def _gaussian_blur(image: Tensor, values: Values, rng: Random) -> Tensor:
    side, sigma = _draw_kernel(values["blur_limit"], image, rng), rng.uniform(*values["sigma_limit"])
    blurred: Tensor = tv.gaussian_blur(image, [side, side], [sigma, sigma])
    return blurred


def _blur(image: Tensor, values: Values, rng: Random) -> Tensor:
    side = _draw_kernel(values["blur_limit"], image, rng)
    around = F.pad(image.float(), [side // 2] * 4, mode="reflect")
    return _to_uint8(F.avg_pool2d(around, side, stride=1))


def _draw_kernel(limits: tuple[int, int], image: Tensor, rng: Random) -> int:
    """An odd side in pixels; borders are reflected, so it ends where there is no more to reflect."""
    smallest, largest = limits
    side = smallest + 2 * int(rng.integers((largest - smallest) // 2 + 1))
    return min(side, 2 * min(image.shape[-2:]) - 1)


def _sharpen(image: Tensor, values: Values, rng: Random) -> Tensor:
    alpha, lightness = rng.uniform(*values["alpha"]), rng.uniform(*values["lightness"])
    kernel = torch.full((3, 3), -alpha)
    kernel[1, 1] = 1.0 - alpha + alpha * (8.0 + lightness)
    around = F.pad(image.float()[:, None], [1] * 4, mode="replicate")  # (3, 1, H + 2, W + 2)
    return _to_uint8(F.conv2d(around, kernel[None, None])[:, 0])


def _gauss_noise(image: Tensor, values: Values, rng: Random) -> Tensor:
    deviation, mean = rng.uniform(*values["std_range"]), rng.uniform(*values["mean_range"])
    shape = image.shape if values["per_channel"] else (1, *image.shape[1:])
    noise = torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))
    return _to_uint8(noise.mul_(255.0 * deviation).add_(255.0 * mean) + image)


def _equalize(image: Tensor, values: Values, rng: Random) -> Tensor:
    equalized: Tensor = tv.equalize(image)
    return equalized


_FLIPS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[..., NDArray[np.float64]]]] = {
    "HorizontalFlip": (tv.horizontal_flip, _mirrored_x),
    "VerticalFlip": (tv.vertical_flip, _mirrored_y),
}
_MOVES: dict[str, Callable[[Values, tuple[int, int], Random], Matrix]] = {
    "Rotate": _rotate,
    "Affine": _affine,
    "ShiftScaleRotate": _shift_scale_rotate,
    "Perspective": _perspective,
}
_COLOURS: dict[str, Callable[[Tensor, Values, Random], Tensor]] = {
    "ColorJitter": _color_jitter,
    "ToGray": _to_gray,
    "RandomBrightnessContrast": _brightness_contrast,
    "GaussianBlur": _gaussian_blur,
    "GaussNoise": _gauss_noise,
    "Blur": _blur,
    "Sharpen": _sharpen,
    "Equalize": _equalize,
}
