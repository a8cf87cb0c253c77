"""Weight files go to and fro between rfdetr 1.11.2 and us, and detect the same on both sides.

The package runs as it is, in an environment of its own (`make peer`). Images have the model's own size, where
resampling, which the two do differently, is the identity.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from rfdetr_core import RFDETR, RFDETRNano
from rfdetr_core.coco_names import COCO_NAMES
from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.data.sample import draw_image
from rfdetr_core.detector_files import write_detector
from rfdetr_core.evaluation.detections import Detections
from rfdetr_core.evaluation.metrics import coco_metrics
from rfdetr_core.models.weights import TrainedModel
from rfdetr_core.training import checkpoint
from rfdetr_core.training.state import Position, keep_best
from tests.models import golden
from tests.training import tiny

ROOT = Path(__file__).parents[2]
PEER = ROOT / ".peer" / "bin" / "python"
SIDE = 384
THRESHOLD = 0.1

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not PEER.exists(), reason="the reference package is not installed: make peer"),
]


def in_peer(*arguments: str | Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([PEER, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


def drawn(folder: Path, side: int) -> list[Path]:
    paths = [folder / f"{seed}.png" for seed in range(2)]
    for seed, path in enumerate(paths):
        draw_image(np.random.default_rng(seed), side, 6)[0].resize((side, side)).save(path)
    return paths


def detections_there(tasks: list[dict[str, Any]], images: list[Path], folder: Path) -> list[Any]:
    """What the reference package finds; see detect.py."""
    tasks = [{**task, "images": [*map(str, images)], "threshold": THRESHOLD} for task in tasks]
    (folder / "tasks.json").write_text(json.dumps(tasks))
    in_peer(ROOT / "tests" / "peer" / "detect.py", folder / "tasks.json", folder / "results.json")
    results: list[Any] = json.loads((folder / "results.json").read_bytes())
    return results


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return drawn(tmp_path_factory.mktemp("images"), SIDE)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Ours, with a spare class; and two in the published form, of three classes and of COCO's 91 slots."""
    folder = tmp_path_factory.mktemp("weights")
    paths = {name: folder / f"{name}.pth" for name in ("ours", "custom", "coco")}
    model = golden.build(variant="nano", num_classes=4)
    _write_best(model, tiny.prepare(tiny.draw(folder / "drawn"), folder / "prepared"), paths["ours"])
    names = Namespace(class_names=["ant", "bee", "fly"], num_queries=300, group_detr=13, patch_size=16)
    torch.save({"model": golden.build(variant="nano", num_classes=3).state_dict(), "args": names}, paths["custom"])
    torch.save(
        {"model": golden.build(variant="nano", num_classes=90).state_dict(), "args": Namespace(num_classes=90)},
        paths["coco"],
    )
    return paths


def _write_best(model: Any, dataset: PreparedDataset, path: Path) -> None:
    """As training writes its best weights, with all that it keeps beside them."""
    job = dataclasses.replace(tiny.job(dataset, path.parent), model=model.config)
    split = dataset.split("valid")
    metrics = coco_metrics(split.table, dataset.class_map, Detections.concatenate([]), max_dets=500)
    engine, outbox = SimpleNamespace(ema=None, raw_model=model), SimpleNamespace(put=lambda _: None)
    keep_best(job, engine, Position(seed=0), {"regular": metrics}, 0, outbox)
    (path.parent / checkpoint.BEST_TOTAL).rename(path)


