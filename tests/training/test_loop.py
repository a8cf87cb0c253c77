"""The training loop: reproducible, resumable at any instant, and honest about which weights are the best."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rfdetr_core.data.loading import EpochSampler, LoaderSettings
from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.errors import CheckpointError, DeviceMemoryError, Terminated, TrainingError
from rfdetr_core.evaluation.detections import Detections
from rfdetr_core.evaluation.evaluate import evaluate_model
from rfdetr_core.evaluation.metrics import CocoMetrics, coco_metrics
from rfdetr_core.models.detector import RFDETR
from rfdetr_core.models.weight_file import WeightFile, read_weight_file
from rfdetr_core.training import batches, checkpoint, validation
from rfdetr_core.training.clock import Clock
from rfdetr_core.training.criterion import Criterion
from rfdetr_core.training.engine import Engine
from rfdetr_core.training.loop import TrainingJob, train
from tests.models.golden import fill_w1
from tests.training import tiny

INTERRUPTED: dict[str, Any] = {
    "accum": 2,
    "batch": 1,
    "epochs": 2,
    "drop_path": 0.3,  # reads torch's random stream
    "multi_scale": "per-batch",
    "expanded_scales": False,
    "lr_scheduler": "cosine",
    "warmup_epochs": 0.5,
    "checkpoint_interval": 1,
    "early_stopping": True,
    "eval_batch_size": 2,
}
"""Settings of the trainings that are interrupted: all that could tell that they were."""


def weight_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.pth"))


def latest(folder: Path) -> dict[str, Any]:
    return checkpoint.load(folder / checkpoint.LATEST)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stop_at(*calls: int) -> Callable[[], bool]:
    """A stop_requested that is true at these calls, counted from 1."""
    counter = iter(range(1, 10_000))
    return lambda: next(counter) in calls


def train_in_pieces(job: TrainingJob, calls: Iterable[int]) -> list[tuple[int, int]]:
    """Train with stops, each after so many calls of stop_requested; returns epoch and step of each stop."""
    stops = []
    for call in calls:
        try:
            train(job, stop_requested=stop_at(call))
        except Terminated:
            position = latest(job.checkpoints)["position"]
            stops.append((position["epoch"], position["step"]))
            continue
        return stops
    raise AssertionError("training does not get ahead")


def assert_same_training(a: Path, b: Path) -> None:
    """Everything in every checkpoint, but for where it was made; and the rows of the metrics."""
    assert weight_files(a) == weight_files(b)
    for name in weight_files(a):
        left, right = checkpoint.load(a / name), checkpoint.load(b / name)
        for content in (left, right):
            del content["train_config"]["num_workers"]
        assert not tiny.differing(left, right), name
    assert not tiny.differing(rows(a), rows(b))


class Scores:
    """Replaces the metric of each evaluation by a series, raw and EMA in turn; counts the evaluations."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, metric: str = "map", **series: list[float]) -> None:
        self.evaluations = 0
        values = iter([value for row in zip(*series.values(), strict=True) for value in row])
        calls = 0

        def scored(*args: Any, **kwargs: Any) -> CocoMetrics:
            nonlocal calls
            calls += 1
            self.evaluations = calls // len(series)
            return dataclasses.replace(coco_metrics(*args, **kwargs), **{metric: next(values)})

        monkeypatch.setattr(validation, "coco_metrics", scored)


