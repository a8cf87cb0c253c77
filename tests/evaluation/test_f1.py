"""The F1 sweep, held to a slow count and to pycocotools' own matching."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rfdetr_core.data.annotations import AnnotationTable
from rfdetr_core.evaluation import matching as module
from rfdetr_core.evaluation.detections import Detections
from rfdetr_core.evaluation.f1 import THRESHOLDS, f1_sweep
from rfdetr_core.evaluation.metrics import coco_metrics
from tests.evaluation.helpers import classes, detections_of, pycocotools, random_problem, table_of

A = (0.0, 0.0, 10.0, 10.0)
B = (100.0, 100.0, 110.0, 110.0)
C = (200.0, 200.0, 210.0, 210.0)


def overlap(found: Any, truth: Any, crowd: bool) -> float:
    width = min(found[2], truth[2]) - max(found[0], truth[0])
    height = min(found[3], truth[3]) - max(found[1], truth[1])
    if width <= 0 or height <= 0:
        return 0.0
    area = (found[2] - found[0]) * (found[3] - found[1])
    other = (truth[2] - truth[0]) * (truth[3] - truth[1])
    return float(width * height / (area if crowd else area + other - width * height))


def slowly(table: AnnotationTable, count: int, detections: Detections, max_dets: int) -> Any:
    """True and false positives at every threshold, (C, 101) each: one loop inside the other, matched anew each time."""
    true, false = np.zeros((count, 101)), np.zeros((count, 101))
    for t, threshold in enumerate(THRESHOLDS):
        for image in range(len(table)):
            for label in range(count):
                here = (detections.images == image) & (detections.labels == label)
                best = sorted(np.flatnonzero(here), key=lambda i: -detections.scores[i])[:max_dets]  # stable
                rows = [r for r in range(table.offsets[image], table.offsets[image + 1]) if table.labels[r] == label]
                free = [r for r in rows if not table.crowd[r]]
                crowds = [r for r in rows if table.crowd[r]]
                for box in (detections.boxes[i] for i in best if detections.scores[i] >= threshold):
                    overlaps = {r: overlap(box, table.boxes[r], False) for r in free}
                    if max(overlaps.values(), default=0.0) >= 0.5:
                        free.remove(max(reversed(free), key=overlaps.__getitem__))  # of equal ones the last
                        true[label, t] += 1
                    elif not any(overlap(box, table.boxes[r], True) >= 0.5 for r in crowds):
                        false[label, t] += 1
    return true, false


def by_hand(true: Any, false: Any, boxes: Any) -> tuple[Any, Any, Any]:
    """Precision, recall, F1; 0 / 0 is 0."""
    shape = true.shape
    precision, recall, f1 = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for c in range(shape[0]):
        for t in range(shape[1]):
            found, wanted = true[c, t] + false[c, t], boxes[c]
            precision[c, t] = true[c, t] / found if found else 0.0
            recall[c, t] = true[c, t] / wanted if wanted else 0.0
            both = precision[c, t] + recall[c, t]
            f1[c, t] = 2 * precision[c, t] * recall[c, t] / both if both else 0.0
    return precision, recall, f1


@pytest.mark.parametrize(("seed", "max_dets"), [(0, 100), (1, 100), (2, 3), (3, 1), (4, 500)])
def test_the_sweep_is_the_slow_count(seed: int, max_dets: int) -> None:
    table, class_map, detections = random_problem(seed, images=3, labels=3, detections=40, crowd=0.2)
    found = f1_sweep(table, len(class_map), detections, max_dets=max_dets)
    boxes = np.bincount(table.labels[~table.crowd], minlength=len(class_map))
    true, false = slowly(table, len(class_map), detections, max_dets)
    precision, recall, f1 = by_hand(true, false, boxes)
    assert true.max() > 0 and false.max() > 0
    assert found.precision == pytest.approx(precision, abs=1e-12)
    assert found.recall == pytest.approx(recall, abs=1e-12)
    assert found.f1 == pytest.approx(f1, abs=1e-12)
    assert found.defined.tolist() == (boxes > 0).tolist()

    best = found.best()
    macro = f1[boxes > 0].mean(axis=0)
    at = next(t for t in range(101) if macro[t] >= macro.max() - 1e-15)
    assert best["f1"] == pytest.approx(macro.max()) and best["f1_threshold"] == THRESHOLDS[at]
    assert best["precision"] == pytest.approx(precision[boxes > 0, at].mean())
    assert best["recall"] == pytest.approx(recall[boxes > 0, at].mean())


@pytest.mark.parametrize("seed", range(10))
def test_matching_is_that_of_pycocotools_at_half_overlap(seed: int) -> None:
    """Its record of every image and class: scores of the detections, which matched, which are ignored."""
    table, class_map, detections = random_problem(seed, detections=300, crowd=0.25)
    max_dets = (100, 5)[seed % 2]
    evaluation = pycocotools(table, class_map, detections, [max_dets])
    everything = evaluation.params.areaRng[0]
    true, false = np.zeros((len(class_map), 101)), np.zeros((len(class_map), 101))
    for record in evaluation.evalImgs:
        if record is None or record["aRng"] != everything:
            continue
        matched, ignored = record["dtMatches"][0] > 0, record["dtIgnore"][0].astype(bool)
        for score, hit, skip in zip(record["dtScores"], matched, ignored, strict=True):
            reached = score >= THRESHOLDS
            label = record["category_id"] - 1
            true[label, reached] += hit and not skip
            false[label, reached] += not hit and not skip
    boxes = np.bincount(table.labels[~table.crowd], minlength=len(class_map))
    precision, recall, f1 = by_hand(true, false, boxes)
    found = f1_sweep(table, len(class_map), detections, max_dets=max_dets)
    assert found.precision == pytest.approx(precision, abs=1e-12)
    assert found.recall == pytest.approx(recall, abs=1e-12)
    assert found.f1 == pytest.approx(f1, abs=1e-12)


def test_a_case_counted_by_hand() -> None:
    """Class 0: two boxes, found at 0.9 and 0.4, a false one at 0.6. Class 1: one box, found at 0.4."""
    table = table_of(2, [(0, 0, A, False), (0, 0, B, False), (1, 1, C, False)])
    detections = detections_of([(0, 0, 0.4, B), (0, 0, 0.9, A), (0, 0, 0.6, C), (1, 1, 0.4, C)])
    found = coco_metrics(table, classes(3), detections, max_dets=100)
    # up to 0.40 all count: class 0 P 2/3, R 1, F1 0.8; class 1 all 1. Above it class 1 has nothing.
    assert (found.f1, found.f1_threshold) == (pytest.approx(0.9), 0.0)
    assert (found.precision, found.recall) == (pytest.approx(5 / 6), 1.0)
    assert found.per_class["class 0"]["f1"] == pytest.approx(0.8)
    assert (found.per_class["class 1"]["f1"], found.per_class["class 1"]["f1_threshold"]) == (1.0, 0.0)
    assert found.per_class["class 2"]["f1"] == found.per_class["class 2"]["f1_threshold"] == -1.0


def test_the_macro_threshold_and_a_class_s_own_differ() -> None:
    """Class 0 is best from 0.61 on, class 1 up to 0.30: the mean has to choose."""
    table = table_of(2, [(0, 0, A, False), (1, 1, B, False)])
    wrong = [(0, 0, 0.6, C)] * 3
    detections = detections_of([(0, 0, 0.9, A), *wrong, (1, 1, 0.3, B)])
    found = coco_metrics(table, classes(2), detections, max_dets=100)
    assert found.per_class["class 0"]["f1_threshold"] == pytest.approx(0.61)
    assert found.per_class["class 1"]["f1_threshold"] == 0.0
    assert found.f1_threshold == 0.0 and found.f1 == pytest.approx((0.4 + 1) / 2)


def test_a_score_of_exactly_a_threshold_counts() -> None:
    for hundredths in (0, 7, 29, 57, 58, 100):
        score = hundredths / 100
        table = table_of(1, [(0, 0, A, False)])
        found = f1_sweep(table, 1, detections_of([(0, 0, score, A)]), max_dets=100)
        assert found.recall[0].tolist() == [1.0] * (hundredths + 1) + [0.0] * (100 - hundredths)


def test_crowds_absorb_what_finds_no_box() -> None:
    crowd = (0.0, 0.0, 100.0, 100.0)
    table = table_of(1, [(0, 0, A, False), (0, 0, crowd, True)])
    detections = detections_of([(0, 0, 0.9, A), (0, 0, 0.8, (50.0, 50.0, 60.0, 60.0)), (0, 0, 0.7, C)])
    found = f1_sweep(table, 1, detections, max_dets=100)
    assert found.precision[0, 0] == 0.5  # A right, C wrong, the one in the crowd neither
    assert found.recall[0, 0] == 1.0


def test_nothing_to_count() -> None:
    nothing = Detections.concatenate([])
    undefined = f1_sweep(table_of(1, []), 2, detections_of([(0, 0, 0.5, A)]), max_dets=10)
    assert undefined.best() == {"f1": -1.0, "f1_threshold": -1.0, "precision": -1.0, "recall": -1.0}
    missed = f1_sweep(table_of(1, [(0, 0, A, False)]), 1, nothing, max_dets=10)
    assert missed.best() == {"f1": 0.0, "f1_threshold": 0.0, "precision": 0.0, "recall": 0.0}
    assert f1_sweep(table_of(0, []), 1, nothing, max_dets=10).f1.shape == (1, 101)


def test_many_pairs_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    table, class_map, detections = random_problem(5, detections=200)
    whole = f1_sweep(table, len(class_map), detections, max_dets=100)
    calls: list[int] = []
    overlaps = module._overlap

    def counted(found: Any, *others: Any) -> Any:
        calls.append(len(found))
        return overlaps(found, *others)

    monkeypatch.setattr(module, "_overlap", counted)
    monkeypatch.setattr(module, "PAIRS_AT_ONCE", 50)
    parts = f1_sweep(table, len(class_map), detections, max_dets=100)
    assert len(calls) > 3 and max(calls) < 100
    assert np.array_equal(parts.f1, whole.f1)
