"""Fields of `train` that show in what the loop evaluates, writes and keeps."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from rfdetr_core.data.loading import LoaderSettings, TrainImages, eval_loader
from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.errors import DatasetError, Terminated
from rfdetr_core.evaluation import inference
from rfdetr_core.evaluation.evaluate import evaluate_model
from rfdetr_core.training import checkpoint, clock, loop
from rfdetr_core.training.criterion import Criterion
from rfdetr_core.training.engine import Engine, build_engine
from rfdetr_core.training.loop import train
from tests.training import tiny
from tests.training.test_loop import Scores, best_files, latest, rows, stop_at, weight_files

LOSSES = {"loss", "loss_ce", "loss_bbox", "loss_giou", "loss_ce_0", "loss_giou_enc"}


def loss_of(dataset: PreparedDataset, split: str, weights: Path) -> dict[str, float]:
    """The weighted loss and its terms by hand: batches of two, each normalised by its own boxes, mean over images."""
    trained = checkpoint.load_trained(weights)
    criterion = Criterion(trained.config).eval()
    images, sums = dataset.split(split), {}
    batches = eval_loader(images, LoaderSettings(0, None, None, None), torch.device("cpu"), resolution=32, batch_size=2)
    for batch in batches:
        pixels, targets = batch.on(torch.device("cpu"))
        with torch.inference_mode():
            terms = criterion(trained.module(pixels, with_aux=True), targets)
        terms["loss"] = sum(terms[name] * weight for name, weight in criterion.weight_dict.items() if name in terms)
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + float(value) * 2
    return {name: value / len(images) for name, value in sums.items()}


@pytest.mark.parameter("compute_val_loss")
class TestValidationLoss:
    def test_it_is_the_loss_of_the_raw_weights(self, dataset: PreparedDataset, tmp_path: Path) -> None:
        train(tiny.job(dataset, tmp_path, epochs=1, compute_val_loss=True))
        (row,) = rows(tmp_path)
        expected = loss_of(dataset, "valid", tmp_path / "checkpoint_best_regular.pth")
        for name in LOSSES:
            assert row[f"val/{name}"] == pytest.approx(expected[name], rel=1e-4), name

    def test_without_raw_evaluation_of_the_average(self, dataset: PreparedDataset, tmp_path: Path) -> None:
        train(tiny.job(dataset, tmp_path, epochs=1, compute_val_loss=True, eval_base_model=False))
        expected = loss_of(dataset, "valid", tmp_path / "checkpoint_best_ema.pth")
        assert rows(tmp_path)[0]["val/loss"] == pytest.approx(expected["loss"], rel=1e-4)

    @pytest.mark.parametrize("value", [False, "auto"])  # nothing reads it by itself
    def test_off(self, dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
        modes: list[bool] = []
        forward = Criterion.forward

        def record(self: Criterion, *args: Any) -> Any:
            modes.append(self.training)
            return forward(self, *args)

        monkeypatch.setattr(Criterion, "forward", record)
        train(tiny.job(dataset, tmp_path, epochs=1, compute_val_loss=value))
        assert modes == [True] * 6  # the canary, and five steps
        assert not [name for name in rows(tmp_path)[0] if name.startswith("val/loss")]


@pytest.mark.parameter("compute_test_loss")
class TestTestRun:
    def test_a_last_row_tells_of_the_best_weights(self, dataset: PreparedDataset, tmp_path: Path) -> None:
        job = tiny.job(dataset, tmp_path, epochs=2, run_test=True)
        train(job)
        *epochs, row = rows(tmp_path)
        assert [r["epoch"] for r in epochs] == [0, 1]
        assert row["epoch"] == 2
        best = tmp_path / "checkpoint_best_total.pth"
        metrics, _ = evaluate_model(
            checkpoint.load_trained(best),
            dataset.split("test"),
            dataset.class_map,
            batch_size=2,
            max_dets=500,
            device=torch.device("cpu"),
            loading=LoaderSettings(0, None, None, None),
        )
        assert row["test/mAP_50_95"] == pytest.approx(metrics.map, abs=1e-6)
        assert row["test/mAR"] == pytest.approx(metrics.mar, abs=1e-6)
        assert row["test/loss"] == pytest.approx(loss_of(dataset, "test", best)["loss"], rel=1e-4)
        train(job)  # a finished training tests once
        assert len(rows(tmp_path)) == 3

    def test_without_its_loss(self, dataset: PreparedDataset, tmp_path: Path) -> None:
        train(tiny.job(dataset, tmp_path, epochs=1, run_test=True, compute_test_loss=False))
        assert "test/mAP_50_95" in rows(tmp_path)[-1]
        assert "test/loss" not in rows(tmp_path)[-1]

    def test_by_default_the_evaluate_stage_does_it(self, dataset: PreparedDataset, tmp_path: Path) -> None:
        train(tiny.job(dataset, tmp_path, epochs=1))
        assert not [name for row in rows(tmp_path) for name in row if name.startswith("test/")]


class TestBestModel:
    def test_smoothing_decides_by_the_average_of_the_scores(
        self, dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """m = 0.5 m + 0.5 score: 0.2, 0.3, 0.25, 0.275 of 0.4, 0.4, 0.2, 0.3; the second is the best."""
        Scores(monkeypatch, raw=[0.4, 0.4, 0.2, 0.3])
        result = train(tiny.job(dataset, tmp_path, epochs=4, use_ema=False, smooth_alpha=0.5))
        assert (result.best_epoch, result.best_score) == (1, 0.4)
        assert latest(tmp_path)["position"]["smoothed"] == pytest.approx(0.275)

    def test_smoothing_leaves_the_average_alone(
        self, dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Scores(monkeypatch, raw=[0.1, 0.1], ema=[0.5, 0.4])
        train(tiny.job(dataset, tmp_path, epochs=2, smooth_alpha=0.9))
        assert best_files(tmp_path) == {"regular": ("regular", 1), "ema": ("ema", 0), "total": ("ema", 0)}

    def test_only_what_later_stages_need_is_written(
        self, dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Scores(monkeypatch, raw=[0.1, 0.2, 0.3], ema=[0.2, 0.1, 0.1])
        job = tiny.job(dataset, tmp_path, epochs=3, checkpoint_interval=1, dont_save_weights=True)
        result = train(job)
        assert weight_files(tmp_path) == ["checkpoint.pth", "checkpoint_best_total.pth"]
        assert (result.best_source, result.best_epoch) == ("regular", 2)
        assert train(job).best_epoch == 2  # what is not there by intent is not missed

    def test_notes_go_into_the_files(self, dataset: PreparedDataset, tmp_path: Path) -> None:
        train(tiny.job(dataset, tmp_path, epochs=1, notes={"ticket": 7}))
        content = checkpoint.load(tmp_path / "checkpoint_best_total.pth")
        assert content["args"]["notes"] == {"ticket": 7}
        assert content["train_config"]["notes"] == {"ticket": 7}


@pytest.mark.parameter("fp16_eval")
class TestHalfPrecisionEvaluation:
    def test_on_a_cpu_it_warns_and_changes_nothing(self, dataset: PreparedDataset, tmp_path: Path) -> None:
        train(tiny.job(dataset, tmp_path / "a", epochs=1))
        with pytest.warns(UserWarning, match="fp16_eval has no effect on a CPU"):
            train(tiny.job(dataset, tmp_path / "b", epochs=1, fp16_eval=True))
        assert not tiny.differing(rows(tmp_path / "a"), rows(tmp_path / "b"))

    @pytest.mark.parametrize(
        ("accelerator", "half"),
        [
            ("cpu", torch.bfloat16),
            pytest.param(
                "gpu",
                torch.float16,
                marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: float16 runs there"),
            ),
        ],
    )
    def test_only_the_evaluated_forward_runs_in_it(
        self,
        dataset: PreparedDataset,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        accelerator: str,
        half: torch.dtype,
    ) -> None:
        """Where the engine says so, which a CPU's never does by itself: activations are small, all else is float32."""
        wanted = {"epochs": 1, "accelerator": accelerator, "amp_dtype": None, "compute_val_loss": True}
        train(tiny.job(dataset, tmp_path / "without", **wanted))
        if accelerator == "cpu":
            monkeypatch.setattr(Engine, "autocast", property(lambda engine: half))
        activations: set[tuple[bool, torch.dtype]] = set()
        found: set[torch.dtype] = set()
        select = inference.postprocess

        def look(module: nn.Module, _: Any, output: Any) -> None:
            if isinstance(module, nn.Linear):
                activations.add((module.training, output.dtype))

        def read(logits: torch.Tensor, boxes: torch.Tensor, *args: Any) -> Any:
            results = select(logits, boxes, *args)
            found.update(values.dtype for result in results for values in (result["scores"], result["boxes"]))
            return results

        monkeypatch.setattr(inference, "postprocess", read)
        with register_module_forward_hook(look):
            train(tiny.job(dataset, tmp_path / "with", fp16_eval=accelerator != "cpu", **wanted))
        assert activations == {(True, torch.float32), (False, half)}
        assert found == {torch.float32}

        (exact,), (rough,) = rows(tmp_path / "without"), rows(tmp_path / "with")
        assert exact["val/loss"] != rough["val/loss"]
        assert rough["val/loss"] == pytest.approx(exact["val/loss"], rel=0.05)
        plain, halved = (latest(tmp_path / name) for name in ("without", "with"))
        assert {value.dtype for value in halved["model"].values() if value.is_floating_point()} == {torch.float32}
        if accelerator == "cpu":  # on a GPU no two trainings are equal to the bit
            assert not [
                part for part in ("model", "ema_model", "optimizer") if tiny.differing(plain[part], halved[part])
            ]

    def test_the_device_decides(self) -> None:
        engine = build_engine(tiny.model_config(), tiny.train_config())
        wanted = dataclasses.replace(engine, fp16_eval=True)
        assert wanted.autocast is None  # a CPU
        wanted.fabric = type("OfAGPU", (), {"device": torch.device("cuda")})()  # type: ignore[assignment]
        assert wanted.autocast == torch.float16


