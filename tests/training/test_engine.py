"""One optimizer step: accumulation, clipping, what stops it, on which device and in which precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rfdetr_core.data.loading import Batch
from rfdetr_core.errors import ConfigError, DeviceMemoryError, TrainingError
from rfdetr_core.models.detector import RFDETR
from rfdetr_core.training.criterion import Criterion
from rfdetr_core.training.engine import (
    Engine,
    build_engine,
    choose_precision,
    fabric_accelerator,
    memory_errors,
    smaller_batch,
)
from tests.training import tiny


def tiny_engine(**train: Any) -> Engine:
    torch.manual_seed(0)
    return build_engine(tiny.model_config(), tiny.train_config(**train))


def step_gradients(engine: Engine, window: Sequence[Batch]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients as the optimizer sees them, and the loss terms; the rate is zero, so no weight changes."""
    gradients: dict[str, Tensor] = {}

    def read(*_: Any) -> None:
        for name, parameter in engine.raw_model.named_parameters():
            if parameter.grad is not None:
                gradients[name] = parameter.grad.clone()

    handle = engine.optimizer.optimizer.register_step_pre_hook(read)
    terms = engine.optimizer_step(window, factor=0.0, global_step=0)
    handle.remove()
    return gradients, terms


def norm(gradients: dict[str, Tensor]) -> float:
    return float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())


BATCHES = [tiny.batch(0, boxes=(3, 2)), tiny.batch(1, boxes=(0, 1)), tiny.batch(2, boxes=(1, 1))]


class TestAccumulation:
    @pytest.mark.parameter("grad_accum_steps")
    def test_the_gradient_of_a_window_is_the_mean_of_its_micro_batches(self) -> None:
        engine = tiny_engine(clip_max_norm=0)
        whole, terms = step_gradients(engine, BATCHES)
        alone = [step_gradients(engine, [batch]) for batch in BATCHES]
        assert len(whole) > 100
        for name, gradient in whole.items():
            mean = torch.stack([gradients[name] for gradients, _ in alone]).mean(0)
            torch.testing.assert_close(gradient, mean, rtol=1e-4, atol=1e-6)
        for name, value in terms.items():
            expected = sum(float(parts[name]) for _, parts in alone) / 3
            assert float(value) == pytest.approx(expected, rel=1e-5), name

    def test_loss_is_the_weighted_sum_of_its_terms(self) -> None:
        engine = tiny_engine()
        _, terms = step_gradients(engine, BATCHES)
        weights = engine.criterion.weight_dict
        assert set(weights) < set(terms)
        total = sum(weight * float(terms[name]) for name, weight in weights.items())
        assert float(terms["loss"]) == pytest.approx(total, rel=1e-5)
        assert not terms["loss"].requires_grad

    def test_gradients_do_not_leak_into_the_next_window(self) -> None:
        engine = tiny_engine(clip_max_norm=0)
        first, _ = step_gradients(engine, BATCHES[:1])
        second, _ = step_gradients(engine, BATCHES[:1])
        assert norm(first) == pytest.approx(norm(second), rel=1e-5)


class TestClipping:
    def test_the_whole_gradient_is_clipped_to_its_largest_norm(self) -> None:
        engine = tiny_engine(clip_max_norm=0.1)
        clipped, _ = step_gradients(engine, BATCHES)
        raw, _ = step_gradients(tiny_engine(clip_max_norm=0), BATCHES)
        assert norm(raw) > 1.0
        assert norm(clipped) == pytest.approx(0.1, rel=1e-4)
        name = "class_embed.weight"  # the direction stays
        torch.testing.assert_close(clipped[name] / 0.1, raw[name] / norm(raw), rtol=1e-3, atol=1e-6)

    def test_a_small_gradient_stays_as_it_is(self) -> None:
        unclipped, _ = step_gradients(tiny_engine(clip_max_norm=0), BATCHES)
        loose, _ = step_gradients(tiny_engine(clip_max_norm=1e6), BATCHES)
        assert norm(loose) == pytest.approx(norm(unclipped), rel=1e-6)


def everything(engine: Engine) -> dict[str, Tensor]:
    """Weights, averages and moments, copied."""
    assert engine.ema is not None
    state = {f"model.{name}": value.clone() for name, value in engine.raw_model.state_dict().items()}
    state |= {f"ema.{name}": value.clone() for name, value in engine.ema.module.state_dict().items()}
    for row, moments in engine.optimizer.state_dict()["state"].items():
        state |= {f"{row}.{name}": value.clone() for name, value in moments.items()}
    return state


