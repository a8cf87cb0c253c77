"""Several ranks train what one process trains: two of them, with gloo on the CPU."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rfdetr_core.config import TrainConfig
from rfdetr_core.data.class_names import named
from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.data.sampling import EpochSampler
from rfdetr_core.errors import ConfigError, DatasetError, Terminated, TrainingError, TransientError
from rfdetr_core.models.weight_file import read_weight_file
from rfdetr_core.training import checkpoint
from rfdetr_core.training.distributed import (
    ALONE,
    ShareOfBatches,
    ShareOfEpoch,
    World,
    chosen_devices,
    threads_per_rank,
)
from rfdetr_core.training.loop import TrainingJob, TrainingResult, train
from tests.training import tiny
from tests.training.ranks import Ranks

RANKS = 2


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path, name: str = checkpoint.LATEST) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / name)["model"]


def children(pid: int) -> dict[int, str]:
    """All processes below this one, with their command lines."""
    parents, found = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError):
            continue
    below = {pid}
    for _ in range(5):
        below |= {child for child, parent in parents.items() if parent in below}
    return {child: found[child] for child in below - {pid}}


def ranks_of(pid: int) -> list[int]:
    return [child for child, command in children(pid).items() if "rfdetr_core.training.rank" in command]


class TestShares:
    """Who is given what."""

    @pytest.mark.parametrize(("images", "batch", "accum"), [(23, 2, 1), (40, 1, 3), (3, 2, 2)])
    @pytest.mark.parametrize("per_sample", [False, True])
    def test_the_ranks_see_what_one_process_sees(self, images: int, batch: int, accum: int, per_sample: bool) -> None:
        settings: dict[str, Any] = {
            "grad_accum_steps": accum, "seed": 3, "scales": [32, 48, 64], "per_sample": per_sample
        }  # fmt: skip
        one = EpochSampler(images, batch_size=RANKS * batch, **settings)
        shares = [ShareOfEpoch(images, World(rank, RANKS), batch_size=batch, **settings) for rank in range(RANKS)]
        for epoch, step in ((0, 0), (1, 2)):
            for sampler in (one, *shares):
                sampler.start(epoch, step)
            assert [a + b for a, b in zip(*shares, strict=True)] == list(one)
            assert {len(sampler) for sampler in shares} == {len(one)}

    @pytest.mark.parametrize("images", [1, 3, 4, 9])
    def test_every_image_is_evaluated_once(self, images: int) -> None:
        shares = [list(ShareOfBatches(images, 2, World(rank, 3))) for rank in range(3)]
        batches = [batch for share in shares for batch in share]
        assert sorted(image for batch in batches for image in batch) == list(range(images))
        assert sorted(batches) == list(ShareOfBatches(images, 2, ALONE))  # as one process puts them together

    def test_threads_are_shared(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        assert [threads_per_rank(ranks, 8) for ranks in (1, 2, 3, 16)] == [8, 4, 2, 1]
        monkeypatch.setenv("OMP_NUM_THREADS", "6")
        assert threads_per_rank(2, 8) == 3


@pytest.mark.parameter("devices")
class TestDevices:
    """Which devices the setting means."""

    @pytest.mark.parametrize(("devices", "found"), [("auto", [0]), (1, [0]), ("2", [0, 1]), (3, [0, 1, 2])])
    def test_on_a_cpu_they_are_processes(self, devices: int | str, found: list[int]) -> None:
        assert chosen_devices(devices, "cpu") == found

    @pytest.mark.parametrize(("devices", "found"), [("auto", [0, 1, 2, 3]), (2, [0, 1]), ("3,1", [3, 1]), ("2,", [2])])
    def test_of_four_gpus(self, devices: int | str, found: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        assert chosen_devices(devices, "cuda") == found

    @pytest.mark.parametrize(
        ("devices", "accelerator", "message"),
        [
            ("0,1", "cpu", "train.devices: '0,1': names GPUs, and training is on cpu (give a count)"),
            ("0,4", "cuda", "train.devices: '0,4': must name distinct GPUs of 0..3 (give a count, or \"auto\")"),
            ("1,1", "cuda", "train.devices: '1,1': must name distinct GPUs of 0..3 (give a count, or \"auto\")"),
            (5, "cuda", "train.devices: 5: this machine has 4 for cuda (give fewer, or \"auto\")"),
            (2, "mps", "train.devices: 2: this machine has 1 for mps (give fewer, or \"auto\")"),
        ],
    )  # fmt: skip
    def test_those_that_are_not_there(
        self, devices: int | str, accelerator: str, message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        with pytest.raises(ConfigError) as caught:
            chosen_devices(devices, accelerator)
        assert str(caught.value) == message

    @pytest.mark.parametrize("devices", [0, -2, "x", "0,,", ",", "", 1.5, True])
    def test_what_is_no_setting(self, devices: Any) -> None:
        with pytest.raises(ConfigError, match="devices"):
            TrainConfig.parse({"devices": devices})


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """Eleven images to train on; five to evaluate on: of batches of two, one rank has three images, the other two."""
    folder = tmp_path_factory.mktemp("uneven")
    return tiny.prepare(tiny.draw(folder / "source", train=11, valid=5, test=3), folder / "prepared")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(RANKS, tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


@pytest.mark.slow
@pytest.mark.parameter("devices")
class TestAgainstOneProcess:
    """Losses, gradients, metrics and weights of two ranks are those of one process with the global batch."""

    @pytest.fixture(autouse=True)
    def _pair(self, pair: Ranks) -> None:
        self.pair = pair

    def both(
        self, dataset: PreparedDataset, folder: Path, *, accum: int, batch: int = 1, **settings: Any
    ) -> list[Path]:
        """Train alone and with two ranks; returns the folders."""
        start = settings.pop("start", None)
        common: dict[str, Any] = {"accum": accum, "eval_batch_size": 2, "compute_val_loss": True, **settings}
        one = tiny.job(dataset, folder / "one", batch=RANKS * batch, **common)
        two = tiny.job(dataset, folder / "two", batch=batch, devices=RANKS, **common)
        one, two = (dataclasses.replace(job, start_weights=start) for job in (one, two))
        steps = [train(one).optimizer_steps, self.pair.train(two).optimizer_steps]
        assert steps[0] == steps[1] >= 10
        return [folder / "one", folder / "two"]

    def compare(self, dataset: PreparedDataset, folder: Path, **settings: Any) -> None:
        """Of weights that stand still, as nearly as numbers let them: losses, metrics and what Adam has of gradients.

        Where they move, Adam makes steps of rounding errors: of a weight without a gradient, for one.
        """
        one, two = self.both(dataset, folder, lr=1e-9, lr_encoder=1e-9, **settings)
        for expected, found in zip(rows(one), rows(two), strict=True):
            assert expected.keys() == found.keys()
            for name, value in expected.items():
                # A mean of percentages over ranks is not the percentage of all, and speed is not the same.
                if not name.endswith(("_error", "images_per_second")) and not name.startswith("seconds/"):
                    assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
        expected, found = (checkpoint.load(path / checkpoint.LATEST)["optimizer"]["state"] for path in (one, two))
        assert expected.keys() == found.keys()
        assert len(expected) > 100
        for number, moments in expected.items():
            for name, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
                difference = float((moments[name] - found[number][name]).norm())
                assert difference <= 1e-4 * float(moments[name].norm()) + 1e-9**power, (number, name)

    @pytest.mark.long
    def test_weights_that_move(self, uneven: PreparedDataset, tmp_path: Path) -> None:
        one, two = self.both(uneven, tmp_path, accum=2, lr=1e-3)
        for epoch, (expected, found) in enumerate(zip(rows(one), rows(two), strict=True)):
            for name in ("train/loss", "train/loss_bbox", "val/loss", "val/loss_giou"):
                assert found[name] == pytest.approx(expected[name], rel=1e-4 * 10**epoch), name
        weights_of_two = weights(two)
        differences = torch.cat(
            [(tensor.float() - weights_of_two[name].float()).abs().flatten() for name, tensor in weights(one).items()]
        )
        assert float((differences > 1e-4).float().mean()) < 0.01  # a tenth of one step

    @pytest.mark.long
    def test_detections_of_all_are_measured(self, tmp_path: Path) -> None:
        """By a detector that has learned something: what random weights find has mAP 0, whoever is missing."""
        source = tiny.draw(tmp_path / "source", train=11, valid=5, test=3)
        for path in source.glob("*/_annotations.coco.json"):
            content = json.loads(path.read_text())
            first = {row["image_id"]: row for row in reversed(content["annotations"])}
            content["annotations"] = [{**row, "bbox": [8, 8, 48, 44], "area": 48 * 44} for row in first.values()]
            path.write_text(json.dumps(content))
        dataset = tiny.prepare(source, tmp_path / "prepared")
        train(tiny.job(dataset, tmp_path / "school", epochs=12, eval_interval=3, lr=3e-3, scale_jitter=False))
        start = partial(read_weight_file, tmp_path / "school" / "checkpoint_best_total.pth")
        self.compare(dataset, tmp_path, accum=1, run_test=True, start=start)
        for name in ("val/mAP_50_95", "val/ema_mAP_50_95", "test/mAP_50_95"):
            assert max(row.get(name, 0.0) for row in rows(tmp_path / "two")) > 0.02, name

    def test_uneven_batches(self, uneven: PreparedDataset, tmp_path: Path) -> None:
        self.compare(uneven, tmp_path, accum=1, batch=2, run_test=True, compute_test_loss=True)

    def test_accumulation_and_scales(self, uneven: PreparedDataset, tmp_path: Path) -> None:
        settings = {"multi_scale": "per-batch", "expanded_scales": False, "compute_train_metrics": False}
        self.compare(uneven, tmp_path, accum=2, **settings)

    def test_a_rank_without_boxes(self, tmp_path: Path) -> None:
        """Of ten images one has boxes: in most steps neither rank has any, in the others one of both."""
        source = tiny.draw(tmp_path / "source")
        path = source / "train" / "_annotations.coco.json"
        content = json.loads(path.read_text())
        first = content["images"][0]["id"]
        content["annotations"] = [row for row in content["annotations"] if row["image_id"] == first]
        path.write_text(json.dumps(content))
        self.compare(tiny.prepare(source, tmp_path / "prepared"), tmp_path, accum=1, eval_interval=2)


@pytest.fixture
def one_unreadable(uneven: PreparedDataset, tmp_path: Path) -> tuple[PreparedDataset, str]:
    """The dataset with classes of other names (train.class_names), and the name of the image that cannot be read."""
    dataset, (name,) = tiny.damaged(uneven, tmp_path / "damaged", 7)
    dataset.class_map = named(dataset.class_map, [f"my {name}" for name in dataset.class_map.names])
    return dataset, name


@pytest.mark.long
@pytest.mark.parameter("devices", "resume", "skip_corrupt")
def test_stopped_and_continued_is_as_if_never_stopped(
    one_unreadable: tuple[PreparedDataset, str], pair: Ranks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also for what all ranks have counted: images that are left out, where it is allowed."""
    dataset, unreadable = one_unreadable
    settings: dict[str, Any] = {
        "batch": 1,
        "accum": 2,
        "devices": RANKS,
        "drop_path": 0.3,
        "epochs": 3,
        "checkpoint_interval": 1,
        "skip_corrupt": 1,
    }
    pair.train(tiny.job(dataset, tmp_path / "whole", **settings))
    published: list[str] = []
    job = tiny.job(dataset, tmp_path / "pieces", **settings)
    caplog.set_level(logging.INFO)
    with pytest.raises(Terminated, match=r"^stopped on request after optimizer step \d+ "):
        train(job, publish=lambda path: published.append(path.name), stop_requested=lambda: bool(published))
    assert published[-1] == checkpoint.LATEST
    assert 0 < checkpoint.load(job.checkpoints / checkpoint.LATEST)["position"]["global_step"] < 15
    result = train(job)
    assert (result.optimizer_steps, result.skipped) == (15, (unreadable,))
    assert not list(job.checkpoints.glob(".ranks"))
    for name in ("checkpoint.pth", "checkpoint_best_total.pth", "checkpoint_2.pth"):
        left, right = (checkpoint.load(tmp_path / folder / name) for folder in ("whole", "pieces"))
        assert not tiny.differing(left, right), name
    assert [row["name"] for row in left["classes"]] == list(dataset.class_map.names)
    assert not tiny.differing(rows(tmp_path / "whole"), rows(tmp_path / "pieces"))
    told = [record.getMessage() for record in caplog.records]
    assert [text for text in told if unreadable in text] == [
        f"image {unreadable} cannot be read and is left out: 1 of train.skip_corrupt: 1"  # once, not by each rank
    ]
    assert any(" x 2 ranks = 4" in text for text in told)
    assert not ranks_of(os.getpid())


