"""mAP on the training images: from outputs that are written by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rfdetr_core.data.annotations import ClassMap
from rfdetr_core.data.loading import Batch
from rfdetr_core.evaluation.metrics import CocoMetrics
from rfdetr_core.training.train_metrics import TrainMetrics
from tests.training import tiny

QUERIES = 4
CLASSES = ClassMap((1, 2, 3), ("circle", "square", "triangle"))
pytestmark = pytest.mark.parameter("compute_train_metrics")


def outputs_for(batch: Batch, *, groups: int = 2, right_group: int = 0) -> dict[str, Tensor]:
    """The truth in one group, scored 0.99; other queries give the top left corner as the first class, scored 0.88."""
    images = len(batch.counts)
    logits = torch.full((images, groups * QUERIES, len(CLASSES) + 1), -9.0)
    boxes = torch.tensor([0.02, 0.02, 0.03, 0.03]).expand(images, groups * QUERIES, 4).clone()
    logits[..., 0] = 2.0
    truth = zip(torch.split(batch.boxes, batch.counts), torch.split(batch.labels, batch.counts), strict=True)
    for image, (of_image, labels) in enumerate(truth):
        for query, (box, label) in enumerate(zip(of_image, labels, strict=True), start=right_group * QUERIES):
            boxes[image, query], logits[image, query, 0], logits[image, query, label] = box, -9.0, 4.6
    return {"pred_logits": logits, "pred_boxes": boxes}


def collected(*pairs: tuple[Batch, dict[str, Tensor]], num_select: int = QUERIES, **settings: int) -> TrainMetrics:
    metrics = TrainMetrics(num_queries=QUERIES, num_select=num_select, **settings)
    for batch, outputs in pairs:
        metrics.add(batch, outputs)
    return metrics


def score(*pairs: tuple[Batch, dict[str, Tensor]], **settings: int) -> CocoMetrics:
    return collected(*pairs, **settings).result(CLASSES, max_dets=100)


def exact(batch: Batch) -> tuple[Batch, dict[str, Tensor]]:
    return batch, outputs_for(batch)


def test_the_truth_scores_one_over_several_batches() -> None:
    found = score(exact(tiny.batch(0, (2, 1))), exact(tiny.batch(1, (0, 3, 1))), exact(tiny.batch(2, (4,))))
    assert found.map == pytest.approx(1.0)
    assert found.mar == pytest.approx(1.0)
    assert sum(row["boxes"] for row in found.per_class.values()) == 11
    assert found.max_dets == 100


def test_shifted_labels_score_nothing() -> None:
    batch = tiny.batch(0, (2, 1))
    shifted = replace(batch, labels=(batch.labels + 1) % 3)
    assert score((batch, outputs_for(shifted))).map == 0.0


def test_half_of_the_boxes_found() -> None:
    """Recall 1/2 at full precision is 51 of 101 recall points."""
    batch = replace(tiny.batch(0, (1, 1)), labels=torch.tensor([1, 1]))
    outputs = outputs_for(batch)
    outputs["pred_boxes"][1] = torch.tensor([0.02, 0.02, 0.03, 0.03])
    outputs["pred_logits"][1] = -9.0
    found = score((batch, outputs))
    assert found.map == pytest.approx(51 / 101)
    assert found.mar == pytest.approx(0.5)


def test_boxes_that_overlap_by_six_tenths_count_at_low_thresholds_only() -> None:
    batch = replace(tiny.batch(0, (1,)), labels=torch.tensor([2]), boxes=torch.tensor([[0.5, 0.5, 0.5, 0.5]]))
    outputs = outputs_for(batch)
    outputs["pred_boxes"][0, 0] = torch.tensor([0.5, 0.5, 0.5, 0.31])  # IoU 0.62
    found = score((batch, outputs))
    assert found.map50 == pytest.approx(1.0)
    assert found.map75 == 0.0
    assert found.map == pytest.approx(0.3)  # 0.5, 0.55 and 0.6 of ten thresholds


def test_only_the_first_group_counts() -> None:
    batch = tiny.batch(3, (2, 2))
    assert score((batch, outputs_for(batch, groups=3, right_group=0))).map == pytest.approx(1.0)
    assert score((batch, outputs_for(batch, groups=3, right_group=1))).map == 0.0


def test_at_most_num_select_detections_of_an_image() -> None:
    batch = replace(tiny.batch(0, (4,)), labels=torch.zeros(4, dtype=torch.int64))
    batch = replace(batch, boxes=torch.tensor([[x, x, 0.2, 0.2] for x in (0.15, 0.35, 0.6, 0.85)]))
    assert score(exact(batch), num_select=4).mar == pytest.approx(1.0)
    assert score(exact(batch), num_select=3).mar == pytest.approx(0.75)


def test_the_spare_column_is_no_class() -> None:
    batch = replace(tiny.batch(0, (1,)), labels=torch.tensor([2]))
    outputs = outputs_for(batch)
    outputs["pred_logits"][..., 3] = 9.0  # above the truth
    found = score((batch, outputs), num_select=16)
    assert found.map == pytest.approx(1.0)


def test_padded_images_are_measured_on_their_own_pixels() -> None:
    """COCO's sizes tell: on the padded extent both boxes would be of 160 x 80 px, large ones."""
    pixels = torch.zeros(2, 3, 320, 320, dtype=torch.uint8)
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.25], [0.5, 0.5, 0.5, 0.25]])
    batch = Batch(pixels, boxes, torch.tensor([0, 1]), (1, 1), (0, 1), sizes=((40, 40), (320, 160)))
    found = score(exact(batch))
    assert found.coco["AP_small"] == pytest.approx(1.0)  # 20 x 10
    assert found.coco["AP_medium"] == pytest.approx(1.0)  # 80 x 80
    assert found.coco["AP_large"] == -1.0
    whole = score(exact(replace(batch, sizes=None)))
    assert (whole.coco["AP_small"], whole.coco["AP_medium"]) == (-1.0, -1.0)
    assert whole.coco["AP_large"] == pytest.approx(1.0)


