"""Fields of `train` that decide what the detector is given: seen at the optimizer step, where nothing comes after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rfdetr_core.data.loading import Batch
from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.training.engine import Engine
from rfdetr_core.training.loop import train
from tests.data.helpers import grid_dataset, prepared
from tests.training import tiny


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """Every batch that a training steps on."""
    seen: list[Batch] = []
    step = Engine.optimizer_step

    def watched(self: Engine, window: Any, **words: Any) -> Any:
        seen.extend(window)
        return step(self, window, **words)

    monkeypatch.setattr(Engine, "optimizer_step", watched)
    return seen


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """Every batch that a training would step on: the steps themselves are left out."""
    seen: list[Batch] = []

    def noted(self: Engine, window: Any, **_: Any) -> Any:
        seen.extend(window)
        return {"loss": torch.tensor(1.0)}

    monkeypatch.setattr(Engine, "optimizer_step", noted)
    return seen


def brightness(batches: list[Batch]) -> float:
    return sum(float(batch.pixels.float().mean()) for batch in batches) / len(batches)


def sides(batches: list[Batch]) -> set[tuple[int, ...]]:
    return {tuple(batch.pixels.shape[-2:]) for batch in batches}


@pytest.mark.parameter("aug_config")
def test_augmentations_reach_the_detector(dataset: PreparedDataset, tmp_path: Path, offered: list[Batch]) -> None:
    lighter = {"RandomBrightnessContrast": {"brightness_limit": [0.3, 0.3], "contrast_limit": 0, "p": 1.0}}
    found = []
    for config in ({}, lighter):
        offered.clear()
        train(tiny.job(dataset, tmp_path / str(len(found)), epochs=1, aug_config=config))
        found.append(brightness(offered))
    assert found[1] > found[0] + 30


@pytest.mark.parameter("aug_config", "scale_jitter")
def test_without_flip_and_jitter_every_epoch_is_the_same(
    dataset: PreparedDataset, tmp_path: Path, offered: list[Batch]
) -> None:
    def views(**fields: Any) -> int:
        offered.clear()
        train(tiny.job(dataset, tmp_path / "-".join(fields), epochs=4, eval_interval=4, **fields))
        return len({pixels.numpy().tobytes() for batch in offered for pixels in batch.pixels})

    assert views(aug_config={}, scale_jitter=False) == 10  # the images themselves
    assert 10 < views(scale_jitter=False) <= 20  # and their mirror images
    assert views(aug_config={}) > 20


@pytest.mark.parameter("multi_scale", "expanded_scales")
def test_the_sides_are_those_asked_for(dataset: PreparedDataset, tmp_path: Path, offered: list[Batch]) -> None:
    block = tiny.model_config().block
    base = 32 // block
    wanted = {
        "off": {32},
        "plain": {(base + k) * block for k in range(-3, 5) if base + k >= 2},
        "expanded": {(base + k) * block for k in range(-5, 6) if base + k >= 2},
    }
    for name, fields in {
        "off": {"multi_scale": "off"},
        "plain": {"multi_scale": "per-batch", "expanded_scales": False},
        "expanded": {"multi_scale": "per-batch", "expanded_scales": True},
    }.items():
        offered.clear()
        train(tiny.job(dataset, tmp_path / name, epochs=12, eval_interval=12, **fields))
        assert sides(offered) == {(side, side) for side in wanted[name]}


@pytest.mark.parameter("multi_scale")
def test_per_sample_batches_are_padded_and_trained_on(
    dataset: PreparedDataset, tmp_path: Path, batches: list[Batch]
) -> None:
    result = train(tiny.job(dataset, tmp_path, epochs=1, multi_scale="per-sample"))
    assert result.optimizer_steps == 5
    assert any(batch.mask is not None and len(set(batch.sizes or ())) == 2 for batch in batches)


@pytest.mark.parameter("square_resize_div_64")
def test_without_squares_the_aspect_stays(tmp_path: Path, batches: list[Batch]) -> None:
    wide = prepared(grid_dataset(tmp_path / "source", 10, width=90, height=48), tmp_path / "prepared")
    for square, expected in ((True, (32, 32)), (False, (32, 64))):
        batches.clear()
        train(tiny.job(wide, tmp_path / str(square), epochs=1, square_resize_div_64=square, scale_jitter=False))
        assert sides(batches) == {expected}
        assert {batch.sizes for batch in batches} == {None if square else ((32, 60),) * 2}
