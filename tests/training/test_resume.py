"""`train.resume`, and what is used when the newest checkpoint cannot be read."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rfdetr_core.config import TrainConfig
from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.errors import CheckpointError, ConfigError, StorageAccessError, Terminated
from rfdetr_core.training import checkpoint
from rfdetr_core.training.folder import job_in_folder
from rfdetr_core.training.loop import TrainingJob, train
from tests.training import tiny
from tests.training.test_loop import INTERRUPTED, assert_same_training, latest, rows, stop_at, weight_files

LONGER: dict[str, Any] = {"lr_scheduler": "step", "drop_path": 0.3, "epochs": 3}


def resuming(job: TrainingJob, path: Path, **settings: Any) -> TrainingJob:
    """Another training, as far as its inputs tell, that goes on from `path`."""
    train = job.train.model_copy(update=settings)
    return dataclasses.replace(job, train=train, inputs="resumed", resume=lambda: path)


@pytest.fixture(scope="module")
def two_epochs(dataset: PreparedDataset, tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    """A finished training."""
    job = tiny.job(dataset, tmp_path_factory.mktemp("two"), **{**LONGER, "epochs": 2}, checkpoint_interval=1)
    train(job)
    return job


@pytest.mark.parameter("resume", "epochs")
def test_more_epochs_are_what_they_would_have_been(
    dataset: PreparedDataset, tmp_path: Path, two_epochs: TrainingJob
) -> None:
    whole = tiny.job(dataset, tmp_path / "whole", **LONGER)
    train(whole)
    more = resuming(tiny.job(dataset, tmp_path / "more", **LONGER), two_epochs.checkpoints / "checkpoint.pth")
    result = train(more)
    assert (result.epochs, result.optimizer_steps) == (3, 15)
    left, right = latest(tmp_path / "whole"), latest(tmp_path / "more")
    for part in ("model", "ema_model", "optimizer", "rng"):
        assert not tiny.differing(left[part], right[part]), part
    assert not tiny.differing(rows(tmp_path / "whole"), rows(tmp_path / "more"))


def test_in_the_same_folder_the_best_files_stay(dataset: PreparedDataset, tmp_path: Path) -> None:
    first = tiny.job(dataset, tmp_path, epochs=1)
    train(first)
    before = checkpoint.load(tmp_path / "checkpoint_best_regular.pth")["metrics"]["map"]
    result = train(resuming(first, tmp_path / "checkpoint.pth", epochs=2))
    best = latest(tmp_path)["position"]["best"]["regular"]
    assert result.epochs == 2
    assert best["score"] >= before
    assert checkpoint.load(tmp_path / "checkpoint_best_regular.pth")["epoch"] == best["epoch"]


def test_epochs_that_were_trained_already_are_told(
    dataset: PreparedDataset, tmp_path: Path, two_epochs: TrainingJob, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    job = resuming(tiny.job(dataset, tmp_path, **LONGER), two_epochs.checkpoints / "checkpoint.pth", epochs=1)
    result = train(job)
    assert (result.epochs, result.optimizer_steps) == (2, 10)
    assert "2 epochs are trained already, train.epochs asks for 1: nothing to train" in caplog.text
    assert "checkpoint_best_total.pth" in weight_files(tmp_path)


def test_weights_alone_start_the_schedule_anew(
    dataset: PreparedDataset, tmp_path: Path, two_epochs: TrainingJob, caplog: pytest.LogCaptureFixture
) -> None:
    best = two_epochs.checkpoints / "checkpoint_best_regular.pth"
    with pytest.raises(Terminated):
        train(resuming(tiny.job(dataset, tmp_path, **LONGER), best), stop_requested=stop_at(1))
    assert "holds weights only: optimizer and schedule start from step 0" in caplog.text
    content = latest(tmp_path)
    assert content["position"]["global_step"] == 0
    assert not tiny.differing(content["model"], checkpoint.load(best)["model"])


def test_an_epoch_of_another_length_begins_anew(dataset: PreparedDataset, tmp_path: Path) -> None:
    job = tiny.job(dataset, tmp_path / "a", epochs=2)
    with pytest.raises(Terminated):
        train(job, stop_requested=stop_at(10))  # 2 steps into the second epoch of 5
    other = tiny.job(dataset, tmp_path / "b", epochs=2, batch=1)  # ten steps an epoch
    result = train(resuming(other, tmp_path / "a" / "checkpoint.pth"))
    assert result.optimizer_steps == 20


class TestRefusals:
    def test_other_classes(self, dataset: PreparedDataset, tmp_path: Path, two_epochs: TrainingJob) -> None:
        content = checkpoint.load(two_epochs.checkpoints / "checkpoint.pth")
        content["classes"][0]["name"] = "circle"
        checkpoint.save(content, tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match=r"other classes: it alone has circle; it lacks rectangle"):
            train(resuming(tiny.job(dataset, tmp_path / "out", **LONGER), tmp_path / "other.pth"))

    def test_another_architecture(self, dataset: PreparedDataset, tmp_path: Path, two_epochs: TrainingJob) -> None:
        job = resuming(tiny.job(dataset, tmp_path, **LONGER), two_epochs.checkpoints / "checkpoint.pth")
        with pytest.raises(CheckpointError, match=r"another architecture: dec_layers 2, here 3") as caught:
            train(dataclasses.replace(job, model=tiny.model_config(dec_layers=3)))
        assert caught.value.exit_code == 2

    def test_no_such_file(self, dataset: PreparedDataset, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"train\.resume: .*absent\.pth: no such file"):
            train(resuming(tiny.job(dataset, tmp_path, **LONGER), tmp_path / "absent.pth"))

    def test_no_checkpoint(self, dataset: PreparedDataset, tmp_path: Path) -> None:
        (tmp_path / "text.pth").write_text("hello")
        with pytest.raises(CheckpointError, match=r"text\.pth: not a weight file"):
            train(resuming(tiny.job(dataset, tmp_path / "out", **LONGER), tmp_path / "text.pth"))


@pytest.mark.parameter("resume")
class TestPythonAPI:
    """`resume` of the folder's own checkpoint lets its settings change; without it they may not."""

    def config(self, dataset: PreparedDataset, output: Path, **settings: Any) -> TrainConfig:
        return tiny.train_config(dataset_dir=str(dataset.folder), output_dir=str(output), batch_size=2, **settings)

    def test_own_checkpoint_with_more_epochs(self, dataset: PreparedDataset, tmp_path: Path) -> None:
        model = tiny.model_config()
        train(job_in_folder(model, self.config(dataset, tmp_path, epochs=1)))
        longer = self.config(dataset, tmp_path, epochs=2)
        assert train(job_in_folder(model, longer)).epochs == 2
        assert train(job_in_folder(model, longer)).epochs == 2  # the same call again has nothing to do
        assert train(job_in_folder(model, self.config(dataset, tmp_path, epochs=1))).epochs == 2  # nor one for less

    @pytest.mark.long
    def test_own_checkpoint_with_another_rate(self, dataset: PreparedDataset, tmp_path: Path) -> None:
        model = tiny.model_config()
        train(job_in_folder(model, self.config(dataset, tmp_path, epochs=1)))
        other = r"another training \(train\.lr 0\.0001, here 0\.001\).*continue it with resume="
        with pytest.raises(ConfigError, match=other):
            job_in_folder(model, self.config(dataset, tmp_path, epochs=2, lr=1e-3))
        longer = self.config(dataset, tmp_path, epochs=2, lr=1e-3, resume=str(tmp_path / "checkpoint.pth"))
        assert train(job_in_folder(model, longer)).epochs == 2

    @pytest.mark.long
    def test_a_torn_newest_checkpoint_is_passed_over(
        self, dataset: PreparedDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        model, config = tiny.model_config(), self.config(dataset, tmp_path, epochs=2, checkpoint_interval=1)
        train(job_in_folder(model, config))
        for name in ("checkpoint.pth", "checkpoint_best_total.pth"):
            (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-5000])
        assert train(job_in_folder(model, config)).epochs == 2
        assert "checkpoint_1.pth is used instead" in caplog.text
        assert checkpoint.load(tmp_path / "checkpoint_best_total.pth")

    @pytest.mark.long
    def test_weights_in_the_own_folder_stay_until_there_is_a_checkpoint(
        self, dataset: PreparedDataset, tmp_path: Path
    ) -> None:
        model, total = tiny.model_config(), tmp_path / "checkpoint_best_total.pth"
        train(job_in_folder(model, self.config(dataset, tmp_path, epochs=1)))
        again = self.config(dataset, tmp_path, epochs=1, lr=1e-3, resume=str(total))
        with pytest.raises(Terminated):
            train(job_in_folder(model, again), stop_requested=lambda: True)
        (tmp_path / "checkpoint.pth").unlink()  # as if it had been killed before
        assert total.exists()
        assert train(job_in_folder(model, again)).epochs == 1