@pytest.fixture(scope="module")
def theirs(files: dict[str, Path], images: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the reference package finds, by file and way of loading."""
    folder = tmp_path_factory.mktemp("peer")
    ways = [("ours", "RFDETRNano"), ("ours", "from_checkpoint"), ("custom", "RFDETRNano"), ("coco", "RFDETRNano")]
    results = detections_there([{"how": how, "weights": str(files[name])} for name, how in ways], images, folder)
    return {f"{name} by {how}": result for (name, how), result in zip(ways, results, strict=True)}


def assert_detects_the_same(model: RFDETR, images: list[Path], expected: dict[str, Any]) -> None:
    assert expected["class"] == type(model).__name__
    for found, peer in zip(model.predict(images, threshold=THRESHOLD), expected["images"], strict=True):
        # The head's spare columns stay in the package's result; ours has only what has a name.
        named = np.isin(peer["class_names"], [name for name in model.class_names if name])
        ours = (found.class_ids, np.array(found.class_names), found.scores, found.boxes)
        theirs = tuple(np.array(peer[key])[named] for key in ("class_ids", "class_names", "scores", "boxes"))
        same = np.logical_and.reduce(
            [
                ours[0][:, None] == theirs[0],
                ours[1][:, None] == theirs[1],
                np.abs(ours[2][:, None] - theirs[2]) <= 1e-4,
                np.abs(ours[3][:, None] - theirs[3]).max(axis=2) <= 1e-2,
            ]
        )
        rows, columns = linear_sum_assignment(same, maximize=True)
        pairs = same[rows, columns]
        # Rounding decides the order of equal scores, and so which of the last ones are among the selected.
        lowest = max(ours[2].min(), theirs[2].min()) + 1e-4
        for scores, paired in ((ours[2], rows[pairs]), (theirs[2], columns[pairs])):
            assert set(np.flatnonzero(scores > lowest)) <= set(paired)
        assert (ours[2] > lowest).sum() >= 5


@pytest.mark.parametrize("how", ["RFDETRNano", "from_checkpoint"])
def test_our_file_loads_there(theirs: dict[str, Any], files: dict[str, Path], images: list[Path], how: str) -> None:
    model = RFDETRNano.from_checkpoint(files["ours"])
    assert model.class_names == ("rectangle", "ellipse", "triangle")
    assert_detects_the_same(model, images, theirs[f"ours by {how}"])


def test_our_files_name_no_field_that_is_unknown_there() -> None:
    in_peer(
        "-c",
        "import sys; from rfdetr.config import ModelConfig\n"
        "unknown = set(sys.argv[1:]) - set(ModelConfig.model_fields)\n"
        "assert not unknown, unknown",
        *checkpoint.PUBLISHED_FIELDS,
    )


def test_a_published_file_of_own_classes_loads_here(
    theirs: dict[str, Any], files: dict[str, Path], images: list[Path]
) -> None:
    for model in (RFDETRNano(pretrain_weights=files["custom"]), RFDETR.from_checkpoint(files["custom"])):
        assert model.class_names == ("ant", "bee", "fly")
        assert_detects_the_same(model, images, theirs["custom by RFDETRNano"])


def test_a_published_file_of_coco_loads_here(
    theirs: dict[str, Any], files: dict[str, Path], images: list[Path], tmp_path: Path
) -> None:
    model = RFDETRNano(pretrain_weights=files["coco"])
    expected = theirs["coco by RFDETRNano"]
    assert {int(i) for image in expected["images"] for i in image["class_ids"]} & set(COCO_NAMES)
    assert_detects_the_same(model, images, expected)
    model.save(tmp_path / "saved.pth")
    assert_detects_the_same(RFDETR.from_checkpoint(tmp_path / "saved.pth"), images, expected)


def test_a_file_with_adapters_detects_here_what_it_detects_there(
    files: dict[str, Path], images: list[Path], tmp_path: Path
) -> None:
    """There its layers compute with their adapters; here these are merged when the file is read."""
    path = tmp_path / "adapters.pth"
    task = {"how": "RFDETRNano", "weights": str(files["custom"]), "options": {"backbone_lora": True}}
    trained, plain = detections_there(
        [{**task, "train_adapters": True, "write": str(path)}, {**task, "options": {}}], images, tmp_path
    )
    assert trained["images"][0]["boxes"][:5] != plain["images"][0]["boxes"][:5]
    content = torch.load(path, weights_only=True)
    assert sum(".lora_" in key for key in content["model"]) == 12 * 3 * 3  # blocks, of q, k, v: A, B, magnitude
    for model in (RFDETRNano(pretrain_weights=path), RFDETR.from_checkpoint(path)):
        assert model.class_names == ("ant", "bee", "fly")
        assert_detects_the_same(model, images, trained)


@pytest.mark.parametrize("variant", ["base", "large-deprecated"])
def test_other_variants_to_and_fro(variant: str, tmp_path: Path) -> None:
    """Patches of 14 pixels, 4 x 4 windows, a block without effect; the large one has two scales as well."""
    images = drawn(tmp_path, 280)
    module = golden.build(variant=variant, num_classes=3, resolution=280)
    ours, theirs = tmp_path / "ours.pth", tmp_path / "theirs.pth"
    write_detector(TrainedModel(module.eval(), module.config, ("ant", "bee", "fly"), "ema", 0, ""), ours)
    del module
    task = {"how": "from_checkpoint", "weights": str(ours), "write": str(theirs)}
    (expected,) = detections_there([task], images, tmp_path)
    for path in (ours, theirs):
        assert_detects_the_same(RFDETR.from_checkpoint(path), images, expected)


def test_supervision_gets_what_was_predicted() -> None:
    """The library is installed there, as a dependency of the package."""
    in_peer(
        "-c",
        """
import numpy as np
import supervision
from rfdetr_core.prediction import Prediction

boxes = np.array([[1.0, 2.0, 30.5, 40.0], [5.0, 6.0, 7.0, 8.0]])
prediction = Prediction(boxes, np.array([0.75, 0.5]), np.array([4, 0]), ("cat", "dog"))
found = prediction.to_supervision()
assert isinstance(found, supervision.Detections)
assert found.xyxy.tolist() == boxes.tolist() and found.confidence.tolist() == [0.75, 0.5]
assert found.class_id.tolist() == [4, 0] and found["class_name"].tolist() == ["cat", "dog"]
assert len(found[found.confidence > 0.6]) == 1
empty = Prediction(boxes[:0], np.empty(0), np.empty(0, dtype=np.int64), ()).to_supervision()
assert len(empty) == 0 and empty.xyxy.shape == (0, 4)
""",
    )
