"""Whether a difference is luck: the bootstrap, held to one that resamples the table and evaluates it anew."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rfdetr_core.data.annotations import AnnotationTable
from rfdetr_core.evaluation.bootstrap import Sampler
from rfdetr_core.evaluation.comparison import compare
from rfdetr_core.evaluation.detections import Detections
from rfdetr_core.evaluation.metrics import coco_metrics
from tests.evaluation.helpers import classes, detections_of, random_problem, table_of

NAMES = ("map", "map50", "map75", "mar", "f1")


def compared(
    table: AnnotationTable,
    class_map: Any,
    ours: Detections,
    theirs: Detections,
    samples: int,
    *,
    limit: int = 100,
    seed: int = 0,
) -> Any:
    candidate, champion = (coco_metrics(table, class_map, found, max_dets=limit) for found in (ours, theirs))
    return compare(table, (candidate, ours), (champion, theirs), samples=samples, seed=seed)


def worse(detections: Detections, pixels: float) -> Detections:
    """The same detections, shifted."""
    return replace(detections, boxes=detections.boxes + pixels)


def problem(images: int = 30) -> Any:
    return random_problem(8, images=images, labels=3, detections=500, crowd=0.05)


def test_the_differences_are_those_of_the_metrics() -> None:
    table, class_map, ours = problem()
    for limit in (3, 100, 500):
        theirs = worse(ours, 5)
        found = compared(table, class_map, ours, theirs, 20, limit=limit)
        a, b = (coco_metrics(table, class_map, detections, max_dets=limit) for detections in (ours, theirs))
        for name in NAMES:
            row = found["metrics"][name]
            assert (row["candidate"], row["champion"]) == (getattr(a, name), getattr(b, name))
            assert row["difference"] == row["candidate"] - row["champion"]
            assert row["low"] - 0.2 < row["difference"] < row["high"] + 0.2
        ap, champion_ap = (metrics.per_class["class 0"]["ap"] for metrics in (a, b))
        assert found["per_class"]["class 0"]["difference"] == ap - champion_ap
        assert found["per_class"]["class 2"] is None  # it has no boxes
    assert json.loads(json.dumps(found)) == found


def test_a_model_is_not_better_than_itself() -> None:
    table, class_map, ours = problem()
    for row in compared(table, class_map, ours, ours, 50)["metrics"].values():
        assert (row["difference"], row["low"], row["high"], row["standard_error"], row["p_value"]) == (0, 0, 0, 0, 1)


def test_a_gain_on_every_image_is_no_luck_and_the_loss_of_it_neither() -> None:
    rows = [(i, i % 2, (10, 10, 60, 60), False) for i in range(40)]
    table, class_map = table_of(40, rows), classes(2)
    right = detections_of([(i, label, 0.9, box) for i, label, box, _ in rows])
    flat = detections_of([(i, label, 0.9, (10, 10, 60, 32)) for i, label, _, _ in rows])
    better = compared(table, class_map, right, flat, 200)["metrics"]
    lost = compared(table, class_map, flat, right, 200)["metrics"]
    for name in NAMES:
        assert better[name]["p_value"] == 1 / 201 and better[name]["low"] > 0.9, name
        assert lost[name]["p_value"] == 1.0 and lost[name]["high"] < -0.9, name


def test_the_same_draws_every_time_and_other_ones_with_another_seed() -> None:
    table, class_map, ours = problem()
    runs = [compared(table, class_map, ours, worse(ours, 3), 50, seed=seed)["metrics"] for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert all(runs[0][name]["standard_error"] != runs[2][name]["standard_error"] for name in NAMES)


def test_without_draws_nothing_is_said_about_luck() -> None:
    table, class_map, ours = problem()
    found = compared(table, class_map, ours, worse(ours, 3), 0)
    assert found["samples"] == 0
    for row in found["metrics"].values():
        assert row["difference"] is not None
        assert {row[key] for key in ("low", "high", "standard_error", "p_value")} == {None}


def resampled(table: AnnotationTable, detections: Detections, images: Any) -> tuple[AnnotationTable, Detections]:
    """The split in which these images stand, as often as they are drawn."""
    parts = []
    for position, image in enumerate(images):
        part = detections.select(detections.images == image)
        parts.append(replace(part, images=np.full(len(part.scores), position, dtype=np.int64)))
    return table.select(images), Detections.concatenate(parts)


def test_the_spread_is_that_of_evaluating_drawn_images_anew() -> None:
    table, class_map, ours = problem(20)
    theirs = worse(ours, 3)
    random = np.random.default_rng(5)
    differences: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(150):
        images = random.integers(0, len(table), len(table))
        pair = [coco_metrics(*_problem(table, found, images, class_map), max_dets=100) for found in (ours, theirs)]
        for name in NAMES:
            differences[name].append(getattr(pair[0], name) - getattr(pair[1], name))
    found = compared(table, class_map, ours, theirs, 1000)["metrics"]
    for name in NAMES:
        slow = np.array(differences[name])
        assert found[name]["standard_error"] == pytest.approx(slow.std(), rel=0.25), name
        assert found[name]["p_value"] == pytest.approx((slow <= 0).mean(), abs=0.1), name
        low, high = np.quantile(slow, [0.025, 0.975])
        assert found[name]["low"] == pytest.approx(low, abs=0.6 * slow.std()), name
        assert found[name]["high"] == pytest.approx(high, abs=0.6 * slow.std()), name


def _problem(table: AnnotationTable, found: Detections, images: Any, class_map: Any) -> Any:
    drawn, detections = resampled(table, found, images)
    return drawn, class_map, detections


@pytest.mark.parametrize("seed", range(12))
def test_a_sample_scores_what_an_evaluation_of_its_images_does(seed: int) -> None:
    """Each image once: to rounding. Drawn with replacement: likewise, where no scores are equal."""
    table, class_map, detections = random_problem(seed, images=12, detections=300)
    limit = (500, 100, 7, 1)[seed % 4]
    random = np.random.default_rng(seed)
    untied = replace(detections, scores=random.permutation(300) / 300)
    once, drawn = np.arange(len(table)), random.integers(0, len(table), len(table))
    for images, found_there in ((once, detections), (drawn, untied)):
        sampler = Sampler(table, len(class_map), found_there, max_dets=limit)
        found = sampler.scores(np.bincount(images, minlength=len(table)))
        expected = coco_metrics(*_problem(table, found_there, images, class_map), max_dets=limit)
        assert found == pytest.approx({name: getattr(expected, name) for name in NAMES}, abs=1e-9)


def test_a_sample_without_boxes_has_no_scores() -> None:
    table = table_of(2, [(0, 0, (0, 0, 9, 9), False)])
    sampler = Sampler(table, 1, detections_of([(0, 0, 0.9, (0, 0, 9, 9))]), max_dets=100)
    assert set(sampler.scores(np.array([0, 2])).values()) == {-1.0}
    assert sampler.scores(np.array([2, 0])) == pytest.approx(dict.fromkeys(NAMES, 1.0))
