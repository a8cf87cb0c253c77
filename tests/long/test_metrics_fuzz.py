"""COCO metrics held to pycocotools on hundreds of random problems; the fast share is in tests/evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.evaluation.helpers import random_problem
from tests.evaluation.test_metrics import assert_equal

PROBLEMS, PARTS = 600, 20
LIMITS = (1, 3, 10, 50, 100, 300, 500, 700)


def problem(seed: int) -> tuple[Any, int]:
    """From one image with one class to a dozen of both; without crowds or half of them; up to 1,500 detections."""
    random = np.random.default_rng(seed)
    shape = {
        "images": int(random.integers(1, 13)),
        "labels": int(random.integers(1, 13)),
        "detections": int(random.choice([1, 20, 100, 400, 1500], p=[0.1, 0.2, 0.3, 0.3, 0.1])),
        "crowd": float(random.choice([0.0, 0.1, 0.5])),
    }
    return random_problem(seed, **shape), int(random.choice(LIMITS))


@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
def test_six_hundred_random_problems(part: int) -> None:
    for seed in range(1000 + part, 1000 + PROBLEMS, PARTS):
        drawn, limit = problem(seed)
        try:
            assert_equal(drawn, limit)
        except AssertionError as error:
            raise AssertionError(f"problem {seed}, {limit} detections: {error}") from error


def test_the_problems_cover_what_they_should() -> None:
    """Crowds, empty images, ties, areas of exactly a border, more than 500 detections of one image and class."""
    seen = dict.fromkeys(("crowds", "no crowd", "empty image", "ties", "border", "over 500", "limits"), 0)
    limits = set()
    for seed in range(1000, 1000 + PROBLEMS):
        (table, class_map, detections), limit = problem(seed)
        limits.add(limit)
        seen["crowds"] += bool(table.crowd.any())
        seen["no crowd"] += not table.crowd.any()
        seen["empty image"] += bool((table.counts == 0).any())
        seen["ties"] += len(np.unique(detections.scores)) < len(detections.scores)
        seen["border"] += bool(np.isin(table.areas, [32.0**2, 96.0**2]).any())
        seen["over 500"] += bool(np.bincount(detections.images * len(class_map) + detections.labels).max() > 500)
    seen["limits"] = len(limits)
    assert limits == set(LIMITS)
    assert all(count >= 5 for count in seen.values()), seen