def test_views_of_the_same_image_are_images_of_their_own() -> None:
    first, second = tiny.batch(0, (1,)), tiny.batch(5, (2,))
    assert first.images == second.images
    assert score(exact(first), exact(second)).map == pytest.approx(1.0)


def test_views_beyond_the_limit_are_left_out() -> None:
    good, bad = tiny.batch(0, (2, 1)), tiny.batch(1, (1, 1))
    wrong = outputs_for(replace(bad, labels=(bad.labels + 1) % 3))
    assert score(exact(good), (bad, wrong)).map < 0.9
    metrics = collected(exact(good), (bad, wrong), max_images=2)
    assert metrics.images == 2
    assert metrics.result(CLASSES, max_dets=100).map == pytest.approx(1.0)


def test_half_precision_outputs_with_gradients() -> None:
    """As the training step has them under autocast."""
    batch = tiny.batch(0, (1, 2))
    outputs = {name: value.bfloat16().requires_grad_() for name, value in outputs_for(batch).items()}
    found = score((batch, outputs))
    assert found.map50 == pytest.approx(1.0)
    assert found.map > 0.8  # boxes are rounded to 8 bits


def test_later_changes_of_the_tensors_do_not_reach_what_is_kept() -> None:
    batch = tiny.batch(0, (2, 1))
    outputs = outputs_for(batch)
    metrics = collected((batch, outputs))
    for tensor in (*outputs.values(), batch.boxes, batch.labels):
        tensor.zero_()
    assert metrics.result(CLASSES, max_dets=100).map == pytest.approx(1.0)


def test_nothing_added_has_no_metrics() -> None:
    found = TrainMetrics(num_queries=QUERIES, num_select=8).result(CLASSES, max_dets=100)
    assert (found.map, found.mar, found.f1) == (-1.0, -1.0, -1.0)
