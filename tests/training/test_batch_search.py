"""The search for a batch as a pure function: measurements in, the next step or the choice out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfdetr_core.training.batch_search import (
    LARGEST_BATCH,
    Attempt,
    Bound,
    Found,
    accumulation,
    bound,
    choose,
    fit,
    next_batch,
    with_headroom,
)

ANY = Bound(LARGEST_BATCH, "limit")


def measured(*pairs: tuple[int, int | None], seconds: float = 1.0) -> list[Attempt]:
    """Attempts of so many images with such peaks, a second for each image."""
    return [Attempt(n, None if peak is None else seconds * n, peak) for n, peak in pairs]


@pytest.mark.parametrize(
    ("batch_size", "target", "accum"), [(6, 16, 3), (16, 16, 1), (40, 16, 1), (1, 16, 16), (5, 16, 4), (8, 16, 2)]
)
def test_accumulation_reaches_the_target(batch_size: int, target: int, accum: int) -> None:
    assert accumulation(batch_size, target) == accum


@pytest.mark.parametrize(
    ("headroom", "use_ema", "expected"),
    [(0.5, True, 10), (0.5, False, 20), (1.0, True, 20), (0.7, True, 14), (0.01, True, 1)],
)
def test_headroom_scales_the_safe_batch_with_ema_only(headroom: float, use_ema: bool, expected: int) -> None:
    assert with_headroom(20, headroom, use_ema=use_ema) == expected


@pytest.mark.parametrize(
    ("images", "target", "expected"),
    [
        (1000, 16, Bound(16, "target")),
        (5, 16, Bound(5, "images")),
        (1000, None, Bound(1000, "images")),
        (10**6, None, Bound(4096, "limit")),
        (0, None, Bound(1, "images")),
    ],
)
def test_the_smallest_bound_holds(images: int, target: int | None, expected: Bound) -> None:
    assert bound(images=images, target=target) == expected


@pytest.mark.parametrize(
    ("attempts", "expected"),
    [
        ((), 1),
        (((1, 110),), 2),
        (((1, 110), (2, 120)), 4),
        (((1, 110), (2, 120), (4, 140)), 16),
        (((1, 110), (2, 120), (4, 140), (16, 260)), 64),
        (((1, 110), (2, 120), (4, 140), (16, 260), (64, 740)), 89),  # where the line meets 999, and not 256
        (((1, 110), (2, 120), (4, 140), (16, 260), (64, 740), (89, 990)), Found(89, "memory")),
        (((1, 110), (2, 120), (4, 140), (16, 260), (64, 740), (89, None)), 76),  # the line was wrong: halfway
        (((1, 110), (2, 120), (4, 140), (16, 260), (64, 740), (89, None), (76, None)), 70),
        (((1, None),), Found(0, "memory")),
        (((1, 1000),), Found(0, "memory")),  # it ended, and beyond the limit
        (((1, 600), (2, 1100)), Found(1, "memory")),
        (((1, 500), (2, 900)), Found(2, "memory")),
    ],
)
def test_the_next_step(attempts: tuple[tuple[int, int | None], ...], expected: int | Found) -> None:
    assert next_batch(measured(*attempts), limit=999, upper=ANY) == expected


@pytest.mark.parametrize(
    ("seconds_left", "expected"), [(100.0, 16), (12.5, 12), (4.9, Found(4, "time")), (0.0, Found(4, "time"))]
)
def test_a_step_that_would_take_too_long_is_made_smaller_or_not_at_all(
    seconds_left: float, expected: int | Found
) -> None:
    attempts = measured((1, 110), (2, 120), (4, 140))
    assert next_batch(attempts, limit=10**6, upper=ANY, seconds_left=seconds_left) == expected


def test_a_bound_is_reached_and_named() -> None:
    upper = Bound(6, "target")
    assert next_batch(measured((1, 110), (2, 120), (4, 140)), limit=999, upper=upper) == 6
    assert next_batch(measured((1, 110), (4, 140), (6, 160)), limit=999, upper=upper) == Found(6, "target")


@pytest.mark.parametrize(
    ("found", "headroom", "use_ema", "expected"),
    [
        (Found(20, "memory"), 0.7, True, 14),
        (Found(20, "memory"), 0.7, False, 20),
        (Found(16, "target"), 0.7, True, 16),  # memory holds 90, and 63 of them are allowed
        (Found(80, "target"), 0.7, True, 62),
        (Found(1, "memory"), 0.7, True, 1),
    ],
)
def test_the_choice_respects_the_headroom(found: Found, headroom: float, use_ema: bool, expected: int) -> None:
    attempts = measured((1, 110), (2, 120))  # 100 and 10 for each image: 89 within 999
    assert choose(attempts, found, limit=999, headroom=headroom, use_ema=use_ema) == expected


def test_a_prediction_leaves_out_what_it_predicts() -> None:
    attempts = measured((1, 110), (2, 120), (16, 300), (8, None))
    full, without = fit(attempts), fit(attempts, without=16)
    assert full is not None and full.peak(16) == 300
    assert without is not None and without.peak(16) == 260
    assert fit(attempts[:1]) is None


def test_sizes_close_to_each_other_give_no_slope() -> None:
    """A CPU's heap: the second step of nearly the same size took more."""
    attempts = measured((16, 139), (32, 197), (30, 198))
    line = fit(attempts)
    assert line is not None and line.bytes_per_image == pytest.approx(58 / 16)
    assert next_batch(attempts, limit=190, upper=ANY) == 23


