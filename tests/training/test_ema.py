"""The average of the weights against the training spec (4.8) and the reference's decay values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rfdetr_core.training.ema import ModelEMA
from rfdetr_core.training.engine import build_engine
from tests.models import golden
from tests.training import tiny


class Scalar(nn.Module):
    """One weight, one averaged buffer, one that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def set(self, value: float) -> None:
        with torch.no_grad():
            self.weight.fill_(value)
            self.mean.fill_(10 * value)
            self.count.fill_(int(value))


def follow(values: list[float], *, decay: float = 0.993, tau: float = 100) -> list[tuple[float, float, int]]:
    """(weight, mean, count) of the average after each update."""
    model = Scalar()
    ema, found = ModelEMA(model, decay=decay, tau=tau), []
    for value in values:
        model.set(value)
        ema.update()
        found.append((ema.module.weight.item(), ema.module.mean.item(), ema.module.count.item()))
    return found


@pytest.mark.parameter("use_ema")
def test_the_measured_series() -> None:
    found = follow([1, 2, 3, 4])
    assert [weight for weight, _, _ in found] == pytest.approx([1, 1.980337, 2.970075, 3.959899], abs=1e-6)


def test_buffers_are_averaged_and_integers_copied() -> None:
    found = follow([1, 2, 3, 4])
    assert [mean for _, mean, _ in found] == pytest.approx([10, 19.80337, 29.70075, 39.59899], abs=1e-5)
    assert [count for _, _, count in found] == [1, 2, 3, 4]


def test_decay_values_of_the_reference() -> None:
    ema = ModelEMA(Scalar(), decay=0.993, tau=100)
    units = golden.scalars("units")
    rows = dict(zip(units["ema_decay_update_index_zero_based"], units["ema_decay_first_updates"], strict=True))
    assert rows.pop(0) == pytest.approx(0.00988, abs=1e-5)  # the first update copies instead
    assert ema.effective_decay(1) == 0.0
    for index, decay in rows.items():
        assert ema.effective_decay(index + 1) == pytest.approx(decay, rel=1e-6)


def test_without_warmup_the_decay_is_constant() -> None:
    assert [weight for weight, _, _ in follow([1, 2, 2], decay=0.9, tau=0)] == pytest.approx([1.0, 1.1, 1.19])


def test_the_copy_is_frozen_and_of_its_own() -> None:
    model = Scalar()
    model.set(1)
    ema = ModelEMA(model, decay=0.9, tau=0)
    model.set(5)
    assert ema.module.weight.item() == 1.0
    assert not ema.module.training
    assert model.training
    assert not ema.module.weight.requires_grad
    assert model.weight.requires_grad


def test_an_aliased_tensor_is_averaged_once() -> None:
    model = Scalar()
    model.alias = model.weight
    ema = ModelEMA(model, decay=0.5, tau=0)
    for value in (1, 2):
        model.set(value)
        ema.update()
    assert ema.module.weight.item() == pytest.approx(1.5)


def test_the_interval_counts_optimizer_steps() -> None:
    engine = build_engine(tiny.model_config(), tiny.train_config(ema_update_interval=3))
    assert engine.ema is not None
    updates = []
    for step in range(7):
        engine.optimizer_step([tiny.batch(step)], factor=1.0, global_step=step)
        updates.append(engine.ema.updates)
    assert updates == [0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parameter("use_ema")
def test_use_ema_false_keeps_no_copy() -> None:
    assert build_engine(tiny.model_config(), tiny.train_config(use_ema=False)).ema is None