class TestReproducibility:
    @pytest.mark.parameter("seed")
    def test_the_same_seed_gives_the_same_training(self, dataset: PreparedDataset, tmp_path: Path) -> None:
        settings = {"drop_path": 0.3, "multi_scale": "per-batch", "expanded_scales": False}
        for name in ("a", "b"):
            train(tiny.job(dataset, tmp_path / name, epochs=1, **settings))
        assert_same_training(tmp_path / "a", tmp_path / "b")

    @pytest.mark.parameter("seed")
    def test_another_seed_gives_another(self, dataset: PreparedDataset, tmp_path: Path) -> None:
        for seed in (1, 2):
            train(tiny.job(dataset, tmp_path / str(seed), epochs=1, seed=seed))
        one, two = (latest(tmp_path / str(seed))["model"] for seed in (1, 2))
        assert not torch.equal(one["class_embed.weight"], two["class_embed.weight"])

    @pytest.mark.parameter("seed")
    def test_no_seed_draws_one_and_records_it(self, dataset: PreparedDataset, tmp_path: Path) -> None:
        first = train(tiny.job(dataset, tmp_path / "a", epochs=1, seed=None))
        second = train(tiny.job(dataset, tmp_path / "b", epochs=1, seed=None))
        assert first.seed != second.seed
        assert latest(tmp_path / "a")["position"]["seed"] == first.seed
        again = train(tiny.job(dataset, tmp_path / "c", epochs=1, seed=first.seed))
        assert again.seed == first.seed
        weights = [latest(tmp_path / name)["model"] for name in ("a", "c")]
        assert not tiny.differing(*weights)

    def test_a_resumed_training_keeps_the_drawn_seed(self, dataset: PreparedDataset, tmp_path: Path) -> None:
        job = tiny.job(dataset, tmp_path, epochs=1, seed=None)
        with pytest.raises(Terminated):
            train(job, stop_requested=stop_at(1))
        assert train(job).seed == latest(tmp_path)["position"]["seed"]