class Time:
    """Takes the place of the clock's time: goes on only by what is said, or by `seconds` with every optimizer step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0) -> None:
        self.now = 1000.0
        monkeypatch.setattr(clock, "time", self)
        step = Engine.optimizer_step

        def slow(engine: Engine, *args: Any, **words: Any) -> Any:
            terms = step(engine, *args, **words)
            self.now += seconds if terms is not None else 0.0
            return terms

        monkeypatch.setattr(Engine, "optimizer_step", slow)

    def monotonic(self) -> float:
        return self.now


class TestTime:
    def test_the_budget_ends_training_with_the_epoch_it_is_in(
        self, dataset: PreparedDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        job = tiny.job(dataset, tmp_path, epochs=9, eval_interval=9, max_hours=1e-9)
        result = train(job)
        assert result.epochs == 1
        assert "val/mAP_50_95" in rows(tmp_path)[0]  # the last epoch is evaluated, whichever it is
        assert "train.max_hours: 1e-09 h are over after epoch 1" in caplog.text
        more = dataclasses.replace(job, train=job.train.model_copy(update={"max_hours": None, "epochs": 2}))
        assert train(more).epochs == 2  # time left: it goes on

    @pytest.mark.parametrize(
        ("minutes", "epochs"), [(6.0, 2), (6.1, 2), (5.9, 3)], ids=["just over", "over", "not yet over"]
    )
    def test_the_budget_is_in_hours(
        self, dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float, epochs: int
    ) -> None:
        """Of steps of six minutes, two epochs of five take an hour."""
        Time(monkeypatch, 60.0 * minutes)
        assert train(tiny.job(dataset, tmp_path, epochs=5, eval_interval=5, max_hours=1.0)).epochs == epochs

    @pytest.mark.parametrize(("minutes", "epochs"), [(12.0, 1), (11.0, 2)])
    def test_the_budget_counts_the_process_before_and_not_the_time_between(
        self, dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float, epochs: int
    ) -> None:
        """Of an epoch's five steps three were made by a process that was preempted; the next came ten hours later."""
        time = Time(monkeypatch, 60.0 * minutes)
        job = tiny.job(dataset, tmp_path, epochs=5, eval_interval=5, max_hours=1.0)
        with pytest.raises(Terminated):
            train(job, stop_requested=stop_at(4))
        time.now += 36_000.0
        assert train(job).epochs == epochs

    @pytest.mark.parametrize(
        ("seconds", "interval", "handed_over"),
        [
            (20.0, 10, [(0, 4), (1, 3), (2, 0)]),  # 60 s are not over after the third step
            (21.0, 10, [(0, 3), (1, 1), (1, 4), (2, 0)]),
            (12.0, 10, [(1, 1), (2, 0)]),
            (12.0, 1, [(1, 0), (2, 0)]),  # that of checkpoint_interval starts the minutes anew
        ],
    )
    def test_checkpoints_are_handed_over_by_the_minute(
        self,
        dataset: PreparedDataset,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        seconds: float,
        interval: int,
        handed_over: list[tuple[int, int]],
    ) -> None:
        Time(monkeypatch, seconds)
        found: list[tuple[int, int]] = []

        def publish(path: Path) -> None:
            position = checkpoint.load(path).get("position")
            if position is not None:
                found.append((position["epoch"], position["step"]))

        minutes = {"checkpoint_minutes": 1.0, "checkpoint_interval": interval}
        train(tiny.job(dataset, tmp_path, epochs=2, eval_interval=2, **minutes), publish=publish)
        assert list(dict.fromkeys(found)) == handed_over

    def test_each_epoch_tells_where_its_time_went(
        self, dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Seconds that are added to a part of the work are found in its column, and in no other."""
        time = Time(monkeypatch, 7.0)

        def slowed(original: Any, seconds: float) -> Any:
            def slow(*args: Any, **words: Any) -> Any:
                time.now += seconds
                return original(*args, **words)

            return slow

        monkeypatch.setattr(loop, "validate", slowed(loop.validate, 50.0))
        monkeypatch.setattr(loop, "keep_best", slowed(loop.keep_best, 3.0))
        monkeypatch.setattr(loop, "save", slowed(loop.save, 11.0))
        monkeypatch.setattr(TrainImages, "__getitem__", slowed(TrainImages.__getitem__, 0.5))
        monkeypatch.setattr(loop, "time", time)
        result = train(tiny.job(dataset, tmp_path, epochs=3, eval_interval=2))
        parts = ("data_wait", "step", "eval", "checkpoint")
        assert [[row[f"seconds/{part}"] for part in parts] for row in rows(tmp_path)] == [
            [5.0, 35.0, 0.0, 0.0],
            [5.0, 35.0, 50.0, 11.0 + 3.0],  # the save at the end of an epoch counts for the next one
            [5.0, 35.0, 50.0, 11.0 + 3.0],
        ]
        assert result.seconds == 40.0 + 2 * 104.0 + 11.0 + 9 * 0.5  # the last save, and a picture of nine images

    @pytest.mark.parametrize(
        ("waited", "steps", "told"),
        [
            (10.0, 190.0, None),  # a twentieth exactly
            (10.01, 190.0, "10.0 s for images, 5 %"),
            (9.99, 190.0, None),
            (1.5, 10.0, "1.5 s for images, 13 %"),
            (1.01, 0.1, "1.0 s for images, 91 %"),
            (1.0, 0.1, None),  # too short for advice, whatever the share
        ],
    )
    def test_waiting_for_more_than_a_twentieth_is_told_with_what_to_change(
        self,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        waited: float,
        steps: float,
        told: str | None,
    ) -> None:
        time = Time(monkeypatch)
        of_epoch = clock.Clock(0.0)
        for part, seconds in (("data_wait", waited), ("step", steps), ("eval", 1e6), ("checkpoint", 1e6)):
            with of_epoch.running(part):
                time.now += seconds
        of_epoch.lap()
        of_epoch.warn_of_waiting(num_workers=2)
        advice = "of the epoch's steps: raise train.num_workers (now 2) or train.prefetch_factor"
        expected = [] if told is None else [f"training waited {told} {advice}, or give the pod more CPU"]
        assert [record.getMessage() for record in caplog.records] == expected

    def test_a_training_that_waits_says_so(
        self,
        dataset: PreparedDataset,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        time, load = Time(monkeypatch, 3.0), TrainImages.__getitem__

        def slow(images: TrainImages, draw: Any) -> Any:
            time.now += 0.5 if draw.epoch == 1 else 0.01
            return load(images, draw)

        monkeypatch.setattr(TrainImages, "__getitem__", slow)
        train(tiny.job(dataset, tmp_path, epochs=2, eval_interval=2))
        told = [record.getMessage() for record in caplog.records if "waited" in record.getMessage()]
        assert told == [
            "training waited 5.0 s for images, 25 % of the epoch's steps: raise train.num_workers (now 0)"
        ]  # of the second epoch alone

    def test_the_whole_of_the_loop_is_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        time = Time(monkeypatch)
        counting = clock.Clock(spent=100.0)
        time.now += 10.0
        with counting.running("eval"):
            time.now += 4.0
        time.now += 6.0
        assert counting.lap()["seconds/eval"] == 4.0
        assert counting.total == 120.0


def test_unreadable_images_are_counted_and_told(
    dataset: PreparedDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged, names = tiny.damaged(dataset, tmp_path / "damaged", 2, 5)
    result = train(tiny.job(damaged, tmp_path / "two", epochs=1, skip_corrupt=2))
    assert sorted(result.skipped) == names
    assert f"image {names[0]} cannot be read and is left out" in caplog.text
    assert "2 of train.skip_corrupt: 2" in caplog.text
    with pytest.raises(DatasetError, match=r"train_0000[25]\.jpg .*train\.skip_corrupt: 1\)") as caught:
        train(tiny.job(damaged, tmp_path / "one", epochs=1, skip_corrupt=1))
    assert caught.value.exit_code == 2
    with pytest.raises(DatasetError, match=rf"training image ({'|'.join(names)}) .*cannot be read"):
        train(tiny.job(damaged, tmp_path / "none", epochs=1))


class TestTrainMetrics:
    def test_they_are_those_of_the_training_views(self, dataset: PreparedDataset, tmp_path: Path) -> None:
        train(tiny.job(dataset, tmp_path, epochs=2, eval_interval=2, compute_train_metrics=True))
        first, second = rows(tmp_path)
        assert "train/mAP_50_95" not in first  # only where the epoch is evaluated
        assert 0.0 <= second["train/mAP_50_95"] <= second["train/mAP_50"] <= 1.0
        assert second["train/mAR"] >= 0.0  # -1 would mean that nothing was given to it

    def test_they_leave_the_training_alone(self, dataset: PreparedDataset, tmp_path: Path) -> None:
        for name, wanted in (("with", True), ("without", False)):
            train(tiny.job(dataset, tmp_path / name, epochs=1, drop_path=0.3, compute_train_metrics=wanted))
        assert not tiny.differing(latest(tmp_path / "with")["model"], latest(tmp_path / "without")["model"])


def test_the_doctor_speaks_once(dataset: PreparedDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tiny.job(dataset, tmp_path, epochs=2))  # random weights, ten steps: nothing can be found
    assert caplog.text.count("doctor: ") == 1
    causes = [symptom["cause"] for symptom in json.loads((tmp_path / "doctor.json").read_text())]
    assert "random_start" in causes


class TestPictures:
    def test_augmented_images_lie_beside_the_metrics(self, dataset: PreparedDataset, tmp_path: Path) -> None:
        train(tiny.job(dataset, tmp_path, epochs=1))
        with Image.open(tmp_path / "augmentation.jpg") as picture:
            assert min(picture.size) > 300
        assert not (tmp_path / "dataset_grids").exists()

    def test_batches_on_request(self, dataset: PreparedDataset, tmp_path: Path) -> None:
        train(tiny.job(dataset, tmp_path / "with", epochs=1, save_dataset_grids=True))
        names = {path.name for path in (tmp_path / "with" / "dataset_grids").iterdir()}
        assert names == {
            f"{split}_batch{i}_grid.jpg" for split, count in (("train", 3), ("val", 2)) for i in range(count)
        }
        train(tiny.job(dataset, tmp_path / "without", epochs=1))
        left, right = (latest(tmp_path / name)["model"] for name in ("with", "without"))
        assert not tiny.differing(left, right)
