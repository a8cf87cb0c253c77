"""Exponential moving average of a model's weights and buffers (training spec 4.8)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn


class ModelEMA:
    """A copy of the model whose weights trail the original's.

    The first update copies; update k >= 2 uses d = decay x (1 - exp(-k / tau)), or d = decay when tau is 0:
    ema = d x ema + (1 - d) x weights. Buffers are averaged like weights; what is not floating-point is copied.
    """

    def __init__(self, model: nn.Module, *, decay: float, tau: float) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.tau, self.updates = decay, tau, 0
        # Walking through the modules costs more than the average itself, and the tensors stay the same objects.
        pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    def effective_decay(self, update: int) -> float:
        """d of update number `update` (1-based)."""
        if update <= 1:
            return 0.0
        return self.decay * (1 - math.exp(-update / self.tau)) if self.tau > 0 else self.decay

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's present weights into the average."""
        self.updates += 1
        decay = self.effective_decay(self.updates)
        for average, weight in self._copied if decay > 0 else self._copied + self._averaged:
            average.copy_(weight)
        if decay > 0:
            averages, weights = zip(*self._averaged, strict=True)
            torch._foreach_lerp_(averages, weights, 1 - decay)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, each once: an alias must not be averaged twice."""
    return chain(module.parameters(), module.buffers())
