"""The evaluate stage: its files, the champion beside the candidate, and what it cannot work with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.evaluate import stage as evaluate
from components.validate_dataset import stage as validate_dataset
from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.detector_files import write_detector
from rfdetr_core.evaluation.detections import Detections
from rfdetr_core.models.detector import RFDETR
from rfdetr_core.models.weights import TrainedModel
from rfdetr_core.publication import publish, unpublish
from rfdetr_core.registry import CHECKPOINT, Registry
from rfdetr_core.storage import location
from tests.evaluation.helpers import pycocotools
from tests.training import tiny

NAMES = ("rectangle", "ellipse", "triangle")
ARCHITECTURE = {name: value for name, value in tiny.MODEL.items() if name != "num_classes"}
LOCAL = {name: tiny.TRAIN[name] for name in ("num_workers", "accelerator")}


class Run:
    """A run whose training is done: random weights, published as train publishes them."""

    def __init__(self, folder: Path, data: Path, **evaluate: Any) -> None:
        self.folder = folder
        self.place = folder / "root" / "runs" / "r1"
        self.registry = Registry(location(str(folder / "root")), "shapes")
        sections = {
            "name": "shapes",
            "dataset": {"uri": str(data)},
            "model": ARCHITECTURE,
            "train": {**LOCAL, "eval_max_dets": 5},
            "evaluate": {"sample_images": 2, "bootstrap_samples": 20, **evaluate},
        }
        (folder / "config.yaml").write_text(json.dumps(sections))  # JSON is YAML
        arguments = ["--run-uri", str(self.place), "--config", str(folder / "config.yaml")]
        assert validate_dataset.main(arguments) == 0
        self.train(NAMES)

    def train(self, names: tuple[str, ...], seed: int = 0) -> None:
        weights = self.folder / f"trained-{seed}-{'-'.join(names)}"
        write(weights / "checkpoints" / CHECKPOINT, names, seed)
        publish(weights, location(str(self.place / "train")), inputs=f"{names} {seed}")

    def promote(self, names: tuple[str, ...], seed: int = 1) -> Path:
        """Make r0 the champion, a model of these classes."""
        weights = self.folder / f"champion-{seed}-{'-'.join(names)}"
        write(weights / CHECKPOINT, names, seed)
        publish(weights, self.registry.version("r0"), inputs="r0")
        self.registry.pointer.write_json({"version": "r0", "metrics": {}, "test_digest": "another"})
        return self.folder / "root" / "models" / "shapes" / "versions" / "r0"

    def __call__(self) -> int:
        return evaluate.main(["--run-uri", str(self.place)])

    def json(self, name: str) -> Any:
        return json.loads((self.place / name).read_text())

    def error(self) -> Any:
        assert not (self.place / "evaluate" / "_SUCCESS.json").exists()
        return self.json("status/evaluate.json")["error"]


def write(path: Path, names: tuple[str, ...], seed: int) -> None:
    path.parent.mkdir(parents=True)
    torch.manual_seed(seed)
    config = tiny.model_config(num_classes=len(names))
    write_detector(TrainedModel(RFDETR(config).eval(), config, names, "ema", 1, ""), path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.draw(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture
def run(tmp_path: Path, data: Path) -> Run:
    return Run(tmp_path, data)


def detections_in(path: Path) -> Any:
    """As the stage's own class, so that pycocotools can be asked."""
    rows = json.loads(path.read_text())
    boxes = np.array([row["bbox"] for row in rows]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    columns = [np.array([row[key] for row in rows]) for key in ("image_id", "category_id", "score")]
    return Detections(columns[0] - 1, columns[1] - 1, columns[2], boxes)


def test_candidate_and_champion_are_measured_on_the_same_images(run: Run) -> None:
    run.promote(NAMES)
    assert run() == 0
    found = run.json("evaluate/metrics.json")
    assert set(found) == {
        "schema_version", "split", "requested_split", "split_note", "images", "boxes", "boxes_by_size", "test_digest",
        "candidate", "champion", "comparison",
    }  # fmt: skip
    assert (found["split"], found["split_note"], found["images"]) == ("test", None, 4)
    assert found["boxes"] == sum(found["boxes_by_size"].values()) > 0
    assert set(found["champion"]) == {*found["candidate"], "version"} and found["champion"]["version"] == "r0"
    assert found["champion"]["weights_sha256"] != found["candidate"]["weights_sha256"]
    assert found["candidate"]["max_dets"] == 5 and found["candidate"]["source"] == "ema"
    size = (run.place / "train" / "checkpoints" / CHECKPOINT).stat().st_size
    assert found["candidate"]["weights_bytes"] == size and found["candidate"]["parameters"] > 1000

    dataset = PreparedDataset(run.folder / "root" / run.json("dataset/dataset.json")["location"])
    for role, name in (("candidate", "detections.json"), ("champion", "champion_detections.json")):
        detections = detections_in(run.place / "evaluate" / name)
        judge = pycocotools(dataset.split("test").table, dataset.class_map, detections, [1, 10, 100])
        assert list(found[role]["coco"].values()) == pytest.approx(list(judge.stats), abs=1e-9)

    comparison = found["comparison"]
    assert (comparison["champion"], comparison["samples"]) == ("r0", 20)
    for name, row in comparison["metrics"].items():
        assert (row["candidate"], row["champion"]) == (found["candidate"][name], found["champion"][name])
        assert row["low"] <= row["high"] and 0 < row["p_value"] <= 1
    confusion = run.json("evaluate/confusion.json")
    assert confusion["classes"] == [*NAMES, "background"] and len(confusion["matrix"]) == 4
    assert sum(map(sum, (row for row in confusion["matrix"][:3]))) == found["boxes"]
    page = (run.place / "evaluate" / "report.html").read_text()
    assert "Against the champion r0" in page


def test_until_promote_has_decided_a_new_champion_is_measured_as_well(run: Run) -> None:
    assert run() == 0
    first = run.json("evaluate/_SUCCESS.json")
    run.promote(NAMES)
    assert run() == 0
    assert run.json("evaluate/metrics.json")["champion"]["version"] == "r0"
    assert run.json("evaluate/_SUCCESS.json")["inputs"] == first["inputs"]
    log = (run.place / "logs" / "evaluate.log").read_text()
    assert "once more: the champion is r0 now, and none was measured" in log
    assert run() == 0
    assert run.json("status/evaluate.json")["state"] == "already done"

    run.registry.pointer.write_json({"version": "r2", "metrics": {}, "test_digest": "another"})
    publish(run.place / "evaluate", location(str(run.place / "promote")), inputs="decided")
    assert run() == 0
    assert run.json("status/evaluate.json")["state"] == "already done"


def test_the_first_model_has_nothing_beside_it(run: Run) -> None:
    assert run() == 0
    found = run.json("evaluate/metrics.json")
    assert found["champion"] is None and found["comparison"] is None
    assert not (run.place / "evaluate" / "champion_detections.json").exists()


def test_a_champion_of_other_classes_is_matched_by_name(run: Run) -> None:
    run.promote(("wolf", "triangle", "rectangle"))
    assert run() == 0
    champion = run.json("evaluate/metrics.json")["champion"]
    assert (champion["missing_classes"], champion["dropped_classes"]) == (["ellipse"], ["wolf"])
    assert champion["per_class"]["ellipse"]["ap"] == 0
    found = json.loads((run.place / "evaluate" / "champion_detections.json").read_text())
    assert {row["category_id"] for row in found} <= {1, 3}
    assert "champion r0 does not know ellipse" in (run.place / "logs" / "evaluate.log").read_text()


@pytest.mark.parametrize("lost", [CHECKPOINT, "_SUCCESS.json", "all"])
def test_a_champion_whose_files_are_gone_ends_the_stage(run: Run, lost: str) -> None:
    """To go on without it would let any model become the champion."""
    place = run.promote(NAMES)
    for path in place.iterdir():
        if lost in (path.name, "all"):
            path.unlink()
    assert run() == 2
    error = run.error()
    assert "r0, the champion of shapes, cannot be evaluated" in error["message"]
    assert "rfdetr-pipeline models rollback shapes --root" in error["hint"] and str(place) in error["hint"]


def test_a_champion_that_is_no_model_ends_the_stage(run: Run) -> None:
    place = run.promote(NAMES)
    unpublish(run.registry.version("r0"))
    (place / CHECKPOINT).write_bytes(b"not a model")
    publish(place, run.registry.version("r0"), inputs="again")
    assert run() == 2
    assert "r0, the champion of shapes, cannot be evaluated" in run.error()["message"]


def test_a_checkpoint_of_another_class_map_is_refused(run: Run) -> None:
    run.train(("rectangle", "wolf", "triangle"))
    assert run() == 2
    error = run.error()
    assert "trained for other classes: rectangle, wolf, triangle; the dataset has ellipse as well" in error["message"]
    assert "--force" in error["hint"]
    run.train(("triangle", "rectangle", "ellipse"))  # another order is no other map
    assert run() == 0


def test_outputs_that_are_not_finite_have_no_score(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite weights may overflow, most likely in half precision."""
    forward = RFDETR.forward

    def overflowing(self: RFDETR, *arguments: Any, **options: Any) -> Any:
        outputs = forward(self, *arguments, **options)
        return {**outputs, "pred_logits": outputs["pred_logits"] * float("nan")}

    monkeypatch.setattr(RFDETR, "forward", overflowing)
    assert run() == 2
    assert f"{CHECKPOINT}: the model's scores or boxes are not finite on some image" in run.error()["message"]


def without_boxes(data: Path, folder: Path, *splits: str) -> Path:
    """A copy of the dataset in which these splits have images and no annotations."""
    shutil.copytree(data, folder)
    for split in splits:
        path = folder / split / "_annotations.coco.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": []}))
    return folder


def test_without_a_box_in_test_valid_is_measured_and_that_is_said(tmp_path: Path, data: Path) -> None:
    run = Run(tmp_path, without_boxes(data, tmp_path / "coco", "test"))
    assert run() == 0
    found = run.json("evaluate/metrics.json")
    assert (found["split"], found["requested_split"]) == ("valid", "test")
    assert found["split_note"] == "measured on valid, because no image of test has a box"
    assert found["split_note"] in (run.place / "logs" / "evaluate.log").read_text()
    assert found["split_note"] in (run.place / "evaluate" / "report.html").read_text()
    assert found["candidate"]["map"] >= 0


@pytest.mark.parametrize(("split", "named"), [("test", "test or valid"), ("valid", "valid")])
def test_without_a_box_anywhere_nothing_can_be_measured(tmp_path: Path, data: Path, split: str, named: str) -> None:
    run = Run(tmp_path, without_boxes(data, tmp_path / "coco", "test", "valid"), split=split)
    assert run() == 2
    assert run.error()["message"] == f"no image of {named} has a box: there is nothing to measure on"
