"""The probe: on a device whose memory is pretended, and with real worst-case steps of a tiny detector."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from rfdetr_core.errors import DeviceMemoryError
from rfdetr_core.training import batch_size as module
from rfdetr_core.training import bench
from rfdetr_core.training.batch_search import Attempt
from rfdetr_core.training.batch_size import ProbeResult, another_device, on_this_device, probe
from rfdetr_core.training.device_memory import Device, DeviceMemory
from rfdetr_core.training.engine import Engine, build_engine
from rfdetr_core.training.worst_case import worst_case
from tests.training import tiny
from tests.training.test_worst_case import facts


class Pretended(DeviceMemory):
    """Every image takes `each` bytes of `there`, and all else `fixed`; a second micro-batch takes `again` more.

    Every batch that was ever computed `keeps` bytes for its kernels.

    Takes the place of the engine's step, too, so that it costs no time.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, there: int, fixed: int, each: int, again: int = 0, keeps: int = 0
    ) -> None:
        self.there, self.fixed, self.each, self.again, self.keeps = there, fixed, each, again, keeps
        self.steps: list[tuple[int, int]] = []  # images, micro-batches
        self.most = 0
        monkeypatch.setattr(bench, "memory_of", lambda device: self)
        monkeypatch.setattr(Engine, "optimizer_step", lambda engine, window, **_: self.step(engine, window))

    def step(self, engine: Engine, window: Any) -> dict[str, Any]:
        images = len(window[0].counts)
        needed = self.fixed + images * self.each + (self.again if len(window) > 1 else 0)
        if engine.raw_model.config.gradient_checkpointing:
            needed -= 30
        self.steps.append((images, len(window)))
        if needed > self.there:
            raise DeviceMemoryError(f"out of memory at batch size {images}", hint="")
        self.most = max(self.most, needed)
        return {}

    def available(self) -> int:
        return self.there

    def begin(self) -> None:
        self.most = 0

    def peak(self) -> int:
        return self.most + self.kept()

    def kept(self) -> int:
        return self.keeps * len(set(self.steps)) if self.keeps else 0

    def left(self) -> int:
        return 7


def run(*, images: int = 1000, boxes: int = 3, price: float | None = None, **train: Any) -> ProbeResult:
    return probe(
        tiny.model_config(),
        tiny.train_config(**train),
        facts(train_images=images, max_boxes=boxes),
        price_per_hour=price,
    )


def sizes(result: ProbeResult) -> list[int]:
    return [attempt.batch_size for attempt in result.attempts]


