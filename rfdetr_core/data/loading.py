"""Batches for training and evaluation.

Order and augmentation depend only on (seed, epoch, index): not on the number of workers, not on where a run
was interrupted. Pixels travel as uint8 and boxes as one packed array per batch. An error of ours in a worker
arrives in the training process as the same exception, in one line: torch itself would send its traceback as text.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rfdetr_core.config.augment import AugConfig, parse_augmentations
from rfdetr_core.data.augment import augment
from rfdetr_core.data.decoding import decode_for_training
from rfdetr_core.data.images import REVERSES_X, REVERSES_Y, decode_image, why_unreadable
from rfdetr_core.data.prepared import PreparedSplit
from rfdetr_core.data.sampling import Draw as Draw
from rfdetr_core.data.sampling import EpochSampler as EpochSampler
from rfdetr_core.data.transforms import (
    View,
    aspect_size,
    draw_view,
    normalise,
    resample,
    to_square,
    view_boxes,
    whole_pixels,
)
from rfdetr_core.errors import DatasetError, RFDETRError, TransientError

Decoded = TypeVar("Decoded")


class Item(NamedTuple):
    """One image on its way into a batch."""

    pixels: NDArray[np.uint8]  # (H, W, C)
    boxes: NDArray[np.float32]  # (n, 4) cx cy w h in [0, 1] of these pixels
    labels: NDArray[np.int64]  # (n,)
    image: int  # position in the split's table
    skipped: tuple[int, ...] = ()  # positions of unreadable images in whose place this one stands


@dataclass(frozen=True)
class Batch:
    """B images and the N boxes of all of them, packed.

    Where images differ in size they stand at the top left, the rest is padding; boxes are relative to the image
    itself, not to the padded extent (model spec 4.1).
    """

    pixels: Tensor  # (B, C, H, W) uint8
    boxes: Tensor  # (N, 4) float32, cx cy w h in [0, 1]
    labels: Tensor  # (N,) int64
    counts: tuple[int, ...]  # boxes of each image
    images: tuple[int, ...]  # positions in the split's table
    sizes: tuple[tuple[int, int], ...] | None = None  # height, width of each image; None: nothing is padded
    skipped: tuple[int, ...] = ()  # positions of unreadable images that others stand in for

    @property
    def mask(self) -> Tensor | None:
        """(B, H, W) bool, True on padding; None when nothing is padded. On the host."""
        return self.mask_on(torch.device("cpu"))

    def mask_on(self, device: torch.device) -> Tensor | None:
        """`mask`, made on the device: only the sizes travel."""
        if self.sizes is None:
            return None
        height, width = self.pixels.shape[-2:]
        heights, widths = torch.tensor(self.sizes, device=device).T  # (B,) each
        below = torch.arange(height, device=device) >= heights[:, None]  # (B, H)
        right = torch.arange(width, device=device) >= widths[:, None]  # (B, W)
        padding: Tensor = below[:, :, None] | right[:, None, :]
        return padding

    def pin_memory(self) -> Batch:
        """Called by the data loader: page-locked tensors, for asynchronous copies to a GPU."""
        pinned = {name: getattr(self, name).pin_memory() for name in ("pixels", "boxes", "labels")}
        return replace(self, **pinned)

    def on(self, device: torch.device) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """The network's input (B, C, H, W) float32, 0 on padding, and one target dict (labels, boxes) per image."""
        pixels = normalise(self.pixels.to(device, non_blocking=True))
        mask = self.mask_on(device)
        if mask is not None:
            pixels.masked_fill_(mask[:, None], 0.0)
        boxes = torch.split(self.boxes.to(device, non_blocking=True), list(self.counts))
        labels = torch.split(self.labels.to(device, non_blocking=True), list(self.counts))
        return pixels, [{"labels": n, "boxes": b} for n, b in zip(labels, boxes, strict=True)]


