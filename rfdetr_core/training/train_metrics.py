"""mAP on the training images: from the outputs that the training steps make anyway (`train.compute_train_metrics`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rfdetr_core.data.annotations import AnnotationTable, ClassMap
from rfdetr_core.data.loading import Batch
from rfdetr_core.evaluation.detections import Detections
from rfdetr_core.evaluation.metrics import CocoMetrics, coco_metrics
from rfdetr_core.models.boxes import cxcywh_to_xyxy
from rfdetr_core.models.postprocess import postprocess


class _Part(NamedTuple):
    """One batch of B images with N boxes and K detections each, in pixels of their views."""

    sizes: NDArray[np.int64]  # (B, 2) height, width
    counts: NDArray[np.int64]  # (B,)
    boxes: NDArray[np.float32]  # (N, 4) x1, y1, x2, y2
    labels: NDArray[np.int64]  # (N,)
    found_boxes: NDArray[np.float32]  # (B, K, 4) x1, y1, x2, y2
    found_labels: NDArray[np.int32]  # (B, K)
    scores: NDArray[np.float32]  # (B, K)


class TrainMetrics:
    """Collects one epoch; the augmented view that the network saw is the image, and its boxes are the truth.

    As the network trains meanwhile, and with dropped paths, this is the mean of an epoch rather than the quality of
    the weights at its end. An image that an epoch takes twice counts twice. What is collected lives in this object
    alone: an epoch resumed in its middle counts what came after, and of several ranks each counts its own images.

    Memory on the host at 300 detections per image (measured): 7.4 kB per image are kept, and `result` takes 140 kB per
    image while it runs, as any evaluation does. An epoch is in random order, so that its first `max_images` views stand
    for all of them: with 5,000 that is 37 MB, and 0.7 GB for some 3 s. Each `add` waits for the device.

    Args:
        num_queries: queries of a group; the first group is the one that evaluation uses, the others are left out.
        num_select: detections kept per image, of all columns of the head.
        max_images: views that are kept; those after them are not looked at.

    Source: training spec section 1.2, `compute_train_metrics`.
    """

    def __init__(self, *, num_queries: int, num_select: int, max_images: int = 5_000) -> None:
        self._num_queries, self._num_select, self._max_images = num_queries, num_select, max_images
        self._parts: list[_Part] = []
        self.images = 0
        """Views kept so far."""

    @torch.no_grad()
    def add(self, batch: Batch, outputs: Mapping[str, Tensor]) -> None:
        """Keep what was found in a micro-batch of B images.

        Args:
            outputs: the detector's in training mode: `pred_logits` (B, G * num_queries, C), `pred_boxes`
                (B, G * num_queries, 4) cx, cy, w, h in [0, 1]; group by group.
        """
        if self.images >= self._max_images:
            return
        logits, boxes = (outputs[name][:, : self._num_queries].float() for name in ("pred_logits", "pred_boxes"))
        sizes = torch.tensor(batch.sizes or [tuple(batch.pixels.shape[-2:])] * len(batch.counts))  # (B, 2)
        found = postprocess(logits, boxes, sizes.to(logits.device), self._num_select)
        stacked = {name: torch.stack([image[name] for image in found]) for name in ("boxes", "labels", "scores")}
        counts = torch.tensor(batch.counts)
        extents = sizes.flip(1).repeat(1, 2).repeat_interleave(counts, dim=0)  # (N, 4) width, height, width, height
        self._parts.append(
            _Part(
                sizes=sizes.numpy(),
                counts=counts.numpy(),
                boxes=(cxcywh_to_xyxy(batch.boxes) * extents).numpy(),
                labels=batch.labels.numpy().copy(),
                found_boxes=stacked["boxes"].cpu().numpy(),
                found_labels=stacked["labels"].int().cpu().numpy(),
                scores=stacked["scores"].cpu().numpy(),
            )
        )
        self.images += len(batch.counts)

    def result(self, class_map: ClassMap, max_dets: int) -> CocoMetrics:
        """COCO metrics of all that was added; every number is -1 if that was nothing.

        Args:
            class_map: classes of the dataset; detections of further columns of the head are dropped.
            max_dets: detections per image and class, as in `coco_metrics`.
        """
        table = self._table()
        parts, first = [], 0
        for part in self._parts:
            kept = part.found_labels < len(class_map)  # (B, K)
            parts.append(
                Detections(
                    images=first + np.nonzero(kept)[0],
                    labels=part.found_labels[kept].astype(np.int64),
                    scores=part.scores[kept].astype(np.float64),
                    boxes=part.found_boxes[kept].astype(np.float64),
                )
            )
            first += len(kept)
        return coco_metrics(table, class_map, Detections.concatenate(parts), max_dets=max_dets)

    def _table(self) -> AnnotationTable:
        """The views as a split."""
        sizes = np.concatenate([np.empty((0, 2), dtype=np.int64), *(part.sizes for part in self._parts)])
        counts = np.concatenate([np.empty(0, dtype=np.int64), *(part.counts for part in self._parts)])
        boxes = np.concatenate([np.empty((0, 4)), *(part.boxes for part in self._parts)])
        return AnnotationTable(
            file_names=np.arange(len(sizes)).astype(np.str_),
            widths=sizes[:, 1],
            heights=sizes[:, 0],
            offsets=np.concatenate([[0], np.cumsum(counts)]),
            boxes=boxes,
            labels=np.concatenate([np.empty(0, dtype=np.int64), *(part.labels for part in self._parts)]),
            areas=np.prod(boxes[:, 2:] - boxes[:, :2], axis=1),
            crowd=np.zeros(len(boxes), dtype=np.bool_),
        )
