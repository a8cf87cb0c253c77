"""Two-stage selection of reference boxes, then the decoder (model spec section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfdetr_core.models.boxes import refine
from rfdetr_core.models.decoder import MLP, Decoder, Memory
from rfdetr_core.models.linear import Linear, linear

_ANCHOR_SIDE = 0.05  # of the image, at the first level; doubles per level
_EDGE = 0.01  # proposals that come closer to 0 or 1 than this are not used
_NORM_EPS = 1e-5


class Selection(NamedTuple):
    """The two-stage proposals, groups concatenated along the query axis, k per group."""

    logits: Tensor | None
    """(B, G*k, C), where they were asked for."""
    boxes: Tensor
    """(B, G*k, 4); logits of boxes without `bbox_reparam`."""
    indices: Tensor
    """(G, B, k) tokens that were chosen, best first."""


def flatten_levels(maps: Sequence[Tensor], shapes: Sequence[tuple[int, int]], mask: Tensor | None) -> Memory:
    """Maps (B, h, w, D) of `shapes`, and a mask (B, H, W) that is True on padding, as memory (spec 4.0)."""
    tokens = maps[0].flatten(1, 2) if len(maps) == 1 else torch.cat([m.flatten(1, 2) for m in maps], dim=1)
    if mask is None:
        return Memory(tokens, shapes, None, None)
    masks = [F.interpolate(mask[:, None].float(), size=shape)[:, 0] > 0.5 for shape in shapes]
    ratios = [torch.stack([(~m[:, 0]).float().mean(-1), (~m[:, :, 0]).float().mean(-1)], dim=-1) for m in masks]
    flat = torch.cat([m.flatten(1) for m in masks], dim=1)
    return Memory(tokens, shapes, flat, torch.stack(ratios, dim=1).to(tokens.dtype))


def anchors(memory: Memory) -> tuple[Tensor, Tensor]:
    """One box per cell, (B or 1, N, 4), and whether it may be proposed, (B or 1, N) bool (spec 4.1).

    Formed in float32 whatever the model's type. Centres are fractions of the valid part of a padded image.
    """
    device = memory.tokens.device
    boxes, start = [], 0
    for level, (h, w) in enumerate(memory.shapes):
        y = (torch.arange(h, dtype=torch.float32, device=device) + 0.5)[None]
        x = (torch.arange(w, dtype=torch.float32, device=device) + 0.5)[None]
        if memory.mask is None:
            y, x = y / h, x / w
        else:
            valid = ~memory.mask[:, start : start + h * w].view(-1, h, w)
            y, x = y / valid[:, :, 0].sum(1, keepdim=True), x / valid[:, 0].sum(1, keepdim=True)
        cx, cy = x[:, None].expand(-1, h, -1), y[:, :, None].expand(-1, -1, w)  # (B or 1, h, w)
        side = torch.full_like(cx, _ANCHOR_SIDE * 2.0**level)
        boxes.append(torch.stack([cx, cy, side, side], dim=-1).flatten(1, 2))
        start += h * w
    flat = torch.cat(boxes, dim=1)
    usable = ((flat > _EDGE) & (flat < 1.0 - _EDGE)).all(-1)
    return flat, usable if memory.mask is None else usable & ~memory.mask


class Transformer(nn.Module):
    """Two-stage heads (one set per query group) and decoder; `two_stage` off leaves the decoder alone."""

    def __init__(self, width: int, num_logits: int, groups: int, decoder: Decoder, *, two_stage: bool) -> None:
        super().__init__()
        self.width = width
        self.decoder = decoder
        self.two_stage = two_stage
        self.bbox_reparam = decoder.bbox_reparam
        if two_stage:
            self.enc_output = nn.ModuleList(Linear(width, width) for _ in range(groups))
            self.enc_output_norm = nn.ModuleList(nn.LayerNorm(width, eps=_NORM_EPS) for _ in range(groups))
            self.enc_out_bbox_embed = nn.ModuleList(MLP(width, width, 4, 3) for _ in range(groups))
            self.enc_out_class_embed = nn.ModuleList(Linear(width, num_logits) for _ in range(groups))

    def forward(
        self, memory: Memory, content: Tensor, reference_table: Tensor, *, queries: int, groups: int, all_layers: bool
    ) -> tuple[list[Tensor], list[Tensor], Selection | None]:
        """Decode with the learned tables of the active groups: content (G*Q, D) and references (G*Q, 4).

        Returns hidden states and base references per layer (see `Decoder.forward`), and the selection.
        """
        batch = memory.tokens.shape[0]
        references = reference_table.expand(batch, -1, -1)
        selection = None
        if self.two_stage:
            selected = min(queries, sum(h * w for h, w in memory.shapes))
            selection = self.select(memory, groups, selected, with_logits=all_layers)
            proposed, learned = selection.boxes.detach(), references[:, : groups * selected]
            moved = refine(learned, proposed) if self.bbox_reparam else learned + proposed
            # With fewer tokens than queries the last rows keep the learned values (spec 4.3).
            few = selected < queries
            references = torch.cat([moved, references[:, groups * selected :]], dim=1) if few else moved
        hidden, bases = self.decoder(
            content.expand(batch, -1, -1), references, memory, groups=groups, all_layers=all_layers
        )
        return hidden, bases, selection

    def select(self, memory: Memory, groups: int, k: int, *, with_logits: bool) -> Selection:
        """The best k tokens of each group, by their highest class logit (spec 4.2)."""
        boxes, usable = anchors(memory)
        tokens = memory.tokens
        if memory.mask is not None or max(max(shape) for shape in memory.shapes) >= 0.5 / _EDGE:
            tokens = tokens.masked_fill(~usable[..., None], 0.0)
        evaluates = groups == 1 and not torch.is_grad_enabled()
        heads = _FirstHeads(self) if evaluates else _GroupHeads(self, groups)
        scores = heads.scores(tokens)  # (G, B, N)
        indices = scores.topk(k, dim=-1).indices  # (G, B, k)

        batch, count = tokens.shape[:2]
        first_rows = torch.arange(batch, device=tokens.device)[:, None] * count
        rows = (indices + first_rows).flatten(1)  # (G, B*k) into the tokens of the whole batch
        logits, deltas = heads.predict(tokens, rows, with_logits=with_logits)
        proposals = self._proposals(boxes, usable).to(tokens.dtype).expand(batch, -1, -1)
        picked = F.embedding(rows, proposals.reshape(-1, 4))  # (G, B*k, 4)
        out = refine(deltas, picked) if self.bbox_reparam else deltas + picked
        chosen = None if logits is None else _queries_last(logits, batch)
        return Selection(chosen, _queries_last(out, batch), indices)

    def _proposals(self, boxes: Tensor, usable: Tensor) -> Tensor:
        if self.bbox_reparam:
            return boxes.masked_fill(~usable[..., None], 0.0)
        return torch.log(boxes / (1.0 - boxes)).masked_fill(~usable[..., None], torch.inf)


class _FirstHeads:
    """The two-stage heads of the first group, without gradient: what they made of all tokens is not made again."""

    def __init__(self, transformer: Transformer) -> None:
        self.output, self.norm = transformer.enc_output[0], transformer.enc_output_norm[0]
        self.classes, self.boxes = transformer.enc_out_class_embed[0], transformer.enc_out_bbox_embed[0]

    def scores(self, tokens: Tensor) -> Tensor:
        """Highest class logit of each token (B, N, D): (1, B, N)."""
        self.z = self.norm(self.output(tokens))
        self.logits = self.classes(self.z)
        best: Tensor = self.logits.amax(-1)
        return best[None]

    def predict(self, tokens: Tensor, rows: Tensor, *, with_logits: bool) -> tuple[Tensor | None, Tensor]:
        """Class logits (1, M, C), where asked for, and box deltas (1, M, 4) of the tokens at `rows` (1, M)."""
        logits = F.embedding(rows, self.logits.flatten(0, 1)) if with_logits else None
        return logits, self.boxes(F.embedding(rows, self.z.flatten(0, 1)))


class _GroupHeads:
    """The two-stage heads of the first `groups` groups, stacked: all groups in one batched product.

    All tokens are scored without gradient; only the chosen ones run through the heads with gradient, which is the same
    gradient at a fraction of the cost.
    """

    def __init__(self, transformer: Transformer, groups: int) -> None:
        self.width = transformer.width
        self.output = _stack(transformer.enc_output[:groups])
        self.norm = _stack(transformer.enc_output_norm[:groups])
        self.classes = _stack(transformer.enc_out_class_embed[:groups])
        box_heads = [head.layers for head in transformer.enc_out_bbox_embed[:groups]]
        self.boxes = [_stack(layers) for layers in zip(*box_heads, strict=True)]

    @torch.no_grad()
    def scores(self, tokens: Tensor) -> Tensor:
        """Highest class logit of each token (B, N, D) per group: (G, B, N)."""
        weight, bias = self.output
        batch, count = tokens.shape[:2]
        z = linear(tokens.flatten(0, 1), weight.flatten(0, 1), bias.flatten()).view(-1, *bias.shape)
        gamma, beta = self.norm
        z = torch.addcmul(beta, F.layer_norm(z, (self.width,), eps=_NORM_EPS), gamma)  # (B*N, G, D)
        return _linear(z.transpose(0, 1), self.classes).amax(-1).view(-1, batch, count)

    def predict(self, tokens: Tensor, rows: Tensor, *, with_logits: bool) -> tuple[Tensor | None, Tensor]:
        """Class logits (G, M, C), where asked for, and box deltas (G, M, 4) of the tokens at `rows` (G, M)."""
        gamma, beta = self.norm
        chosen = F.embedding(rows, tokens.flatten(0, 1))  # (G, M, D)
        z = F.layer_norm(_linear(chosen, self.output), (self.width,), eps=_NORM_EPS)
        z = torch.addcmul(beta[:, None], z, gamma[:, None])
        deltas = z
        for layer in self.boxes[:-1]:
            deltas = F.relu(_linear(deltas, layer))
        return _linear(z, self.classes) if with_logits else None, _linear(deltas, self.boxes[-1])


def _stack(modules: Sequence[nn.Module] | nn.ModuleList) -> tuple[Tensor, Tensor]:
    """Weights (G, ...) and biases (G, ...) of modules of equal shape."""
    return torch.stack([m.weight for m in modules]), torch.stack([m.bias for m in modules])  # type: ignore[misc]


def _linear(x: Tensor, weight_and_bias: tuple[Tensor, Tensor]) -> Tensor:
    """(G, M, in) through G linears at once: (G, M, out)."""
    weight, bias = weight_and_bias
    return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))


def _queries_last(x: Tensor, batch: int) -> Tensor:
    """(G, B*k, C) to (B, G*k, C)."""
    groups, _, channels = x.shape
    return x.view(groups, batch, -1, channels).transpose(0, 1).reshape(batch, -1, channels)
