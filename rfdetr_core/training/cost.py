"""What a training will take: time, device-hours, and money where a price is known. Arithmetic on measured steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rfdetr_core.config import TrainConfig
from rfdetr_core.data.sampling import MIN_STEPS_PER_EPOCH
from rfdetr_core.training.worst_case import DatasetFacts


@dataclass(frozen=True)
class Cost:
    """An estimate from the times of steps and evaluation batches alone.

    Loading that is slower than the device, checkpoints and start-up come on top; early stopping may end sooner.
    """

    devices: int
    seconds_per_optimizer_step: float  # the mean over the training scales
    steps_per_epoch: int
    seconds_per_epoch: float  # of training steps
    seconds_per_evaluation: float  # of the validation split
    hours: float  # all epochs, with evaluation
    device_hours: float
    price_per_hour: float | None
    price: float | None
    max_hours: float | None
    epochs_within_max_hours: int | None  # those that end, or are under way, when the budget is over

    @property
    def fits(self) -> bool:
        """Whether all of it fits into `train.max_hours`."""
        return self.max_hours is None or self.hours <= self.max_hours


def estimate(
    train: TrainConfig,
    facts: DatasetFacts,
    *,
    effective_batch: int,
    devices: int,
    step_seconds: float,
    eval_seconds_per_image: float,
    price_per_hour: float | None,
) -> Cost:
    """Add up epochs, evaluations and the final test.

    Args:
        effective_batch: images per optimizer step, of all devices.
        step_seconds: of an optimizer step, the mean over the training scales.
        eval_seconds_per_image: on one device, by all models that training evaluates.
        price_per_hour: of one device.
    """
    steps = max(MIN_STEPS_PER_EPOCH, math.ceil(facts.train_images / effective_batch))
    epoch = steps * step_seconds
    evaluation = facts.valid_images * eval_seconds_per_image / devices
    every = evaluation / min(train.eval_interval, train.epochs)
    test = facts.test_images * eval_seconds_per_image / devices if train.run_test else 0.0
    evaluations = math.ceil(train.epochs / train.eval_interval)
    hours = (train.epochs * epoch + evaluations * evaluation + test) / 3600
    within = None
    if train.max_hours is not None:
        within = max(1, min(train.epochs, math.ceil(3600 * train.max_hours / max(1e-9, epoch + every))))
    return Cost(
        devices=devices,
        seconds_per_optimizer_step=step_seconds,
        steps_per_epoch=steps,
        seconds_per_epoch=epoch,
        seconds_per_evaluation=evaluation,
        hours=hours,
        device_hours=hours * devices,
        price_per_hour=price_per_hour,
        price=None if price_per_hour is None else hours * devices * price_per_hour,
        max_hours=train.max_hours,
        epochs_within_max_hours=within,
    )
