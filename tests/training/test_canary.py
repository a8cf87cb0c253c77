"""The worst step before the first one: it leaves no trace, and fails where the training would."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.errors import DeviceMemoryError
from rfdetr_core.models.detector import RFDETR
from rfdetr_core.training.canary import run_canary
from rfdetr_core.training.device_memory import memory_of
from rfdetr_core.training.engine import Engine, build_engine
from rfdetr_core.training.loop import train
from rfdetr_core.training.worst_case import DatasetFacts, worst_case
from tests.training import tiny
from tests.training.test_engine import everything


@pytest.mark.parametrize("settings", [{}, {"square_resize_div_64": False}, {"amp_dtype": "bf16"}], ids=str)
@pytest.mark.parametrize("steps", [0, 2])
def test_leaves_everything_bit_by_bit(
    dataset: PreparedDataset, tmp_path: Path, steps: int, settings: dict[str, Any]
) -> None:
    job = tiny.job(dataset, tmp_path, drop_path=0.3, multi_scale="per-batch", **settings)
    model = tiny.model_config(layer_norm=False, gradient_checkpointing=True)  # batch norm has buffers that a step moves
    job = type(job)(**{**vars(job), "model": model})
    torch.manual_seed(0)
    engine = build_engine(model, job.train)
    for step in range(steps):
        engine.optimizer_step([tiny.batch(step)], factor=1.0, global_step=step)
    before, streams = everything(engine), engine.random_state()
    updates = engine.ema.updates if engine.ema is not None else -1
    shapes: list[tuple[int, ...]] = []
    handle = engine.raw_model.register_forward_hook(lambda _, given, __: shapes.append(tuple(given[0].shape)))
    peak = run_canary(job, engine, memory_of(engine.device))
    handle.remove()
    assert shapes == [(2, 3, *worst_case(model, job.train, DatasetFacts.of(dataset.document)).largest)]
    assert min(shapes[0][2:]) >= 112
    assert peak > 10**8
    assert not tiny.differing(before, everything(engine))
    assert not tiny.differing(streams, engine.random_state())
    assert all(parameter.grad is None for parameter in engine.raw_model.parameters())
    assert engine.ema is not None and engine.ema.updates == updates
    assert engine.raw_model.training and engine.model.training


def test_without_a_trace_the_hook_would_see_one(dataset: PreparedDataset, tmp_path: Path) -> None:
    """The same forward by hand moves the buffers and the stream, so that the test above can fail."""
    torch.manual_seed(0)
    engine = build_engine(tiny.model_config(layer_norm=False), tiny.train_config(drop_path=0.3))
    before, streams = everything(engine), engine.random_state()
    engine.raw_model(*[tiny.batch(0).on(engine.device)[0]])
    assert tiny.differing(before, everything(engine))
    assert tiny.differing(streams, engine.random_state())


def test_a_training_that_does_not_fit_fails_before_its_first_step(
    dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = RFDETR.forward

    def small(self: RFDETR, pixels: Any, *args: Any, **settings: Any) -> Any:
        if pixels.shape[-1] > 96:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, pixels, *args, **settings)

    monkeypatch.setattr(RFDETR, "forward", small)
    monkeypatch.setattr(Engine, "optimizer_step", None)
    job = tiny.job(dataset, tmp_path, batch=2, accum=2, multi_scale="per-batch")
    with pytest.raises(
        DeviceMemoryError,
        match=r"before the first step, with the largest batch .*: 2 images of 112 x 112 px with 3 boxes",
    ) as caught:
        train(job)
    assert caught.value.hint.startswith("try train.batch_size: 1 with train.grad_accum_steps: 4")
    assert not list(tmp_path.glob("*.pth"))


def test_the_result_tells_prediction_and_peak(
    dataset: PreparedDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    job = tiny.job(dataset, tmp_path, epochs=1)
    result = train(type(job)(**{**vars(job), "predicted_peak_bytes": 123}))
    assert result.predicted_peak_bytes == 123
    assert 10**8 < result.peak_memory_bytes < 10**11
    assert "the largest batch that this dataset can give fits: 2 images of 32 x 32 px" in caplog.text
