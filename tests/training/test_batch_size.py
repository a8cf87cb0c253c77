"""The probe: its rules as pure functions, and real worst-case steps of a tiny detector."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from rfdetr_core import hardware
from rfdetr_core.config import TrainConfig
from rfdetr_core.errors import DeviceMemoryError
from rfdetr_core.training import batch_size as module
from rfdetr_core.training.batch_size import ProbeResult, accumulation, probe, with_headroom, worst_case_batch
from rfdetr_core.training.engine import Engine, build_engine
from tests.training import tiny


@pytest.mark.parametrize(
    ("batch_size", "target", "accum"), [(6, 16, 3), (16, 16, 1), (40, 16, 1), (1, 16, 16), (5, 16, 4), (8, 16, 2)]
)
def test_accumulation_reaches_the_target(batch_size: int, target: int, accum: int) -> None:
    assert accumulation(batch_size, target) == accum


@pytest.mark.parametrize(
    ("headroom", "use_ema", "expected"),
    [(0.5, True, 10), (0.5, False, 20), (1.0, True, 20), (0.7, True, 14), (0.01, True, 1)],
)
def test_headroom_scales_the_safe_batch_with_ema_only(headroom: float, use_ema: bool, expected: int) -> None:
    assert with_headroom(20, headroom, use_ema=use_ema) == expected


def run(train: TrainConfig, *, images: int = 1000, max_boxes: int = 3) -> ProbeResult:
    return probe(tiny.model_config(), train, images=images, max_boxes=max_boxes)


def sizes(result: ProbeResult) -> list[int]:
    return [attempt.batch_size for attempt in result.attempts]


class TestGivenBatch:
    def test_is_proven_by_two_steps(self) -> None:
        result = run(tiny.train_config(batch_size=3, grad_accum_steps=5))
        assert sizes(result) == [3, 3]
        assert all(attempt.fits and attempt.seconds and attempt.peak_bytes for attempt in result.attempts)
        assert (result.batch_size, result.grad_accum_steps, result.stopped_by) == (3, 5, "given")
        assert result.device == "cpu"
        assert result.memory_bytes == hardware.memory_limit()
        assert result.seconds_per_optimizer_step == pytest.approx((result.attempts[-1].seconds or 0) * 5)

    def test_that_does_not_fit_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fits_up_to(monkeypatch, 2)
        with pytest.raises(DeviceMemoryError, match=r"batch size 3 .*batch_size: auto"):
            run(tiny.train_config(batch_size=3))

    def test_json_spells_out_the_effective_batch(self) -> None:
        document = run(tiny.train_config(batch_size=2, grad_accum_steps=4)).to_json()
        assert document["effective_batch_size"] == 8
        assert document["attempts"][0]["batch_size"] == 2


def fits_up_to(monkeypatch: pytest.MonkeyPatch, largest: int) -> None:
    """Steps of a larger batch run out of memory; those that fit cost no time."""

    def step(self: Engine, window: Any, **_: Any) -> dict[str, Any]:
        count = len(window[0].counts)
        if count > largest:
            raise DeviceMemoryError(f"out of memory on cuda:0 at batch size {count}", hint="use batch_size: auto")
        return {}

    monkeypatch.setattr(Engine, "optimizer_step", step)


AUTO: dict[str, Any] = {"batch_size": "auto", "auto_batch_target_effective": 16}


class TestAutomaticBatch:
    """On a CPU, whose memory has no natural end, four bounds stop the doubling; a fifth is memory itself."""

    @pytest.mark.parameter("batch_size", "auto_batch_target_effective")
    def test_stops_at_the_target(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fits_up_to(monkeypatch, 10_000)
        result = run(tiny.train_config(**{**AUTO, "auto_batch_target_effective": 6}))
        assert sizes(result) == [1, 1, 2, 4, 8]
        assert (result.stopped_by, result.batch_size, result.grad_accum_steps) == ("target", 8, 1)

    @pytest.mark.parameter("auto_batch_target_effective", "devices")
    @pytest.mark.parametrize(("largest", "batch", "accum"), [(10_000, 16, 1), (6, 4, 4), (2, 2, 8)])
    def test_the_target_is_that_of_each_device(
        self, monkeypatch: pytest.MonkeyPatch, largest: int, batch: int, accum: int
    ) -> None:
        """With two of them an optimizer step sees twice as many images."""
        fits_up_to(monkeypatch, largest)
        found = [run(tiny.train_config(**AUTO, auto_batch_ema_headroom=1.0, devices=n)) for n in (1, 2)]
        assert [(result.batch_size, result.grad_accum_steps) for result in found] == [(batch, accum)] * 2
        assert [result.to_json()["effective_batch_size"] for result in found] == [16, 16]

    def test_stops_at_the_number_of_images(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fits_up_to(monkeypatch, 10_000)
        result = run(tiny.train_config(**AUTO), images=5)
        assert sizes(result) == [1, 1, 2, 4]
        assert (result.stopped_by, result.batch_size, result.grad_accum_steps) == ("images", 4, 4)

    def test_stops_when_time_is_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fits_up_to(monkeypatch, 10_000)
        monkeypatch.setattr(module, "CPU_SECONDS", 0.0)
        result = run(tiny.train_config(**AUTO))
        assert (sizes(result), result.stopped_by, result.grad_accum_steps) == ([1, 1], "time", 16)

    @pytest.mark.parameter("auto_batch_ema_headroom")
    def test_stops_before_the_memory_is_full(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every image adds 1 GB to the 1 GB of the model; 95 % of 8 GB hold 6 images, so 4 and not 8."""
        fits_up_to(monkeypatch, 10_000)
        last = [0]
        step = Engine.optimizer_step

        def remember(self: Engine, window: Any, **settings: Any) -> Any:
            last[0] = len(window[0].counts)
            return step(self, window, **settings)

        monkeypatch.setattr(Engine, "optimizer_step", remember)
        monkeypatch.setattr(hardware, "memory_limit", lambda: 8 * 10**9)
        monkeypatch.setattr(hardware, "resident_bytes", lambda: 10**9)
        monkeypatch.setattr(hardware, "peak_rss", lambda: (1 + last[0]) * 10**9)
        result = run(tiny.train_config(**AUTO, auto_batch_ema_headroom=0.75))
        assert sizes(result) == [1, 1, 2, 4]
        assert (result.stopped_by, result.largest_that_fits, result.batch_size) == ("memory", 4, 3)
        assert result.grad_accum_steps == 6

    @pytest.mark.parameter("batch_size", "auto_batch_ema_headroom")
    @pytest.mark.parametrize(("use_ema", "batch", "accum"), [(True, 5, 4), (False, 8, 2)])
    def test_stops_when_a_step_does_not_fit(
        self, monkeypatch: pytest.MonkeyPatch, use_ema: bool, batch: int, accum: int
    ) -> None:
        fits_up_to(monkeypatch, 10)
        result = run(tiny.train_config(**AUTO, use_ema=use_ema, eval_base_model=True))
        assert sizes(result) == [1, 1, 2, 4, 8, 16]
        assert [attempt.fits for attempt in result.attempts] == [True] * 5 + [False]
        assert result.attempts[-1].seconds is None
        assert (result.stopped_by, result.largest_that_fits) == ("memory", 8)
        assert (result.batch_size, result.grad_accum_steps) == (batch, accum)

    def test_not_even_one_image(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fits_up_to(monkeypatch, 0)
        with pytest.raises(DeviceMemoryError, match=r"batch size 1 .*lower model\.resolution") as caught:
            run(tiny.train_config(**AUTO))
        assert caught.value.exit_code == 2

    def test_an_effective_batch_far_above_the_target_is_told(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A GPU is filled; the learning rate stays what the user said."""
        fits_up_to(monkeypatch, 100)
        monkeypatch.setattr(module, "_on_cpu", lambda device: False)
        caplog.set_level(logging.WARNING)
        result = run(tiny.train_config(**AUTO))
        assert (result.stopped_by, result.batch_size) == ("memory", 44)
        assert "the effective batch is 44, and train.auto_batch_target_effective asks for 16 or more" in caplog.text
        assert "scaling train.lr by 2.8 or less" in caplog.text

    def test_ends_at_the_largest_batch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fits_up_to(monkeypatch, 10**6)
        monkeypatch.setattr(module, "_on_cpu", lambda device: False)
        monkeypatch.setattr(module, "LARGEST_BATCH", 8)
        result = run(tiny.train_config(**AUTO))
        assert (result.stopped_by, result.batch_size) == ("limit", 8)

    @pytest.mark.parameter("batch_size", "auto_batch_target_effective")
    def test_with_real_steps(self) -> None:
        result = run(tiny.train_config(**{**AUTO, "auto_batch_target_effective": 2}))
        assert sizes(result) == [1, 1, 2]
        assert all(attempt.seconds for attempt in result.attempts)


class TestWorstCase:
    @pytest.mark.parameter("auto_batch_max_targets_per_image")
    @pytest.mark.parametrize(
        ("max_boxes", "limit", "expected"), [(3, 100, 3), (700, 100, 100), (700, 500, 500), (0, 100, 1)]
    )
    def test_as_many_boxes_as_the_fullest_image_up_to_the_limit(
        self, monkeypatch: pytest.MonkeyPatch, max_boxes: int, limit: int, expected: int
    ) -> None:
        counts: list[tuple[int, ...]] = []
        monkeypatch.setattr(Engine, "optimizer_step", lambda self, window, **_: counts.append(window[0].counts))
        train = tiny.train_config(batch_size=2, auto_batch_max_targets_per_image=limit)
        assert run(train, max_boxes=max_boxes).targets_per_image == expected
        assert counts == [(expected, expected)] * 2

    @pytest.mark.parameter("auto_batch_max_targets_per_image")
    def test_more_targets_leave_room_for_fewer_images(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where memory is what the boxes of a batch fill."""

        def step(engine: Engine, window: Any, **_: Any) -> dict[str, Any]:
            if sum(window[0].counts) > 1000:
                raise DeviceMemoryError("out of memory", hint="")
            return {}

        monkeypatch.setattr(Engine, "optimizer_step", step)
        monkeypatch.setattr(module, "_on_cpu", lambda device: False)
        found = {}
        for limit in (10, 500):
            train = tiny.train_config(**AUTO, auto_batch_ema_headroom=1.0, auto_batch_max_targets_per_image=limit)
            result = run(train, max_boxes=700).to_json()
            assert result["targets_per_image"] == limit
            found[limit] = result["batch_size"]
        assert found == {10: 64, 500: 2}

    @pytest.mark.parametrize(
        ("settings", "side"),
        [
            ({"multi_scale": "off"}, 32),
            ({"multi_scale": "per-batch"}, 112),
            ({"multi_scale": "per-batch", "expanded_scales": False}, 96),
        ],
    )
    def test_the_largest_side_that_training_draws(
        self, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], side: int
    ) -> None:
        shapes: list[tuple[int, ...]] = []
        monkeypatch.setattr(
            Engine, "optimizer_step", lambda self, window, **_: shapes.append(tuple(window[0].pixels.shape))
        )
        assert run(tiny.train_config(batch_size=1, **settings)).side == side
        assert shapes == [(1, 3, side, side)] * 2

    def test_a_batch_of_it_is_legal(self) -> None:
        batch = worst_case_batch(2, 32, 50, 3)
        x1y1, x2y2 = batch.boxes[:, :2] - batch.boxes[:, 2:] / 2, batch.boxes[:, :2] + batch.boxes[:, 2:] / 2
        assert batch.boxes.shape == (100, 4)
        assert (x2y2 > x1y1).all()
        assert (batch.boxes > 0).all()
        assert (batch.boxes < 1).all()
        assert set(batch.labels.tolist()) == {0, 1, 2}
        assert len({tuple(box) for box in batch.boxes.tolist()}) == 100  # identical boxes would match too easily


def test_training_after_a_probe_draws_the_same_weights() -> None:
    train = tiny.train_config(batch_size=1, drop_path=0.2)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    run(train)
    assert torch.equal(torch.get_rng_state(), state)
    after = build_engine(tiny.model_config(), train).raw_model.state_dict()
    torch.manual_seed(11)
    assert not tiny.differing(after, build_engine(tiny.model_config(), train).raw_model.state_dict())
