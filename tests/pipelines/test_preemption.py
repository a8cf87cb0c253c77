"""A pod that is taken away: SIGTERM in every phase of probing and training ends within the grace period, resumable."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from components.probe_batch_size import stage as probe_batch_size
from components.train import stage as train
from components.validate_dataset import stage as validate_dataset
from rfdetr_core.data.sample import write_sample_dataset
from rfdetr_core.models.detector import RFDETR
from rfdetr_core.training import checkpoint, validation
from tests.processes import without_settings

GRACE_SECONDS = 20.0
CONFIG = """
name: shapes
dataset: {uri: data}
model: {variant: pico, resolution: 64, num_queries: 10, num_select: 10, group_detr: 2}
train:
  {epochs: 500, batch_size: 2, grad_accum_steps: 2, eval_batch_size: 2, num_workers: 0, multi_scale: off, seed: 0}
"""


SLOW_STORE = """
import sys, time
from components.train.stage import main
from rfdetr_core.storage.local import LocalLocation

send = LocalLocation.upload_file


def upload_file(self, path):
    if self.name.endswith(".pth"):
        print("sending", self.name, flush=True)
        time.sleep(0.5)
    return send(self, path)


LocalLocation.upload_file = upload_file
sys.exit(main())
"""
"""The train stage with a store that takes half a second for a checkpoint."""


def stage(folder: Path, run: str, name: str, *arguments: str, program: str = "") -> subprocess.Popen[str]:
    """A stage of one run as a process, started as the pipeline does; or a program that runs it."""
    start = ["-c", program] if program else ["-m", f"components.{name}.stage"]
    return subprocess.Popen(
        [sys.executable, *start, "--run-uri", str(folder / "store" / "runs" / run), *arguments],
        cwd=folder,
        env=without_settings(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def prepared(folder: Path, run: str, **overrides: Any) -> None:
    """The first stage of a run, and the second where it has nothing to search; in this process."""
    uri = str(folder / "store" / "runs" / run)
    overrides["dataset"] = {"uri": str(folder / "data")}
    given = ["--config", str(folder / "config.yaml"), "--overrides", json.dumps(overrides)]
    assert validate_dataset.main(["--run-uri", uri, *given]) == 0
    if "batch_size" not in overrides.get("train", {}):
        assert probe_batch_size.main(["--run-uri", uri]) == 0


class Preemption(logging.Handler):
    """SIGTERM for this process, in which a stage runs: when it is called, or a line with the marker is logged."""

    def __init__(self, marker: str = "") -> None:
        super().__init__()
        self.marker = marker
        self.asked = 0.0
        self.lines: list[str] = []

    def __call__(self) -> None:
        if not self.asked:
            self.asked = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        if self.marker and self.marker in self.lines[-1]:
            self()

    def of_training(self, folder: Path, run: str) -> tuple[str, float]:
        """All that the train stage logged, and the seconds from the signal to its end."""
        logging.getLogger().addHandler(self)
        try:
            assert train.main(["--run-uri", str(folder / "store" / "runs" / run)]) == 143
        finally:
            logging.getLogger().removeHandler(self)
        assert self.asked
        return "\n".join(self.lines) + "\n", time.monotonic() - self.asked


def status(folder: Path, run: str, name: str) -> Any:
    return json.loads((folder / "store" / "runs" / run / "status" / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of five optimizer steps an epoch and, where a batch takes a second, fifty of evaluation."""
    folder = tmp_path_factory.mktemp("preempted")
    write_sample_dataset(folder / "data", train=20, valid=100, test=2, size=64)
    (folder / "config.yaml").write_text(CONFIG)
    return folder


def stopped(process: subprocess.Popen[str], marker: str, wait: float = 0.0) -> tuple[str, float]:
    """SIGTERM when a line with the marker was printed; all that was printed, and the seconds from there to the end."""
    assert process.stdout is not None
    before = ""
    with process:  # ends it and closes the pipe, whatever comes
        try:
            for line in process.stdout:
                before += line
                if marker in line:
                    break
            else:
                pytest.fail(f"{marker!r} was never printed: {before}")
            time.sleep(wait)
            asked = time.monotonic()
            process.send_signal(signal.SIGTERM)
            rest, _ = process.communicate(timeout=60)
            return before + rest, time.monotonic() - asked
        finally:
            process.kill()


