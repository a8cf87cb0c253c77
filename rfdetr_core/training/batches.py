"""The batches of a training: its loaders, pictures of what they give, and unreadable images."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from rfdetr_core.config import TrainConfig
from rfdetr_core.data.loading import Batch, BatchLoader, EpochSampler, EvalImages, LoaderSettings, train_loader
from rfdetr_core.data.prepared import PreparedSplit
from rfdetr_core.data.preview import write_augmentation_preview, write_dataset_grids
from rfdetr_core.errors import DatasetError
from rfdetr_core.training.clock import Clock
from rfdetr_core.training.distributed import ShareOfBatches, World
from rfdetr_core.training.engine import Engine
from rfdetr_core.training.state import Position, TrainingJob

AUGMENTATION_PREVIEW = "augmentation.jpg"
"""Augmented training images with their boxes."""

log = logging.getLogger(__name__)


def build_loaders(
    job: TrainingJob, engine: Engine, sampler: EpochSampler, train: PreparedSplit, valid: PreparedSplit, seed: int
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Training batches in the sampler's order, and every validation image once."""
    config = job.train
    train_batches = train_loader(
        train,
        sampler,
        _loader_settings(config),
        engine.device,
        seed=seed,
        scale_jitter=config.scale_jitter,
        flip=config.aug_config is None,
        aug_config=config.aug_config,
        square=config.square_resize_div_64,
        multiple=job.model.block,
        skip_corrupt=config.skip_corrupt,
        channels=job.model.num_channels,
    )
    train_batches.generator = torch.Generator()
    return train_batches, split_loader(job, engine, valid)


def split_loader(job: TrainingJob, engine: Engine, split: PreparedSplit) -> DataLoader[Any]:
    """Every image of a split once; of several ranks, each has a share of the batches."""
    size = job.train.eval_batch_size or job.batch_size
    batches = BatchLoader(
        EvalImages(split, job.model.resolution, job.model.num_channels),
        batch_sampler=ShareOfBatches(len(split), size, engine.world),
        **_loader_settings(job.train).keywords(engine.device),
    )
    # A loader draws a number whenever it begins. From torch's own stream, which drop path reads on a CPU, a resumed
    # epoch would draw once more than an uninterrupted one.
    batches.generator = torch.Generator()
    return batches


def _loader_settings(config: TrainConfig) -> LoaderSettings:
    return LoaderSettings(config.num_workers, config.pin_memory, config.persistent_workers, config.prefetch_factor)


def write_previews(
    job: TrainingJob, sampler: EpochSampler, train_batches: DataLoader[Any], valid_batches: DataLoader[Any]
) -> None:
    """Pictures of what the detector is going to see."""
    names = job.dataset.class_map.names
    sampler.start(0)
    write_augmentation_preview(job.output / AUGMENTATION_PREVIEW, train_batches, names)
    if job.train.save_dataset_grids:
        for split, batches in (("train", train_batches), ("val", valid_batches)):
            write_dataset_grids(job.output / "dataset_grids", split, batches, names)


def windows(loader: DataLoader[Any], accum: int, clock: Clock) -> Iterator[list[Batch]]:
    """Groups of `accum` micro-batches: what one optimizer step consumes."""
    batches = iter(loader)
    while True:
        with clock.running("data_wait"):
            window = list(islice(batches, accum))
        if not window:
            return
        yield window


def count_skipped(position: Position, window: Sequence[Batch], split: PreparedSplit, limit: int, world: World) -> None:
    """Note the unreadable images of a window, each once.

    Raises:
        DatasetError: there are more than `train.skip_corrupt` allows.
    """
    met = {image for batch in window for image in batch.skipped}
    if limit:  # else none is skipped
        met = set(world.union(met))
    for image in sorted(met - set(position.skipped)):
        position.skipped.append(image)
        name, count = split.table.file_names[image], len(position.skipped)
        log.warning("image %s cannot be read and is left out: %d of train.skip_corrupt: %d", name, count, limit)
    if len(position.skipped) > limit:
        names = ", ".join(str(split.table.file_names[image]) for image in position.skipped[:8])
        raise DatasetError(
            f"{len(position.skipped)} training images cannot be read, train.skip_corrupt allows {limit}: {names}",
            hint="mend or remove them in the source and prepare the dataset again",
        )