class TestAnotherDataset:
    """What a checkpoint knows of the images that it was trained on does not go along to others."""

    @pytest.mark.long
    def test_skipped_images_and_scores_stay_behind(self, dataset: PreparedDataset, tmp_path: Path) -> None:
        damaged, _ = tiny.damaged(dataset, tmp_path / "damaged", 9)
        train(tiny.job(damaged, tmp_path / "first", epochs=1, skip_corrupt=1, early_stopping=True))
        newer = tiny.prepare(tiny.draw(tmp_path / "coco", train=8), tmp_path / "newer")
        job = dataclasses.replace(
            tiny.job(newer, tmp_path / "second", epochs=2, early_stopping=True),
            inputs="resumed",
            resume=lambda: tmp_path / "first" / "checkpoint.pth",
        )
        result = train(job)
        assert result.skipped == ()
        content = checkpoint.load(tmp_path / "second" / "checkpoint.pth")
        assert content["early_stopping"]["wait"] == 0 and content["early_stopping"]["best"] > -1


class TestOtherSettings:
    def resumed(self, dataset: PreparedDataset, folder: Path, **settings: Any) -> TrainingJob:
        return dataclasses.replace(
            tiny.job(dataset, folder / "second", epochs=2, **settings),
            inputs="resumed",
            resume=lambda: folder / "first" / "checkpoint.pth",
        )

    @pytest.mark.long
    def test_an_average_begins_where_there_was_none(
        self, dataset: PreparedDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        train(tiny.job(dataset, tmp_path / "first", epochs=1, use_ema=False))
        train(self.resumed(dataset, tmp_path))
        assert "has no averaged weights" in caplog.text
        assert (tmp_path / "second" / "checkpoint_best_ema.pth").exists()

    def test_another_seed_has_no_effect_and_is_told(
        self, dataset: PreparedDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        train(tiny.job(dataset, tmp_path / "first", epochs=1))
        assert train(self.resumed(dataset, tmp_path, seed=99)).seed == 7
        assert "train.seed: 99 has no effect" in caplog.text

    @pytest.mark.parametrize("own", ["auto", "last", ""])
    def test_auto_is_what_happens_anyway(self, own: str) -> None:
        assert tiny.train_config(resume=own).resume is None


class TestBrokenFiles:
    @pytest.mark.long
    def test_the_newest_whole_checkpoint_is_used(
        self, dataset: PreparedDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        settings = {**INTERRUPTED, "epochs": 3}
        train(tiny.job(dataset, tmp_path / "whole", **settings))
        job = tiny.job(dataset, tmp_path / "cut", **settings)
        with pytest.raises(Terminated):
            train(job, stop_requested=stop_at(30))  # in the third epoch
        path = tmp_path / "cut" / "checkpoint.pth"
        path.write_bytes(path.read_bytes()[:-5000])
        train(job)
        assert "checkpoint.pth: not a readable checkpoint" in caplog.text
        assert "checkpoint_1.pth is used instead" in caplog.text
        assert_same_training(tmp_path / "whole", tmp_path / "cut")

    def test_a_damaged_best_file_counts_as_lost(
        self, dataset: PreparedDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        job = tiny.job(dataset, tmp_path, epochs=2)
        with pytest.raises(Terminated):
            train(job, stop_requested=stop_at(9))
        best = tmp_path / "checkpoint_best_ema.pth"
        best.write_bytes(best.read_bytes()[:1000])
        train(job)
        assert "checkpoint_best_ema.pth of epoch 1 was lost" in caplog.text
        assert checkpoint.load(best)["epoch"] == 1

    @pytest.mark.long
    def test_a_full_disk_leaves_the_checkpoint_before(
        self, dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole, job = tiny.job(dataset, tmp_path / "whole", epochs=2), tiny.job(dataset, tmp_path / "full", epochs=2)
        train(whole)
        saves, fsync = iter(range(100)), os.fsync

        def full(descriptor: int) -> None:
            if next(saves) == 4:  # the first epoch's three best files and its checkpoint came before
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(StorageAccessError, match=r"cannot be written: No space left .*make room"):
            train(job)
        assert latest(tmp_path / "full")["position"]["epoch"] == 1
        assert not list((tmp_path / "full").glob(".*.part"))
        train(job)
        assert_same_training(tmp_path / "whole", tmp_path / "full")


PROGRAM = """
import signal, sys, torch
from pathlib import Path
from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.errors import Terminated
from rfdetr_core.training import loop
from tests.training import tiny
from tests.training.test_loop import INTERRUPTED
torch.set_num_threads(1)
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
job = tiny.job(PreparedDataset(Path(sys.argv[1])), Path(sys.argv[2]), checkpoint_minutes=1e-9,
               **{**INTERRUPTED, "epochs": 40, "checkpoint_interval": 10, "eval_interval": 4})
print("ready", flush=True)
try:
    loop.train(job, stop_requested=lambda: bool(stop))
except Terminated:
    sys.exit(143)
"""


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_thirty_kills_at_random_end_in_the_same_weights(dataset: PreparedDataset, tmp_path: Path) -> None:
    """SIGKILL and SIGTERM in turn, at random instants; a checkpoint after every step."""

    def run(folder: Path, kill_after: float | None, how: int) -> int:
        command = [sys.executable, "-c", PROGRAM, str(dataset.folder), str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()) as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            try:
                return process.wait(timeout=kill_after)
            except subprocess.TimeoutExpired:
                process.send_signal(how)
                return process.wait(timeout=60)

    assert run(tmp_path / "whole", None, 0) == 0
    draw, kills = random.Random(0), 0
    while kills < 30:
        how = signal.SIGKILL if kills % 2 else signal.SIGTERM
        code = run(tmp_path / "killed", draw.uniform(0.2, 1.2), how)
        if code == 0:
            break
        assert code in (-signal.SIGKILL, 143)
        kills += 1
    assert kills >= 10, "the training was over before it could be killed often enough"
    assert run(tmp_path / "killed", None, 0) == 0
    assert_same_training(tmp_path / "whole", tmp_path / "killed")
    assert torch.isfinite(latest(tmp_path / "killed")["model"]["class_embed.weight"]).all()
