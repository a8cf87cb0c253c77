"""Training losses of the detector (model spec section 6)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfdetr_core.config import ModelConfig
from rfdetr_core.models.boxes import cxcywh_to_xyxy, iou_and_giou
from rfdetr_core.training.matcher import Matches, PackedTargets, match_layers, pack_targets

_LOSS_BBOX, _LOSS_GIOU = 5.0, 2.0
_ALPHA = 0.25
_MIN_TARGET = 0.01  # of the IoU-aware classification target


class Positives(NamedTuple):
    """The entries of the class logits that an assigned target makes positive; K of them."""

    logits: Tensor
    """(K,)."""
    iou: Tensor
    """(K,) of predicted box and target, without gradient."""
    image: Tensor
    """(K,) int64, counted on over all layers: layer * B + image."""
    images: int
    """layers * B."""


class Criterion(nn.Module):
    """Classification, box and GIoU losses of every decoder layer and of the two-stage selection.

    The module's mode must follow the model's: in training all query groups are matched, in evaluation one.
    `weight_dict` holds the weight of each loss; `total` applies it.
    """

    def __init__(self, config: ModelConfig, cls_loss_coef: float = 1.0) -> None:
        super().__init__()
        self.groups = config.group_detr
        self.sum_groups = config.sum_group_losses
        self.classification = _classification_loss(config)
        weights = {"loss_ce": cls_loss_coef, "loss_bbox": _LOSS_BBOX, "loss_giou": _LOSS_GIOU}
        suffixes = ["", *(f"_{layer}" for layer in range(config.dec_layers - 1))]
        if config.two_stage:
            suffixes.append("_enc")
        self.weight_dict = {name + suffix: weight for suffix in suffixes for name, weight in weights.items()}

    def forward(
        self, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]], num_boxes: float | None = None
    ) -> dict[str, Tensor]:
        """Loss terms, unweighted scalars: `loss_ce`, `loss_bbox`, `loss_giou` and diagnostics per layer.

        `outputs` are the detector's; per image a target holds `labels` (n,) int64 and `boxes` (n, 4) cxcywh in
        [0, 1], and may hold `valid` (n,) bool, False on rows that only pad it. Names end in `_0`.. for earlier
        layers and `_enc` for the two-stage selection. The diagnostics `class_error` (last layer, percent) and
        `cardinality_error` have no weight. All terms are divided by `num_boxes`; its default is the number
        of targets x groups, or with `sum_group_losses` without the groups, at least 1; in training averaged over the
        ranks. Without a target every term still depends on the outputs, with a gradient of zero or the background's.

        Raises DatasetError for a label that the head has no column for.
        """
        layers: list[tuple[str, Mapping[str, Tensor]]] = [("", outputs)]
        layers += [(f"_{i}", layer) for i, layer in enumerate(outputs.get("aux_outputs", ()))]
        if "enc_outputs" in outputs:
            layers.append(("_enc", outputs["enc_outputs"]))
        sizes = [layer["pred_logits"].shape[1] for _, layer in layers]
        # All layers side by side along the query axis: (B, S, C) and (B, S, 4).
        logits = _at_least_float32(torch.cat([layer["pred_logits"] for _, layer in layers], dim=1))
        boxes = _at_least_float32(torch.cat([layer["pred_boxes"] for _, layer in layers], dim=1))

        packed = pack_targets(targets, boxes)
        groups = self.groups if self.training else 1
        matches = match_layers(logits.detach(), boxes.detach(), packed, sizes, groups)
        shares = 1 if self.sum_groups else groups
        normaliser = self._num_boxes(packed, shares, boxes.device) if num_boxes is None else max(1.0, num_boxes)

        losses = self._losses(logits, boxes, packed, matches, sizes) / normaliser  # (3, layers)
        cardinality = _cardinality_error(logits.detach(), packed, sizes)
        result: dict[str, Tensor] = {}
        for (suffix, _), (ce, bbox, giou), error in zip(layers, losses.T, cardinality, strict=True):
            result["loss_ce" + suffix] = ce
            if not suffix:
                result["class_error"] = _class_error(logits.detach(), packed, matches)
            result["loss_bbox" + suffix] = bbox
            result["loss_giou" + suffix] = giou
            result["cardinality_error" + suffix] = error
        return result

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum that is minimised."""
        return torch.stack([losses[name] * w for name, w in self.weight_dict.items() if name in losses]).sum()

    def _losses(
        self, logits: Tensor, boxes: Tensor, targets: PackedTargets, matches: Matches, sizes: Sequence[int]
    ) -> Tensor:
        """Sums of the three losses (3, layers)."""
        pairs = (matches.image, matches.query)
        predicted, wanted = boxes[pairs], targets.boxes[matches.target]  # (K, 4)
        iou, giou = iou_and_giou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted))
        positives = Positives(
            logits[(*pairs, targets.labels[matches.target])],
            iou.detach(),
            matches.layer * logits.shape[0] + matches.image,
            len(sizes) * logits.shape[0],
        )
        background, correction = self.classification(logits, positives)

        per_pair = torch.stack([correction, (predicted - wanted).abs().sum(-1), 1.0 - giou])  # (3, K)
        sums = per_pair.new_zeros(3, len(sizes)).index_add(1, matches.layer, per_pair)
        per_layer = torch.stack([part.sum() for part in torch.split(background.sum((0, 2)), list(sizes))])
        return sums + F.pad(per_layer[None], (0, 0, 0, 2))

    def _num_boxes(self, targets: PackedTargets, shares: int, device: torch.device) -> Tensor:
        count = torch.tensor(float(sum(targets.counts) * shares), device=device)
        # In evaluation the ranks have unequal numbers of batches: they must not wait for each other here.
        ranks = 1
        if self.training and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(count)
            ranks = torch.distributed.get_world_size()
        # Of all ranks together at least 1: then a step without any target is that of one process as well.
        return count.clamp(min=1.0) / ranks


