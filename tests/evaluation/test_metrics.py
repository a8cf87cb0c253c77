"""COCO metrics, held to pycocotools."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pycocotools.cocoeval import Params

from rfdetr_core.evaluation.detections import Detections
from rfdetr_core.evaluation.metrics import RECALLS, coco_metrics
from tests.evaluation.helpers import classes, detections_of, mean, pycocotools, random_problem, table_of

TWELVE = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium",
    "AR_large",
)  # fmt: skip
PER_CLASS = {"boxes", "ap", "ap50", "ap75", "ar", "f1", "f1_threshold", "precision", "recall"}
A = (10.0, 10.0, 60.0, 60.0)
B = (100.0, 100.0, 180.0, 160.0)
NOTHING = Detections.concatenate([])


def assert_equal(problem: Any, max_dets: int) -> None:
    """All that we report against pycocotools, to 1e-9."""
    table, class_map, detections = problem
    found = coco_metrics(table, class_map, detections, max_dets=max_dets)
    expected = pycocotools(table, class_map, detections, [1, 10, 100]).stats
    assert list(found.coco) == list(TWELVE)
    assert list(found.coco.values()) == pytest.approx(list(expected), abs=1e-9)

    # pycocotools reads its summary at three limits; its arrays know any
    evaluation = pycocotools(table, class_map, detections, [max_dets])
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    assert found.max_dets == max_dets
    totals = (mean(precision[..., 0, 0]), mean(precision[0, ..., 0, 0]), mean(precision[5, ..., 0, 0]))
    assert (found.map, found.map50, found.map75) == pytest.approx(totals, abs=1e-9)
    assert found.mar == pytest.approx(mean(recall[..., 0, 0]), abs=1e-9)
    assert found.precision50 == pytest.approx(precision[0, :, :, 0, 0], abs=1e-9)
    defined = precision[0, :, :, 0, 0] > 0
    assert found.scores50[defined] == pytest.approx(evaluation.eval["scores"][0, :, :, 0, 0][defined], abs=1e-9)
    assert list(found.per_class) == list(class_map.names)
    for label, row in enumerate(found.per_class.values()):
        aps = (precision[:, :, label, 0, 0], precision[0, :, label, 0, 0], precision[5, :, label, 0, 0])
        own = (*map(mean, aps), mean(recall[:, label, 0, 0]))
        assert (row["ap"], row["ap50"], row["ap75"], row["ar"]) == pytest.approx(own, abs=1e-9)
        assert row["boxes"] == int(((table.labels == label) & ~table.crowd).sum())


@pytest.mark.parametrize("seed", range(24))
def test_random_problems(seed: int) -> None:
    assert_equal(random_problem(seed), (500, 100, 7, 1)[seed % 4])


@pytest.mark.parameter("eval_max_dets")
@pytest.mark.parametrize("max_dets", [1, 3, 7, 10, 100, 500])
def test_exactly_so_many_detections_per_image(max_dets: int) -> None:
    """1,300 detections, 650 of them of one class in one image: more than any limit."""
    table, class_map, detections = random_problem(101, images=2, labels=2, detections=1300)
    counts = np.bincount(detections.images * 2 + detections.labels)
    assert counts.max() > 500
    assert_equal((table, class_map, detections), max_dets)


def test_limits_differ_in_their_numbers() -> None:
    """Else the test above would not notice a limit that is not obeyed."""
    problem = random_problem(101, images=2, labels=2, detections=1300)
    found = [coco_metrics(*problem, max_dets=limit) for limit in (1, 3, 7, 10, 100, 500)]
    assert len({metrics.mar for metrics in found}) >= 5
    assert len({metrics.map for metrics in found}) >= 5


@pytest.mark.parameter("eval_max_dets")
@pytest.mark.parametrize("max_dets", [3, 500])
def test_six_objects_and_a_limit(max_dets: int) -> None:
    """One image, six perfect detections: at three, recall is one half (training spec 12, item 31)."""
    boxes = [(50.0 * i, 0.0, 50.0 * i + 40, 40.0) for i in range(6)]
    table = table_of(1, [(0, 0, box, False) for box in boxes])
    detections = detections_of([(0, 0, 0.9 - 0.1 * i, box) for i, box in enumerate(boxes)])
    found = coco_metrics(table, classes(1), detections, max_dets=max_dets)
    assert found.mar == pytest.approx(0.5 if max_dets == 3 else 1.0)
    assert found.map == pytest.approx(51 / 101 if max_dets == 3 else 1.0)  # precision 1 at recalls 0.00 to 0.50
    assert found.coco["AR_100"] == 1.0


@pytest.mark.parametrize(
    "problem",
    [
        pytest.param((table_of(2, []), classes(2), NOTHING), id="nothing at all"),
        pytest.param((table_of(2, []), classes(2), detections_of([(0, 1, 0.5, A)])), id="no ground truth"),
        pytest.param((table_of(2, [(1, 0, A, False)]), classes(2), NOTHING), id="no detections"),
        pytest.param((table_of(2, [(0, 0, A, True)]), classes(1), detections_of([(0, 0, 0.5, A)])), id="crowds alone"),
        pytest.param(
            (table_of(3, [(1, 0, A, False)]), classes(1), detections_of([(2, 0, 0.9, A), (1, 0, 0.5, A)])),
            id="detections in an image without boxes",
        ),
        pytest.param(
            (
                table_of(1, [(0, 0, A, False), (0, 0, A, False)]),
                classes(1),
                detections_of([(0, 0, 0.5, A), (0, 0, 0.5, A), (0, 0, 0.5, A)]),
            ),
            id="equal boxes and equal scores",
        ),
    ],
)
def test_borders(problem: Any) -> None:
    assert_equal(problem, 100)


def test_area_borders_belong_to_both_sides_as_in_coco() -> None:
    """Areas of exactly 32^2 and 96^2, just below and just above."""
    rows = []
    for i, area in enumerate((1023.999, 1024.0, 1024.001, 9215.999, 9216.0, 9216.001)):
        side = area**0.5
        rows.append((0, 0, (100.0 * i, 0.0, 100.0 * i + side, side), False))
    areas = [1023.999, 1024.0, 1024.001, 9215.999, 9216.0, 9216.001]
    table = table_of(1, rows, areas=areas)
    detections = detections_of([(0, 0, 0.9 - 0.1 * i, row[2]) for i, row in enumerate(rows) if i % 2])
    assert_equal((table, classes(1), detections), 100)


def test_annotated_areas_decide_the_size() -> None:
    """A mask's area is smaller than its box's: COCO goes by what is annotated."""
    table = table_of(1, [(0, 0, (0, 0, 200, 200), False)], areas=[500])
    found = coco_metrics(table, classes(1), detections_of([(0, 0, 0.9, (0, 0, 200, 200))]), max_dets=100)
    assert (found.coco["AP_small"], found.coco["AP_large"]) == (pytest.approx(1), -1.0)


def test_a_class_without_ground_truth_is_undefined_and_left_out_of_means() -> None:
    table = table_of(1, [(0, 0, A, False)])
    detections = detections_of([(0, 0, 0.9, A), (0, 1, 0.99, B), (0, 2, 0.99, A)])
    found = coco_metrics(table, classes(3), detections, max_dets=100)
    assert (found.map, found.map50, found.mar) == pytest.approx((1, 1, 1))
    undefined = {**dict.fromkeys(PER_CLASS, -1.0), "boxes": 0}
    assert found.per_class["class 1"] == found.per_class["class 2"] == undefined
    assert (found.precision50[:, 1:] == -1).all() and found.precision50[:, 0] == pytest.approx(1)


def test_without_ground_truth_every_number_is_undefined() -> None:
    found = coco_metrics(table_of(2, []), classes(2), detections_of([(0, 0, 0.5, A)]), max_dets=100)
    assert set(found.coco.values()) == {-1.0}
    scalars = {k: v for k, v in found.to_json().items() if isinstance(v, float)}
    assert set(scalars) >= {"map", "map50", "map75", "mar", "f1"} and set(scalars.values()) == {-1.0}


def test_to_json_holds_every_scalar_and_is_json() -> None:
    import json

    found = coco_metrics(*random_problem(1), max_dets=7)
    document = json.loads(json.dumps(found.to_json()))
    scalars = ("map", "map50", "map75", "mar", "f1", "f1_threshold", "precision", "recall", "max_dets")
    assert {name: document[name] for name in scalars} == {name: getattr(found, name) for name in scalars}
    assert document["coco"] == found.coco and document["per_class"] == found.per_class
    assert set(document["per_class"]["class 0"]) == PER_CLASS


def test_the_recalls_are_float64_hundredths() -> None:
    """In float32, 0.1 lies above a tenth, and a recall of exactly a tenth would miss it (training spec 6.3)."""
    assert RECALLS.dtype == np.float64 and RECALLS.tolist() == Params(iouType="bbox").recThrs.tolist()
    rows = [(0, 0, (20.0 * i, 0.0, 20.0 * i + 10, 10.0), False) for i in range(10)]
    table = table_of(1, rows)
    found = coco_metrics(table, classes(1), detections_of([(0, 0, 0.9, rows[0][2])]), max_dets=100)
    assert found.map == pytest.approx(11 / 101)


# ---- detections -------------------------------------------------------------------------------------------


def test_detections_are_joined_in_order() -> None:
    one, other = detections_of([(0, 1, 0.5, A)]), detections_of([(2, 0, 0.9, B), (1, 1, 0.1, A)])
    joined = Detections.concatenate([one, NOTHING, other])
    assert joined.images.tolist() == [0, 2, 1] and joined.labels.tolist() == [1, 0, 1]
    assert joined.scores.tolist() == [0.5, 0.9, 0.1] and joined.boxes.tolist() == [list(A), list(B), list(A)]
    assert NOTHING.boxes.shape == (0, 4) and NOTHING.images.dtype == np.int64


def test_detections_as_coco_results_name_ids_of_the_annotations() -> None:
    [row] = detections_of([(2, 1, 0.5, B)]).to_coco(classes(2))
    assert row == {"image_id": 3, "category_id": 2, "bbox": [100.0, 100.0, 80.0, 60.0], "score": 0.5}
