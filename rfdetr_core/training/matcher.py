"""Assignment of predictions to targets (Carion et al., "DETR", section 3.1; model spec 6.1).

Each image and each query group is one rectangular assignment problem. The costs of all decoder layers are formed
together, only between a target and the queries of its own image, and cross to the host in one transfer.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rfdetr_core.errors import DatasetError
from rfdetr_core.models.boxes import cxcywh_to_xyxy, iou_and_giou

_COST_CLASS, _COST_BOX, _COST_GIOU = 2.0, 5.0, 2.0
_ALPHA = 0.25  # focal balance of the class cost; gamma is 2


class PackedTargets(NamedTuple):
    """The targets of a batch in one table, image after image."""

    labels: Tensor
    """(T,) int64."""
    boxes: Tensor
    """(T, 4) cxcywh in [0, 1]."""
    image: Tensor
    """(T,) the image each row belongs to."""
    counts: list[int]
    """Rows of each image."""


class Matches(NamedTuple):
    """Matched pairs of all layers, (K,) int64 each."""

    layer: Tensor
    image: Tensor
    query: Tensor
    """Along the concatenated query axis of all layers."""
    target: Tensor
    """Row of the packed targets."""
    first_layer: int
    """How many of the pairs belong to layer 0; they come first."""


def pack_targets(targets: Sequence[Mapping[str, Tensor]], like: Tensor) -> PackedTargets:
    """Concatenate the targets of `like.shape[0]` images on the device and in the float type of `like`.

    Of a target padded to a fixed size, `valid` (n,) bool marks the real rows; the others are left out.
    """
    if len(targets) != like.shape[0]:
        raise ValueError(f"{len(targets)} targets for {like.shape[0]} images")
    targets = [_without_padding(target) for target in targets]
    counts = [len(target["labels"]) for target in targets]
    return PackedTargets(
        labels=torch.cat([target["labels"] for target in targets]).to(like.device, non_blocking=True),
        boxes=torch.cat([target["boxes"] for target in targets]).to(like, non_blocking=True),
        image=torch.repeat_interleave(torch.tensor(counts)).to(like.device, non_blocking=True),
        counts=counts,
    )


def _without_padding(target: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if "valid" not in target:
        return target
    return {part: target[part][target["valid"]] for part in ("labels", "boxes")}


def match(
    outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]], groups: int
) -> list[tuple[Tensor, Tensor]]:
    """Match one layer: per image the matched queries, ascending, and their rows in the image's (valid) targets.

    `outputs` holds `pred_logits` (B, G*Q, C) and `pred_boxes` (B, G*Q, 4); a target of `labels` (n,) and `boxes`
    (n, 4) cxcywh gets min(n, Q) queries in each of the G `groups`. Raises DatasetError for a label outside 0..C-1.
    """
    logits, boxes = outputs["pred_logits"].detach(), outputs["pred_boxes"].detach()
    packed = pack_targets(targets, boxes)
    found = match_layers(logits, boxes, packed, [logits.shape[1]], groups)
    first_rows = np.cumsum([0, *packed.counts])
    image, query, target = (part.cpu() for part in (found.image, found.query, found.target))
    return [(query[image == i], target[image == i] - int(first_rows[i])) for i in range(len(packed.counts))]


@torch.no_grad()
def match_layers(
    logits: Tensor, boxes: Tensor, targets: PackedTargets, layer_sizes: Sequence[int], groups: int
) -> Matches:
    """Match every layer, where `logits` (B, S, C) and `boxes` (B, S, 4) hold the layers side by side.

    `layer_sizes` are their query counts, each a multiple of `groups`. Pairs are ordered by layer, image, query.
    Raises DatasetError for a label outside 0..C-1.
    """
    costs = assignment_costs(logits, boxes, targets, layer_sizes)
    pairs = _solve(costs, targets.counts, layer_sizes, groups)
    layer, image, query, target = torch.from_numpy(pairs).to(logits.device, non_blocking=True).unbind()
    return Matches(layer, image, query, target, int((pairs[0] == 0).sum()))


def assignment_costs(
    logits: Tensor, boxes: Tensor, targets: PackedTargets, layer_sizes: Sequence[int]
) -> NDArray[np.float32]:
    """Cost (T, S) of each target with every query of its own image; arguments and errors as of `match_layers`.

    What is not finite was replaced, with a RuntimeWarning, by a value above all others of its layer.
    """
    costs = _own_image_costs(logits, boxes, targets)
    if np.isfinite(costs).all():
        return costs
    return _with_finite_costs(costs, logits, boxes, targets, layer_sizes)


def _solve(
    costs: NDArray[np.float32], counts: Sequence[int], layer_sizes: Sequence[int], groups: int
) -> NDArray[np.int64]:
    """Rows layer, image, query, target (4, K) of the cheapest assignment in each layer, image and group."""
    rows: list[NDArray[np.int64]] = [np.empty((4, 0), np.int64)]
    first_query = 0
    for layer, size in enumerate(layer_sizes):
        first_target = 0
        for image, count in enumerate(counts):
            own = costs[first_target : first_target + count]
            for start in range(first_query, first_query + size, size // groups) if count else ():
                target, query = linear_sum_assignment(own[:, start : start + size // groups])
                order = query.argsort()
                found = np.empty((4, len(order)), np.int64)
                found[0], found[1], found[2], found[3] = (
                    layer,
                    image,
                    query[order] + start,
                    target[order] + first_target,
                )
                rows.append(found)
            first_target += count
        first_query += size
    return np.concatenate(rows, axis=1)


def _own_image_costs(logits: Tensor, boxes: Tensor, targets: PackedTargets) -> NDArray[np.float32]:
    """Cost of each target with every query of its own image (T, S), on the host."""
    classes = logits.shape[-1]
    labels = targets.labels.clamp(0, classes - 1)  # an illegal label is reported below, not by a device fault
    class_logits = logits.transpose(1, 2)[targets.image, labels]  # (T, S)
    costs = pair_costs(class_logits, boxes[targets.image], targets.boxes[:, None])
    # The labels travel with the costs: a transfer of their own would wait for the device a second time.
    host = torch.cat([costs.flatten(), targets.labels.float()]).cpu().numpy()
    sent = host[costs.numel() :].astype(np.int64)
    for row in np.flatnonzero((sent < 0) | (sent >= classes)):
        image = int(np.searchsorted(np.cumsum(targets.counts), row, side="right"))
        raise DatasetError(
            f"label {sent[row]} of image {image} in the batch is outside 0..{classes - 1}",
            hint="labels count from 0, in the order of the class map; check model.num_classes",
        )
    matrix: NDArray[np.float32] = host[: costs.numel()].reshape(costs.shape)
    return matrix


def pair_costs(class_logits: Tensor, boxes: Tensor, target_boxes: Tensor) -> Tensor:
    """Assignment cost, float32, of broadcastable class logits (T, S) with boxes (T, S, 4) and (T, 1, 4)."""
    z = class_logits.float() if class_logits.dtype in (torch.float16, torch.bfloat16) else class_logits
    p = z.sigmoid()
    # softplus(-z) is -log p, softplus(z) is -log(1 - p)
    class_cost = _ALPHA * (1 - p).square() * F.softplus(-z) - (1 - _ALPHA) * p.square() * F.softplus(z)
    box_cost = (boxes - target_boxes).abs().sum(-1)
    _, giou = iou_and_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target_boxes))
    return (_COST_BOX * box_cost + _COST_CLASS * class_cost - _COST_GIOU * giou).float()


def _with_finite_costs(
    costs: NDArray[np.float32],
    logits: Tensor,
    boxes: Tensor,
    targets: PackedTargets,
    layer_sizes: Sequence[int],
) -> NDArray[np.float32]:
    """Replace non-finite costs by a value above all finite ones of the layer, those of other images included."""
    warnings.warn("predictions are not finite: their assignment costs were replaced", RuntimeWarning, stacklevel=2)
    result = costs.copy()
    limit = float(np.finfo(np.float32).max)
    start = 0
    for size in layer_sizes:
        layer = slice(start, start + size)
        class_logits = logits[:, layer].flatten(0, 1)[:, targets.labels].T  # (T, B*size)
        full = pair_costs(class_logits, boxes[:, layer].reshape(1, -1, 4), targets.boxes[:, None])
        finite = full[full.isfinite()]
        fill = min(float(finite.max()) + float(finite.abs().max()) + 1.0, limit) if len(finite) else limit
        block = result[:, layer]
        block[~np.isfinite(block)] = fill
        start += size
    return result