def _classification_loss(config: ModelConfig) -> Callable[[Tensor, Positives], tuple[Tensor, Tensor]]:
    """The loss that `config` chooses.

    Each takes all logits (B, S, C) and the positives among them, and returns every entry's loss as if it were
    negative, shaped as `logits`, and what to add for each positive (K,) (spec 6.3).
    """
    if config.ia_bce_loss:
        return ia_bce
    if config.use_position_supervised_loss:
        return position_supervised
    return varifocal if config.use_varifocal_loss else focal


def ia_bce(logits: Tensor, positives: Positives) -> tuple[Tensor, Tensor]:
    """IoU-aware binary cross-entropy: a positive's target is max(0.01, p^0.25 * iou^0.75)."""
    z = positives.logits
    p = z.sigmoid()
    target = (p.detach() ** _ALPHA * positives.iou ** (1.0 - _ALPHA)).clamp(min=_MIN_TARGET)
    as_positive = (1.0 - target) * z + F.softplus(-z)
    return logits.sigmoid().square() * F.softplus(logits), as_positive - p.square() * F.softplus(z)


def focal(logits: Tensor, positives: Positives) -> tuple[Tensor, Tensor]:
    """Focal loss (Lin et al. 2017) with alpha 0.25 and gamma 2."""
    z = positives.logits
    as_positive = _ALPHA * (1.0 - z.sigmoid()).square() * F.softplus(-z)
    return _as_negative(logits), as_positive - _as_negative(z)


def varifocal(logits: Tensor, positives: Positives) -> tuple[Tensor, Tensor]:
    """Varifocal loss (Zhang et al. 2021): the IoU is a positive's target and weight; without overlap, a negative."""
    z, iou = positives.logits, positives.iou
    as_negative = _as_negative(z)
    as_positive = torch.where(iou > 0, iou * _cross_entropy(z, iou), as_negative)
    return _as_negative(logits), as_positive - as_negative


def position_supervised(logits: Tensor, positives: Positives) -> tuple[Tensor, Tensor]:
    """Position-supervised loss (Liu et al. 2023): a positive's target is its IoU over the best one of its image."""
    z, iou = positives.logits, positives.iou
    best = iou.new_zeros(positives.images).scatter_reduce(0, positives.image, iou, "amax")
    target = iou / (best[positives.image] + 1e-8)
    balance = torch.where(target > 0, _ALPHA, 1.0 - _ALPHA)
    as_positive = balance * (target - z.sigmoid()).square() * _cross_entropy(z, target)
    return _as_negative(logits), as_positive - _as_negative(z)


def _as_negative(logits: Tensor) -> Tensor:
    """Focal loss of entries that are no positives, which three of the losses share."""
    return (1.0 - _ALPHA) * logits.sigmoid().square() * F.softplus(logits)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.softplus(logits) - target * logits


def _class_error(logits: Tensor, targets: PackedTargets, matches: Matches) -> Tensor:
    """Percent of the last layer's matched queries whose best class is not their target's."""
    if matches.first_layer == 0:
        return logits.new_tensor(100.0)
    last = slice(0, matches.first_layer)
    best = logits[matches.image[last], matches.query[last]].argmax(-1)
    return (best != targets.labels[matches.target[last]]).to(logits.dtype).mean() * 100.0


def _cardinality_error(logits: Tensor, targets: PackedTargets, sizes: Sequence[int]) -> Tensor:
    """Mean over images of |queries with a probability above 0.5 - targets|, per layer."""
    confident = (logits.amax(-1).sigmoid() > 0.5).to(logits.dtype)
    counts = logits.new_tensor(targets.counts)
    return torch.stack([(part.sum(1) - counts).abs().mean() for part in torch.split(confident, list(sizes), dim=1)])


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
