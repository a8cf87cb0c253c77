"""From raw outputs to detections in pixels of the original image (model spec section 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from rfdetr_core.models.boxes import cxcywh_to_xyxy


def postprocess(logits: Tensor, boxes: Tensor, target_sizes: Tensor, num_select: int) -> list[dict[str, Tensor]]:
    """The `num_select` best (query, class) pairs of each image; no suppression, ties keep their order.

    `logits` (B, Q, C), `boxes` (B, Q, 4) cxcywh in [0, 1], `target_sizes` (B, 2) rows height, width of the
    original images. Per image: `scores` (K,), `labels` (K,) int64, `boxes` (K, 4) xyxy in pixels, inside the
    image; K = min(num_select, Q * C), best first.
    """
    classes = logits.shape[-1]
    scores = logits.sigmoid().flatten(1)
    flat = best_first(scores, min(num_select, scores.shape[1]))
    scores = scores.gather(1, flat)
    heights, widths = target_sizes.to(boxes).unbind(-1)
    extent = torch.stack([widths, heights, widths, heights], dim=-1)[:, None]  # (B, 1, 4)
    corners = cxcywh_to_xyxy(boxes) * extent
    corners = corners.gather(1, (flat // classes)[..., None].expand(-1, -1, 4))
    corners = torch.minimum(corners.clamp(min=0), extent)
    return [
        {"scores": s, "labels": label, "boxes": b} for s, label, b in zip(scores, flat % classes, corners, strict=True)
    ]


def best_first(scores: Tensor, k: int) -> Tensor:
    """Positions (B, k) of the k highest of `scores` (B, N), which are not negative; equal ones in their order.

    The same as a stable descending sort, at a tenth of its time: the bits of a float that is not negative rise with its
    value, so one 64-bit number holds the score, and below it the position, counted from the end.
    """
    if scores.dtype is torch.float64:
        return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    count = scores.shape[1]
    from_the_end = torch.arange(count - 1, -1, -1, device=scores.device)
    keys = (scores.float().view(torch.int32).long() << 32) | from_the_end
    return (count - 1) - (keys.topk(k, dim=-1).values & 0xFFFFFFFF)
