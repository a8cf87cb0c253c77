"""A dataset of drawn images and a detector small enough to train in a second."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rfdetr_core.config import ModelConfig, TrainConfig
from rfdetr_core.data.findings import Report
from rfdetr_core.data.formats.coco import read_coco_folder
from rfdetr_core.data.loading import Batch
from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.data.preparing import PrepareOptions, write_prepared
from rfdetr_core.data.sample import write_sample_dataset
from rfdetr_core.data.validation import validate
from rfdetr_core.training.loop import TrainingJob

MODEL: dict[str, Any] = {
    "variant": "pico",
    "resolution": 32,
    "hidden_dim": 32,
    "dim_feedforward": 32,
    "out_feature_indexes": (1, 2),
    "num_queries": 8,
    "num_select": 8,
    "group_detr": 2,
    "num_classes": 3,
}
TRAIN: dict[str, Any] = {
    "epochs": 2,
    "seed": 7,
    "multi_scale": "off",
    "num_workers": 0,
    "log_per_class_metrics": False,
    "compute_val_loss": False,
    "tensorboard": False,
    "accelerator": "cpu",
}
WALL_CLOCK = re.compile(r"images_per_second$|seconds/|position\.seconds$")


def model_config(**fields: Any) -> ModelConfig:
    return ModelConfig.parse({**MODEL, **fields})


def train_config(**fields: Any) -> TrainConfig:
    return TrainConfig.parse({**TRAIN, **fields})


def draw(folder: Path, *, train: int = 10, valid: int = 4, test: int = 4) -> Path:
    """A COCO folder of drawn images."""
    write_sample_dataset(folder, train=train, valid=valid, test=test, size=64, max_objects=3)
    return folder


def prepare(source: Path, folder: Path) -> PreparedDataset:
    class_map, splits = validate(read_coco_folder(source), Report())
    write_prepared(folder, class_map, splits, PrepareOptions(train_short_side=None), source=str(source))
    return PreparedDataset(folder)


def damaged(dataset: PreparedDataset, folder: Path, *images: int) -> tuple[PreparedDataset, list[str]]:
    """A copy whose training images at these positions cannot be read, and their names."""
    copy = PreparedDataset(shutil.copytree(dataset.folder, folder))
    split = copy.split("train")
    for image in images:
        with (copy.folder / "train" / split.index.shards[0]).open("r+b") as file:
            file.seek(int(split.index.offsets[image]))
            file.write(bytes(int(split.index.lengths[image])))
    return copy, [str(split.table.file_names[image]) for image in images]


def job(dataset: PreparedDataset, folder: Path, *, batch: int = 2, accum: int = 1, **train: Any) -> TrainingJob:
    """Five optimizer steps an epoch, with ten images, whatever batch and accum."""
    return TrainingJob(
        model=model_config(),
        train=train_config(**train),
        dataset=dataset,
        checkpoints=folder,
        output=folder,
        batch_size=batch,
        grad_accum_steps=accum,
        inputs="same",
    )


def batch(seed: int, boxes: tuple[int, ...] = (2, 1), side: int = 32) -> Batch:
    """Random pixels, with so many random boxes in each image."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(boxes)
    centres = torch.rand((total, 2), generator=generator) * 0.6 + 0.2
    extents = torch.rand((total, 2), generator=generator) * 0.3 + 0.1
    return Batch(
        pixels=torch.randint(0, 256, (len(boxes), 3, side, side), dtype=torch.uint8, generator=generator),
        boxes=torch.cat([centres, extents], dim=1),
        labels=torch.randint(0, 3, (total,), generator=generator),
        counts=boxes,
        images=tuple(range(len(boxes))),
    )


def flat(content: Any, path: str = "") -> dict[str, Any]:
    """Nested dicts and lists as one dict of dotted names, to compare checkpoints leaf by leaf."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else None
    if items is None:
        return {path: content}
    return {name: leaf for key, value in items for name, leaf in flat(value, f"{path}.{key}".lstrip(".")).items()}


def differing(a: Any, b: Any) -> list[str]:
    """Dotted names of what is not the same, bit for bit, in two nested structures; wall-clock numbers aside."""
    left, right = flat(a), flat(b)
    names = sorted(name for name in left.keys() | right.keys() if not WALL_CLOCK.search(name))
    return [name for name in names if name not in left or name not in right or not _same(left[name], right[name])]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)
