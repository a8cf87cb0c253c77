"""Box arithmetic shared by the model and the losses. A box is cxcywh unless the name says xyxy."""

from __future__ import annotations

import torch
from torch import Tensor

_MIN_AREA = 1e-7  # unions and hulls are clamped here, so degenerate boxes divide by something


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Corners of (..., 4) cxcywh boxes; negative widths and heights count as 0."""
    centre, half = boxes[..., :2], boxes[..., 2:].clamp(min=0) * 0.5
    return torch.cat([centre - half, centre + half], dim=-1)


def iou_and_giou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU of broadcastable (..., 4) xyxy boxes, each of shape (...)."""
    overlap = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    hull = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    intersection = overlap.clamp(min=0).prod(-1)
    union = (area(a) + area(b) - intersection).clamp(min=_MIN_AREA)
    hull_area = hull.clamp(min=0).prod(-1).clamp(min=_MIN_AREA)
    iou = intersection / union
    return iou, iou - (hull_area - union) / hull_area


def area(boxes: Tensor) -> Tensor:
    """Area of (..., 4) xyxy boxes."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def refine(delta: Tensor, reference: Tensor) -> Tensor:
    """Move reference boxes by predicted deltas relative to their size (`bbox_reparam`, spec 4.2 and 4.7)."""
    centre = delta[..., :2] * reference[..., 2:] + reference[..., :2]
    return torch.cat([centre, delta[..., 2:].exp() * reference[..., 2:]], dim=-1)
