"""The estimate: arithmetic that a person can redo."""

from __future__ import annotations

from typing import Any

import pytest

from rfdetr_core.training.cost import Cost, estimate
from tests.training import tiny
from tests.training.test_worst_case import facts


def cost(*, devices: int = 1, price: float | None = None, effective: int = 16, **train: Any) -> Cost:
    return estimate(
        tiny.train_config(**{"epochs": 10, **train}),
        facts(train_images=1600, valid_images=200, test_images=100),
        effective_batch=effective,
        devices=devices,
        step_seconds=2.0,
        eval_seconds_per_image=0.1,
        price_per_hour=price,
    )


def test_epochs_and_evaluations_add_up() -> None:
    found = cost()
    assert (found.steps_per_epoch, found.seconds_per_epoch, found.seconds_per_evaluation) == (100, 200.0, 20.0)
    assert found.hours == pytest.approx(10 * (200 + 20) / 3600)
    assert (found.price, found.fits, found.epochs_within_max_hours) == (None, True, None)


@pytest.mark.parametrize(("interval", "evaluations"), [(1, 10), (3, 4), (10, 1), (99, 1)])
def test_the_last_epoch_is_evaluated_whatever_the_interval(interval: int, evaluations: int) -> None:
    assert cost(eval_interval=interval).hours == pytest.approx((10 * 200 + evaluations * 20) / 3600)


def test_the_final_test_counts() -> None:
    assert cost(run_test=True).hours - cost().hours == pytest.approx(10 / 3600)


@pytest.mark.parametrize(("price", "devices", "expected"), [(3.0, 1, 3.0), (3.0, 4, 12.0), (0.0, 1, 0.0)])
def test_the_price_is_that_of_all_devices(price: float, devices: int, expected: float) -> None:
    found = cost(price=price, devices=devices)
    assert found.device_hours == pytest.approx(devices * found.hours)
    assert found.price == pytest.approx(expected * found.hours)


def test_several_devices_share_the_evaluation() -> None:
    assert cost(devices=4).seconds_per_evaluation == 5.0


@pytest.mark.parameter("max_hours")
@pytest.mark.parametrize(
    ("max_hours", "fits", "epochs"), [(0.7, True, 10), (0.3, False, 5), (0.01, False, 1), (None, True, None)]
)
def test_a_budget_that_will_not_do_is_known(max_hours: float | None, fits: bool, epochs: int | None) -> None:
    found = cost(max_hours=max_hours)  # 0.61 hours, 220 s an epoch
    assert (found.fits, found.epochs_within_max_hours) == (fits, epochs)


def test_a_tiny_dataset_makes_five_steps() -> None:
    assert cost(effective=1600).steps_per_epoch == 5
