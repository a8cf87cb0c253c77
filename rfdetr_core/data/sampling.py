"""Which training images are seen, in which order and at which sides."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

MIN_STEPS_PER_EPOCH = 5  # a tiny dataset is sampled with replacement up to this (training spec 4.5)


class Draw(NamedTuple):
    """What a worker is asked for: which image, in which epoch, at which side in pixels."""

    image: int
    epoch: int
    side: int


class EpochSampler(Sampler[list[Draw]]):
    """The batches of one epoch, in an order that depends only on (seed, epoch) (training spec 4.5).

    The set is padded to whole optimizer steps with images drawn once, so that no partial accumulation window
    exists; a set smaller than five steps is drawn with replacement. All batches of one optimizer step share a
    side, drawn from `scales` by the number of that step; with `per_sample`, each image has its own (training
    spec 3.2).
    """

    def __init__(
        self,
        images: int,
        *,
        batch_size: int,
        grad_accum_steps: int,
        seed: int,
        scales: Sequence[int],
        per_sample: bool = False,
    ) -> None:
        self._images, self._batch_size, self._accum = images, batch_size, grad_accum_steps
        self._seed, self._scales, self._per_sample = seed, list(scales), per_sample
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

    def sides(self, epoch: int) -> NDArray[np.int64]:
        """The side in pixels of every image of an epoch, in order."""
        window = self._accum * self._batch_size
        if self._per_sample:
            rng = np.random.default_rng([self._seed, epoch, 1])
            return rng.choice(np.array(self._scales, dtype=np.int64), size=self.steps_per_epoch * window)
        first = epoch * self.steps_per_epoch
        steps = [random.Random(first + step).choice(self._scales) for step in range(self.steps_per_epoch)]
        return np.repeat(np.array(steps, dtype=np.int64), window)

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch, first = self._epoch, self._first_step * self._accum
        batches = (-1, self._batch_size)
        images, sides = self.order(epoch).reshape(batches), self.sides(epoch).reshape(batches)
        for batch in zip(images[first:].tolist(), sides[first:].tolist(), strict=True):
            yield [Draw(image, epoch, side) for image, side in zip(*batch, strict=True)]

    def __len__(self) -> int:
        return (self.steps_per_epoch - self._first_step) * self._accum
