"""The learning-rate factor as a pure function of the optimizer step (training spec 4.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then "step" (x0.1 once, from epoch `lr_drop` on) or "cosine" (down to `min_factor`)."""

    kind: Literal["step", "cosine"]
    epochs: int
    steps_per_epoch: int
    warmup_epochs: float = 0.0
    lr_drop: int = 100
    min_factor: float = 0.0

    def factor(self, step: int) -> float:
        """What multiplies every group's base rate at optimizer step `step` (0-based)."""
        total = self.epochs * self.steps_per_epoch
        warmup = int(self.steps_per_epoch * self.warmup_epochs)
        if step < warmup:
            return step / max(1, warmup)
        if self.kind == "cosine":
            progress = (step - warmup) / max(1, total - warmup)
            return self.min_factor + (1 - self.min_factor) * 0.5 * (1 + math.cos(math.pi * progress))
        return 1.0 if step < self.lr_drop * self.steps_per_epoch else 0.1


def set_learning_rates(optimizer: torch.optim.Optimizer, base_rates: list[float], factor: float) -> None:
    """Give each group its base rate times the factor."""
    for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
        group["lr"] = rate * factor