class TestNonFinite:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_loss_aborts_before_any_weight_changes(self, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
        engine = tiny_engine()
        engine.optimizer_step(BATCHES, factor=1.0, global_step=0)
        before, calls = everything(engine), [0]
        original = Criterion.total

        def total(self: Criterion, losses: dict[str, Tensor]) -> Tensor:
            calls[0] += 1
            return original(self, losses) * (value if calls[0] == 2 else 1.0)  # the second of three

        monkeypatch.setattr(Criterion, "total", total)
        with pytest.raises(
            TrainingError, match=r"the loss is not finite \(loss (nan|inf)\) at optimizer step 1, images b0, b1 "
        ) as caught:
            engine.optimizer_step(BATCHES, factor=1.0, global_step=1, image_names=["b0", "b1", "b2", "b3"])
        assert caught.value.exit_code == 2
        assert not tiny.differing(before, everything(engine))

    def test_the_loss_term_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        engine = tiny_engine()
        original = Criterion.forward

        def broken(self: Criterion, *args: Any) -> dict[str, Tensor]:
            terms = original(self, *args)
            return {**terms, "loss_giou_enc": terms["loss_giou_enc"] * float("nan")}

        monkeypatch.setattr(Criterion, "forward", broken)
        with pytest.raises(TrainingError, match=r"\(loss_giou_enc nan, loss nan\) at optimizer step 3, images 0, 1, 0"):
            engine.optimizer_step(BATCHES, factor=1.0, global_step=3)

    def test_a_gradient_aborts_as_well(self) -> None:
        engine = tiny_engine()
        before = everything(engine)
        engine.raw_model.class_embed.bias.register_hook(lambda gradient: gradient * float("inf"))
        with pytest.raises(TrainingError, match="the gradient is not finite at optimizer step 5"):
            engine.optimizer_step(BATCHES, factor=1.0, global_step=5)
        assert not tiny.differing(before, everything(engine))

    def test_an_overflow_under_fp16_is_left_to_the_gradient_scaler(self) -> None:
        engine = tiny_engine()
        engine.precision = "16-mixed"
        finite, infinite = torch.tensor([[1.0]]), torch.tensor([[float("inf")]])
        engine._refuse_non_finite(["loss"], finite, infinite[0, 0], BATCHES[:1], 0, None)
        with pytest.raises(TrainingError):
            engine._refuse_non_finite(["loss"], infinite, finite[0, 0], BATCHES[:1], 0, None)


class TestMemory:
    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
            RuntimeError("std::bad_alloc"),
            MemoryError(),
        ],
        ids=["torch", "cublas", "cpu", "onednn", "python"],
    )
    def test_running_out_is_told_with_the_batch(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        engine = tiny_engine()

        def forward(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(RFDETR, "forward", forward)
        with pytest.raises(
            DeviceMemoryError, match=r"out of memory on cpu at batch size 2, 32 px, peak \d.* of .* GiB "
        ) as caught:
            engine.optimizer_step(BATCHES, factor=1.0, global_step=0)
        assert caught.value.exit_code == 2
        assert caught.value.hint.startswith("try train.batch_size: 1 with train.grad_accum_steps: 6, ")

    @pytest.mark.parametrize(
        ("batch", "accum", "advice"),
        [
            (6, 2, "try train.batch_size: 4 with train.grad_accum_steps: 3, "),
            (5, 1, "try train.batch_size: 1 with"),
            (1, 4, "lower"),
        ],
    )
    def test_the_advice_keeps_the_effective_batch(self, batch: int, accum: int, advice: str) -> None:
        assert smaller_batch(batch, accum).startswith(advice)

    def test_other_errors_pass(self) -> None:
        with pytest.raises(RuntimeError, match="shapes"), memory_errors("here", hint="", device=torch.device("cpu")):
            raise RuntimeError("shapes do not agree")


class TestPrecision:
    def test_a_cpu_trains_in_float32(self) -> None:
        assert choose_precision("cpu", "auto") == "32-true"
        assert tiny_engine().autocast is None

    def test_bf16_keeps_float32_weights(self) -> None:
        engine = tiny_engine(amp_dtype="bf16")
        seen = []
        engine.raw_model.bbox_embed.layers[0].register_forward_hook(lambda *call: seen.append(call[2].dtype))
        terms = engine.optimizer_step(BATCHES, factor=1.0, global_step=0)
        assert seen == [torch.bfloat16] * 3
        assert engine.autocast == torch.bfloat16
        assert torch.isfinite(terms["loss"])
        assert {parameter.dtype for parameter in engine.raw_model.parameters()} == {torch.float32}

    def test_fp16_on_a_cpu_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="fp16 does not train on a CPU"):
            choose_precision("cpu", "fp16")

    @pytest.mark.parametrize(
        ("capability", "amp_dtype", "expected"),
        [
            ((9, 0), "auto", "bf16-mixed"),
            ((8, 0), "auto", "bf16-mixed"),
            ((7, 5), "auto", "16-mixed"),
            ((7, 5), "bf16", "bf16-mixed"),
            ((9, 0), "fp16", "16-mixed"),
            ((9, 0), None, "32-true"),
        ],
    )
    def test_a_gpu_decides_by_its_capability(
        self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], amp_dtype: str | None, expected: str
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        assert choose_precision("auto", amp_dtype) == expected


class TestAccelerator:
    @pytest.mark.parameter("accelerator")
    def test_what_is_absent_is_refused_with_what_is_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        with pytest.raises(ConfigError, match=r"train\.accelerator: gpu is not available here \(available: cpu"):
            fabric_accelerator("gpu")
        assert fabric_accelerator("auto") == "cpu"

    @pytest.mark.parameter("accelerator")
    def test_auto_is_cuda_then_mps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        assert fabric_accelerator("auto") == "cuda" == fabric_accelerator("gpu")
        assert fabric_accelerator("cpu") == "cpu"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert fabric_accelerator("auto") == "mps"


@pytest.mark.parameter("drop_path")
@pytest.mark.parametrize(("drop_path", "same"), [(0.0, True), (0.5, False)])
def test_drop_path_reaches_the_encoder(drop_path: float, same: bool) -> None:
    engine = tiny_engine(drop_path=drop_path)
    losses = {float(step_gradients(engine, BATCHES)[1]["loss"]) for _ in range(3)}
    assert (len(losses) == 1) is same
