"""The doctor: every cause is planted, and must be named first; a detector on its way gets no remark."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from rfdetr_core.config import ModelConfig, TrainConfig
from rfdetr_core.data.annotations import AnnotationTable, ClassMap
from rfdetr_core.evaluation.detections import Detections
from rfdetr_core.evaluation.metrics import coco_metrics
from rfdetr_core.training.doctor import MAX_IMAGES, Symptom, examine, report_lines, to_json
from tests.evaluation.helpers import table_of

NAMES = ("bolt", "nut", "screw")
CLASSES = ClassMap((1, 2, 3), NAMES)
MOVING = {"loss": 6.0, "loss_ce": 0.7, "loss_bbox": 0.3, "loss_giou": 0.6}
UNTRAINED = {"loss": 14.3, "loss_ce": 0.14, "loss_bbox": 0.51, "loss_giou": 1.03}
DIVERGED = {"loss": 33.4, "loss_ce": 1.0, "loss_bbox": 2.4, "loss_giou": 0.83}
MANY = 6_000  # optimizer steps


def scene(images: int = 20, boxes: int = 3, *, side: float = 100.0, seed: int = 0) -> AnnotationTable:
    """Squares of about `side` pixels in images of 640 x 480, each in a cell of its own; the classes in turn."""
    rng = np.random.default_rng(seed)
    across = math.ceil(math.sqrt(boxes))
    rows = []
    for n in range(images * boxes):
        edge = side * rng.uniform(0.8, 1.2)
        row, column = divmod(n % boxes, across)
        x = 640 / across * column + rng.uniform(0, 640 / across - edge)
        y = 480 / across * row + rng.uniform(0, 480 / across - edge)
        rows.append((n // boxes, n % 3, (x, y, x + edge, y + edge), False))
    return table_of(images, rows)


def owners(table: AnnotationTable) -> Any:
    return np.repeat(np.arange(len(table)), table.counts)


def found(table: AnnotationTable, *, labels: Any = None, boxes: Any = None, scores: Any = 0.9) -> Detections:
    """One detection per annotated box, exact unless told otherwise."""
    return Detections(
        images=owners(table),
        labels=table.labels if labels is None else np.asarray(labels),
        scores=np.broadcast_to(np.asarray(scores, dtype=np.float64), table.labels.shape).copy(),
        boxes=table.boxes if boxes is None else np.asarray(boxes),
    )


def astray(table: AnnotationTable, score: float = 0.3) -> Detections:
    """As many detections, of the right classes, of 4 px anywhere."""
    corners = np.random.default_rng(1).uniform(0, 470, (len(table.labels), 2))
    return found(table, boxes=np.concatenate([corners, corners + 4], axis=1), scores=score)


def diagnose(
    table: AnnotationTable,
    detections: Detections,
    *,
    losses: dict[str, float] = MOVING,
    steps: int = MANY,
    start_weights: bool = True,
    model: dict[str, Any] | None = None,
    **train: Any,
) -> list[Symptom]:
    config = TrainConfig.parse(train)
    symptoms = examine(
        metrics=coco_metrics(table, CLASSES, detections, max_dets=config.eval_max_dets),
        detections=detections,
        table=table,
        class_map=CLASSES,
        model=ModelConfig.parse({"variant": "nano", "num_classes": 3, **(model or {})}),
        train=config,
        losses=losses,
        steps=steps,
        start_weights=start_weights,
    )
    assert [s.weight for s in symptoms] == sorted((s.weight for s in symptoms), reverse=True)
    assert all(0 < s.weight <= 1 for s in symptoms)
    return symptoms


def causes(symptoms: list[Symptom]) -> list[str]:
    return [symptom.cause for symptom in symptoms]


# --- Healthy ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start_weights", [True, False])
def test_a_detector_on_its_way_gets_no_remark(start_weights: bool) -> None:
    """Half of the boxes found, after few steps, with losses and a learning rate that would be told otherwise."""
    table = scene()
    half = np.where(np.arange(len(table.labels))[:, None] % 2 == 0, table.boxes, 0.0)
    symptoms = diagnose(
        table, found(table, boxes=half), losses=UNTRAINED, steps=1, start_weights=start_weights, lr=1e-2
    )
    assert symptoms == []
    assert report_lines(symptoms) == [] == to_json(symptoms)


# --- Labels -------------------------------------------------------------------------------------------------


def test_labels_shifted_by_one() -> None:
    table = scene()
    first, *others = diagnose(table, found(table, labels=(table.labels + 1) % 3))
    assert first.cause == "labels_swapped"
    assert "100% of the boxes are found, 0% of these under the right label" in first.evidence
    assert "20 of 20 bolt are called nut" in first.evidence
    assert "100% are off by +1" in first.evidence
    assert "dataset.uri" in first.advice and "model.pretrain_weights" in first.advice
    assert others == []


def test_labels_shifted_down_from_random_weights() -> None:
    table = scene()
    shifted = found(table, labels=(table.labels - 1) % 3)
    random, swapped = diagnose(table, shifted, start_weights=False)
    assert (random.cause, swapped.cause) == ("random_start", "labels_swapped")
    assert "100% are off by -1" in swapped.evidence
    assert "pretrain_weights" not in swapped.advice


def test_two_swapped_classes_are_told_at_a_good_map_too() -> None:
    table = scene()
    detections = found(table, labels=np.array([0, 2, 1])[table.labels])
    assert coco_metrics(table, CLASSES, detections, max_dets=100).map50 > 0.3
    (only,) = diagnose(table, detections)
    assert only.cause == "labels_swapped"
    assert "33% of these under the right label" in only.evidence
    assert "off by" not in only.evidence


def test_the_best_scored_detection_names_a_box() -> None:
    """A query gives several classes: its second one, far below, does not make the label right."""
    table = scene()
    wrong = found(table, labels=(table.labels + 1) % 3)
    faint = found(table, scores=0.02)
    assert causes(diagnose(table, Detections.concatenate([faint, wrong])))[0] == "labels_swapped"
    assert diagnose(table, Detections.concatenate([found(table), found(table, labels=wrong.labels, scores=0.02)])) == []


def test_labels_at_random_are_no_swap() -> None:
    table = scene(30)
    labels = np.random.default_rng(3).integers(0, 3, len(table.labels))
    wrong = np.where(labels == table.labels, (labels + 1 + np.arange(len(labels)) % 2) % 3, labels)
    first = diagnose(table, found(table, labels=wrong))[0]
    assert first.cause == "classes_confused"
    assert "0% of these under the right label" in first.evidence


def test_one_name_for_all_is_no_swap() -> None:
    table = scene()
    assert diagnose(table, found(table, labels=np.full_like(table.labels, 2))) == []  # an mAP50 of 0.11


def test_a_few_boxes_found_show_no_swap() -> None:
    table = scene()
    some = np.arange(len(table.labels)) % 10 == 0
    detections = found(
        table,
        labels=np.where(some, (table.labels + 1) % 3, table.labels),
        boxes=np.where(some[:, None], table.boxes, astray(table).boxes),
    )
    assert causes(diagnose(table, detections)) == ["boxes_missed"]


# --- Collapse -----------------------------------------------------------------------------------------------


def test_all_detections_in_one_place() -> None:
    table = scene()
    boxes = np.tile([300.0, 220.0, 340.0, 260.0], (len(table.labels), 1))
    first = diagnose(table, found(table, boxes=boxes), lr=5e-4)[0]
    assert first.cause == "one_place"
    assert "100% of the images is at x 0.47-0.53, y 0.46-0.54" in first.evidence
    assert "train.lr (now 0.0005)" in first.advice


def test_objects_in_one_place_are_no_collapse() -> None:
    rng = np.random.default_rng(0)
    rows = [(i, i % 3, (200.0, 200.0, 300.0, 300.0 + rng.uniform(0, 9)), False) for i in range(20)]
    table = table_of(20, rows)
    boxes = np.tile([200.0, 240.0, 300.0, 290.0], (20, 1))  # IoU 0.5 or less
    assert "one_place" not in causes(diagnose(table, found(table, boxes=boxes)))


def test_all_detections_of_one_class() -> None:
    table = scene()
    first = diagnose(table, found(table, labels=np.full_like(table.labels, 2), boxes=astray(table).boxes))[0]
    assert first.cause == "one_class"
    assert "100% of the best detections are screw, 33% of the boxes are" in first.evidence
    assert "train.lr" in first.advice


def test_a_class_that_rules_the_annotations_is_no_collapse() -> None:
    table = scene()
    most = np.where(np.arange(len(table.labels)) % 10 == 0, 1, 0)
    ruled = AnnotationTable(**{**vars(table), "labels": most})
    detections = found(ruled, labels=np.zeros_like(most), boxes=astray(table).boxes)
    assert "one_class" not in causes(diagnose(ruled, detections))


# --- Size and number of boxes -------------------------------------------------------------------------------


def test_boxes_below_a_patch() -> None:
    table = scene(side=10.0)  # 6.9 px at 384 px: 10 px of the geometric mean of 640 and 480
    first = diagnose(table, astray(table))[0]
    assert first.cause == "small_boxes"
    assert "100% of the boxes are smaller than a patch of 16 px at 384 px" in first.evidence
    assert "(median 6." in first.evidence or "(median 7." in first.evidence
    assert "0% of these are found" in first.evidence
    assert "model.resolution (now 384)" in first.advice


def test_the_size_counts_at_the_input_resolution() -> None:
    table = scene(side=30.0)  # 21 px at 384 px
    assert "small_boxes" not in causes(diagnose(table, astray(table)))
    smaller = diagnose(table, astray(table), model={"resolution": 192})[0]
    assert smaller.cause == "small_boxes"


def test_small_boxes_that_are_found_are_not_the_cause() -> None:
    table = scene(side=10.0)
    swapped = found(table, labels=(table.labels + 1) % 3)
    assert causes(diagnose(table, swapped)) == ["labels_swapped"]


@pytest.mark.parametrize(
    ("field", "model", "train"),
    [
        ("model.num_queries", {"num_queries": 20, "num_select": 60}, {}),
        ("model.num_queries", {"num_queries": 20, "num_select": 20}, {}),
        ("model.num_select", {"num_select": 20}, {}),
        ("train.eval_max_dets", {}, {"eval_max_dets": 5}),
    ],
)
def test_more_boxes_than_detections(field: str, model: dict[str, Any], train: dict[str, Any]) -> None:
    """30 boxes, 10 of each class, in every image; told at a good mAP too."""
    table = scene(6, 30, side=60.0)
    (only,) = diagnose(table, found(table), model=model, **train)
    assert only.cause == "too_many_boxes"
    most = 10 if field.startswith("train") else 30
    share = "50%" if field.startswith("train") else "33%"
    what = "boxes of a class in an image" if field.startswith("train") else "boxes in an image"
    assert f"up to {most} {what}" in only.evidence and share in only.evidence
    assert only.advice == f"Raise {field} to {most}."


# --- Learning -----------------------------------------------------------------------------------------------


def test_random_weights_are_said_first() -> None:
    table = scene(side=10.0)
    first, *others = diagnose(table, astray(table), losses=UNTRAINED, steps=7, start_weights=False, lr=1e-8)
    assert first.cause == "random_start"
    assert "an mAP50 of 0.000 is normal" in first.evidence
    assert "model.pretrain_weights" in first.advice
    assert {"lr_too_low", "few_steps", "small_boxes", "boxes_missed"} == set(causes(others))


@pytest.mark.parametrize(("model", "train"), [({"freeze_encoder": True}, {}), ({}, {"lr_encoder": 0.0})])
def test_a_random_encoder_that_is_frozen(model: dict[str, Any], train: dict[str, Any]) -> None:
    table = scene()
    first = diagnose(table, astray(table), start_weights=False, model=model, **train)[0]
    assert "encoder stays random" in first.advice


def test_few_steps() -> None:
    table = scene()
    first, second = diagnose(table, astray(table), steps=20)
    assert (first.cause, second.cause) == ("few_steps", "boxes_missed")
    assert first.evidence == "20 optimizer steps so far"
    assert "few_steps" in causes(diagnose(table, astray(table), steps=199))
    assert "few_steps" not in causes(diagnose(table, astray(table), steps=200))


@pytest.mark.parametrize("name", ["loss", "val/loss_giou"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_comes_before_all(name: str, value: float) -> None:
    table = scene()
    first, second, *_ = diagnose(table, astray(table), losses={**MOVING, name: value}, start_weights=False)
    assert (first.cause, second.cause) == ("loss_not_finite", "random_start")
    assert first.evidence == f"not finite: {name}"
    (alone,) = diagnose(table, found(table), losses={**MOVING, name: value})
    assert alone.cause == "loss_not_finite"


def test_losses_above_those_of_an_untrained_detector() -> None:
    table = scene()
    first = diagnose(table, astray(table), losses=DIVERGED, lr=3e-4)[0]
    assert first.cause == "lr_too_high"
    assert "train.lr is 0.0003, loss_ce 1, loss_bbox 2.4, loss_giou 0.83" in first.evidence
    assert "0.0001" in first.advice


def test_a_learning_rate_far_above_the_default() -> None:
    table = scene()
    assert causes(diagnose(table, astray(table), lr=1e-3)) == ["lr_too_high", "boxes_missed"]
    assert causes(diagnose(table, astray(table), lr=9e-4)) == ["boxes_missed"]


def test_a_learning_rate_far_below_the_default() -> None:
    table = scene()
    for losses in (UNTRAINED, MOVING):
        first = diagnose(table, astray(table), losses=losses, steps=20, lr=1e-6)[0]
        assert first.cause == "lr_too_low"
        assert "train.lr is 1e-06" in first.evidence


def test_losses_that_hardly_moved() -> None:
    table = scene()
    assert causes(diagnose(table, astray(table), losses=UNTRAINED)) == ["lr_too_low", "boxes_missed"]
    assert causes(diagnose(table, astray(table), losses={**MOVING, "loss_giou": 0.96}))[0] == "lr_too_low"
    only_classes = {**MOVING, "loss_ce": 0.12}
    assert causes(diagnose(table, astray(table), losses=only_classes))[0] == "lr_too_low"
    # a focal loss starts elsewhere, and few steps explain it
    assert causes(diagnose(table, astray(table), losses=only_classes, model={"ia_bce_loss": False})) == ["boxes_missed"]
    assert "lr_too_low" not in causes(diagnose(table, astray(table), losses=UNTRAINED, steps=20))


def test_losses_that_are_not_known() -> None:
    table = scene()
    assert causes(diagnose(table, astray(table), losses={})) == ["boxes_missed"]


# --- How far it came ----------------------------------------------------------------------------------------


def test_scores_below_a_hundredth() -> None:
    table = scene()
    (only,) = diagnose(table, found(table, scores=0.0042, labels=(table.labels + 1) % 3))
    assert only.cause == "scores_low"
    assert only.evidence == "the best score is 0.0042, below 0.01"
    (unweighted,) = diagnose(table, astray(table, 0.004), cls_loss_coef=0.0)
    assert "train.cls_loss_coef" in unweighted.advice


def test_no_detections_at_all() -> None:
    (only,) = diagnose(scene(), Detections.concatenate([]))
    assert only.cause == "scores_low"
    assert "the best score is 0.0000" in only.evidence


def test_boxes_that_are_not_found() -> None:
    table = scene()
    moved = table.boxes + np.where(np.arange(len(table.labels))[:, None] < 18, 0.0, 300.0)
    wrong_scores = np.where(np.arange(len(table.labels)) < 18, 0.011, 0.9)
    noise = Detections.concatenate([astray(table, 0.9)] * 40)
    (only,) = diagnose(table, Detections.concatenate([found(table, boxes=moved, scores=wrong_scores), noise]))
    assert only.cause == "boxes_missed"
    assert "recall at IoU 0.5 and score 0.01 is 0.30" in only.evidence


def test_boxes_that_drown_in_false_ones() -> None:
    table = scene()
    noise = Detections.concatenate([astray(table, 0.9)] * 40)
    (only,) = diagnose(table, Detections.concatenate([found(table, scores=0.02), noise]))
    assert only.cause == "false_detections"
    assert "recall is 1.00 at IoU 0.5, 100% of it under the right label" in only.evidence


# --- Splits -------------------------------------------------------------------------------------------------


def test_a_split_without_boxes() -> None:
    crowd = table_of(3, [(0, 0, (0, 0, 50, 50), True)])
    for table in (table_of(3, []), crowd):
        (only,) = diagnose(table, Detections.concatenate([]))
        assert only.cause == "no_annotations"
        assert only.evidence == "none of 3 validation images has a box"


def test_crowd_regions_and_images_without_boxes_do_not_count() -> None:
    rows = [(2, 0, (0.0, 0.0, 640.0, 480.0), True), (2, 1, (100.0, 100.0, 200.0, 200.0), False)]
    rows += [(4, 2, (300.0, 100.0, 400.0, 200.0), False)]
    table = table_of(6, rows)
    shifted = found(table, labels=[0, 2, 0], scores=[0.0, 0.9, 0.9])
    first = diagnose(table, shifted)[0]
    assert first.cause == "labels_swapped"
    assert "100% of the boxes are found" in first.evidence


def test_a_big_split_is_looked_at_in_part() -> None:
    """Four fifths of the labels are wrong: too few in the first half, all in the second."""
    table = scene(2 * MAX_IMAGES)
    image = owners(table)
    wrong = (image < 0.3 * len(table)) | (image >= 0.5 * len(table))
    first = diagnose(table, found(table, labels=np.where(wrong, (table.labels + 1) % 3, table.labels)))[0]
    assert first.cause == "labels_swapped"
    assert "20% of these under the right label" in first.evidence
    assert "(in 2,000 of the 4,000 images with boxes)" in first.evidence


# --- For people and machines --------------------------------------------------------------------------------


def test_the_report() -> None:
    symptoms = [Symptom("few_steps", 0.6, "5 steps", "Do more."), Symptom("boxes_missed", 0.4, "recall 0", "Wait.")]
    assert report_lines(symptoms) == [
        "doctor: 2 things look wrong, the likeliest cause first",
        "  1. few_steps: 5 steps. Do more.",
        "  2. boxes_missed: recall 0. Wait.",
    ]
    assert report_lines(symptoms[:1])[0] == "doctor: one thing looks wrong"
    assert to_json(symptoms)[1] == {
        "cause": "boxes_missed",
        "weight": 0.4,
        "evidence": "recall 0",
        "advice": "Wait.",
    }


def test_symptoms_can_be_written_as_json() -> None:
    table = scene(side=10.0)
    symptoms = diagnose(
        table,
        found(table, labels=np.zeros_like(table.labels), boxes=astray(table).boxes),
        steps=9,
        start_weights=False,
    )
    assert len(symptoms) >= 4
    assert json.loads(json.dumps(to_json(symptoms))) == to_json(symptoms)
