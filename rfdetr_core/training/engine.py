"""The parts of a training step, put together once: used by the loop, and by the batch-size probe as it is."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import lightning_fabric
import torch
from lightning_fabric.wrappers import _FabricModule
from torch import Tensor

from rfdetr_core.config import ModelConfig, TrainConfig
from rfdetr_core.data.loading import Batch
from rfdetr_core.errors import ConfigError, DeviceMemoryError, TrainingError
from rfdetr_core.models.detector import RFDETR
from rfdetr_core.training.criterion import Criterion
from rfdetr_core.training.ema import ModelEMA
from rfdetr_core.training.optimizer import build_optimizer
from rfdetr_core.training.schedule import set_learning_rates

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
AUTOCAST: dict[Precision, torch.dtype | None] = {
    "32-true": None,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}
NO_MEMORY = ("out of memory", "can't allocate memory", "cublas_status_alloc_failed", "cudnn_status_alloc_failed")
"""How libraries without an exception type of their own say it."""


@dataclass
class Engine:
    """Model, loss, optimizer and average of one training, on one device."""

    fabric: lightning_fabric.Fabric
    precision: Precision
    model: _FabricModule
    raw_model: RFDETR  # the same weights, unwrapped
    criterion: Criterion
    optimizer: Any  # torch.optim.AdamW as wrapped by Fabric
    base_rates: list[float]
    ema: ModelEMA | None
    clip_max_norm: float
    ema_update_interval: int

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.fabric.device

    @property
    def autocast(self) -> torch.dtype | None:
        """The precision of evaluation: the same as in training."""
        return AUTOCAST[self.precision]

    def optimizer_step(self, window: Sequence[Batch], *, factor: float, global_step: int) -> dict[str, Tensor]:
        """Forward and backward over an accumulation window, then clip, update, average.

        The window's gradient is the mean over its micro-batches, each normalised by its own boxes (training
        spec 4.3). Returns the mean of every loss term and of their weighted sum, "loss"; on the device.

        Raises:
            TrainingError: a loss or a gradient that is not finite, before any weight is touched.
            DeviceMemoryError: out of memory.
        """
        set_learning_rates(self.optimizer, self.base_rates, factor)
        images = len(window[0].counts)
        with memory_errors(
            f"on {self.device} at batch size {images}",
            hint="lower train.batch_size, or let the probe choose it with batch_size: auto",
        ):
            means = self._accumulate(window)
            norm = self.fabric.clip_gradients(
                self.model, self.optimizer, max_norm=self.clip_max_norm or math.inf, error_if_nonfinite=False
            )
            self._refuse_non_finite(means["loss"], norm, global_step)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None and (global_step + 1) % self.ema_update_interval == 0:
            self.ema.update()
        return means

    def _accumulate(self, window: Sequence[Batch]) -> dict[str, Tensor]:
        """Backward of every micro-batch; returns the means of the loss terms."""
        sums: Tensor | None = None
        names: list[str] = []
        for position, batch in enumerate(window):
            with self.fabric.no_backward_sync(self.model, enabled=position < len(window) - 1):
                pixels, targets = batch.on(self.device)
                terms = self.criterion(self.model(pixels), targets)
                loss = self.criterion.total(terms)
                self.fabric.backward(loss / len(window))
            names = [*terms, "loss"]
            values = torch.stack([*terms.values(), loss]).detach()  # one sum per window, not one per term
            sums = values if sums is None else sums + values
        assert sums is not None
        return dict(zip(names, (sums / len(window)).unbind(), strict=True))

    def _refuse_non_finite(self, loss: Tensor, norm: Tensor | None, global_step: int) -> None:
        # Under fp16 a gradient overflows now and then, by design: its scaler then skips the update.
        watched = loss if norm is None or self.precision == "16-mixed" else loss + norm
        if not torch.isfinite(watched):  # the only wait for the device that a step has of its own
            what = "the gradient is not finite" if torch.isfinite(loss) else f"the loss is {loss.item()}"
            raise TrainingError(
                f"{what} at optimizer step {global_step}",
                hint="lower train.lr, or look at the images of that step; the last checkpoint is whole",
            )


@contextmanager
def memory_errors(where: str, *, hint: str) -> Iterator[None]:
    """What PyTorch raises when memory runs out becomes a DeviceMemoryError "out of memory <where>"."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        text = str(error).lower()
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(sign in text for sign in NO_MEMORY):
            raise DeviceMemoryError(f"out of memory {where}", hint=hint) from error
        raise


def build_engine(model: ModelConfig, train: TrainConfig) -> Engine:
    """Choose device and precision, then build model, loss, optimizer and EMA on it.

    Weights are drawn from torch's global generator: seed it first. lr_encoder 0 freezes the encoder: without a
    gradient, not just without a step.
    """
    precision = choose_precision(train.accelerator, train.amp_dtype)
    # Fabric tells its choice of device at INFO level by itself, in every process that builds one.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    fabric = lightning_fabric.Fabric(accelerator=fabric_accelerator(train.accelerator), devices=1, precision=precision)
    torch.set_float32_matmul_precision("high")
    frozen = model.freeze_encoder or train.lr_encoder == 0
    raw_model = RFDETR(model.model_copy(update={"freeze_encoder": frozen}), drop_path=train.drop_path)
    raw_model.to(fabric.device)
    ema = ModelEMA(raw_model, decay=train.ema_decay, tau=train.ema_tau) if train.use_ema else None
    # Gradient scaling in fp16 and a fused step cannot both own the unscaling.
    optimizer = build_optimizer(raw_model, model, train, fused=precision != "16-mixed")
    base_rates = [float(group["lr"]) for group in optimizer.param_groups]
    wrapped, wrapped_optimizer = fabric.setup(raw_model, optimizer)
    wrapped.train()
    criterion = Criterion(model, cls_loss_coef=train.cls_loss_coef).to(fabric.device)
    criterion.train()
    return Engine(
        fabric=fabric,
        precision=precision,
        model=wrapped,
        raw_model=raw_model,
        criterion=criterion,
        optimizer=wrapped_optimizer,
        base_rates=base_rates,
        ema=ema,
        clip_max_norm=train.clip_max_norm,
        ema_update_interval=train.ema_update_interval,
    )


def fabric_accelerator(name: str) -> str:
    """Fabric's name of `train.accelerator`; "auto" is GPU, then MPS, then CPU.

    Raises:
        ConfigError: the accelerator is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    wanted = "cuda" if name == "gpu" else name
    if wanted == "auto":
        return next(kind for kind, there in available.items() if there)
    if not available.get(wanted, False):
        there = ", ".join(kind for kind, present in available.items() if present)
        raise ConfigError(f"train.accelerator: {name} is not available here", hint=f"available: {there}; or auto")
    return wanted


def choose_precision(accelerator: str, amp_dtype: str | None) -> Precision:
    """Training spec 4.6: "auto" is float32 on a CPU, bf16 where the GPU has it in hardware, else fp16.

    Raises:
        ConfigError: fp16 on a CPU, where there is no gradient scaling.
    """
    device = fabric_accelerator(accelerator)
    if amp_dtype is None or (amp_dtype == "auto" and device == "cpu"):
        return "32-true"
    if amp_dtype == "auto":
        native_bf16 = device == "cuda" and torch.cuda.get_device_capability()[0] >= 8
        return "bf16-mixed" if native_bf16 else "16-mixed"
    if amp_dtype == "fp16" and device == "cpu":
        raise ConfigError("train.amp_dtype: fp16 does not train on a CPU", hint="use auto, null or bf16")
    return "bf16-mixed" if amp_dtype == "bf16" else "16-mixed"
