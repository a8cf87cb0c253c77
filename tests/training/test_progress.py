"""What a person sees: a line every ten seconds, or a bar on stderr."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.training import progress as module
from rfdetr_core.training.loop import train
from rfdetr_core.training.progress import Progress
from tests.training import tiny


class Clock:
    """Seconds that pass only when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


def test_a_line_is_due_at_the_first_step_and_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    progress = Progress(style=None, total_steps=100, done_steps=0)
    due = []
    for _ in range(25):
        clock.now += 1
        due.append(progress.step(4))
        if due[-1]:
            progress.show(epoch="1/1", loss=1.0, lr=1e-4)
    assert [step for step, was_due in enumerate(due, 1) if was_due] == [1, 11, 21]


def test_the_line_says_loss_map_speed_and_time_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rfdetr_core")
    clock = Clock(monkeypatch)
    progress = Progress(style=None, total_steps=3700, done_steps=90)  # 90 steps were done by an earlier process
    for _ in range(10):
        clock.now += 2
        progress.step(16)
    progress.show(epoch="2/30", loss=7.12345, lr=1e-4)
    progress.evaluated(0.4321)
    progress.show(epoch="2/30", loss=7.12345, lr=5e-5)
    assert caplog.messages == [
        "epoch 2/30  step 100/3700  loss 7.123  mAP -  lr 1.00e-04  8.0 images/s  ETA 2:00:00",
        "epoch 2/30  step 100/3700  loss 7.123  mAP 0.432  lr 5.00e-05  8.0 images/s  ETA 2:00:00",
    ]


@pytest.mark.parameter("progress_bar")
@pytest.mark.parametrize("style", ["tqdm", "rich"])
def test_a_bar_is_drawn_on_stderr(
    style: str, dataset: PreparedDataset, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(tiny.job(dataset, tmp_path, epochs=1, progress_bar=style))
    out, err = capfd.readouterr()
    assert out == ""
    assert "5/5" in err
    assert re.search(r"epoch 1/1  loss \d+\.\d{3}  mAP -  lr 1\.00e-04", err)
    assert "images/s" in " ".join(err.split())


@pytest.mark.parameter("progress_bar")
def test_none_draws_nothing(dataset: PreparedDataset, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(tiny.job(dataset, tmp_path, epochs=1, progress_bar=None))
    assert capfd.readouterr() == ("", "")


def test_a_failure_closes_the_bar(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), Progress(style="tqdm", total_steps=9, done_steps=0) as progress:
        progress.step(1)
        raise KeyError
    assert capfd.readouterr().err.endswith("\n")
    assert progress._bar.disable  # tqdm's word for closed
