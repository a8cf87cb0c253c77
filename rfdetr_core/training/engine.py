"""The parts of a training step, put together once: used by the loop, and by the batch-size probe as it is."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import lightning_fabric
import numpy as np
import torch
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.wrappers import _FabricModule
from numpy.typing import NDArray
from torch import Tensor

from rfdetr_core import hardware
from rfdetr_core.config import ModelConfig, TrainConfig
from rfdetr_core.data.loading import Batch
from rfdetr_core.errors import ConfigError, DeviceMemoryError, TrainingError
from rfdetr_core.evaluation.evaluate import half_precision
from rfdetr_core.models.detector import RFDETR
from rfdetr_core.training.criterion import Criterion
from rfdetr_core.training.distributed import ALONE, World, chosen_devices
from rfdetr_core.training.ema import ModelEMA
from rfdetr_core.training.optimizer import build_optimizer
from rfdetr_core.training.schedule import set_learning_rates

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
AUTOCAST: dict[Precision, torch.dtype | None] = {
    "32-true": None,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}
NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "bad_alloc",  # oneDNN's own scratch memory
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "could not create a primitive",  # oneDNN, whose kernels are made when they are first used
    "could not create a memory",
    "could not execute a primitive",
)
"""How libraries without an exception type of their own say it."""


@dataclass
class Engine:
    """Model, loss, optimizer and average of one training, on the device of this process."""

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
    fp16_eval: bool = False
    world: World = ALONE

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.fabric.device

    @property
    def autocast(self) -> torch.dtype | None:
        """The precision of evaluation: float16 if `fp16_eval` asks for it and the device has it, else training's."""
        return (half_precision(self.device) if self.fp16_eval else None) or AUTOCAST[self.precision]

    def optimizer_step(
        self,
        window: Sequence[Batch],
        *,
        factor: float,
        global_step: int,
        image_names: Sequence[str] | NDArray[np.str_] | None = None,
        observe: Callable[[Batch, Mapping[str, Any]], None] | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> dict[str, Tensor] | None:
        """Forward and backward over an accumulation window, then clip, update, average.

        The window's gradient is the mean over its micro-batches, each normalised by its own boxes (training
        spec 4.3), and over the ranks, which all take a step at the same time. Returns the mean of every loss term and
        of their weighted sum, "loss"; on the device.

        Args:
            image_names: file names by position in the split, for the error of a loss that is not finite.
            observe: is given every micro-batch and the detector's outputs for it.
            stop_requested: asked before every micro-batch, with the same answer on all ranks; true leaves everything as
                after the step before, torch's random stream included, and returns None.

        Raises:
            TrainingError: a loss or a gradient that is not finite, before any weight is touched.
            DeviceMemoryError: out of memory.
        """
        set_learning_rates(self.optimizer, self.base_rates, factor)
        streams = self.random_state()
        side = max(max(batch.pixels.shape[-2:]) for batch in window)
        with memory_errors(
            f"on {self.device} at batch size {len(window[0].counts)}, {side} px",
            hint=smaller_batch(len(window[0].counts), len(window)),
            device=self.device,
        ):
            names, values = self._accumulate(window, observe, stop_requested)
            if len(values) < len(window):
                self.optimizer.zero_grad(set_to_none=True)
                self.set_random_state(streams)
                return None
            norm = self.fabric.clip_gradients(
                self.model, self.optimizer, max_norm=self.clip_max_norm or math.inf, error_if_nonfinite=False
            )
            terms = torch.stack(values)
            self._refuse_non_finite(names, terms, norm, window, global_step, image_names)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None and (global_step + 1) % self.ema_update_interval == 0:
            self.ema.update()
        return dict(zip(names, self.world.mean(terms.mean(0)).unbind(), strict=True))

    def rehearse(self, batch: Batch) -> None:
        """Forward and backward of a batch whose gradients are dropped.

        Weights, buffers, average, moments and random streams are left as they were, bit by bit. Several ranks do it
        together, each by itself. A compiled model runs uncompiled.

        Raises:
            RuntimeError: what torch raises, out of memory above all.
        """
        streams = self.random_state()
        buffers = [(buffer, buffer.clone()) for buffer in self.raw_model.buffers()]
        try:
            pixels, targets = batch.on(self.device)
            with self.fabric.autocast():
                outputs = self.raw_model(pixels, batch.mask_on(self.device))
            loss = self.criterion.total(self.criterion(outputs, targets))
            # Nothing is accumulated in a parameter: DDP, which waits for that, is not told of this backward.
            trained = [parameter for parameter in self.raw_model.parameters() if parameter.requires_grad]
            torch.autograd.grad(loss, trained, allow_unused=True)
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            self.set_random_state(streams)

    def random_state(self) -> dict[str, Tensor]:
        """The random streams of torch that a step reads."""
        state = {"torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def set_random_state(self, state: Mapping[str, Tensor]) -> None:
        """Go back to `state`. A run may go on on another kind of device: what that one lacks goes its own way."""
        torch.set_rng_state(state["torch"])
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)

    def _accumulate(
        self,
        window: Sequence[Batch],
        observe: Callable[[Batch, Mapping[str, Any]], None] | None,
        stop_requested: Callable[[], bool],
    ) -> tuple[list[str], list[Tensor]]:
        """Backward of every micro-batch until a stop is asked for; the names of the loss terms, and their values."""
        names: list[str] = []
        values: list[Tensor] = []
        for position, batch in enumerate(window):
            if stop_requested():
                break
            with self.fabric.no_backward_sync(self.model, enabled=position < len(window) - 1):
                pixels, targets = batch.on(self.device)
                outputs = self.model(pixels, batch.mask_on(self.device))
                terms = self.criterion(outputs, targets)
                loss = self.criterion.total(terms)
                self.fabric.backward(loss / len(window))
            names = [*terms, "loss"]
            values.append(torch.stack([*terms.values(), loss]).detach())
            if observe is not None:
                observe(batch, outputs)
        return names, values

    def _refuse_non_finite(
        self,
        names: Sequence[str],
        terms: Tensor,
        norm: Tensor | None,
        window: Sequence[Batch],
        global_step: int,
        image_names: Sequence[str] | NDArray[np.str_] | None,
    ) -> None:
        """Raise the same error on all ranks, with the images of those that have the fault.

        `terms` are the loss terms (M, T) of the window's micro-batches, the last of them the weighted sum.
        """
        # Under fp16 a gradient overflows now and then, by design: its scaler then skips the update.
        losses = terms[:, -1]
        total = self.world.mean(losses.sum())
        watched = total if norm is None or self.precision == "16-mixed" else total + norm
        if torch.isfinite(watched):  # the only wait for the device that a step has of its own
            return
        guilty = [i for i, finite in enumerate(torch.isfinite(losses).tolist()) if not finite]
        what = "the gradient is not finite"
        if guilty:
            values = zip(names, terms[guilty[0]].tolist(), strict=True)
            broken = ", ".join(f"{name} {value}" for name, value in values if not math.isfinite(value))
            what = f"the loss is not finite ({broken})"
        suspects = [image for i, batch in enumerate(window) if not guilty or i in guilty for image in batch.images]
        found = [json.loads(text) for text in self.world.texts(json.dumps([bool(guilty), what, suspects]))]
        worst = max(is_guilty for is_guilty, _, _ in found)
        what = next(text for is_guilty, text, _ in found if is_guilty == worst)
        positions = [image for is_guilty, _, images in found if is_guilty == worst for image in images]
        shown = [str(position if image_names is None else image_names[position]) for position in positions]
        listed = ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")
        raise TrainingError(
            f"{what} at optimizer step {global_step}, images {listed}",
            hint="lower train.lr, or look at these images and their boxes; the last checkpoint is whole",
        )


@contextmanager
def memory_errors(where: str, *, hint: str, device: torch.device) -> Iterator[None]:
    """What PyTorch raises when memory runs out becomes a DeviceMemoryError "out of memory <where>, peak <n> GiB".

    What it raises when a compiled model cannot be compiled becomes a ConfigError.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        text = str(error).lower()
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(sign in text for sign in NO_MEMORY):
            raise DeviceMemoryError(f"out of memory {where}, peak {_peak(device)}", hint=hint) from error
        if any(kind.__module__ == "torch._dynamo.exc" for kind in type(error).__mro__):
            reason = str(error).strip().splitlines()[0][:200]
            raise ConfigError(f"model.compile: true does not work here: {reason}", hint="leave it at false") from error
        raise


def _peak(device: torch.device) -> str:
    """The most memory that this process took, and what there is."""
    if device.type == "cuda":
        peak, total = torch.cuda.max_memory_reserved(device), torch.cuda.get_device_properties(device).total_memory
    else:
        peak, total = hardware.peak_rss(), hardware.memory_limit()
    return f"{peak / 2**30:.2f} of {total / 2**30:.2f} GiB"


def smaller_batch(batch_size: int, accum: int) -> str:
    """What to change when a step of this micro-batch does not fit: the next smaller one of the same effective batch."""
    effective = batch_size * accum
    smaller = next((size for size in range(batch_size - 1, 0, -1) if effective % size == 0), None)
    if smaller is None:
        return "lower model.resolution, or set model.gradient_checkpointing: true"
    return (
        f"try train.batch_size: {smaller} with train.grad_accum_steps: {effective // smaller}, the same effective "
        f"batch of {effective}; or let the probe choose with batch_size: auto"
    )


def build_engine(model: ModelConfig, train: TrainConfig, world: World = ALONE, *, accumulates: bool = True) -> Engine:
    """Choose device and precision, then build model, loss, optimizer and EMA on it.

    Weights are drawn from torch's global generator: seed it first, alike on all ranks. lr_encoder 0 freezes the
    encoder: without a gradient, not just without a step.

    Args:
        accumulates: False if every optimizer step is one micro-batch, which lets several ranks work faster.
    """
    precision = choose_precision(train.accelerator, train.amp_dtype)
    if train.fp16_eval and fabric_accelerator(train.accelerator) == "cpu":
        warnings.warn("train.fp16_eval has no effect on a CPU: evaluation stays in float32", stacklevel=2)
    # Fabric tells its choice of device at INFO level by itself, in every process that builds one.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    fabric = _fabric(train, precision, world, accumulates)
    torch.set_float32_matmul_precision("high")
    frozen = model.freeze_encoder or train.lr_encoder == 0
    raw_model = RFDETR(model.model_copy(update={"freeze_encoder": frozen}), drop_path=train.drop_path)
    raw_model.to(fabric.device)
    ema = ModelEMA(raw_model, decay=train.ema_decay, tau=train.ema_tau) if train.use_ema else None
    # Gradient scaling in fp16 and a fused step cannot both own the unscaling.
    optimizer = build_optimizer(raw_model, model, train, fused=model.fused_optimizer and precision != "16-mixed")
    base_rates = [float(group["lr"]) for group in optimizer.param_groups]
    stepped = compiled(raw_model) if model.compile else raw_model
    wrapped, wrapped_optimizer = fabric.setup(stepped, optimizer)
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
        fp16_eval=train.fp16_eval,
        world=world,
    )


def compiled(model: RFDETR) -> torch.nn.Module:
    """The model as training steps run it, with the same weights; evaluation goes on with the model itself.

    The first size is compiled for itself, the second one for all sizes to come.

    Raises:
        ConfigError: there is no compiler.
    """
    # What torch looks for: on a CPU it writes C++, for a GPU Triton builds its launchers in C.
    on_cpu = next(model.parameters()).device.type == "cpu"
    known = [os.environ.get("CXX", "g++")] if on_cpu else [os.environ.get("CC", "gcc"), "clang"]
    if not any(map(shutil.which, known)):
        raise ConfigError(
            f"model.compile: true needs a compiler, and this machine has no {' and no '.join(known)}",
            hint="install one, name it in CXX and CC, or leave it at false",
        )
    return cast(torch.nn.Module, torch.compile(model))


def _fabric(train: TrainConfig, precision: Precision, world: World, accumulates: bool) -> lightning_fabric.Fabric:
    """Device and precision of this process, and how its gradients meet those of the others."""
    accelerator = fabric_accelerator(train.accelerator)
    if world.size == 1:
        number = first_device(train).index
        alone = 1 if number is None else [number]
        return lightning_fabric.Fabric(accelerator=accelerator, devices=alone, precision=precision)
    numbers = chosen_devices(train.devices, accelerator)
    # The encoder's mask token never has a gradient. Without accumulation the ranks learn from the first step which
    # parameters have none, instead of looking in every step (training spec 4.9).
    strategy = DDPStrategy(
        find_unused_parameters=accumulates, static_graph=not accumulates, gradient_as_bucket_view=True
    )
    devices = numbers if accelerator == "cuda" else len(numbers)
    fabric = lightning_fabric.Fabric(
        accelerator=accelerator,
        devices=devices,
        num_nodes=train.num_nodes,
        precision=precision,
        strategy=strategy,
    )
    fabric.launch()  # torchrun did: this takes the place among the ranks
    return fabric


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


def first_device(train: TrainConfig) -> torch.device:
    """Where a single process computes: on the first GPU that `train.devices` lists, if this machine has that many.

    Raises:
        ConfigError: the accelerator is not there.
    """
    accelerator, (first, comma, _) = fabric_accelerator(train.accelerator), str(train.devices).partition(",")
    listed = comma and accelerator == "cuda" and int(first) < torch.cuda.device_count()
    return torch.device(accelerator, int(first)) if listed else torch.device(accelerator)


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