def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No bound by target or time."""
    monkeypatch.setattr(module, "_on_cpu", lambda _: False)


class TestGivenBatch:
    def test_is_proven_by_real_steps(self) -> None:
        result = run(batch_size=3, grad_accum_steps=5)
        assert sizes(result) == [1, 2, 3]
        assert all(attempt.seconds and attempt.fits(result.limit_bytes) for attempt in result.attempts)
        assert (result.batch_size, result.grad_accum_steps, result.stopped_by) == (3, 5, "given")
        assert result.device.kind == "cpu"
        assert result.predicted_peak_bytes == pytest.approx(result.peak_bytes, rel=0.1)
        assert 0 < result.peak_bytes < result.limit_bytes < result.available_bytes
        assert result.evaluation.batch_size == 3 and result.evaluation.seconds > 0

    def test_as_it_accumulates(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pretended = Pretended(monkeypatch, there=1000, fixed=100, each=10)
        run(batch_size=4, grad_accum_steps=1)
        assert pretended.steps[-2:] == [(4, 1)] * 2
        run(batch_size=4, grad_accum_steps=7)
        assert pretended.steps[-2:] == [(4, 2)] * 2
        run(batch_size=4, grad_accum_steps=1, devices=2)  # DDP's buckets hold gradients from the start
        assert pretended.steps[-2:] == [(4, 2)] * 2

    @pytest.mark.parameter("batch_size")
    def test_that_does_not_fit_is_refused_with_the_largest_that_does(self, monkeypatch: pytest.MonkeyPatch) -> None:
        Pretended(monkeypatch, there=1000, fixed=100, each=10)
        with pytest.raises(
            DeviceMemoryError, match=r"train\.batch_size: 96 does not fit on cpu: the largest that does is 85"
        ) as caught:
            run(batch_size=96, grad_accum_steps=2)
        assert caught.value.exit_code == 2
        assert (
            "use train.batch_size: 64 with train.grad_accum_steps: 3, the same effective batch of 192"
            in caught.value.hint
        )

    def test_that_is_hopeless_is_not_tried(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pretended = Pretended(monkeypatch, there=1000, fixed=100, each=10)
        with pytest.raises(DeviceMemoryError, match="the largest that does is 85"):
            run(batch_size=4000)
        assert max(images for images, _ in pretended.steps) < 100

    def test_that_fits_with_little_to_spare_is_told(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        Pretended(monkeypatch, there=1000, fixed=100, each=10)
        assert run(batch_size=88).batch_size == 88
        assert "batch 88 fits, and takes 98 % of the memory there is" in caplog.text

    def test_whose_second_micro_batch_does_not_fit_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        Pretended(monkeypatch, there=1000, fixed=100, each=10, again=200)
        assert run(batch_size=60, grad_accum_steps=2).peak_bytes == 900
        with pytest.raises(DeviceMemoryError, match="the largest that does is 64"):
            run(batch_size=75, grad_accum_steps=2)


AUTO: dict[str, Any] = {"batch_size": "auto", "auto_batch_target_effective": 16}


class TestAutomaticBatch:
    @pytest.mark.parameter("batch_size", "auto_batch_target_effective")
    def test_on_a_cpu_stops_at_the_target(self, monkeypatch: pytest.MonkeyPatch) -> None:
        Pretended(monkeypatch, there=10**6, fixed=100, each=10)
        result = run(**{**AUTO, "auto_batch_target_effective": 6})
        assert sizes(result) == [1, 2, 4, 6]
        assert (result.stopped_by, result.batch_size, result.grad_accum_steps) == ("target", 6, 1)

    @pytest.mark.parameter("auto_batch_target_effective", "devices")
    @pytest.mark.parametrize(("there", "batch", "accum"), [(10_000, 16, 1), (180, 7, 3), (132, 2, 8)])
    def test_the_target_is_that_of_each_device(
        self, monkeypatch: pytest.MonkeyPatch, there: int, batch: int, accum: int
    ) -> None:
        """With two of them an optimizer step sees twice as many images."""
        Pretended(monkeypatch, there=there, fixed=100, each=10)
        found = [run(**AUTO, auto_batch_ema_headroom=1.0, devices=n) for n in (1, 2)]
        assert [(result.batch_size, result.grad_accum_steps) for result in found] == [(batch, accum)] * 2
        assert found[0].cost.steps_per_epoch >= 2 * found[1].cost.steps_per_epoch - 1

    @pytest.mark.parametrize(("devices", "batch"), [(1, 5), (2, 3)])
    def test_stops_at_the_images_of_a_device(self, monkeypatch: pytest.MonkeyPatch, devices: int, batch: int) -> None:
        Pretended(monkeypatch, there=10**6, fixed=100, each=10)
        result = run(**AUTO, images=5, devices=devices)
        assert (result.stopped_by, result.batch_size) == ("images", batch)

    def test_stops_when_time_is_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        Pretended(monkeypatch, there=10**6, fixed=100, each=10)
        monkeypatch.setattr(module, "CPU_SECONDS", 0.0)
        result = run(**AUTO)
        assert (sizes(result), result.stopped_by, result.grad_accum_steps) == ([1], "time", 16)

    @pytest.mark.parameter("batch_size", "auto_batch_ema_headroom")
    @pytest.mark.parametrize(("use_ema", "batch"), [(True, 42), (False, 85)])
    def test_finds_where_the_memory_ends(self, monkeypatch: pytest.MonkeyPatch, use_ema: bool, batch: int) -> None:
        """85 x 10 + 100 is 95 % of 1000; no step is tried that fails."""
        pretended = Pretended(monkeypatch, there=1000, fixed=100, each=10)
        like_a_gpu(monkeypatch)
        result = run(**AUTO, use_ema=use_ema, eval_base_model=True, auto_batch_ema_headroom=0.5)
        assert sizes(result) == [1, 2, 4, 16, 64, 85]
        assert (result.stopped_by, result.safe_batch_size, result.batch_size) == ("memory", 85, batch)
        assert result.headroom == (0.5 if use_ema else 1.0)
        assert result.predicted_peak_bytes == result.peak_bytes == 100 + 10 * batch
        assert max(images for images, _ in pretended.steps) == 85

    def test_what_other_batches_leave_behind_does_not_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A training holds the kernels of its own shapes: here those of the first step of all, and of its own batch."""
        Pretended(monkeypatch, there=1000, fixed=100, each=10, keeps=40)
        like_a_gpu(monkeypatch)
        result = run(**AUTO, auto_batch_ema_headroom=1.0)
        assert len(result.attempts) > 4
        assert (result.stopped_by, result.safe_batch_size, result.batch_size) == ("memory", 77, 77)
        assert result.attempts[-1].peak_bytes == 100 + 10 * 77 + 2 * 40

    def test_every_scale_keeps_something(self, monkeypatch: pytest.MonkeyPatch) -> None:
        peaks = []
        for keeps in (0, 40):
            Pretended(monkeypatch, there=10**6, fixed=100, each=10, keeps=keeps)
            peaks.append(run(batch_size=4, multi_scale="per-batch").peak_bytes)
        scales = len(worst_case(tiny.model_config(), tiny.train_config(multi_scale="per-batch"), facts()).extents)
        assert scales > 2 and peaks[1] - peaks[0] >= 40 * (scales - 2)

    def test_a_failed_step_leaves_its_trace(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pretended = Pretended(monkeypatch, there=1000, fixed=0, each=1)
        monkeypatch.setattr(pretended, "peak", lambda: pretended.most // 2)  # it takes twice what it tells
        like_a_gpu(monkeypatch)
        result = run(**AUTO, images=10**6, auto_batch_ema_headroom=1.0)
        failed = [attempt for attempt in result.attempts if attempt.peak_bytes is None]
        assert failed[0] == Attempt(failed[0].batch_size, None, None, left_bytes=7)
        assert 900 <= result.safe_batch_size <= 1000
        assert json.loads(json.dumps(result.to_json()))["attempts"][-1]["batch_size"] == sizes(result)[-1]

    def test_a_batch_that_accumulation_breaks_is_made_smaller(self, monkeypatch: pytest.MonkeyPatch) -> None:
        Pretended(monkeypatch, there=300, fixed=100, each=10, again=0)
        monkeypatch.setattr(bench.Bench, "micro_batches", 1, raising=False)
        like_a_gpu(monkeypatch)
        plain = run(**{**AUTO, "auto_batch_target_effective": 1}, auto_batch_ema_headroom=1.0)
        assert plain.batch_size == 18
        Pretended(monkeypatch, there=300, fixed=100, each=10, again=60)
        result = run(**{**AUTO, "auto_batch_target_effective": 64}, auto_batch_ema_headroom=1.0)
        assert 100 + 10 * result.batch_size + 60 <= result.limit_bytes
        assert (result.stopped_by, result.safe_batch_size) == ("memory", result.batch_size)

    @pytest.mark.parametrize(
        ("there", "advice"),
        [
            (100, r"model\.gradient_checkpointing: true fits"),
            (70, "no smaller model fits either: use a device with more memory"),
        ],
    )
    def test_not_even_one_image(self, monkeypatch: pytest.MonkeyPatch, there: int, advice: str) -> None:
        Pretended(monkeypatch, there=there, fixed=100, each=10)
        with pytest.raises(
            DeviceMemoryError, match=rf"does not fit on cpu even with batch size 1, of 32 x 32 px .*{advice}"
        ) as caught:
            run(**AUTO)
        assert caught.value.exit_code == 2

    def test_an_effective_batch_far_above_the_target_is_told(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A GPU is filled; the learning rate stays what the user said."""
        Pretended(monkeypatch, there=1000, fixed=100, each=10)
        like_a_gpu(monkeypatch)
        assert run(**AUTO, auto_batch_ema_headroom=0.5).batch_size == 42
        assert "the effective batch is 42, and train.auto_batch_target_effective asks for 16 or more" in caplog.text
        assert "scaling train.lr by 2.6 or less" in caplog.text

    @pytest.mark.parameter("batch_size", "auto_batch_target_effective")
    def test_with_real_steps(self) -> None:
        result = run(**{**AUTO, "auto_batch_target_effective": 2})
        assert sizes(result) == [1, 2]
        assert all(attempt.seconds for attempt in result.attempts)


class TestWorstCase:
    @pytest.mark.parameter("auto_batch_max_targets_per_image")
    def test_more_targets_leave_room_for_fewer_images(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where memory is what the boxes of a batch fill."""
        like_a_gpu(monkeypatch)
        found = {}
        for limit in (10, 500):
            Pretended(monkeypatch, there=10_000, fixed=0, each=limit)
            result = run(**AUTO, auto_batch_ema_headroom=1.0, auto_batch_max_targets_per_image=limit, boxes=700)
            assert result.worst_case.targets == limit
            found[limit] = result.batch_size
        assert found == {10: 950, 500: 19}

    def test_an_image_with_more_boxes_than_are_tried_is_told(self, caplog: pytest.LogCaptureFixture) -> None:
        run(batch_size=1, boxes=700, auto_batch_max_targets_per_image=5)
        assert "an image has 700 boxes, and train.auto_batch_max_targets_per_image lets the probe try 5" in caplog.text

    @pytest.mark.parameter("square_resize_div_64")
    def test_images_of_wild_aspects_are_what_is_tried(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shapes: set[tuple[int, ...]] = set()
        monkeypatch.setattr(
            Engine, "optimizer_step", lambda _, window, **__: shapes.add(tuple(window[0].pixels.shape[2:]))
        )
        train = tiny.train_config(batch_size=1, square_resize_div_64=False)
        result = probe(tiny.model_config(), train, facts(widest=(90, 30), tallest=(30, 60)))
        assert max(shapes) == (96, 96) or shapes == {(64, 96)}
        assert result.worst_case.padded


class TestCost:
    @pytest.mark.parameter("max_hours")
    def test_a_budget_that_will_not_do_is_told(self, caplog: pytest.LogCaptureFixture) -> None:
        result = run(batch_size=1, epochs=100, max_hours=1e-6)
        assert not result.cost.fits
        assert "train.max_hours: 1e-06 will not do for 100 epochs" in caplog.text

    def test_the_price_is_in_the_result(self) -> None:
        result = run(batch_size=1, price=2.0)
        assert result.cost.price == pytest.approx(2 * result.cost.hours)
        assert result.to_json()["cost"]["price"] == result.cost.price


GPU = Device("cuda", "A", 80 * 10**9, "1")


class TestAnotherDevice:
    @pytest.mark.parametrize(
        ("here", "reason"),
        [
            (GPU, ""),
            (Device("cuda", "A", 40 * 10**9, "1"), ""),  # enough for the peak
            (Device("cuda", "A", 80 * 10**9, "2"), ""),
            (Device("cuda", "B", 80 * 10**9, "1"), "it ran on A, and this is B"),
            (Device("cpu", "cpu", 80 * 10**9, ""), "it ran on A, and this is cpu"),
            (Device("cuda", "A", 20 * 10**9, "1"), "it measured a peak of 27.94 GiB, and there are 18.63 GiB here"),
        ],
    )
    def test_is_one_of_another_name_or_too_little_memory(self, here: Device, reason: str) -> None:
        assert another_device({"device": vars(GPU), "peak_bytes": 30 * 10**9}, here) == reason

    def found(self, batch: int, accum: int) -> dict[str, Any]:
        return {"device": vars(GPU), "peak_bytes": 1, "batch_size": batch, "grad_accum_steps": accum}

    def test_keeps_a_searched_batch_that_fits(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        Pretended(monkeypatch, there=1000, fixed=100, each=10)
        new = on_this_device(self.found(40, 1), tiny.model_config(), tiny.train_config(**AUTO), facts())
        assert (new["batch_size"], new["grad_accum_steps"], new["device"]["kind"]) == (40, 1, "cpu")
        assert "the batch size is probed again: it ran on A, and this is cpu" in caplog.text

    def test_takes_a_smaller_one_of_the_same_effective_batch(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        Pretended(monkeypatch, there=300, fixed=100, each=10)
        new = on_this_device(self.found(48, 1), tiny.model_config(), tiny.train_config(**AUTO), facts())
        assert (new["batch_size"], new["grad_accum_steps"]) == (12, 4)
        assert "batch 12 x 4 instead, the same effective batch" in caplog.text

    def test_refuses_a_given_one_that_does_not_fit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        Pretended(monkeypatch, there=300, fixed=100, each=10)
        with pytest.raises(DeviceMemoryError, match="48 does not fit"):
            on_this_device(self.found(48, 1), tiny.model_config(), tiny.train_config(batch_size=48), facts())

    def test_the_same_one_costs_nothing(self) -> None:
        here = run(batch_size=1).to_json()
        assert on_this_device(here, tiny.model_config(), tiny.train_config(batch_size=1), facts()) is here


def test_training_after_a_probe_draws_the_same_weights() -> None:
    train = tiny.train_config(batch_size=1, drop_path=0.2)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    run(batch_size=1, drop_path=0.2)
    assert torch.equal(torch.get_rng_state(), state)
    after = build_engine(tiny.model_config(), train).raw_model.state_dict()
    torch.manual_seed(11)
    assert not tiny.differing(after, build_engine(tiny.model_config(), train).raw_model.state_dict())
