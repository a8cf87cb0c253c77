"""A pod that is taken away: SIGTERM in every phase of probing and training ends within the grace period, resumable."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rfdetr_core.data.sample import write_sample_dataset
from rfdetr_core.training import checkpoint
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
        time.sleep(2.0)
    return send(self, path)


LocalLocation.upload_file = upload_file
sys.exit(main())
"""
"""The train stage with a store that takes two seconds for a checkpoint."""

SLOW_STEP = """
import sys, time
from components.train.stage import main
from rfdetr_core.models.detector import RFDETR

forward = RFDETR.forward


def slow(self, *args, **words):
    if self.training:
        print("stepping", flush=True)
        time.sleep(1.0)
    return forward(self, *args, **words)


RFDETR.forward = slow
sys.exit(main())
"""
"""The train stage with a second for each micro-batch, of which a step has two."""

SLOW_EVALUATION = """
import sys, time
from components.train.stage import main
from rfdetr_core.training import validation

detections_of = validation.detections_of


def slow(*args, **words):
    print("evaluating", flush=True)
    time.sleep(0.5)
    return detections_of(*args, **words)


validation.detections_of = slow
sys.exit(main())
"""
"""The train stage with a second for each evaluated batch: half of one for either kind of weights."""


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


UPLOADS = json.dumps({"train": {"eval_interval": 500, "checkpoint_interval": 1}})


def completed(folder: Path, run: str, name: str, *arguments: str) -> None:
    process = stage(folder, run, name, *arguments)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output


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


@pytest.mark.slow
def test_the_probe(folder: Path) -> None:
    # Large images: what is left of the search after its first step takes seconds, also where this test is waited for.
    overrides = {"train": {"batch_size": "auto"}, "model": {"resolution": 320}}
    completed(folder, "probe", "validate_dataset", "--config", "config.yaml", "--overrides", json.dumps(overrides))
    _, seconds = stopped(stage(folder, "probe", "probe_batch_size"), "batch 1 at 320 x 320 px")
    found = status(folder, "probe", "probe_batch_size")
    assert (found["state"], found["exit_code"]) == ("preempted", 143)
    assert seconds < GRACE_SECONDS
    assert not (folder / "store" / "runs" / "probe" / "probe").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "program", "marker", "wait", "where"),
    [
        ("first-step", SLOW_STEP, "stepping", 0.0, range(1)),  # its first half is thrown away
        ("epoch", "", "epoch 1/500 done", 0.1, range(5, 500)),
        ("evaluation", SLOW_EVALUATION, "evaluating", 0.0, range(5, 6)),
    ],
)
def test_training(folder: Path, phase: str, program: str, marker: str, wait: float, where: range) -> None:
    overrides = {"train": {"eval_interval": 500}} if phase == "epoch" else {}
    completed(folder, phase, "validate_dataset", "--config", "config.yaml", "--overrides", json.dumps(overrides))
    completed(folder, phase, "probe_batch_size")
    output, seconds = stopped(stage(folder, phase, "train", program=program), marker, wait)
    found = status(folder, phase, "train")
    assert (found["state"], found["exit_code"]) == ("preempted", 143)
    assert seconds < GRACE_SECONDS
    kept = folder / "store" / "runs" / phase / "train" / "checkpoints" / "checkpoint.pth"
    position = checkpoint.load(kept)["position"]
    step, epoch = position["global_step"], position["epoch"]
    assert step in where
    assert f"stopped on request after optimizer step {step} " in output
    assert ("epoch 1/500 done" in output) is (phase == "epoch")

    again = stage(folder, phase, "train")  # the next attempt goes on from there
    output, _ = stopped(again, f"epoch {epoch + 1}/500 done")
    assert (f", optimizer step {step}\n" in output) is (step > 0)  # continuing after epoch ...
    assert checkpoint.load(kept)["position"]["epoch"] > epoch


@pytest.mark.slow
def test_an_upload(folder: Path) -> None:
    """What is under way arrives whole, and the last step's checkpoint after it."""
    completed(folder, "upload", "validate_dataset", "--config", "config.yaml", "--overrides", UPLOADS)
    completed(folder, "upload", "probe_batch_size")
    rest, seconds = stopped(stage(folder, "upload", "train", program=SLOW_STORE), "sending", 0.5)
    found = status(folder, "upload", "train")
    assert (found["state"], found["exit_code"]) == ("preempted", 143)
    assert seconds < GRACE_SECONDS
    for path in (folder / "store" / "runs" / "upload" / "train" / "checkpoints").glob("*.pth"):
        checkpoint.load(path)
    kept = checkpoint.load(folder / "store" / "runs" / "upload" / "train" / "checkpoints" / "checkpoint.pth")
    assert f"stopped on request after optimizer step {kept['position']['global_step']} " in rest
