"""The train stage under the same run id: what it takes over of earlier attempts, and what it does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from components.probe_batch_size import stage as probe_batch_size
from components.train import stage as train
from components.validate_dataset import stage as validate_dataset
from rfdetr_core.publication import MANIFEST, publish, read_manifest
from rfdetr_core.storage import location
from rfdetr_core.training import checkpoint
from tests.training import tiny

ARCHITECTURE = {name: value for name, value in tiny.MODEL.items() if name != "num_classes"}


class Run:
    """The first three stages of one run, in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = tiny.draw(folder / "coco")
        self.place = folder / "root" / "runs" / "r1"
        self.checkpoints = self.place / "train" / "checkpoints"

    def __call__(self, **settings: Any) -> int:
        """Give the run these settings, and go through its stages; returns the last exit code."""
        base = {**tiny.TRAIN, "epochs": 2, "batch_size": 2, "grad_accum_steps": 1, "checkpoint_interval": 1}
        sections = {
            "name": "shapes",
            "dataset": {"uri": str(self.data)},
            "model": ARCHITECTURE,
            "train": {**base, **settings},
        }
        config = self.folder / "config.yaml"
        config.write_text(json.dumps(sections))  # JSON is YAML
        codes = [validate_dataset.main(["--run-uri", str(self.place), "--config", str(config)])]
        codes += [stage.main(["--run-uri", str(self.place)]) for stage in (probe_batch_size, train)]
        assert codes[:-1] == [0, 0]
        return codes[-1]

    def result(self) -> Any:
        return json.loads((self.place / "train" / "result.json").read_text())

    def unpublished(self) -> None:
        """As a pod leaves it that was lost in training."""
        (self.place / "train" / MANIFEST).unlink()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def weights(path: Path) -> Any:
    return checkpoint.load(path)["model"]


def test_what_does_not_change_the_numbers_costs_no_training(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run() == 0
    before = run.result()
    monkeypatch.setattr("rfdetr_core.training.loop.windows", None)  # whoever trains calls it
    assert run(num_workers=1, max_hours=5.0, progress_bar="tqdm", checkpoint_interval=2) == 0
    after = run.result()
    assert (after["optimizer_steps"], after["best_score"]) == (before["optimizer_steps"], before["best_score"])
    assert (run.place / "train" / MANIFEST).exists()


def test_more_epochs_go_on_and_fewer_are_done_already(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(epochs=1) == 0
    assert run(epochs=2) == 0
    assert "continuing after epoch 1, optimizer step 5" in capsys.readouterr().out
    assert run.result()["optimizer_steps"] == 10
    assert run(epochs=1) == 0
    assert "2 epochs are trained already, train.epochs asks for 1" in capsys.readouterr().out
    assert run.result()["optimizer_steps"] == 10


def test_another_rate_is_another_training(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(epochs=1) == 0
    assert run(epochs=1, lr=1e-3) == 0
    told = "of another training (train.lr 0.0001, here 0.001): training starts anew"
    assert told in capsys.readouterr().out
    assert checkpoint.load(run.checkpoints / checkpoint.LATEST)["train_config"]["lr"] == 1e-3


@pytest.mark.parametrize("lost", ["gone", "torn"])
def test_without_the_newest_checkpoint_a_periodic_one_serves(run: Run, lost: str) -> None:
    assert run() == 0
    run.unpublished()
    latest, periodic = run.checkpoints / checkpoint.LATEST, run.checkpoints / "checkpoint_1.pth"
    whole, trained = weights(latest), weights(periodic)
    assert all(bool((whole[name] == trained[name]).all()) for name in whole)
    if lost == "gone":
        latest.unlink()
    else:
        latest.write_bytes(latest.read_bytes()[:-5000])
    assert run() == 0
    assert run.result()["optimizer_steps"] == 10
    again = weights(run.checkpoints / checkpoint.BEST_TOTAL)
    assert again.keys() == whole.keys()


class TestProbedElsewhere:
    """probe.json of another device: the train stage probes anew, and says so."""

    def elsewhere(self, run: Run) -> None:
        """Let the probe's result be that of a GPU which this machine does not have."""
        folder = location(str(run.place / "probe"))
        manifest = read_manifest(folder)
        assert manifest is not None
        path = run.place / "probe" / "probe.json"
        document = json.loads(path.read_text())
        document["device"] = {"kind": "cuda", "name": "A GPU", "memory_bytes": 80 * 2**30, "driver": ""}
        path.write_text(json.dumps(document))
        (run.place / "probe" / MANIFEST).unlink()
        local = run.folder / "again"
        shutil.copytree(run.place / "probe", local)
        publish(local, folder, inputs=manifest.inputs)

    def test_the_batch_is_proven_here(self, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(batch_size="auto", auto_batch_target_effective=2) == 0
        assert "probed again" not in capsys.readouterr().out
        assert run.result()["predicted_peak_bytes"] is None or run.result()["predicted_peak_bytes"] > 10**8
        self.elsewhere(run)
        assert train.main(["--run-uri", str(run.place), "--force"]) == 0
        said = capsys.readouterr().out
        assert "the batch size is probed again: it ran on A GPU, and this is cpu" in said
        assert "the largest batch that this dataset can give fits: 2 images of 32 x 32 px" in said
        assert run.result()["peak_memory_bytes"] > 10**8


def test_the_probe_leaves_what_people_look_at(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"train": {**tiny.TRAIN, "batch_size": 2}, "probe": {"price_per_hour": 2.0}}
    base = {"name": "shapes", "dataset": {"uri": str(run.data)}, "model": ARCHITECTURE}
    path = run.folder / "config.yaml"
    path.write_text(json.dumps({**base, **config}))
    assert validate_dataset.main(["--run-uri", str(run.place), "--config", str(path)]) == 0
    assert probe_batch_size.main(["--run-uri", str(run.place)]) == 0
    said = capsys.readouterr().out
    assert "batch 2 x 4 = 8 per device (the batch was given; safe: 2) on cpu" in said
    assert "at 2 per hour" in said
    found = json.loads((run.place / "probe" / "probe.json").read_text())
    assert found["cost"]["price"] == pytest.approx(2 * found["cost"]["hours"])
    assert (run.place / "probe" / "probe.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png" in (run.place / "probe" / "report.html").read_text()
