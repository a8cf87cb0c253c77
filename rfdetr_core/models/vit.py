"""DINOv2 vision transformer with windowed attention (model spec section 2).

Every window carries its own CLS and register tokens through the whole network. A windowed block attends
inside each window; a global block attends over the concatenation of an image's windows, which is a view.
"""

# mypy: disable-error-code=no-any-return
# (calling an nn.Module is untyped)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from rfdetr_core.models.linear import KeepingModule, Linear, linear_kept

_NORM_EPS = 1e-6


class PatchEmbeddings(nn.Module):
    """Patches to vectors; the nesting follows the published state dict."""

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(images)


class Embeddings(KeepingModule):
    """Images to windowed token sequences: patches, positions, one CLS (and registers) per window."""

    def __init__(
        self, *, channels: int, width: int, patch_size: int, num_windows: int, table_side: int, registers: int
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.num_windows = num_windows
        self.width = width
        self.table_grid = (table_side, table_side)  # the export replaces the table, and this with it
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # never used; published weights hold it
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + table_side**2, width))
        self.patch_embeddings = PatchEmbeddings(channels, width, patch_size)
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, width))
        self.num_prefix = 1 + registers

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The positional table (1, 1 + h*w, width) for a grid of h x w patches; differentiable."""
        table = self.position_embeddings
        if grid == self.table_grid:
            return table
        if not self.kept.usable(table):
            return resize_table(table, self.table_grid, grid)
        return self.kept.get([table], lambda: resize_table(table, self.table_grid, grid), of=grid)

    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Images (B, channels, H, W) to tokens (B*n*n, T, width), windows row-major within an image."""
        n, (h, w) = self.num_windows, grid
        positions = self.positions(grid)
        patches = self.patch_embeddings(images).flatten(2).transpose(1, 2) + positions[:, 1:]  # (B, h*w, width)
        windows = patches.reshape(-1, n, h // n, n, w // n, self.width).transpose(2, 3)
        windows = windows.reshape(-1, (h // n) * (w // n), self.width)
        prefix = self.cls_token + positions[:, :1]
        if self.num_prefix > 1:
            prefix = torch.cat([prefix, self.register_tokens], dim=1)
        return torch.cat([prefix.expand(windows.shape[0], -1, -1), windows], dim=1)


def resize_table(table: Tensor, held: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """A table (1, 1 + h*w, width) of one grid of patches for another one: bicubic with antialias, CLS row kept."""
    patches = table[:, 1:].float().reshape(1, *held, -1).permute(0, 3, 1, 2)
    resized: Tensor = _Bicubic.apply(patches, wanted)
    return torch.cat([table[:, :1], resized.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def _bicubic(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bicubic", align_corners=False, antialias=True)


class _Bicubic(torch.autograd.Function):
    """`_bicubic` of (1, C, h, w) with its gradient as two products: torch's own is not compiled for open sizes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
        ctx.held, ctx.size = x.shape[-2:], size
        return _bicubic(x, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # What each of the old rows gives to each of the new ones, and the columns likewise.
        rows, columns = (
            _bicubic(torch.eye(old, dtype=gradient.dtype, device=gradient.device)[None, None], (old, new))[0, 0]
            for old, new in zip(ctx.held, ctx.size, strict=True)
        )
        return rows @ gradient @ columns.t(), None


class SelfAttention(KeepingModule):
    """Query, key and value projections, separate as in the published state dict, computed as one product."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = (self.query, self.key, self.value)
        weights, bias = [part.weight for part in parts], torch.cat([part.bias for part in parts])
        qkv = linear_kept(self.kept, x, weights, bias)
        q, k, v = qkv.view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind()  # (B, heads, T, width)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class AttentionOutput(nn.Module):
    """Output projection of the attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x)


class Attention(nn.Module):
    """Multi-head self-attention over (B, T, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads)
        self.output = AttentionOutput(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.attention(x))


class MLP(nn.Module):
    """Two linears with an exact GELU between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, 4 * width, activation="gelu")
        self.fc2 = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))


class LayerScale(nn.Module):
    """A learned factor per channel; the block applies it together with the residual sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(width))

    def forward(self, residual: Tensor, branch: Tensor) -> Tensor:
        return torch.addcmul(residual, branch, self.lambda1)


def drop_windows(branch: Tensor, rate: float) -> Tensor:
    """Stochastic depth: zero whole windows of (windows, T, width) with probability `rate` (spec 2.3)."""
    keep = branch.new_empty(branch.shape[0], 1, 1).bernoulli_(1.0 - rate)
    return branch * keep.div_(1.0 - rate)


class Block(nn.Module):
    """Pre-norm transformer block on windowed tokens (B*n*n, T, width)."""

    def __init__(self, width: int, heads: int, *, windows_per_sequence: int, drop_path: float) -> None:
        super().__init__()
        self.windows_per_sequence = windows_per_sequence  # 1: inside a window; n*n: over the whole image
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=_NORM_EPS)
        self.attention = Attention(width, heads)
        self.layer_scale1 = LayerScale(width)
        self.norm2 = nn.LayerNorm(width, eps=_NORM_EPS)
        self.mlp = MLP(width)
        self.layer_scale2 = LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        tokens, width = x.shape[1:]
        normed = self.norm1(x)
        attended = self.attention(normed.view(-1, self.windows_per_sequence * tokens, width)).view_as(x)
        x = self.layer_scale1(x, self._maybe_drop(attended))
        return self.layer_scale2(x, self._maybe_drop(self.mlp(self.norm2(x))))

    def _maybe_drop(self, branch: Tensor) -> Tensor:
        if self.training and self.drop_path > 0.0:
            return drop_windows(branch, self.drop_path)
        return branch


class Encoder(nn.Module):
    """The stack of blocks."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(blocks)


class WindowedViT(nn.Module):
    """The encoder: images to one feature map per requested depth.

    `outputs_after_blocks` counts blocks from 1; `windowed_blocks` holds 0-based indices, all others attend
    globally. Blocks behind the last requested depth keep their weights and are not computed.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        patch_size: int,
        num_windows: int,
        table_side: int,
        outputs_after_blocks: Sequence[int],
        windowed_blocks: Sequence[int],
        registers: int = 0,
        channels: int = 3,
        weight_std: float = 0.02,
        position_std: float = 0.02,
        drop_path: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.outputs_after_blocks = tuple(outputs_after_blocks)
        self.gradient_checkpointing = gradient_checkpointing
        self.embeddings = Embeddings(
            channels=channels,
            width=width,
            patch_size=patch_size,
            num_windows=num_windows,
            table_side=table_side,
            registers=registers,
        )
        self.encoder = Encoder(
            [
                Block(
                    width,
                    heads,
                    windows_per_sequence=1 if i in windowed_blocks else num_windows**2,
                    drop_path=drop_path * i / max(1, depth - 1),
                )
                for i in range(depth)
            ]
        )
        self.layernorm = nn.LayerNorm(width, eps=_NORM_EPS)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=weight_std)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.embeddings.cls_token, std=position_std)
        nn.init.trunc_normal_(self.embeddings.position_embeddings, std=position_std)

    def forward(self, images: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """Images (B, channels, H, W), h x w patches, to maps (B, h, w, width) in the order of the depths."""
        x = self.embeddings(images, grid)
        outputs: dict[int, Tensor] = {}
        for number, block in enumerate(self.encoder.layer[: max(self.outputs_after_blocks)], start=1):
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            if number in self.outputs_after_blocks:
                outputs[number] = self.to_map(x, grid)
        return [outputs[number] for number in self.outputs_after_blocks]

    def to_map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Final norm, prefix dropped, windows undone: (B*n*n, T, width) to (B, h, w, width)."""
        n, (h, w), width = self.embeddings.num_windows, grid, self.embeddings.width
        patches = self.layernorm(x[:, self.embeddings.num_prefix :])
        return patches.reshape(-1, n, n, h // n, w // n, width).transpose(2, 3).reshape(-1, h, w, width)
