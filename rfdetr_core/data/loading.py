"""Batches for training and evaluation.

Order and augmentation depend only on (seed, epoch, index): not on the number of workers, not on where a run
was interrupted. Pixels travel as uint8 and boxes as one packed array per batch.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from rfdetr_core.data.images import REVERSES_X, REVERSES_Y
from rfdetr_core.data.prepared import PreparedSplit
from rfdetr_core.data.transforms import View, draw_view, normalise, to_square, view_boxes

MIN_STEPS_PER_EPOCH = 5  # a tiny dataset is sampled with replacement up to this (training spec 4.5)


class Draw(NamedTuple):
    """What a worker is asked for: which image, in which epoch, at which side in pixels."""

    image: int
    epoch: int
    side: int


@dataclass(frozen=True)
class Batch:
    """B images and the N boxes of all of them, packed."""

    pixels: Tensor  # (B, 3, S, S) uint8
    boxes: Tensor  # (N, 4) float32, cx cy w h in [0, 1]
    labels: Tensor  # (N,) int64
    counts: tuple[int, ...]  # boxes of each image
    images: tuple[int, ...]  # positions in the split's table

    def pin_memory(self) -> Batch:
        """Called by the data loader: page-locked tensors, for asynchronous copies to a GPU."""
        return Batch(
            self.pixels.pin_memory(), self.boxes.pin_memory(), self.labels.pin_memory(), self.counts, self.images
        )

    def on(self, device: torch.device) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """The network's input (B, 3, S, S) float32, and one target dict (labels, boxes) per image."""
        pixels = normalise(self.pixels.to(device, non_blocking=True))
        boxes = torch.split(self.boxes.to(device, non_blocking=True), list(self.counts))
        labels = torch.split(self.labels.to(device, non_blocking=True), list(self.counts))
        return pixels, [{"labels": n, "boxes": b} for n, b in zip(labels, boxes, strict=True)]


class TrainImages(Dataset[Any]):
    """Augmented training images; crowd regions are no targets."""

    def __init__(self, split: PreparedSplit, *, seed: int, scale_jitter: bool, flip: bool) -> None:
        self._split, self._seed = split, seed
        self._scale_jitter, self._flip = scale_jitter, flip

    def __getitem__(self, draw: Draw) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int64], int]:
        rng = np.random.default_rng([self._seed, draw.epoch, draw.image])
        table = self._split.table
        width, height = int(table.widths[draw.image]), int(table.heights[draw.image])
        view = draw_view(rng, width, height, scale_jitter=self._scale_jitter, flip=self._flip)
        # The window ends at `side` pixels: decode no more than what the resampling can use.
        at_least = math.ceil(draw.side * min(width, height) / min(view.width, view.height))
        image = self._split.decode(draw.image, at_least=at_least)
        on_decoded = _on_decoded(view, image.size, (width, height), int(self._split.index.orientations[draw.image]))
        rows = table.rows(draw.image)
        usable = ~table.crowd[rows]
        boxes, kept = view_boxes(table.boxes[rows][usable], view)
        return to_square(image, draw.side, on_decoded), boxes, table.labels[rows][usable][kept], draw.image


def _on_decoded(view: View, decoded: tuple[int, int], whole: tuple[int, int], orientation: int) -> View:
    """A window of the whole image (width, height in pixels) in pixels of its scaled decode.

    That shrinks by a whole number, and its last row and column reach beyond the image where its sides are no
    multiples; turned upright, they may be the first ones.
    """
    shrink = round(whole[0] / decoded[0])
    return View(
        view.left / shrink + (decoded[0] - whole[0] / shrink if orientation in REVERSES_X else 0.0),
        view.top / shrink + (decoded[1] - whole[1] / shrink if orientation in REVERSES_Y else 0.0),
        view.width / shrink,
        view.height / shrink,
        view.flip,
    )


class EvalImages(Dataset[Any]):
    """Images as evaluation, prediction and parity see them."""

    def __init__(self, split: PreparedSplit, resolution: int) -> None:
        self._split, self._resolution = split, resolution

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, image: int) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int64], int]:
        table = self._split.table
        rows = table.rows(image)
        usable = ~table.crowd[rows]
        whole = View(0.0, 0.0, float(table.widths[image]), float(table.heights[image]), flip=False)
        boxes, kept = view_boxes(table.boxes[rows][usable], whole)
        pixels = to_square(self._split.decode(image), self._resolution)
        return pixels, boxes, table.labels[rows][usable][kept], image


