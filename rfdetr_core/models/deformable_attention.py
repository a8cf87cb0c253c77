"""Multi-scale deformable attention (Zhu et al., "Deformable DETR", section 4.1; model spec 4.6)."""

# mypy: disable-error-code=no-any-return
# (calling an nn.Module is untyped)

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfdetr_core.models.linear import Linear


class DeformableAttention(nn.Module):
    """Each query reads a few points of each level around its reference box.

    `width` D, `heads` H, `levels` and `points` per head and level; a head owns D / H channels.
    """

    def __init__(self, width: int, *, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = Linear(width, heads * levels * points * 2)
        self.attention_weights = Linear(width, heads * levels * points)
        self.value_proj = Linear(width, width)
        self.output_proj = Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Offsets start as rays: head m looks along 2*pi*m/H, point p stands p+1 steps away."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angles = torch.arange(self.heads, dtype=torch.float32) * (2.0 * math.pi / self.heads)
        rays = torch.stack([angles.cos(), angles.sin()], dim=-1)
        rays = rays / rays.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1, dtype=torch.float32)
        bias = (rays[:, None, None] * steps[:, None]).expand(-1, self.levels, -1, -1)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        query: Tensor,
        references: Tensor,
        memory: Tensor,
        shapes: Sequence[tuple[int, int]],
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from (B, n, D) queries to (B, N, D) memory: the levels of `shapes` (h, w), concatenated.

        `references` are (B, n, levels or 1, 4) boxes cxcywh as fractions of the level, or (B, n, levels or 1, 2)
        points; `mask` (B, N) is True on padded cells, whose value is 0. Returns (B, n, D).
        """
        n, heads, points = query.shape[1], self.heads, self.points
        value = self.value_proj(memory)  # (B, N, D)
        if mask is not None:
            value = value.masked_fill(mask[..., None], 0.0)
        grid = self._locations(query, references, shapes) * 2.0 - 1.0  # (B, H, levels, P, n, 2) in [-1, 1]
        weights = self.attention_weights(query).view(-1, n, heads, self.levels * points).softmax(-1)

        sampled = []
        cells = [h * w for h, w in shapes]
        for level, (level_value, (h, w)) in enumerate(zip(value.split(cells, dim=1), shapes, strict=True)):
            planes = level_value.transpose(1, 2).reshape(-1, level_value.shape[-1] // heads, h, w)  # (B*H, d, h, w)
            points_of_level = grid[:, :, level].flatten(0, 1)  # (B*H, P, n, 2)
            sampled.append(F.grid_sample(planes, points_of_level, padding_mode="zeros", align_corners=False))
        values = sampled[0] if len(sampled) == 1 else torch.cat(sampled, dim=2)  # (B*H, d, levels*P, n)
        mixed = (values * weights.permute(0, 2, 3, 1).flatten(0, 1)[:, None]).sum(2)  # (B*H, d, n)
        return self.output_proj(mixed.view(-1, query.shape[-1], n).transpose(1, 2))

    def _locations(self, query: Tensor, references: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Sampling points (B, H, levels, P, n, 2) as fractions of the level, x then y.

        Offsets from a box are in halves of its sides, per point; from a point, in cells. The queries lie innermost: the
        sum over the few points then runs over whole rows.
        """
        split = (-1, query.shape[1], self.heads, self.levels, self.points, 2)
        offsets = self.sampling_offsets(query).view(split).permute(0, 2, 3, 4, 1, 5)
        spread = references.transpose(1, 2)[:, None, :, None]
        at, *sides = torch.split(spread, 2, dim=-1)  # (B, 1, levels or 1, 1, n, 2) each
        if sides:
            return at + offsets * (sides[0] * (0.5 / self.points))
        cells = torch.tensor([[w, h] for h, w in shapes], dtype=at.dtype, device=at.device)
        return at + offsets / cells[:, None, None]
