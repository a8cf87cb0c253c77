"""What a model gets wrong: outcomes, confusion and kinds of errors, held to slow counts and to cases made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rfdetr_core.data.annotations import AnnotationTable
from rfdetr_core.evaluation.analysis import BACKGROUND, OTHERS, condensed, confusion, error_analysis, outcome
from rfdetr_core.evaluation.detections import Detections
from rfdetr_core.evaluation.metrics import coco_metrics
from tests.evaluation.helpers import classes, detections_of, random_problem, table_of
from tests.evaluation.test_f1 import overlap, slowly

A, B = (0, 0, 100, 100), (200, 200, 300, 300)
NOTHING = Detections.concatenate([])


def seen_at(table: AnnotationTable, count: int, detections: Detections, score: float = 0.5) -> Any:
    return outcome(table, count, detections, score=score, max_dets=100)


@pytest.mark.parametrize("seed", range(4))
def test_an_outcome_counts_what_the_f1_sweep_counts(seed: int) -> None:
    table, class_map, detections = random_problem(seed)
    true, false = slowly(table, len(class_map), detections, 100)
    for step in (0, 30, 75):
        seen = seen_at(table, len(class_map), detections, step / 100)
        assert int(seen.hit.sum()) == true[:, step].sum()
        assert int((~seen.hit).sum()) == false[:, step].sum()
        assert int(seen.missed.sum()) == (~table.crowd).sum() - true[:, step].sum()
        assert seen.wrong.sum() == (~seen.hit).sum() + seen.missed.sum()
        assert not (seen.missed & table.crowd).any()


def test_images_are_ranked_by_their_f1() -> None:
    rows = [(i, 0, A, False) for i in (0, 1, 3)] + [(3, 0, B, False), (4, 0, A, False)]
    found = [(0, 0, 0.9, A), (1, 0, 0.4, A), (3, 0, 0.9, A), (4, 0, 0.9, A), (4, 0, 0.9, B), (4, 0, 0.8, B)]
    seen = seen_at(table_of(5, rows), 1, detections_of(found))
    assert seen.f1 == pytest.approx([1, 0, 1, 2 / 3, 1 / 2])  # image 2 has nothing, and nothing is found in it
    assert seen.wrong.tolist() == [0, 1, 0, 1, 2]
    assert seen.worst(2).tolist() == [1, 4] and seen.best(2).tolist() == [0, 2]
    assert sorted([*seen.worst(99), *seen.best(99)]) == [0, 1, 2, 3, 4]  # no image is shown twice
    assert len(seen_at(table_of(1, []), 1, NOTHING).best(3)) == 0


# ---- confusion --------------------------------------------------------------------------------------------


def confused(table: AnnotationTable, count: int, detections: Detections, score: float) -> Any:
    """One loop inside the other: the surest first, each takes the free box of largest overlap of whatever class."""
    matrix = np.zeros((count + 1, count + 1), dtype=int)
    for image in range(len(table)):
        rows = table.rows(image)
        boxes, labels = table.boxes[rows][~table.crowd[rows]], table.labels[rows][~table.crowd[rows]]
        free = np.ones(len(boxes), dtype=bool)
        mine = np.flatnonzero((detections.images == image) & (detections.scores >= score))
        for d in mine[np.argsort(-detections.scores[mine], kind="stable")]:
            overlaps = [overlap(detections.boxes[d], box, False) for box in boxes] * free
            best = int(np.argmax(overlaps)) if len(overlaps) else -1
            if best >= 0 and overlaps[best] >= 0.5:
                free[best] = False
                matrix[labels[best], detections.labels[d]] += 1
            else:
                matrix[count, detections.labels[d]] += 1
        np.add.at(matrix, (labels[free], count), 1)
    return matrix


@pytest.mark.parametrize("seed", range(6))
def test_confusion_is_the_slow_count(seed: int) -> None:
    table, class_map, detections = random_problem(seed, crowd=0.0, detections=300)
    scores = np.random.default_rng(seed).permutation(len(detections.scores)) / 300
    detections = Detections(detections.images, detections.labels, scores, detections.boxes)
    found = confusion(table, class_map, seen_at(table, len(class_map), detections, 0.4))
    assert found["matrix"] == confused(table, len(class_map), detections, 0.4).tolist()
    assert found["classes"] == [*class_map.names, BACKGROUND]
    assert (found["iou"], found["score"]) == (0.5, 0.4)
    assert np.sum(found["matrix"]) > 40 and np.trace(found["matrix"]) > 0


def test_what_lies_in_a_crowd_is_not_taken_for_background() -> None:
    table = table_of(1, [(0, 0, A, True), (0, 0, B, False)])
    detections = detections_of([(0, 0, 0.9, (10, 10, 40, 40)), (0, 1, 0.8, (10, 10, 40, 40)), (0, 0, 0.7, B)])
    found = confusion(table, classes(2), seen_at(table, 2, detections))
    assert found["matrix"] == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]  # a crowd absorbs its own class only


def test_confusion_of_nothing() -> None:
    table = table_of(2, [(0, 1, A, False)])
    assert confusion(table, classes(2), seen_at(table, 2, NOTHING))["matrix"] == [[0, 0, 0], [0, 0, 1], [0, 0, 0]]


def test_a_large_matrix_is_condensed_without_losing_a_count() -> None:
    random = np.random.default_rng(0)
    matrix = random.integers(0, 50, (8, 8))
    matrix[2] = matrix[:, 2] = matrix[5] = matrix[:, 5] = 0
    matrix[2, 5] = 3
    names = [*"abcdefg", BACKGROUND]
    document = {"classes": names, "matrix": matrix.tolist()}
    assert condensed(document, 7) == (names, matrix.tolist())
    kept, small = condensed(document, 6)
    assert kept == ["a", "b", "d", "e", "g", OTHERS, BACKGROUND]
    assert np.sum(small) == matrix.sum() and small[5][5] == 3
    assert [row[-1] for row in small] == [*matrix[[0, 1, 3, 4, 6], 7].tolist(), 0, matrix[7, 7]]
    assert small[0][:5] == matrix[0, [0, 1, 3, 4, 6]].tolist()


# ---- kinds of errors --------------------------------------------------------------------------------------

LOW = (0, 0, 100, 30)  # overlaps A by 0.3


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("classification", (0, 1, 0.9, A)),
        ("localisation", (0, 0, 0.9, LOW)),
        ("both", (0, 1, 0.9, LOW)),
        ("background", (0, 0, 0.9, (400, 400, 450, 450))),
        ("duplicate", (0, 0, 0.8, A)),
    ],
)
def test_each_kind_of_error_is_told_apart(kind: str, found: Any) -> None:
    right = [(0, 0, 0.85, A)] if kind == "duplicate" else []
    table = table_of(2, [(0, 0, A, False), (1, 1, B, False)])
    errors = error_analysis(table, classes(2), detections_of([found, *right]), max_dets=100)
    counts = errors["counts"]
    assert {name for name, n in counts.items() if n} == {kind, "missed"}
    assert counts[kind] == 1


def test_what_an_error_costs_is_the_ap_that_mending_it_brings() -> None:
    table = table_of(2, [(0, 0, A, False), (1, 0, B, False)])
    found = [(0, 0, 0.9, A), (1, 0, 0.8, (200, 200, 300, 230))]  # the second is right, and too flat
    detections = detections_of(found)
    errors = error_analysis(table, classes(1), detections, max_dets=100)
    before = coco_metrics(table, classes(1), detections, max_dets=100).map50
    mended = detections_of([found[0], (1, 0, 0.8, B)])
    after = coco_metrics(table, classes(1), mended, max_dets=100).map50
    assert errors["delta_ap50"]["localisation"] == pytest.approx(after - before) and after - before > 0.4
    assert errors["counts"] == {**dict.fromkeys(errors["counts"], 0), "localisation": 1}


def test_errors_are_counted_up_to_the_limit_of_detections() -> None:
    table = table_of(1, [(0, 0, A, False)])
    detections = detections_of([(0, 0, 0.9 - 0.1 * i, B) for i in range(5)])
    counts = [error_analysis(table, classes(1), detections, max_dets=n)["counts"]["background"] for n in (1, 3, 100)]
    assert counts == [1, 3, 5]


@pytest.mark.parametrize("seed", range(4))
def test_on_random_problems_background_is_what_touches_no_box(seed: int) -> None:
    """And what it costs is the AP50 that leaving it out brings."""
    table, class_map, detections = random_problem(seed, crowd=0.0)
    limit = len(detections.scores)
    apart = np.array(
        [
            all(overlap(box, truth, False) < 0.1 for truth in table.boxes[table.rows(int(image))])
            for image, box in zip(detections.images, detections.boxes, strict=True)
        ]
    )
    errors = error_analysis(table, class_map, detections, max_dets=limit)
    assert errors["counts"]["background"] == int(apart.sum())
    before, after = (
        coco_metrics(table, class_map, found, max_dets=limit).map50 for found in (detections, detections.select(~apart))
    )
    assert errors["delta_ap50"]["background"] == pytest.approx(after - before, abs=1e-9) and after > before
