"""The largest step that a dataset can ask for: the most pixels and the most boxes that a batch of it can have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from rfdetr_core.config import ModelConfig, TrainConfig
from rfdetr_core.data.loading import Batch
from rfdetr_core.data.scales import configured_scales
from rfdetr_core.data.transforms import LONGEST_SIDE, View, aspect_size


@dataclass(frozen=True)
class DatasetFacts:
    """What the probe knows of a dataset: counts of images, boxes of the fullest ones, and the extreme shapes."""

    train_images: int
    valid_images: int
    test_images: int
    max_boxes: int  # in one training image
    valid_max_boxes: int
    widest: tuple[int, int] | None  # width, height of the training image with the largest aspect; None: not recorded
    tallest: tuple[int, int] | None

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> DatasetFacts:
        """From the content of dataset.json; one that was prepared before shapes were recorded has none."""
        splits = document["splits"]
        train, valid, test = (splits.get(name, {}) for name in ("train", "valid", "test"))
        shapes = train.get("extreme_images", {})
        return cls(
            train_images=int(train["images"]),
            valid_images=int(valid.get("images", 0)),
            test_images=int(test.get("images", 0)),
            max_boxes=int(train["max_boxes_per_image"]),
            valid_max_boxes=int(valid.get("max_boxes_per_image", 0)),
            widest=tuple(shapes["widest"]) if shapes else None,
            tallest=tuple(shapes["tallest"]) if shapes else None,
        )


@dataclass(frozen=True)
class WorstCase:
    """The step to prove, and the others of its training.

    `extents` are height and width in pixels of a batch at every training scale, ascending; the last is the largest.
    """

    extents: tuple[tuple[int, int], ...]
    targets: int  # boxes in each image
    padded: bool  # images of different sizes meet in a batch, and a mask tells them from the padding
    shapes_known: bool  # the extents are reached by images of the dataset; False: by images as extreme as can be

    @property
    def largest(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.extents[-1]


def worst_case(model: ModelConfig, train: TrainConfig, facts: DatasetFacts) -> WorstCase:
    """The largest extents of a batch at each scale, and the boxes of the fullest image up to the field's limit.

    Square batches have the scale's own side. Where the aspect is kept a batch is as high as its tallest image and as
    wide as its widest: the longer side of each may reach 1333 px, and padding rounds up to the detector's block.
    """
    scales = configured_scales(model, train)
    square = train.square_resize_div_64
    extents = tuple(
        (side, side) if square else _padded(side, facts, model.block, train.scale_jitter) for side in scales
    )
    return WorstCase(
        extents=extents,
        targets=max(1, min(facts.max_boxes, train.auto_batch_max_targets_per_image)),
        padded=not square or (train.multi_scale == "per-sample" and len(scales) > 1),
        shapes_known=square or facts.widest is not None,
    )


def _padded(side: int, facts: DatasetFacts, block: int, scale_jitter: bool) -> tuple[int, int]:
    """Height and width of the largest batch at one scale, with the aspect kept."""
    if facts.widest is None or facts.tallest is None:
        height = width = LONGEST_SIDE
    else:
        # The longer side grows with the aspect until it is cut: the extreme images decide for all between.
        width = _resized(facts.widest, side)[0]
        height = _resized(facts.tallest, side)[1]
        if scale_jitter:  # a random crop is a square of the scale's side
            width, height = max(width, min(side, LONGEST_SIDE)), max(height, min(side, LONGEST_SIDE))
    return -(-height // block) * block, -(-width // block) * block


def _resized(size: tuple[int, int], side: int) -> tuple[int, int]:
    return aspect_size(View(0.0, 0.0, float(size[0]), float(size[1]), flip=False), side)


def scale_weights(scales: int, *, per_sample: bool, batch_size: int) -> list[float]:
    """How often a batch has each of so many scales, ascending: uniform, or the largest of what its images draw."""
    if not per_sample:
        return [1.0 / scales] * scales
    at_most = [(k / scales) ** batch_size for k in range(scales + 1)]
    return [high - low for low, high in pairwise(at_most)]


def worst_case_batch(
    batch_size: int,
    extent: tuple[int, int],
    targets: int,
    num_classes: int,
    *,
    channels: int = 3,
    padded: bool = False,
) -> Batch:
    """Random pixels and `targets` random boxes in each image: every assignment problem has its full size.

    Args:
        extent: height and width in pixels.
        padded: every image ends a pixel before the extent, so that the padding mask is there.
    """
    generator, (height, width) = torch.Generator().manual_seed(batch_size), extent
    centres = torch.rand((batch_size * targets, 2), generator=generator) * 0.8 + 0.1
    sides = torch.rand((batch_size * targets, 2), generator=generator) * 0.15 + 0.05
    picture = torch.randint(0, 256, (1, channels, height, width), dtype=torch.uint8, generator=generator)
    return Batch(
        pixels=picture.repeat(batch_size, 1, 1, 1),
        boxes=torch.cat([centres, sides], dim=1),
        labels=torch.randint(0, num_classes, (batch_size * targets,), generator=generator),
        counts=(targets,) * batch_size,
        images=tuple(range(batch_size)),
        sizes=((height - 1, width - 1),) * batch_size if padded else None,
    )