@pytest.fixture(scope="module")
def whole(dataset: PreparedDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    train(tiny.job(dataset, folder, **INTERRUPTED))
    return folder


class TestResume:
    """train N is train k, stop, resume, train N - k: bit for bit on a CPU."""

    @pytest.mark.long
    def test_stopped_anywhere(self, dataset: PreparedDataset, tmp_path: Path, whole: Path) -> None:
        """Between two steps, within a step, in the evaluation, and after the border of the epochs.

        An epoch has five steps, with a question before each of their two micro-batches, and two evaluated batches.
        """
        stops = train_in_pieces(tiny.job(dataset, tmp_path, **INTERRUPTED), [3, 4, 5] * 5)
        between, within, evaluation = [(0, 1), (0, 4), (1, 2), (1, 3)], [(0, 2), (1, 0), (1, 4)], [(0, 5)]
        assert stops == sorted(between + within + evaluation)
        assert_same_training(whole, tmp_path)

    @pytest.mark.long
    def test_with_other_workers(self, dataset: PreparedDataset, tmp_path: Path, whole: Path) -> None:
        """Neither their number nor a change of it can be seen in the result."""
        job = tiny.job(dataset, tmp_path, num_workers=2, **INTERRUPTED)
        with pytest.raises(Terminated):
            train(job, stop_requested=stop_at(2))
        train(job)
        assert_same_training(whole, tmp_path)

    def test_the_stop_is_clean(self, dataset: PreparedDataset, tmp_path: Path) -> None:
        job = tiny.job(dataset, tmp_path, **INTERRUPTED)
        with pytest.raises(Terminated, match=r"after optimizer step 3 .*same command again") as caught:
            train(job, stop_requested=stop_at(8))  # within the fourth
        assert caught.value.exit_code == 143
        position = latest(tmp_path)["position"]
        assert (position["epoch"], position["step"], position["global_step"]) == (0, 3, 3)
        assert weight_files(tmp_path) == ["checkpoint.pth"]
        assert rows(tmp_path) == []

    def test_a_stop_in_the_evaluation_does_not_wait_for_its_end(
        self, dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scores = Scores(monkeypatch, raw=[0.1], ema=[0.1])
        with pytest.raises(Terminated, match="after optimizer step 5 "):
            train(tiny.job(dataset, tmp_path, epochs=1), stop_requested=stop_at(6))
        assert scores.evaluations == 0
        assert latest(tmp_path)["position"]["step"] == 5

    def test_a_killed_process_resumes_from_its_last_whole_checkpoint(
        self, dataset: PreparedDataset, tmp_path: Path, whole: Path
    ) -> None:
        job = tiny.job(dataset, tmp_path, **INTERRUPTED)
        # A checkpoint after every step; killed with SIGKILL as the seventh of them is being written.
        program = f"""
import os, signal, torch
from pathlib import Path
from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.training import loop
from tests.training import tiny
from tests.training.test_loop import INTERRUPTED
torch.set_num_threads({torch.get_num_threads()})  # results are equal to the bit for equal threads only
job = tiny.job(PreparedDataset(Path({str(dataset.folder)!r})), Path({str(tmp_path)!r}),
               checkpoint_minutes=1e-9, **INTERRUPTED)
saves, fsync = 0, os.fsync
def kill_at_the_seventh(descriptor):
    global saves
    saves += 1
    if saves == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)
os.fsync = kill_at_the_seventh
loop.train(job)
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path.cwd())
        assert done.returncode == -signal.SIGKILL, done.stderr
        position = latest(tmp_path)["position"]
        assert 0 < position["global_step"] < 10
        assert list(tmp_path.glob(".*.part"))  # the write that was cut off

        train(job)
        for name in weight_files(whole):
            left, right = checkpoint.load(whole / name), checkpoint.load(tmp_path / name)
            assert not [key for key in tiny.differing(left, right) if key != "train_config.checkpoint_minutes"]
        assert not tiny.differing(rows(whole), rows(tmp_path))
        assert not list(tmp_path.glob(".*.part"))

    def test_a_finished_training_returns_at_once(
        self, dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job = tiny.job(dataset, tmp_path, epochs=1)
        first, before = train(job), (tmp_path / "metrics.csv").read_text()
        monkeypatch.setattr(Engine, "optimizer_step", None)
        published: list[Path] = []
        second = train(job, publish=published.append)
        same = ("epochs", "optimizer_steps", "seed", "best_source", "best_score", "best_epoch", "stopped_early")
        assert [getattr(first, name) for name in same] == [getattr(second, name) for name in same]
        assert published == []
        assert (tmp_path / "metrics.csv").read_text() == before

    def test_metrics_files_equal_the_history_after_resume(self, dataset: PreparedDataset, tmp_path: Path) -> None:
        job = tiny.job(dataset, tmp_path, epochs=2)
        with pytest.raises(Terminated):
            train(job, stop_requested=stop_at(8))
        (tmp_path / "metrics.jsonl").write_text('{"epoch": 0}\n{"epoch": 1, "of": "a lost timeline"}\n')
        train(job)
        history = latest(tmp_path)["position"]["history"]
        assert [row["epoch"] for row in history] == [0, 1]
        assert rows(tmp_path) == history
        with (tmp_path / "metrics.csv").open() as file:
            table = list(csv.DictReader(file))
        assert [{name: float(value) for name, value in row.items()} for row in table] == history

    def test_other_inputs_start_anew_and_clear_the_folder(
        self, dataset: PreparedDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        train(tiny.job(dataset, tmp_path, epochs=2, checkpoint_interval=1))
        assert "checkpoint_1.pth" in weight_files(tmp_path)
        (tmp_path / "checkpoint_mine.bak").touch()
        other = dataclasses.replace(tiny.job(dataset, tmp_path, epochs=1, use_ema=False), inputs="other")
        caplog.set_level(logging.WARNING)
        result = train(other)
        assert "checkpoint.pth was made with another configuration or dataset: training starts anew" in caplog.text
        assert result.optimizer_steps == 5
        assert len(rows(tmp_path)) == 1
        assert (tmp_path / "checkpoint_mine.bak").exists()
        # nothing of the first training is left under the names of the second
        assert weight_files(tmp_path) == [
            "checkpoint.pth",
            "checkpoint_best_regular.pth",
            "checkpoint_best_total.pth",
        ]
        assert {checkpoint.load(tmp_path / name)["inputs"] for name in weight_files(tmp_path)} == {"other"}


class TestStartWeights:
    @pytest.fixture
    def job(self, dataset: PreparedDataset, tmp_path: Path) -> TrainingJob:
        """A training from weights of five classes; every reading of them is counted in `reads`."""
        module = RFDETR(tiny.model_config(num_classes=5))
        fill_w1(module)
        torch.save({"model": module.state_dict()}, tmp_path / "start.pth")
        self.reads = 0

        def read() -> WeightFile:
            self.reads += 1
            return read_weight_file(tmp_path / "start.pth")

        return dataclasses.replace(tiny.job(dataset, tmp_path / "out", epochs=1), start_weights=read)

    def test_model_and_average_begin_with_them(self, job: TrainingJob) -> None:
        """Before the first step: a stop there leaves a checkpoint of what was loaded, but for one tiny step."""
        still = dataclasses.replace(job, train=tiny.train_config(epochs=1, lr=1e-12, lr_encoder=1e-12))
        with pytest.raises(Terminated):
            train(still, stop_requested=stop_at(1))
        content, start = latest(job.checkpoints), read_weight_file(job.checkpoints.parent / "start.pth").state
        for key, value in start.items():
            expected = value[:4] if "class_embed" in key else value
            for part in ("model", "ema_model"):
                torch.testing.assert_close(content[part][key], expected)

    def test_the_average_holds_them_before_its_first_update(self, job: TrainingJob) -> None:
        late = dataclasses.replace(job, train=tiny.train_config(epochs=1, lr=1e-2, ema_update_interval=5))
        with pytest.raises(Terminated):
            train(late, stop_requested=stop_at(3))
        content, start = latest(job.checkpoints), read_weight_file(job.checkpoints.parent / "start.pth").state
        assert content["ema_updates"] == 0
        torch.testing.assert_close(content["ema_model"]["query_feat.weight"], start["query_feat.weight"])
        assert not torch.equal(content["model"]["query_feat.weight"], start["query_feat.weight"])

    def test_a_continued_training_takes_its_checkpoint(self, job: TrainingJob) -> None:
        with pytest.raises(Terminated):
            train(job, stop_requested=stop_at(3))
        report = (job.output / "weights.json").read_text()
        (job.output / "weights.json").unlink()
        train(job)
        assert self.reads == 1
        assert (job.output / "weights.json").read_text() == report
        assert json.loads(report)["class_rows"] == [6, 4]

    def test_what_was_done_is_told(self, job: TrainingJob, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        train(job)
        assert "class heads have 6 rows in the file and 4 in the model" in caplog.text

    def test_what_does_not_fit_leaves_no_checkpoint(self, job: TrainingJob) -> None:
        other = dataclasses.replace(job, model=tiny.model_config(hidden_dim=16))
        with pytest.raises(CheckpointError, match=r"start\.pth: .* in the model ") as caught:
            train(other)
        assert "\n" not in str(caught.value)
        assert weight_files(job.checkpoints) == []


class TestUnusableCheckpoints:
    @pytest.fixture
    def stopped(self, dataset: PreparedDataset, tmp_path: Path) -> TrainingJob:
        job = tiny.job(dataset, tmp_path, epochs=1)
        with pytest.raises(Terminated):
            train(job, stop_requested=stop_at(1))
        return job

    def refused(self, job: TrainingJob, reason: str) -> None:
        with pytest.raises(CheckpointError, match=reason) as caught:
            train(job)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400

    def test_a_torn_file(self, stopped: TrainingJob) -> None:
        path = stopped.checkpoints / "checkpoint.pth"
        path.write_bytes(path.read_bytes()[:-5000])
        self.refused(stopped, r"checkpoint\.pth: not a readable checkpoint: ")

    def test_another_architecture(self, stopped: TrainingJob) -> None:
        other = dataclasses.replace(stopped, model=tiny.model_config(num_queries=9))
        self.refused(other, r"checkpoint\.pth does not fit this training: .*size mismatch for refpoint_embed")

    @pytest.mark.parametrize("lost", ["optimizer", "position", "early_stopping", "rng", "ema_model"])
    def test_a_part_is_lacking(self, stopped: TrainingJob, lost: str) -> None:
        content = checkpoint.load(stopped.checkpoints / "checkpoint.pth")
        del content[lost]
        checkpoint.save(content, stopped.checkpoints / "checkpoint.pth")
        self.refused(stopped, f"does not fit this training: no '{lost}'")

    def test_a_position_of_another_program(self, stopped: TrainingJob) -> None:
        content = checkpoint.load(stopped.checkpoints / "checkpoint.pth")
        content["position"]["phase"] = 1
        checkpoint.save(content, stopped.checkpoints / "checkpoint.pth")
        self.refused(stopped, "unexpected keyword argument 'phase'")


class TestFiles:
    @pytest.mark.parameter("checkpoint_interval", "use_ema", "epochs")
    def test_names_contents_and_publication(self, dataset: PreparedDataset, tmp_path: Path) -> None:
        """Every file is whole when it is published, and nothing else is."""
        published: list[tuple[str, int]] = []

        def publish(path: Path) -> None:
            content = checkpoint.load(path)
            epoch = content["epoch"] if "epoch" in content else content["position"]["epoch"]
            published.append((path.name, epoch))

        job = tiny.job(dataset, tmp_path, epochs=5, checkpoint_interval=2, eval_interval=5)
        train(job, publish=publish)
        best = ["checkpoint_best_ema.pth", "checkpoint_best_regular.pth", "checkpoint_best_total.pth"]
        periodic = ["checkpoint_1.pth", "checkpoint_3.pth"]
        assert weight_files(tmp_path) == sorted(["checkpoint.pth", *best, *periodic])
        assert [epoch for name, epoch in published if name == "checkpoint.pth"] == [2, 4, 5]
        assert [row for row in published if row[0] in periodic] == [("checkpoint_1.pth", 2), ("checkpoint_3.pth", 4)]
        assert {name for name, _ in published} == set(weight_files(tmp_path))
        # later stages must find the best weights wherever a checkpoint tells of them
        assert [name for name, _ in published].index("checkpoint_best_total.pth") < len(published) - 1

        content = latest(tmp_path)
        assert content["train_config"] == job.train.model_dump(mode="json")
        assert content["config"] == job.model.model_dump(mode="json")
        assert [row["name"] for row in content["classes"]] == ["rectangle", "ellipse", "triangle"]
        assert content["dataset_digest"] == dataset.digest
        assert content["ema_updates"] == content["position"]["global_step"] == 25
        assert not tiny.differing(content["model"], checkpoint.load(tmp_path / best[1])["model"])
        assert not tiny.differing(content["ema_model"], checkpoint.load(tmp_path / best[0])["model"])
        assert tiny.differing(content["model"], content["ema_model"])

    def test_best_weights_detect_what_their_evaluation_saw(
        self, dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[Detections] = []

        def record(table: Any, class_map: Any, detections: Detections, **settings: Any) -> CocoMetrics:
            seen.append(detections)
            return coco_metrics(table, class_map, detections, **settings)

        monkeypatch.setattr(validation, "coco_metrics", record)
        train(tiny.job(dataset, tmp_path, epochs=1, lr=2e-3))
        for source, expected in zip(("regular", "ema"), seen, strict=True):
            path = tmp_path / f"checkpoint_best_{source}.pth"
            metrics, found = evaluate_model(
                checkpoint.load_trained(path),
                dataset.split("valid"),
                dataset.class_map,
                batch_size=3,
                max_dets=500,
                device=torch.device("cpu"),
                loading=LoaderSettings(0, None, None, None),
            )
            assert len(found.scores) > 20
            np.testing.assert_array_equal(found.labels, expected.labels)
            np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4)
            np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-3)
            assert tiny.flat(checkpoint.load(path)["metrics"]) == pytest.approx(tiny.flat(metrics.to_json()))
        assert not np.allclose(seen[0].scores, seen[1].scores, rtol=1e-4)

    def test_checkpoints_within_an_epoch(self, dataset: PreparedDataset, tmp_path: Path) -> None:
        steps: list[tuple[int, int]] = []

        def publish(path: Path) -> None:
            position = checkpoint.load(path).get("position")
            if position is not None:
                steps.append((position["epoch"], position["step"]))

        train(tiny.job(dataset, tmp_path, epochs=1, checkpoint_minutes=1e-9), publish=publish)
        assert steps == [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (1, 0)]

    @pytest.mark.parametrize(
        ("lost", "total"),
        [("regular", ("ema", 0, 0.8)), ("ema", ("regular", 0, 0.9)), ("total", ("regular", 0, 0.9))],
    )
    def test_lost_best_weights_are_replaced(
        self,
        dataset: PreparedDataset,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        lost: str,
        total: tuple[str, int, float],
    ) -> None:
        """The newest checkpoint reached the store, some of the best weights that it tells of did not."""
        Scores(monkeypatch, raw=[0.9, 0.2], ema=[0.8, 0.1])
        job = tiny.job(dataset, tmp_path, epochs=2)
        with pytest.raises(Terminated):
            train(job, stop_requested=stop_at(9))
        (tmp_path / f"checkpoint_best_{lost}.pth").unlink()
        published: list[str] = []
        result = train(job, publish=lambda path: published.append(path.name))
        assert (result.best_source, result.best_epoch, result.best_score) == total
        found = best_files(tmp_path)
        assert found["total"] == total[:2]
        assert found[lost] == (total[:2] if lost == "total" else (lost, 1))
        assert f"checkpoint_best_{lost}.pth" in published

    def test_best_weights_lost_after_the_end_are_replaced_by_the_last(
        self, dataset: PreparedDataset, tmp_path: Path
    ) -> None:
        job = tiny.job(dataset, tmp_path, epochs=1)
        train(job)
        for path in tmp_path.glob("checkpoint_best_*.pth"):
            path.unlink()
        result = train(job)
        content = checkpoint.load(tmp_path / "checkpoint_best_total.pth")
        assert (content["source"], content["epoch"]) == (result.best_source, 0)
        assert content["metrics"]["map"] == result.best_score


def best_files(folder: Path) -> dict[str, tuple[str, int]]:
    """What each best file says of itself: source and epoch."""
    contents = {path.stem.removeprefix("checkpoint_best_"): checkpoint.load(path) for path in folder.glob("*best*")}
    return {name: (content["source"], content["epoch"]) for name, content in contents.items()}


class TestBest:
    @pytest.mark.parametrize(
        ("ema", "total"),
        [(0.49, ("regular", 1)), (0.51, ("ema", 2)), (0.5, ("regular", 1))],
        ids=["raw is better", "ema is better", "a tie goes to the raw weights"],
    )
    def test_the_best_of_each_kind_and_overall(
        self,
        dataset: PreparedDataset,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        ema: float,
        total: tuple[str, int],
    ) -> None:
        Scores(monkeypatch, raw=[0.3, 0.5, 0.4], ema=[0.2, 0.45, ema])
        result = train(tiny.job(dataset, tmp_path, epochs=3, checkpoint_interval=1))
        assert best_files(tmp_path) == {"regular": ("regular", 1), "ema": ("ema", 2), "total": total}
        assert (result.best_source, result.best_epoch) == total
        assert result.best_score == max(0.5, ema)
        of_epoch = {epoch: checkpoint.load(tmp_path / f"checkpoint_{epoch}.pth") for epoch in range(3)}
        found = {
            name: checkpoint.load(tmp_path / f"checkpoint_best_{name}.pth") for name in ("regular", "ema", "total")
        }
        assert not tiny.differing(found["regular"]["model"], of_epoch[1]["model"])
        assert not tiny.differing(found["ema"]["model"], of_epoch[2]["ema_model"])
        kind = "model" if total[0] == "regular" else "ema_model"
        assert not tiny.differing(found["total"]["model"], of_epoch[total[1]][kind])
        assert found["total"]["metrics"]["map"] == result.best_score

    def test_the_first_evaluation_always_counts(
        self, dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Scores(monkeypatch, raw=[-1.0], ema=[-1.0])  # COCO's value where nothing is annotated
        train(tiny.job(dataset, tmp_path, epochs=1))
        assert set(best_files(tmp_path)) == {"regular", "ema", "total"}

    def test_skipped_epochs_cannot_be_the_best(
        self, dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Scores(monkeypatch, raw=[0.9, 0.2, 0.1], ema=[0.9, 0.1, 0.2])
        job = tiny.job(dataset, tmp_path, epochs=3, skip_best_epochs=1, early_stopping=True, early_stopping_patience=2)
        result = train(job)
        assert best_files(tmp_path) == {"regular": ("regular", 1), "ema": ("ema", 2), "total": ("regular", 1)}
        assert result.best_score == 0.2
        assert not result.stopped_early  # against the skipped 0.9 it would have

    def test_recall_can_decide(self, dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        Scores(monkeypatch, metric="mar", raw=[0.6, 0.5], ema=[0.1, 0.7])
        result = train(tiny.job(dataset, tmp_path, epochs=2, best_model_metric="mar"))
        assert best_files(tmp_path) == {"regular": ("regular", 0), "ema": ("ema", 1), "total": ("ema", 1)}
        assert result.best_score == 0.7

    @pytest.mark.parameter("use_ema")
    def test_without_ema(self, dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        Scores(monkeypatch, raw=[0.5])
        result = train(tiny.job(dataset, tmp_path, epochs=1, use_ema=False))
        assert best_files(tmp_path) == {"regular": ("regular", 0), "total": ("regular", 0)}
        assert result.best_source == "regular"
        assert latest(tmp_path)["ema_model"] is None
        assert not [name for name in rows(tmp_path)[0] if "ema" in name]

    def test_without_evaluating_the_raw_weights(
        self, dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Scores(monkeypatch, ema=[0.5])
        result = train(tiny.job(dataset, tmp_path, epochs=1, eval_base_model=False))
        assert best_files(tmp_path) == {"ema": ("ema", 0), "total": ("ema", 0)}
        assert result.best_source == "ema"
        assert "val/mAP_50_95" not in rows(tmp_path)[0]


class TestEvaluation:
    @pytest.mark.parameter("eval_interval")
    def test_every_interval_and_at_the_end(
        self, dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scores = Scores(monkeypatch, raw=[0.1, 0.2, 0.3], ema=[0.4, 0.5, 0.6])
        train(tiny.job(dataset, tmp_path, epochs=5, eval_interval=2))
        assert scores.evaluations == 3
        evaluated = {
            row["epoch"]: (row["val/mAP_50_95"], row["val/ema_mAP_50_95"])
            for row in rows(tmp_path)
            if "val/mAP_50_95" in row
        }
        assert evaluated == {1: (0.1, 0.4), 3: (0.2, 0.5), 4: (0.3, 0.6)}

    @pytest.mark.parameter("log_per_class_metrics")
    def test_rows_hold_the_losses_and_metrics(self, dataset: PreparedDataset, tmp_path: Path) -> None:
        train(tiny.job(dataset, tmp_path, epochs=1, log_per_class_metrics=True))
        (row,) = rows(tmp_path)
        assert (row["epoch"], row["step"]) == (0, 4)
        terms = ("loss", "loss_ce", "loss_bbox", "loss_giou", "loss_ce_0", "loss_giou_enc", "class_error")
        assert {f"train/{name}" for name in terms} < set(row)
        for prefix in ("val/", "val/ema_"):
            names = ("mAP_50_95", "mAP_50", "mAP_75", "mAR", "F1", "F1_threshold", "precision", "recall")
            assert {prefix + name for name in names} < set(row)
            classes = {name.removeprefix(f"{prefix}AP/") for name in row if name.startswith(f"{prefix}AP/")}
            assert classes == {"rectangle", "ellipse", "triangle"}
            per_class = [row[f"{prefix}AP/{name}"] for name in classes]
            assert sum(per_class) / 3 == pytest.approx(row[f"{prefix}mAP_50_95"], abs=1e-9)

    @pytest.mark.parameter("log_per_class_metrics")
    def test_without_per_class_metrics(
        self, dataset: PreparedDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "rfdetr_core")
        train(tiny.job(dataset, tmp_path, epochs=1, log_per_class_metrics=False))
        assert not [name for name in rows(tmp_path)[0] if "AP/" in name]
        assert "per class" not in caplog.text
        line = r"epoch 1/1 done  loss \d+\.\d{3}  mAP 0\.\d{3}  mAP50 0\.\d{3}  EMA mAP 0\.\d{3}  .* images/s"
        assert re.search(line, caplog.text)

    @pytest.mark.parameter("log_per_class_metrics")
    def test_the_console_tells_the_classes(
        self, dataset: PreparedDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "rfdetr_core")
        train(tiny.job(dataset, tmp_path, epochs=1, log_per_class_metrics=True))
        assert "EMA AP per class: rectangle 0." in caplog.text

    def test_training_goes_on_in_training_mode(
        self, dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        modes: list[tuple[bool, bool]] = []
        original = Engine.optimizer_step

        def record(self: Engine, *args: Any, **kwargs: Any) -> Any:
            assert self.ema is not None
            modes.append((self.raw_model.training, self.ema.module.training))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Engine, "optimizer_step", record)
        train(tiny.job(dataset, tmp_path, epochs=2))
        assert modes == [(True, False)] * 10

    def test_memory_that_runs_out_is_told_with_the_batch(
        self, dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def predict(*_: Any, **__: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(validation, "detections_of", predict)
        with pytest.raises(
            DeviceMemoryError, match=r"in evaluation at batch size 3, peak .* \(try train\.eval_batch_size: 1\)"
        ):
            train(tiny.job(dataset, tmp_path, epochs=1, eval_batch_size=3))


class TestEarlyStopping:
    @pytest.mark.parameter("early_stopping", "early_stopping_patience")
    @pytest.mark.parametrize(
        ("settings", "epochs"),
        [
            ({"early_stopping_patience": 3}, 4),
            ({"early_stopping_patience": 2, "eval_interval": 2}, 6),
        ],
        ids=["patience", "counts evaluations"],
    )
    def test_a_constant_metric_stops(
        self,
        dataset: PreparedDataset,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        settings: dict[str, Any],
        epochs: int,
    ) -> None:
        Scores(monkeypatch, raw=[0.1] * 8, ema=[0.1] * 8)
        job = tiny.job(dataset, tmp_path, epochs=8, early_stopping=True, **settings)
        result = train(job)
        assert (result.epochs, result.stopped_early) == (epochs, True)
        assert len(rows(tmp_path)) == epochs
        assert set(best_files(tmp_path)) == {"regular", "ema", "total"}
        again = train(job)  # and it stays stopped
        assert (again.epochs, again.stopped_early) == (epochs, True)

    @pytest.mark.parameter("early_stopping")
    def test_it_is_off_by_default(
        self, dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Scores(monkeypatch, raw=[0.1] * 3, ema=[0.1] * 3)
        result = train(tiny.job(dataset, tmp_path, epochs=3, early_stopping_patience=1))
        assert (result.epochs, result.stopped_early) == (3, False)

    @pytest.mark.parameter("early_stopping_use_ema")
    def test_it_can_watch_the_average_alone(
        self, dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Scores(monkeypatch, raw=[0.1, 0.6, 0.7], ema=[0.5] * 3)
        settings = {"early_stopping": True, "early_stopping_patience": 1, "early_stopping_use_ema": True}
        assert train(tiny.job(dataset, tmp_path, epochs=3, **settings)).epochs == 2


def test_a_loss_that_is_not_finite_ends_training_and_leaves_the_checkpoint(
    dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, total = iter(range(-1, 100)), Criterion.total  # -1: the canary
    monkeypatch.setattr(Criterion, "total", lambda *args: total(*args) * (float("nan") if next(calls) == 7 else 1))
    job = tiny.job(dataset, tmp_path, epochs=2)
    with pytest.raises(
        TrainingError, match=r"the loss is not finite \(loss nan\) at optimizer step 7, images train_\d+\.jpg, train_"
    ) as caught:
        train(job)
    assert "\n" not in str(caught.value)
    content = latest(tmp_path)
    assert content["position"]["global_step"] == 5
    assert all(torch.isfinite(value).all() for value in content["model"].values() if value.is_floating_point())
    assert train(job).epochs == 2  # the next attempt continues from there


class TestWindows:
    def test_64_images_make_6_steps_of_3_micro_batches_of_4(self) -> None:
        sampler = EpochSampler(64, batch_size=4, grad_accum_steps=3, seed=0, scales=[32])
        micro_batches = list(sampler)
        windows: list[Any] = list(batches.windows(sampler, 3, Clock(0.0)))
        assert (len(micro_batches), sampler.steps_per_epoch) == (18, 6)
        assert [len(window) for window in windows] == [3] * 6
        assert [batch for window in windows for batch in window] == micro_batches

    def test_training_makes_as_many_steps_and_passes(
        self, dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        passes = 0
        forward = Criterion.forward

        def count(self: Criterion, *args: Any) -> Any:
            nonlocal passes
            passes += 1
            return forward(self, *args)

        monkeypatch.setattr(Criterion, "forward", count)
        result = train(tiny.job(dataset, tmp_path, epochs=2, batch=1, accum=2))
        assert (result.optimizer_steps, passes) == (10, 1 + 20)  # the canary's is the first