def collate(
    items: Sequence[tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int64], int]],
) -> Batch:
    """Stack pixels to (B, 3, S, S) and pack boxes."""
    pixels, boxes, labels, images = zip(*items, strict=True)
    return Batch(
        pixels=torch.from_numpy(np.ascontiguousarray(np.stack(pixels).transpose(0, 3, 1, 2))),
        boxes=torch.from_numpy(np.concatenate(boxes)),
        labels=torch.from_numpy(np.concatenate(labels)),
        counts=tuple(len(b) for b in boxes),
        images=tuple(images),
    )


class EpochSampler(Sampler[list[Draw]]):
    """The batches of one epoch, in an order that depends only on (seed, epoch) (training spec 4.5).

    The set is padded to whole optimizer steps with images drawn once, so that no partial accumulation window
    exists; a set smaller than five steps is drawn with replacement. All batches of one optimizer step share a
    side, drawn from `scales` by the number of that step (training spec 3.2).
    """

    def __init__(
        self, images: int, *, batch_size: int, grad_accum_steps: int, seed: int, scales: Sequence[int]
    ) -> None:
        self._images, self._batch_size, self._accum = images, batch_size, grad_accum_steps
        self._seed, self._scales = seed, list(scales)
        self.steps_per_epoch = max(MIN_STEPS_PER_EPOCH, math.ceil(images / (batch_size * grad_accum_steps)))
        self._epoch, self._first_step = 0, 0

    def start(self, epoch: int, step: int = 0) -> None:
        """The next iteration gives the batches of `epoch` from optimizer step `step` on."""
        self._epoch, self._first_step = epoch, step

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The images of an epoch, in order."""
        wanted = self.steps_per_epoch * self._batch_size * self._accum
        rng = np.random.default_rng([self._seed, epoch])
        if self._images < MIN_STEPS_PER_EPOCH * self._batch_size * self._accum:
            return rng.integers(self._images, size=wanted)
        padding = np.random.default_rng(0).integers(self._images, size=wanted - self._images)
        return rng.permutation(np.concatenate([np.arange(self._images), padding]))

    def __iter__(self) -> Iterator[list[Draw]]:
        order = self.order(self._epoch).reshape(self.steps_per_epoch, self._accum, self._batch_size)
        for step in range(self._first_step, self.steps_per_epoch):
            side = random.Random(self._epoch * self.steps_per_epoch + step).choice(self._scales)
            for images in order[step]:
                yield [Draw(int(image), self._epoch, side) for image in images]

    def __len__(self) -> int:
        return (self.steps_per_epoch - self._first_step) * self._accum


@dataclass(frozen=True)
class LoaderSettings:
    """How a DataLoader works; None as in the training spec 1.2 (seed document, Data loading)."""

    num_workers: int
    pin_memory: bool | None
    persistent_workers: bool | None
    prefetch_factor: int | None

    def __post_init__(self) -> None:
        if self.num_workers == 0:
            for name, given in (
                ("persistent_workers", self.persistent_workers),
                ("prefetch_factor", self.prefetch_factor),
            ):
                if given:
                    warnings.warn(f"{name}={given} is ignored: there are no workers (num_workers=0)", stacklevel=3)

    def keywords(self, device: torch.device) -> dict[str, Any]:
        """Arguments for DataLoader."""
        workers = self.num_workers > 0
        return {
            "num_workers": self.num_workers,
            "pin_memory": device.type == "cuda" if self.pin_memory is None else self.pin_memory,
            "persistent_workers": workers and self.persistent_workers is not False,
            "prefetch_factor": (self.prefetch_factor or 2) if workers else None,
            "collate_fn": collate,
            "worker_init_fn": _one_thread,
        }


def _one_thread(_: int) -> None:
    # A worker that spins up OpenMP threads takes them from the training process.
    torch.set_num_threads(1)


def train_loader(
    split: PreparedSplit,
    sampler: EpochSampler,
    settings: LoaderSettings,
    device: torch.device,
    *,
    seed: int,
    scale_jitter: bool,
    flip: bool,
) -> DataLoader[Any]:
    """Augmented batches in the sampler's order."""
    images = TrainImages(split, seed=seed, scale_jitter=scale_jitter, flip=flip)
    return DataLoader(images, batch_sampler=sampler, **settings.keywords(device))


def eval_loader(
    split: PreparedSplit, settings: LoaderSettings, device: torch.device, *, resolution: int, batch_size: int
) -> DataLoader[Any]:
    """Every image once, in the table's order."""
    return DataLoader(EvalImages(split, resolution), batch_size=batch_size, **settings.keywords(device))
