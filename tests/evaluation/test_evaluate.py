"""From a model and a split to detections and numbers, with models whose answers are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rfdetr_core.config import ModelConfig
from rfdetr_core.data.annotations import ClassMap
from rfdetr_core.data.loading import LoaderSettings, eval_loader
from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.evaluation import evaluate
from rfdetr_core.evaluation.evaluate import by_name, evaluate_model, half_precision, split_digest
from rfdetr_core.evaluation.inference import predict_split
from rfdetr_core.models.weights import TrainedModel
from tests.data.helpers import annotation, document, grid_dataset, image_row, prepared, write_dataset
from tests.evaluation.helpers import detections_of

CPU = torch.device("cpu")
ALONE = LoaderSettings(0, None, None, None)
BOX = (1.0, 2.0, 3.0, 4.0)


class Known(nn.Module):
    """Answers every image with the boxes and labels of a table, found by the order of the calls; class logits 2."""

    def __init__(self, table: Any, columns: int, *, spare: bool = False) -> None:
        super().__init__()
        self.table, self.columns, self.spare, self.next = table, columns, spare, 0
        self.training_seen: set[bool] = set()
        self.dtypes: set[torch.dtype] = set()

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        self.training_seen.add(self.training)
        self.dtypes.add((pixels @ pixels).dtype)
        queries = int(self.table.counts.max()) + 1
        logits = torch.full((len(pixels), queries, self.columns), -9.0)
        boxes = torch.full((len(pixels), queries, 4), 0.5)
        for b in range(len(pixels)):
            rows = self.table.rows(self.next)
            size = np.array([self.table.widths[self.next], self.table.heights[self.next]] * 2)
            x1, y1, x2, y2 = (self.table.boxes[rows] / size).T
            found = np.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], axis=1)
            boxes[b, : len(found)] = torch.from_numpy(found).float()
            for q, label in enumerate(self.table.labels[rows]):
                logits[b, q, label] = 2.0
            if self.spare:
                logits[b, queries - 1, -1] = 8.0  # the spare column is the surest of all
            self.next += 1
        return {"pred_logits": logits, "pred_boxes": boxes}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """Ten images of 64 x 48 with boxes of two classes."""
    folder = tmp_path_factory.mktemp("evaluate")
    return prepared(grid_dataset(folder / "source", 10), folder / "prepared")


def predict(dataset: PreparedDataset, model: nn.Module, *, num_select: int = 300, **options: Any) -> Any:
    split = dataset.split("train")
    batches = eval_loader(split, ALONE, CPU, resolution=32, batch_size=4)
    return predict_split(model, batches, split.table, num_select=num_select, num_classes=2, device=CPU, **options)


def test_detections_are_in_pixels_of_their_images(dataset: PreparedDataset) -> None:
    table = dataset.split("train").table
    found = predict(dataset, Known(table, 3).eval())
    sure = found.scores > 0.5
    for image in range(len(table)):
        rows, mine = table.rows(image), sure & (found.images == image)
        assert sorted(found.labels[mine]) == sorted(table.labels[rows])
        for box, label in zip(table.boxes[rows], table.labels[rows], strict=True):
            distances = np.abs(found.boxes[mine & (found.labels == label)] - box).max(axis=1)
            assert distances.min() < 1e-4
    assert found.images.tolist() == sorted(found.images.tolist())
    assert found.scores.dtype == found.boxes.dtype == np.float64


def test_the_spare_last_column_takes_part_and_is_dropped_afterwards(dataset: PreparedDataset) -> None:
    """With one detection per image, the spare column wins it, and nothing is left (DESIGN section 5)."""
    table = dataset.split("train").table
    assert len(predict(dataset, Known(table, 3, spare=True), num_select=1).scores) == 0
    two = predict(dataset, Known(table, 3, spare=True), num_select=2)
    assert len(two.scores) == len(table) and set(two.labels) <= {0, 1}
    assert len(predict(dataset, Known(table, 3), num_select=1).scores) == len(table)
    every = predict(dataset, Known(table, 3))
    queries = int(table.counts.max()) + 1
    assert len(every.scores) == len(table) * queries * 2 and set(every.labels) == {0, 1}


def test_the_mode_is_left_alone_and_no_gradient_is_kept(dataset: PreparedDataset) -> None:
    table = dataset.split("train").table
    for mode in (True, False):
        model = Known(table, 3).train(mode)
        predict(dataset, model)
        assert model.training_seen == {mode} and model.training is mode
        assert model.dtypes == {torch.float32}


def test_autocast_runs_the_forward_pass_only(dataset: PreparedDataset) -> None:
    model = Known(dataset.split("train").table, 3)
    found = predict(dataset, model, autocast=torch.bfloat16)
    assert model.dtypes == {torch.bfloat16}
    assert found.scores.max() == pytest.approx(float(torch.tensor(2.0).sigmoid()), abs=1e-7)


def trained(module: nn.Module, names: tuple[str, ...]) -> TrainedModel:
    config = ModelConfig.parse({"variant": "nano", "resolution": 64, "num_select": 300})
    return TrainedModel(module, config, names, "ema", 3, "0" * 64)  # type: ignore[arg-type]


def test_a_model_that_knows_the_answers_scores_one(dataset: PreparedDataset) -> None:
    split = dataset.split("train")
    metrics, detections = evaluate_model(
        trained(Known(split.table, 3), ("cat", "dog")), split, dataset.class_map,
        batch_size=3, max_dets=100, device=CPU, loading=ALONE,
    )  # fmt: skip
    assert metrics.map == pytest.approx(1) and metrics.f1 == pytest.approx(1)
    assert len(detections.scores) == len(split) * (int(split.table.counts.max()) + 1) * 2


def test_classes_are_matched_by_name(dataset: PreparedDataset) -> None:
    split = dataset.split("train")

    def aps(names: tuple[str, ...]) -> tuple[float, float]:
        metrics, _ = evaluate_model(
            trained(Known(split.table, 3), names), split, dataset.class_map,
            batch_size=4, max_dets=100, device=CPU, loading=ALONE,
        )  # fmt: skip
        return metrics.per_class["cat"]["ap"], metrics.per_class["dog"]["ap"]

    assert aps(("cat", "dog")) == pytest.approx((1, 1))
    assert max(aps(("dog", "cat"))) < 0.5  # its label 0 means dog: every sure answer is of the other class
    # a class that the split does not have is dropped, and one that the model does not have is missed
    assert aps(("cat", "wolf")) == pytest.approx((1, 0))


def test_by_name_relabels_and_drops() -> None:
    detections = detections_of([(0, 0, 0.9, BOX), (1, 1, 0.8, BOX), (2, 2, 0.7, (5, 6, 7, 8)), (3, 1, 0.6, BOX)])
    found = by_name(detections, ("dog", "wolf", "cat"), ClassMap((1, 2), ("cat", "dog")))
    assert found.labels.tolist() == [1, 0] and found.images.tolist() == [0, 2]
    assert found.scores.tolist() == [0.9, 0.7] and found.boxes.tolist() == [list(BOX), [5, 6, 7, 8]]
    same = by_name(detections, ("a", "b", "c"), ClassMap((7, 8, 9), ("a", "b", "c")))
    assert same is detections
    none = by_name(detections, ("x", "y", "z"), ClassMap((1,), ("cat",)))
    assert len(none.scores) == 0 and none.boxes.shape == (0, 4)


def test_the_split_digest_is_that_of_what_is_evaluated(tmp_path: Path) -> None:
    """Equal for the same test images, however train was prepared; another for another box or picture."""

    def digest(name: str, short_side: int | None = None, **valid: Any) -> str:
        content = {"images": [image_row(1, "v.png")], "annotations": [annotation(1)], **valid}
        write_dataset(tmp_path / name, document([image_row(1, "t.png", 90, 80)]), document(**content))
        prepared(tmp_path / name, tmp_path / f"{name}-prepared", short_side=short_side)
        return split_digest(tmp_path / f"{name}-prepared" / "valid")

    first = digest("first")
    assert digest("reduced", short_side=20) == first
    others = {
        digest("box", annotations=[annotation(1, bbox=(4, 4, 20, 11))]),
        digest("picture", images=[image_row(1, "v.png", 63, 48)]),
        digest("name", images=[image_row(1, "w.png")]),
    }
    assert len(others | {first}) == 4


@pytest.mark.parametrize(("device", "expected"), [("cuda", torch.float16), ("mps", torch.float16), ("cpu", None)])
def test_half_precision_is_for_devices_that_gain_by_it(device: str, expected: torch.dtype | None) -> None:
    assert half_precision(torch.device(device)) == expected


def test_a_cpu_evaluates_in_float32_all_the_same(dataset: PreparedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    split = dataset.split("train")
    for expected in (torch.float32, torch.bfloat16):
        model = Known(split.table, 3)
        evaluate_model(
            trained(model, ("cat", "dog")), split, dataset.class_map,
            batch_size=4, max_dets=100, device=CPU, loading=ALONE, fp16=True,
        )  # fmt: skip
        assert model.dtypes == {expected}
        monkeypatch.setattr(evaluate, "half_precision", lambda _: torch.bfloat16)  # as on a device that gains by it