@pytest.mark.long
def test_the_probe(folder: Path) -> None:
    # Large images: what is left of the search after its first step takes seconds, also where this test is waited for.
    prepared(folder, "probe", train={"batch_size": "auto"}, model={"resolution": 320})
    _, seconds = stopped(stage(folder, "probe", "probe_batch_size"), "batch 1 at 320 x 320 px")
    found = status(folder, "probe", "probe_batch_size")
    assert (found["state"], found["exit_code"]) == ("preempted", 143)
    assert seconds < GRACE_SECONDS
    assert not (folder / "store" / "runs" / "probe" / "probe").exists()


def resumable(folder: Path, run: str, output: str, seconds: float, where: range) -> None:
    """What a preempted training must leave; then the next attempt goes on from there."""
    found = status(folder, run, "train")
    assert (found["state"], found["exit_code"]) == ("preempted", 143)
    assert seconds < GRACE_SECONDS
    kept = folder / "store" / "runs" / run / "train" / "checkpoints" / "checkpoint.pth"
    position = checkpoint.load(kept)["position"]
    step, epoch = position["global_step"], position["epoch"]
    assert step in where
    assert f"stopped on request after optimizer step {step} " in output

    output, _ = Preemption(f"epoch {epoch + 1}/500 done").of_training(folder, run)
    assert (f", optimizer step {step}\n" in output) is (step > 0)  # continuing after epoch ...
    assert checkpoint.load(kept)["position"]["epoch"] > epoch


@pytest.mark.long
def test_an_epoch(folder: Path) -> None:
    prepared(folder, "epoch", train={"eval_interval": 500})
    output, seconds = stopped(stage(folder, "epoch", "train"), "epoch 1/500 done", 0.1)
    resumable(folder, "epoch", output, seconds, range(5, 500))


def test_the_first_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first half is thrown away."""
    preemption, forward = Preemption(), RFDETR.forward

    def slow(self: RFDETR, *args: Any, **words: Any) -> Any:
        if self.training:
            preemption()
            time.sleep(0.1)
        return forward(self, *args, **words)

    prepared(folder, "first-step")
    with monkeypatch.context() as patch:
        patch.setattr(RFDETR, "forward", slow)
        output, seconds = preemption.of_training(folder, "first-step")
    assert "epoch 1/500 done" not in output
    resumable(folder, "first-step", output, seconds, range(1))


def test_an_evaluation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second for each batch: half of one for either kind of weights."""
    preemption, detections_of = Preemption(), validation.detections_of

    def slow(*args: Any, **words: Any) -> Any:
        preemption()
        time.sleep(0.5)
        return detections_of(*args, **words)

    prepared(folder, "evaluation")
    with monkeypatch.context() as patch:
        patch.setattr(validation, "detections_of", slow)
        output, seconds = preemption.of_training(folder, "evaluation")
    assert "epoch 1/500 done" not in output
    resumable(folder, "evaluation", output, seconds, range(5, 6))


@pytest.mark.long
def test_an_upload(folder: Path) -> None:
    """What is under way arrives whole, and the last step's checkpoint after it."""
    prepared(folder, "upload", train={"eval_interval": 500, "checkpoint_interval": 1})
    rest, seconds = stopped(stage(folder, "upload", "train", program=SLOW_STORE), "sending", 0.1)
    found = status(folder, "upload", "train")
    assert (found["state"], found["exit_code"]) == ("preempted", 143)
    assert seconds < GRACE_SECONDS
    for path in (folder / "store" / "runs" / "upload" / "train" / "checkpoints").glob("*.pth"):
        checkpoint.load(path)
    kept = checkpoint.load(folder / "store" / "runs" / "upload" / "train" / "checkpoints" / "checkpoint.pth")
    assert f"stopped on request after optimizer step {kept['position']['global_step']} " in rest
