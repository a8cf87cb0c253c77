"""The learning-rate factor against the measured series of the training spec (4.2, 12.12 to 12.15)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rfdetr_core.data.loading import Batch
from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.training.engine import Engine
from rfdetr_core.training.loop import train
from rfdetr_core.training.schedule import Schedule, set_learning_rates
from tests.training import tiny


def factors(schedule: Schedule) -> list[float]:
    return [schedule.factor(step) for step in range(schedule.epochs * schedule.steps_per_epoch)]


def test_step_drops_once_to_a_tenth() -> None:
    assert factors(Schedule(kind="step", epochs=3, steps_per_epoch=8, lr_drop=2)) == [1.0] * 16 + [0.1] * 8


def test_step_never_drops_with_the_defaults() -> None:
    assert set(factors(Schedule(kind="step", epochs=100, steps_per_epoch=3))) == {1.0}


def test_cosine_falls_to_zero() -> None:
    found = factors(Schedule(kind="cosine", epochs=3, steps_per_epoch=8))
    assert found == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 24)) for step in range(24)])
    assert found[0] == 1.0
    assert found[12] == pytest.approx(0.5)


def test_warmup_and_floor_give_the_measured_series() -> None:
    schedule = Schedule(kind="cosine", epochs=4, steps_per_epoch=8, warmup_epochs=1.5, min_factor=0.1)
    rates = [1e-4 * factor for factor in factors(schedule)]
    assert rates[:12] == pytest.approx([step * 1e-4 / 12 for step in range(12)])
    assert rates[:3] == pytest.approx([0.0, 8.3333e-6, 1.66667e-5], rel=1e-5)
    assert rates[11] == pytest.approx(9.16667e-5, rel=1e-5)
    assert rates[12] == pytest.approx(1e-4)
    assert rates[-3:] == pytest.approx([1.49047e-5, 1.22025e-5, 1.0554e-5], rel=1e-5)
    assert min(rates[12:]) > 0.1 * 1e-4


def test_the_floor_means_nothing_to_step() -> None:
    with_floor, without = (
        Schedule(kind="step", epochs=3, steps_per_epoch=8, lr_drop=1, min_factor=f) for f in (0.5, 0)
    )
    assert factors(with_floor) == factors(without)


def test_without_warmup_the_first_step_has_the_full_rate() -> None:
    assert Schedule(kind="step", epochs=1, steps_per_epoch=5).factor(0) == 1.0


def test_a_fractional_warmup_is_cut_to_whole_steps() -> None:
    found = factors(Schedule(kind="step", epochs=1, steps_per_epoch=8, warmup_epochs=0.49))
    assert found == pytest.approx([0, 1 / 3, 2 / 3, 1, 1, 1, 1, 1])


def test_warmup_longer_than_training_never_arrives() -> None:
    assert max(factors(Schedule(kind="cosine", epochs=1, steps_per_epoch=4, warmup_epochs=2.0))) == 3 / 8


def test_every_group_is_scaled_by_the_same_factor() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    base = [1e-4, 7e-5, 3e-6]
    optimizer = torch.optim.AdamW([{"params": [p], "lr": lr} for p, lr in zip(parameters, base, strict=True)])
    for factor in (0.5, 0.25, 1.0):  # always of the base rates: factors do not pile up
        set_learning_rates(optimizer, base, factor)
        assert [group["lr"] for group in optimizer.param_groups] == [rate * factor for rate in base]


@pytest.mark.parameter("lr_scheduler", "warmup_epochs")
def test_the_schedule_reaches_the_optimizer(
    monkeypatch: pytest.MonkeyPatch, dataset: PreparedDataset, tmp_path: Path
) -> None:
    """The rates that training really steps with: warm-up from zero, then the drop."""
    seen: list[float] = []
    rates: list[float] = []
    original = Engine.optimizer_step

    def record(self: Engine, window: Sequence[Batch], **settings: Any) -> dict[str, Tensor] | None:
        result = original(self, window, **settings)
        rates[:] = self.base_rates
        seen.append(self.optimizer.param_groups[0]["lr"] / self.base_rates[0])
        return result

    monkeypatch.setattr(Engine, "optimizer_step", record)
    train(tiny.job(dataset, tmp_path, epochs=2, warmup_epochs=0.4, lr_drop=1, eval_interval=2))
    assert seen == pytest.approx([0.0, 0.5, 1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.1])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/lr"] for row in rows] == pytest.approx([1e-4, 1e-5])
    for name, rate in (("train/lr_min", min(rates)), ("train/lr_max", max(rates))):
        assert [row[name] for row in rows] == pytest.approx([rate, 0.1 * rate])
    assert min(rates) < 1e-4 < max(rates)
