"""Latency: models take turns, the first runs do not count, and the row says what was measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rfdetr_core.config import ModelConfig
from rfdetr_core.evaluation import latency
from rfdetr_core.evaluation.latency import RUNS, WARM_UP, measure_latency
from rfdetr_core.models.weights import TrainedModel

NOW = [0.0]
"""What the clock says: it goes on only while a model computes."""


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency.time, "perf_counter", lambda: NOW[0])


class Slow(nn.Module):
    """Takes so many seconds, a little longer each time, and much longer at first."""

    def __init__(self, name: str, seconds: float, calls: list[str]) -> None:
        super().__init__()
        self.name, self.seconds, self.calls = name, seconds, calls
        self.seen: set[Any] = set()

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        before = self.calls.count(self.name)
        self.calls.append(self.name)
        self.seen |= {tuple(pixels.shape), (pixels @ pixels).dtype}
        NOW[0] += 9.0 if before < WARM_UP else self.seconds + 0.0001 * (before - WARM_UP)
        return {"pred_logits": torch.zeros(1, 5, 3), "pred_boxes": torch.full((1, 5, 4), 0.5)}


def slow(name: str, seconds: float, calls: list[str]) -> TrainedModel:
    config = ModelConfig.parse({"variant": "nano", "resolution": 64})
    return TrainedModel(Slow(name, seconds, calls), config, ("a", "b"), "ema", 0, "")  # type: ignore[arg-type]


def test_two_models_take_turns_and_are_told_apart() -> None:
    calls: list[str] = []
    models = [slow("fast", 0.001, calls), slow("slow", 0.006, calls)]
    fast, other = measure_latency(models, torch.device("cpu"))
    assert calls == ["fast", "slow"] * (WARM_UP + RUNS)
    assert (fast["milliseconds"], other["milliseconds"]) == pytest.approx((1.95, 6.95))  # the median of 20 runs
    assert fast["p90_milliseconds"] == pytest.approx(1 + 0.1 * 0.9 * 19)  # the warm-up is not among them
    assert fast["images_per_second"] == pytest.approx(1000 / 1.95, rel=1e-3)
    assert (fast["runs"], fast["batch_size"], fast["device"], fast["precision"]) == (RUNS, 1, "cpu", "float32")
    assert fast["threads"] == torch.get_num_threads() and fast["device_name"]
    assert models[0].module.seen == {(1, 3, 64, 64), torch.float32}


def test_half_precision_is_used_and_named() -> None:
    calls: list[str] = []
    model = slow("a", 0.0, calls)
    [row] = measure_latency([model], torch.device("cpu"), autocast=torch.bfloat16)
    assert row["precision"] == "bfloat16" and torch.bfloat16 in model.module.seen
