"""The encoder's blocks in the form that is exported: the same function with fewer operations.

What a training must keep apart is folded into the weights, exactly but for rounding:

* the scale 1 / sqrt(d) of the attention into the query's projection;
* the key's bias away: it adds the same to all scores of a query, which the softmax does not see;
* the value's bias into the output's, since the weights of a query sum to one;
* the layer scale into the linear before it.

Tokens are rows (windows x T, width) throughout, so that a linear with its bias is one Gemm.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfdetr_core.models.vit import Block, WindowedViT


class ExportBlock(nn.Module):
    """A `Block` in eval mode, for tokens as rows; `sequence` rows attend to each other."""

    def __init__(self, block: Block, sequence: int) -> None:
        super().__init__()
        inner, output = block.attention.attention, block.attention.output.dense
        self.width = int(inner.query.weight.shape[0])
        self.split = (-1, sequence, inner.heads, self.width // inner.heads)
        self.norm1, self.norm2 = block.norm1, block.norm2
        scale = (self.width // inner.heads) ** -0.5
        self.query = _linear(inner.query.weight * scale, inner.query.bias * scale)
        self.key = _linear(inner.key.weight, None)
        self.value = _linear(inner.value.weight, None)
        through = output.weight.double() @ inner.value.bias.double() + output.bias.double()
        self.output = _scaled(output.weight, through, block.layer_scale1.lambda1)
        self.fc1 = _linear(block.mlp.fc1.weight, block.mlp.fc1.bias)
        self.fc2 = _scaled(block.mlp.fc2.weight, block.mlp.fc2.bias, block.layer_scale2.lambda1)

    def forward(self, x: Tensor) -> Tensor:
        # Sizes are plain numbers: what is read off a tensor becomes operators of the graph.
        normed = self.norm1(x)
        q = self.query(normed).view(self.split).transpose(1, 2)  # (sequences, heads, T, d)
        k = self.key(normed).view(self.split).permute(0, 2, 3, 1)
        v = self.value(normed).view(self.split).transpose(1, 2)
        attended = ((q @ k).softmax(-1) @ v).transpose(1, 2).reshape(-1, self.width)
        x = x + self.output(attended)
        return cast(Tensor, x + self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class ExportedViT(nn.Module):
    """A `WindowedViT` for one grid of patches, in evaluation only; takes its place, and its parts."""

    def __init__(self, vit: WindowedViT, grid: tuple[int, int]) -> None:
        super().__init__()
        self.tokens = vit.embeddings.num_prefix + grid[0] * grid[1] // vit.embeddings.num_windows**2  # per window
        used = [cast(Block, block) for block in vit.encoder.layer[: max(vit.outputs_after_blocks)]]
        self.layer = nn.ModuleList(ExportBlock(block, block.windows_per_sequence * self.tokens) for block in used)
        self.width = int(vit.layernorm.normalized_shape[0])
        vit.encoder.layer = nn.ModuleList()
        self.vit = vit

    def forward(self, images: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """As the encoder's."""
        x = self.vit.embeddings(images, grid).reshape(-1, self.width)
        outputs = {}
        for number, block in enumerate(self.layer, start=1):
            x = block(x)
            if number in self.vit.outputs_after_blocks:
                outputs[number] = self.vit.to_map(x.view(-1, self.tokens, self.width), grid)
        return [outputs[number] for number in self.vit.outputs_after_blocks]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    return linear


def _scaled(weight: Tensor, bias: Tensor, factors: Tensor) -> nn.Linear:
    return _linear(weight.double() * factors.double()[:, None], bias.double() * factors.double())
