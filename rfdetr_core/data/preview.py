"""Pictures of what the detector sees: batches as grids of images with their boxes and class names.

They are made from a loader's own dataset and sampler, in this process: no worker is started, no random number of
the training is drawn, and the same images come again when training asks for them.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader

from rfdetr_core.data.loading import Batch, collate
from rfdetr_core.errors import StorageAccessError

_SIDE = 3  # images in a row and in a column
_CELL = 320  # pixels
_BATCHES = 3
_QUALITY = 90


def write_dataset_grids(folder: Path, split: str, loader: DataLoader[Any], class_names: Sequence[str]) -> list[Path]:
    """`<split>_batch<i>_grid.jpg` of the first three batches (training spec 1.2), the first nine images of each.

    Raises:
        DatasetError: an image cannot be read.
        StorageAccessError: the folder cannot be written.
    """
    paths = []
    for i, batch in enumerate(_first_batches(loader)):
        paths.append(folder / f"{split}_batch{i}_grid.jpg")
        _save(grid(batch, class_names), paths[-1])
    return paths


def write_augmentation_preview(path: Path, loader: DataLoader[Any], class_names: Sequence[str]) -> None:
    """The first nine images of a training, in one picture.

    Raises:
        DatasetError: an image cannot be read.
        StorageAccessError: the file cannot be written.
    """
    dataset: Any = loader.dataset
    keys = [key for batch in islice(_keys(loader), _SIDE * _SIDE) for key in batch]
    _save(grid(collate([dataset[key] for key in keys[: _SIDE * _SIDE]]), class_names), path)


def grid(batch: Batch, class_names: Sequence[str]) -> Image.Image:
    """The first nine images of a batch, each fitted to a square cell, with their boxes and names."""
    sheet = Image.new("RGB", (_SIDE * _CELL, _SIDE * _CELL), (32, 32, 32))
    starts = np.cumsum([0, *batch.counts])
    for i in range(min(_SIDE * _SIDE, len(batch.counts))):
        height, width = batch.sizes[i] if batch.sizes else batch.pixels.shape[-2:]
        pixels = batch.pixels[i, :3, :height, :width].expand(
            3, -1, -1
        )  # grey becomes RGB, a fourth channel is not seen
        image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        scale = _CELL / max(image.size)
        image = image.resize((max(1, round(width * scale)), max(1, round(height * scale))))
        rows = slice(starts[i], starts[i + 1])
        _draw_boxes(image, batch.boxes[rows].numpy(), batch.labels[rows].tolist(), class_names)
        sheet.paste(image, (i % _SIDE * _CELL, i // _SIDE * _CELL))
    return sheet


def _draw_boxes(
    image: Image.Image, boxes: np.ndarray[Any, Any], labels: Sequence[int], class_names: Sequence[str]
) -> None:
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    for (cx, cy, w, h), label in zip(boxes * np.array([*image.size, *image.size]), labels, strict=True):
        corners = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
        draw.rectangle(corners, outline=_colour(label), width=2)
        # Above the box, or just inside where there is no room.
        anchor = (corners[0], corners[1] - 14 if corners[1] >= 14 else corners[1])
        draw.rectangle(draw.textbbox(anchor, class_names[label], font=font), fill=_colour(label))
        draw.text(anchor, class_names[label], fill=(0, 0, 0), font=font)


def _colour(label: int) -> tuple[int, int, int]:
    """Light colours that neighbouring labels do not share: hues by the golden ratio."""
    red, green, blue = (round(255 * v) for v in colorsys.hsv_to_rgb(label * 0.618 % 1, 0.7, 1.0))
    return red, green, blue


def _keys(loader: DataLoader[Any]) -> Iterator[list[Any]]:
    """What the loader asks its dataset for, batch by batch."""
    sampler: Any = loader.batch_sampler
    return iter(sampler)


def _first_batches(loader: DataLoader[Any]) -> Iterator[Batch]:
    dataset: Any = loader.dataset
    return (collate([dataset[key] for key in keys[: _SIDE * _SIDE]]) for keys in islice(_keys(loader), _BATCHES))


def _save(sheet: Image.Image, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path, "JPEG", quality=_QUALITY)
    except OSError as error:
        raise StorageAccessError(
            f"{path}: cannot be written: {error.strerror or error}", hint="check the folder and its free space"
        ) from error