class _Images(Dataset[Any]):
    """Decoding with errors for people; `__getitem__` raises them, the data loader gets them as a value."""

    def __init__(self, split: PreparedSplit, purpose: str, channels: int) -> None:
        self._split, self._purpose, self._channels = split, purpose, channels

    def __getitems__(self, keys: Sequence[Any]) -> list[Item] | RFDETRError:
        """What a DataLoader asks for: the items of a batch, or why there are none (see `BatchLoader`)."""
        try:
            return [self[key] for key in keys]
        except RFDETRError as error:
            return error

    def _decoded(self, image: int, decode: Callable[[bytes, int], Decoded]) -> Decoded | str:
        """One image, upright; or why it cannot be read. A damaged shard is an error in itself."""
        data = self._split.read_bytes(image)
        try:
            return decode(data, int(self._split.index.orientations[image]))
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders let a broken file raise whatever it leads them to
            return why_unreadable(error, data)

    def _unreadable(self, image: int, reason: str, advice: str = "") -> DatasetError:
        name, total = self._split.table.file_names[image], len(self._split)
        return DatasetError(
            f"{self._purpose} image {name} (number {image + 1} of {total}) cannot be read: {reason}",
            hint=f"mend or remove it in the source and prepare the dataset again{advice}",
        )

    def _targets(self, image: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Boxes (n, 4) x1, y1, x2, y2 in pixels and labels (n,); crowd regions are no targets."""
        table = self._split.table
        rows = table.rows(image)
        usable = ~table.crowd[rows]
        return table.boxes[rows][usable], table.labels[rows][usable]


class TrainImages(_Images):
    """Augmented training images (training spec 3.3 and 3.5).

    Args:
        flip: mirror half of them; for `aug_config: null`, which is nothing but that.
        aug_config: augmentations in the vocabulary of `rfdetr_core.config.augment`, after the resize.
        square: resample to a square; otherwise the shorter side becomes the drawn one, of at most 1333 px.
        skip_corrupt: unreadable images that one item may pass over, taking others in their place.
        channels: 1 reads them as grey, 3 as RGB, 4 as RGBA.
    """

    def __init__(
        self,
        split: PreparedSplit,
        *,
        seed: int,
        scale_jitter: bool,
        flip: bool,
        aug_config: AugConfig | None = None,
        square: bool = True,
        skip_corrupt: int = 0,
        channels: int = 3,
    ) -> None:
        super().__init__(split, "training", channels)
        self._seed, self._scale_jitter, self._flip = seed, scale_jitter, flip
        self._augmentations = parse_augmentations(aug_config)
        self._square, self._skip_corrupt = square, skip_corrupt

    def __getitem__(self, draw: Draw) -> Item:
        found = self._view(draw)
        if isinstance(found, Item):
            return found
        # Who stands in depends on what is asked for and on nothing else, so a resumed run meets the same images.
        others = np.random.default_rng([self._seed, draw.epoch, draw.image, 1])
        skipped = [draw.image]
        while len(skipped) <= self._skip_corrupt and len(skipped) < len(self._split):
            other = int(others.integers(len(self._split)))
            if other in skipped:
                continue
            instead = self._view(draw._replace(image=other))
            if isinstance(instead, Item):
                return instead._replace(skipped=tuple(skipped))
            skipped.append(other)
        allowed = f", or allow more than train.skip_corrupt: {self._skip_corrupt}"
        raise self._unreadable(draw.image, found, allowed)

    def _view(self, draw: Draw) -> Item | str:
        """The image as it is seen in this epoch, or why it cannot be read."""
        rng = np.random.default_rng([self._seed, draw.epoch, draw.image])
        table = self._split.table
        width, height = int(table.widths[draw.image]), int(table.heights[draw.image])
        view = draw_view(rng, width, height, scale_jitter=self._scale_jitter, flip=self._flip)
        size = (draw.side, draw.side) if self._square else aspect_size(view, draw.side)
        # The window ends at `size` pixels: decode no more than what the resampling can use.
        shrink = max(size[0] / view.width, size[1] / view.height)
        needed = math.ceil(shrink * min(width, height))
        decode = partial(decode_for_training, at_least=needed, channels=self._channels)
        decoded = self._decoded(draw.image, decode)
        if isinstance(decoded, str):
            return decoded
        boxes, labels = self._targets(draw.image)
        orientation = int(self._split.index.orientations[draw.image])
        window, boxes = _on_decoded(view, boxes, (decoded.shape[1], decoded.shape[0]), (width, height), orientation)
        unit_boxes, kept = view_boxes(boxes, window)
        pixels, labels = resample(decoded, size, window), labels[kept]
        if self._augmentations:
            pixels, unit_boxes, kept = augment(pixels, unit_boxes, self._augmentations, rng)
            labels = labels[kept]
        return Item(pixels, unit_boxes, labels, draw.image)


def _on_decoded(
    view: View, boxes: NDArray[np.float64], decoded: tuple[int, int], whole: tuple[int, int], orientation: int
) -> tuple[View, NDArray[np.float64]]:
    """A window of the whole image and boxes in it, in pixels of its scaled decode (sizes are width and height).

    That shrinks by a whole number, and its last row and column reach beyond the image where its sides are no
    multiples; turned upright, they may be the first ones. The window becomes whole pixels of the decode.
    """
    shrink = round(whole[0] / decoded[0])
    right = decoded[0] - whole[0] / shrink if orientation in REVERSES_X else 0.0
    down = decoded[1] - whole[1] / shrink if orientation in REVERSES_Y else 0.0
    window = view._replace(
        left=view.left / shrink + right,
        top=view.top / shrink + down,
        width=view.width / shrink,
        height=view.height / shrink,
    )
    return whole_pixels(window, decoded), boxes / shrink + [right, down, right, down]


class EvalImages(_Images):
    """Images as evaluation, prediction and parity see them: the whole image, to the square."""

    def __init__(self, split: PreparedSplit, resolution: int, channels: int = 3) -> None:
        super().__init__(split, "evaluation", channels)
        self._resolution = resolution

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, image: int) -> Item:
        decoded = self._decoded(image, partial(decode_image, channels=self._channels))
        if isinstance(decoded, str):
            raise self._unreadable(image, decoded)
        table = self._split.table
        boxes, labels = self._targets(image)
        whole = View(0.0, 0.0, float(table.widths[image]), float(table.heights[image]), flip=False)
        unit_boxes, kept = view_boxes(boxes, whole)
        return Item(to_square(decoded, self._resolution), unit_boxes, labels[kept], image)


def collate(items: Sequence[Item], multiple: int = 1) -> Batch:
    """Pack items to a batch whose sides are multiples of `multiple` pixels."""
    sizes = tuple(item.pixels.shape[:2] for item in items)
    height, width = (math.ceil(max(side) / multiple) * multiple for side in zip(*sizes, strict=True))
    padded = any(size != (height, width) for size in sizes)
    shape = (len(items), items[0].pixels.shape[2], height, width)
    pixels = (np.zeros if padded else np.empty)(shape, dtype=np.uint8)
    for target, item, (h, w) in zip(pixels, items, sizes, strict=True):
        target[:, :h, :w] = item.pixels.transpose(2, 0, 1)
    return Batch(
        pixels=torch.from_numpy(pixels),
        boxes=torch.from_numpy(np.concatenate([item.boxes for item in items])),
        labels=torch.from_numpy(np.concatenate([item.labels for item in items])),
        counts=tuple(len(item.boxes) for item in items),
        images=tuple(item.image for item in items),
        sizes=sizes if padded else None,
        skipped=tuple(sorted({image for item in items for image in item.skipped})),
    )


def _collate_or_pass(items: Sequence[Item] | RFDETRError, multiple: int) -> Batch | RFDETRError:
    return items if isinstance(items, RFDETRError) else collate(items, multiple)


class BatchLoader(DataLoader[Any]):
    """A DataLoader that raises the error of ours that a worker met, as it was raised there."""

    def __iter__(self) -> Any:
        return _raising(super().__iter__(), self.num_workers)


def _raising(batches: Iterator[Batch | RFDETRError], workers: int) -> Iterator[Batch]:
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:
            # A batch of a worker that died meanwhile cannot be fetched; what it raised itself is marked by torch.
            gone = isinstance(error, ConnectionError | EOFError | FileNotFoundError)
            if workers and gone and not str(error).startswith("Caught "):
                # torch's handler of that death raises as well, once, wherever the program is by then: here.
                with suppress(RuntimeError):
                    time.sleep(1.0)
                raise _worker_died(error) from error
            # Without torch's frames, one of which holds the error: a circle would keep the loader until the garbage
            # collector comes, and workers that are stopped by that do not hear of it: it waits five seconds for each.
            error.__traceback__ = None
            raise
        if isinstance(batch, RFDETRError):
            try:
                raise batch
            finally:
                del batch  # no circle here either
        yield batch


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

    def keywords(self, device: torch.device, multiple: int = 1) -> dict[str, Any]:
        """Arguments for DataLoader; `multiple` as in `collate`."""
        workers = self.num_workers > 0
        return {
            "num_workers": self.num_workers,
            "pin_memory": device.type == "cuda" if self.pin_memory is None else self.pin_memory,
            "persistent_workers": workers and self.persistent_workers is not False,
            "prefetch_factor": (self.prefetch_factor or 2) if workers else None,
            "collate_fn": partial(_collate_or_pass, multiple=multiple),
            "worker_init_fn": _apart,
        }


def _apart(_: int) -> None:
    # A worker that spins up OpenMP threads takes them from the training process.
    torch.set_num_threads(1)
    # A signal to the whole process group (Ctrl-C, a launcher that ends) is for the training process: it still needs
    # its workers until the next safe point, and they end with it.
    os.setpgrp()


@contextmanager
def worker_errors() -> Iterator[None]:
    """Say what became of a loading process that died. torch raises that anywhere in the training process.

    Raises:
        TransientError: it was killed: by whoever was short of memory, most of the time.
        DatasetError: the shared memory, through which batches travel, is full.
    """
    try:
        yield
    except RuntimeError as error:
        if any(sign in str(error) for sign in _NO_SHARED_MEMORY):
            raise DatasetError(
                "the shared memory of the loading processes is full (/dev/shm)",
                hint="give the pod a larger /dev/shm, or lower train.num_workers or train.prefetch_factor",
            ) from error
        if is_worker_death(error):
            raise _worker_died(error) from error
        raise


def is_worker_death(error: RuntimeError) -> bool:
    """Whether it is torch's report of a loading process that is gone; it may interrupt anything."""
    return str(error).startswith("DataLoader worker (pid")


def _worker_died(error: Exception) -> TransientError:
    return TransientError(
        f"a loading process died: {' '.join(str(error).split())}",
        hint="most often for want of memory: give the pod more, or lower train.num_workers; "
        "the same command continues from the last checkpoint",
    )


_NO_SHARED_MEMORY = ("unable to write to file </torch_", "Bus error", "out of shared memory")


def train_loader(
    split: PreparedSplit,
    sampler: EpochSampler,
    settings: LoaderSettings,
    device: torch.device,
    *,
    seed: int,
    scale_jitter: bool,
    flip: bool,
    aug_config: AugConfig | None = None,
    square: bool = True,
    multiple: int = 1,
    skip_corrupt: int = 0,
    channels: int = 3,
) -> DataLoader[Any]:
    """Augmented batches in the sampler's order; see `TrainImages`.

    Args:
        multiple: sides of a batch are multiples of so many pixels: patch size x windows of the detector.

    Raises:
        DatasetError: from the iteration: an image that cannot be read.
    """
    images = TrainImages(
        split,
        seed=seed,
        scale_jitter=scale_jitter,
        flip=flip,
        aug_config=aug_config,
        square=square,
        skip_corrupt=skip_corrupt,
        channels=channels,
    )
    return BatchLoader(images, batch_sampler=sampler, **settings.keywords(device, multiple))


def eval_loader(
    split: PreparedSplit,
    settings: LoaderSettings,
    device: torch.device,
    *,
    resolution: int,
    batch_size: int,
    channels: int = 3,
) -> DataLoader[Any]:
    """Every image once, in the table's order.

    Raises:
        DatasetError: from the iteration: an image that cannot be read.
    """
    images = EvalImages(split, resolution, channels)
    return BatchLoader(images, batch_size=batch_size, **settings.keywords(device))
