"""Decoder: object queries attend to each other and to the feature maps (model spec 4.4 to 4.7)."""

# mypy: disable-error-code=no-any-return
# (calling an nn.Module is untyped)

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfdetr_core.models.boxes import refine
from rfdetr_core.models.deformable_attention import DeformableAttention
from rfdetr_core.models.linear import KeepingModule, Kept, Linear, linear_kept

_SINE_BASE = 10000.0


class MLP(nn.Module):
    """Linears with ReLU between them."""

    def __init__(self, width_in: int, hidden: int, width_out: int, depth: int) -> None:
        super().__init__()
        widths = [width_in, *[hidden] * (depth - 1), width_out]
        self.layers = nn.ModuleList(
            Linear(a, b, activation="none" if number == depth else "relu")
            for number, (a, b) in enumerate(pairwise(widths), start=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Memory(NamedTuple):
    """What the decoder attends to: the flattened feature maps of all levels."""

    tokens: Tensor
    """(B, N, D), levels concatenated, each row-major."""
    shapes: Sequence[tuple[int, int]]
    """(h, w) of each level."""
    mask: Tensor | None
    """(B, N), True on padding; None when nothing is padded."""
    valid_ratios: Tensor | None
    """(B, levels, 2): valid share of each level's width and height; None when nothing is padded."""


def sine_embedding(boxes: Tensor, width: int) -> Tensor:
    """Sine features of (..., 4) boxes: (..., 2 * width), coordinates in the order y, x, w, h (spec 4.4).

    Of (..., 2) points: (..., width), y before x.
    """
    per_coordinate = width // 2
    exponents = torch.arange(per_coordinate // 2, dtype=boxes.dtype, device=boxes.device) * (2.0 / per_coordinate)
    yxwh = torch.stack([boxes[..., 1], boxes[..., 0], *boxes[..., 2:].unbind(-1)], dim=-1)
    angles = (yxwh * (2.0 * math.pi))[..., None] / _SINE_BASE**exponents
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-3)


class SelfAttention(KeepingModule):
    """Multi-head attention with packed projections, named as in `nn.MultiheadAttention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)
        self.kept_value = Kept()
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, position: Tensor, groups: int) -> Tensor:
        """(B, G*Q, D) and its position vectors to (B, G*Q, D); a query sees its own group only."""
        width = x.shape[-1]
        (qk_weight, v_weight), (qk_bias, v_bias) = (
            torch.split(part, [2 * width, width]) for part in (self.in_proj_weight, self.in_proj_bias)
        )
        qk = linear_kept(self.kept, x + position, [qk_weight], qk_bias)
        v = linear_kept(self.kept_value, x, [v_weight], v_bias)
        per_group = x.shape[1] // groups
        split = (-1, per_group, self.heads, width // self.heads)  # groups become batch entries
        q, k, v = (part.reshape(split).transpose(1, 2) for part in (*qk.chunk(2, dim=-1), v))
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(attended.transpose(1, 2).reshape(-1, x.shape[1], width))


class DecoderLayer(nn.Module):
    """Self-attention, deformable cross-attention, feed-forward; each followed by its norm."""

    def __init__(
        self, width: int, *, ffn_width: int, self_heads: int, cross_heads: int, levels: int, points: int
    ) -> None:
        super().__init__()
        self.self_attn = SelfAttention(width, self_heads)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attn = DeformableAttention(width, heads=cross_heads, levels=levels, points=points)
        self.norm2 = nn.LayerNorm(width)
        self.linear1 = Linear(width, ffn_width, activation="relu")
        self.linear2 = Linear(ffn_width, width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, x: Tensor, position: Tensor, references: Tensor, memory: Memory, groups: int) -> Tensor:
        x = self.norm1(x + self.self_attn(x, position, groups))
        crossed = self.cross_attn(x + position, references, memory.tokens, memory.shapes, memory.mask)
        x = self.norm2(x + crossed)
        return self.norm3(x + self.linear2(self.linear1(x)))


class Decoder(nn.Module):
    """The layers, the shared output norm, and the query positions.

    `box_head` is set when references are refined after every layer (`lite_refpoint_refine` off); it is the
    detector's own head, so the state dict then names it twice.
    """

    def __init__(
        self,
        width: int,
        *,
        layers: int,
        ffn_width: int,
        self_heads: int,
        cross_heads: int,
        levels: int,
        points: int,
        bbox_reparam: bool,
        box_head: MLP | None,
    ) -> None:
        super().__init__()
        layer = DecoderLayer(
            width, ffn_width=ffn_width, self_heads=self_heads, cross_heads=cross_heads, levels=levels, points=points
        )
        self.layers = nn.ModuleList([layer, *(copy.deepcopy(layer) for _ in range(layers - 1))])
        self.norm = nn.LayerNorm(width)
        self.ref_point_head = MLP(2 * width, width, width, 2)
        self.bbox_reparam = bbox_reparam
        self.bbox_embed = box_head

    def forward(
        self, content: Tensor, references: Tensor, memory: Memory, *, groups: int, all_layers: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Hidden states (B, n, D) and the references their boxes are relative to (B, n, 4), per layer.

        Only the last layer's are kept unless `all_layers`. References are boxes, or logits of boxes without
        `bbox_reparam`.
        """
        hidden: list[Tensor] = []
        bases: list[Tensor] = []
        x, base = content, references
        position, sampled_from = self._position(references, memory)
        for number, layer in enumerate(self.layers, start=1):
            last = number == len(self.layers)
            x = layer(x, position, sampled_from, memory, groups)
            if all_layers or last:
                hidden.append(self.norm(x))
                bases.append(base)
            if self.bbox_embed is not None and not last:
                # The next prediction builds on the refined box with its gradient, the next layer without it.
                delta = self.bbox_embed(x)
                base = refine(delta, references) if self.bbox_reparam else delta + references
                references = base.detach()
                position, sampled_from = self._position(references, memory)
        return hidden, bases

    def _position(self, references: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """Query position vectors (B, n, D) and the boxes to sample from (B, n, levels or 1, 4)."""
        boxes = (references if self.bbox_reparam else references.sigmoid())[:, :, None]
        if memory.valid_ratios is not None:
            boxes = boxes * memory.valid_ratios.repeat(1, 1, 2)[:, None]
        return self.ref_point_head(sine_embedding(boxes[:, :, 0], self.norm.normalized_shape[0])), boxes
