"""Early stopping against the series of the training spec (5.4, 12.22 to 12.25)."""

from __future__ import annotations

import math

import pytest

from rfdetr_core.training.early_stopping import EarlyStopping, monitored_value


def evaluations_until_stop(values: list[float], *, patience: int, min_delta: float = 0.001) -> int | None:
    """How many values are fed until it says stop; None if it never does."""
    stopping = EarlyStopping(patience, min_delta)
    return next((i for i, value in enumerate(values, 1) if stopping.should_stop(value)), None)


@pytest.mark.parametrize(("patience", "evaluations"), [(3, 4), (1, 2)])
def test_a_constant_stops_after_patience(patience: int, evaluations: int) -> None:
    assert evaluations_until_stop([0.1] * 9, patience=patience) == evaluations


def test_zeros_stop_too() -> None:
    assert evaluations_until_stop([0.0] * 9, patience=3) == 4


def test_small_gains_do_not_raise_the_best_but_add_up() -> None:
    assert evaluations_until_stop([0.100, 0.1005, 0.1009, 0.2], patience=2) == 3
    assert evaluations_until_stop([0.100, 0.1005, 0.1011, 0.1012, 0.1013], patience=2) == 5
    assert evaluations_until_stop([0.100, 0.1005, 0.1009], patience=2, min_delta=0.0001) is None


def test_exactly_min_delta_is_no_improvement() -> None:
    assert evaluations_until_stop([0.5, 0.625], patience=1, min_delta=0.125) == 2
    assert evaluations_until_stop([0.5, 0.6250001], patience=1, min_delta=0.125) is None


def test_improvement_starts_the_wait_anew() -> None:
    assert evaluations_until_stop([0.1, 0.1, 0.2, 0.2, 0.2], patience=2) == 5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_stops_at_once(value: float) -> None:
    assert evaluations_until_stop([0.1, value], patience=9) == 2


@pytest.mark.parametrize(
    ("raw", "ema", "use_ema", "evaluations"),
    [
        ([0.1, 0.2, 0.3, 0.4], [0.5] * 4, True, 3),
        ([0.1, 0.2, 0.3, 0.4], [0.5] * 4, False, 3),
        ([0.1, 0.6, 0.7, 0.8], [0.5] * 4, True, 3),
        ([0.1, 0.6, 0.7, 0.8], [0.5] * 4, False, None),
    ],
)
def test_which_value_is_watched(raw: list[float], ema: list[float], use_ema: bool, evaluations: int | None) -> None:
    values = [monitored_value(r, e, use_ema=use_ema) for r, e in zip(raw, ema, strict=True)]
    assert evaluations_until_stop(values, patience=2) == evaluations


def test_what_is_absent_is_not_watched() -> None:
    assert monitored_value(0.2, None, use_ema=True) == 0.2
    assert monitored_value(None, 0.3, use_ema=False) == 0.3
    with pytest.raises(ValueError, match="empty"):
        monitored_value(None, None, use_ema=False)
