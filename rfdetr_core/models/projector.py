"""Projector: the encoder's maps to one map of the decoder's width per scale (model spec section 3).

Maps are channels-last (B, h, w, C) throughout: a 1x1 convolution is then a matrix product, and the channel
norm runs along the last axis.
"""

# mypy: disable-error-code=no-any-return
# (calling an nn.Module is untyped)

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfdetr_core.models.linear import KeepingModule, linear_kept

_NORM_EPS = 1e-6
_BOTTLENECKS = 3
_SUBSAMPLED = 0.25
SCALE_FACTORS = {"P3": 2.0, "P4": 1.0, "P5": 0.5}


class ConvNorm(KeepingModule):
    """Convolution without bias, norm (named `bn` in the state dict whatever it is), activation."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int,
        *,
        layer_norm: bool,
        relu: bool = False,
        stride: int = 1,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.LayerNorm(channels_out, eps=_NORM_EPS) if layer_norm else nn.BatchNorm2d(channels_out)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        if self.conv.kernel_size == (1, 1):
            x = linear_kept(self.kept, x, [self.conv.weight.flatten(1)], None)
        else:
            x = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        channels_last = isinstance(self.bn, nn.LayerNorm)
        x = self.bn(x) if channels_last else self.bn(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return F.relu(x) if self.relu else F.silu(x)


class Bottleneck(nn.Module):
    """Two 3x3 convolutions, no shortcut."""

    def __init__(self, channels: int, *, layer_norm: bool) -> None:
        super().__init__()
        self.cv1 = ConvNorm(channels, channels, 3, layer_norm=layer_norm)
        self.cv2 = ConvNorm(channels, channels, 3, layer_norm=layer_norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv2(self.cv1(x))


class C2f(nn.Module):
    """Cross-stage block: split, a chain of bottlenecks, and a fusion of every intermediate."""

    def __init__(self, channels_in: int, channels_out: int, *, layer_norm: bool) -> None:
        super().__init__()
        hidden = channels_out // 2
        self.cv1 = ConvNorm(channels_in, 2 * hidden, 1, layer_norm=layer_norm)
        self.cv2 = ConvNorm((2 + _BOTTLENECKS) * hidden, channels_out, 1, layer_norm=layer_norm)
        self.m = nn.ModuleList(Bottleneck(hidden, layer_norm=layer_norm) for _ in range(_BOTTLENECKS))

    def forward(self, x: Tensor) -> Tensor:
        pieces = list(self.cv1(x).chunk(2, dim=-1))
        for bottleneck in self.m:
            pieces.append(bottleneck(pieces[-1]))
        return self.cv2(torch.cat(pieces, dim=-1))


class Upsample(nn.ConvTranspose2d):
    """Doubles both sides and halves the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels // 2, kernel_size=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Projector(nn.Module):
    """Maps (B, h, w, E), one per encoder output, to maps (B, h*f, w*f, D), one per factor f of `factors`.

    A factor is 4, 2, 1 or 0.5. A last one of 0.25 has no weights: it takes every second cell of the map before
    it, whatever that one's size (spec section 3). Raises ValueError for any other factor.
    """

    def __init__(
        self, channels_in: Sequence[int], channels_out: int, factors: Sequence[float], *, layer_norm: bool
    ) -> None:
        super().__init__()
        self.subsampled = len(factors) > 1 and factors[-1] == _SUBSAMPLED
        self.factors = tuple(factors[:-1] if self.subsampled else factors)
        self.stages_sampling = nn.ModuleList(
            nn.ModuleList(_resampler(channels, factor, layer_norm=layer_norm) for channels in channels_in)
            for factor in self.factors
        )
        self.stages = nn.ModuleList(
            nn.Sequential(
                C2f(_resampled_channels(channels_in, factor), channels_out, layer_norm=layer_norm),
                nn.LayerNorm(channels_out, eps=_NORM_EPS),
            )
            for factor in self.factors
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        outputs = []
        for samplers, stage in zip(self.stages_sampling, self.stages, strict=True):
            resampled = [sampler(x) for sampler, x in zip(samplers, maps, strict=True)]  # type: ignore[call-overload]
            outputs.append(stage(torch.cat(resampled, dim=-1)))
        if self.subsampled:
            outputs.append(outputs[-1][:, ::2, ::2])
        return outputs

    def shapes(self, grid: tuple[int, int]) -> list[tuple[int, int]]:
        """(h, w) of each output for input maps of `grid`; an odd side halves upwards."""
        shapes = [(math.ceil(grid[0] * factor), math.ceil(grid[1] * factor)) for factor in self.factors]
        if self.subsampled:
            shapes.append((math.ceil(shapes[-1][0] / 2), math.ceil(shapes[-1][1] / 2)))
        return shapes


def _resampler(channels: int, factor: float, *, layer_norm: bool) -> nn.Sequential:
    if factor == 4.0:
        half = channels // 2
        return nn.Sequential(Upsample(channels), nn.LayerNorm(half, eps=_NORM_EPS), nn.GELU(), Upsample(half))
    if factor == 2.0:
        return nn.Sequential(Upsample(channels))
    if factor == 0.5:
        return nn.Sequential(ConvNorm(channels, channels, 3, layer_norm=layer_norm, relu=True, stride=2))
    if factor == 1.0:
        return nn.Sequential()  # nothing to do, and no entry in the state dict
    raise ValueError(f"no projector stage of factor {factor}: use 4, 2, 1 or 0.5, and 0.25 only after another one")


def _resampled_channels(channels_in: Sequence[int], factor: float) -> int:
    return sum(channels // int(max(factor, 1.0)) for channels in channels_in)