def searched(fixed: int, each: int, limit: int, upper: Bound, memory: int) -> tuple[list[Attempt], Found]:
    """A whole search where n images take fixed + n * each bytes, and a step beyond `memory` fails."""
    attempts: list[Attempt] = []
    while True:
        step = next_batch(attempts, limit=limit, upper=upper)
        if isinstance(step, Found):
            return attempts, step
        assert 1 <= step <= upper.batch_size and step not in {one.batch_size for one in attempts}
        peak = fixed + step * each
        attempts.append(Attempt(step, step * 0.01, peak if peak <= memory else None))


@given(
    fixed=st.integers(0, 10**10),
    each=st.integers(1, 10**9),
    limit=st.integers(0, 10**11),
    images=st.integers(1, 6000),
)
def test_the_search_is_never_above_the_limit_and_ends_near_it(fixed: int, each: int, limit: int, images: int) -> None:
    upper = bound(images=images, target=None)
    attempts, found = searched(fixed, each, limit, upper, memory=round(limit / 0.95))
    largest = max(0, min((limit - fixed) // each, upper.batch_size))
    assert 0.95 * largest - 1 < found.safe <= largest
    assert len(attempts) <= 10  # few are needed
    assert (found.stopped_by == "memory") is (found.safe < upper.batch_size)


@given(fixed=st.integers(0, 10**6), each=st.integers(1, 10**5), limits=st.lists(st.integers(0, 10**7), min_size=2))
def test_of_the_same_measurements_a_higher_limit_chooses_no_smaller_batch(
    fixed: int, each: int, limits: list[int]
) -> None:
    attempts = measured(*((n, fixed + n * each) for n in (1, 2, 4, 8, 16)))
    chosen = []
    for limit in sorted(limits):
        step = next_batch(attempts, limit=limit, upper=Bound(16, "target"))
        found = step if isinstance(step, Found) else Found(max(a.batch_size for a in attempts if a.fits(limit)), "time")
        chosen.append(choose(attempts, found, limit=limit, headroom=0.7, use_ema=True) if found.safe else 0)
        assert found.safe == 0 or fixed + chosen[-1] * each <= limit
    assert chosen == sorted(chosen)


def test_a_line_that_bends_upwards_is_bisected() -> None:
    """Memory that grows faster than the batch, as attention over all tokens does."""
    attempts: list[Attempt] = []
    while True:
        step = next_batch(attempts, limit=10_000, upper=ANY)
        if isinstance(step, Found):
            break
        peak = 100 + step * step
        attempts.append(Attempt(step, 1.0, peak if peak <= 10_500 else None))
    assert 94 <= step.safe <= 99