class _Running:
    """A training of two ranks that goes on in a thread, as its folder and its error."""

    def __init__(self, job: TrainingJob) -> None:
        self.error: Exception | None = None
        self.result: TrainingResult | None = None
        self._thread = threading.Thread(target=self._run, args=(job,))
        self._thread.start()

    def _run(self, job: TrainingJob) -> None:
        try:
            self.result = train(job)
        except Exception as error:
            self.error = error

    def wait_for(self, what: Callable[[], Any], seconds: float = 60.0) -> Any:
        """The first value of `what` that is true."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and self._thread.is_alive():
            if found := what():
                return found
            time.sleep(0.05)
        raise AssertionError(f"never: {what}; {self.error}")

    def seconds_to_the_end(self) -> float:
        started = time.monotonic()
        self._thread.join(120)
        assert not self._thread.is_alive()
        return time.monotonic() - started


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(RANKS))
def test_a_rank_that_dies_ends_the_others(uneven: PreparedDataset, tmp_path: Path, rank: int) -> None:
    before = set(ranks_of(os.getpid()))
    job = tiny.job(uneven, tmp_path, batch=1, devices=RANKS, epochs=1000, eval_interval=1000, checkpoint_interval=1)
    running = _Running(job)
    running.wait_for((tmp_path / "checkpoint.pth").exists, seconds=180)  # four processes import torch first
    pids = [pid for pid in ranks_of(os.getpid()) if pid not in before]
    assert len(pids) == RANKS
    victim = next(
        pid for pid in pids if f"\0RANK={rank}\0" in "\0" + Path(f"/proc/{pid}/environ").read_text()
    )  # fmt: skip
    os.kill(victim, signal.SIGKILL)
    assert running.seconds_to_the_end() < 60
    assert isinstance(running.error, TransientError)  # the pipeline tries again
    assert running.error.message == (
        f"rank {rank} of 2 (process {victim}) was ended by SIGKILL; the others were stopped"
    )
    assert not set(ranks_of(os.getpid())) - before
    assert checkpoint.newest_whole(tmp_path) is not None


@pytest.mark.slow
@pytest.mark.parameter("skip_corrupt")
def test_an_image_that_one_rank_cannot_read(one_unreadable: tuple[PreparedDataset, str], tmp_path: Path) -> None:
    """By default the rank's own error is that of the training."""
    dataset, name = one_unreadable
    with pytest.raises(DatasetError, match=rf"training image {name} .*cannot be read"):
        train(tiny.job(dataset, tmp_path / "none", batch=1, devices=RANKS))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_names_the_images(uneven: PreparedDataset, pair: Ranks, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"not finite") as caught:
        pair.train(tiny.job(uneven, tmp_path, batch=1, devices=RANKS, lr=1e30, warmup_epochs=0.0, clip_max_norm=0.0))
    assert ".png" in str(caught.value) or ".jpg" in str(caught.value)


def test_alone_everything_is_ones_own() -> None:
    assert ALONE.is_main and ALONE.any(True) and not ALONE.any(False)
    assert ALONE.union([3, 1, 3]) == [1, 3]
    assert (ALONE.from_main({"a": 1}), ALONE.texts("ä")) == ({"a": 1}, ["ä"])
    values = torch.tensor([1.0, 2.0])
    assert ALONE.mean(values) is values
    np.testing.assert_array_equal(values, [1, 2])
