"""Runs a detector over a split and collects detections."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from rfdetr_core.data.annotations import AnnotationTable
from rfdetr_core.data.loading import Batch
from rfdetr_core.evaluation.detections import Detections
from rfdetr_core.models.linear import constant_weights
from rfdetr_core.models.postprocess import postprocess

Outputs = dict[str, Tensor]


@torch.inference_mode()
def predict_split(
    model: nn.Module,
    batches: Iterable[Batch],
    table: AnnotationTable,
    *,
    num_select: int,
    num_classes: int,
    device: torch.device,
    autocast: torch.dtype | None = None,
) -> Detections:
    """Detections of every image of a split, in the table's order.

    The model is used in the mode it is in. Top-k runs over all columns of the head; detections of the spare
    last column are dropped afterwards (DESIGN section 5).

    Args:
        autocast: run the forward pass in this precision; boxes and scores are float32 all the same.
    """
    parts = []
    with constant_weights(model):
        for batch in batches:
            pixels, _ = batch.on(device)
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                outputs = model(pixels)
            parts.append(detections_of(outputs, batch.images, table, num_select=num_select, num_classes=num_classes))
    return Detections.concatenate(parts)


def detections_of(
    outputs: Outputs, positions: Sequence[int], table: AnnotationTable, *, num_select: int, num_classes: int
) -> Detections:
    """What a forward pass over the images at `positions` of the table found, in pixels of these images."""
    images = np.array(positions, dtype=np.int64)
    logits, boxes = outputs["pred_logits"].float(), outputs["pred_boxes"].float()
    sizes = torch.from_numpy(np.stack([table.heights[images], table.widths[images]], axis=1)).to(logits.device)
    results = postprocess(logits, boxes, sizes, num_select)
    labels = np.concatenate([r["labels"].cpu().numpy() for r in results])
    kept = labels < num_classes
    return Detections(
        images=np.repeat(images, [len(r["labels"]) for r in results])[kept],
        labels=labels[kept],
        scores=np.concatenate([r["scores"].cpu().numpy() for r in results]).astype(np.float64)[kept],
        boxes=np.concatenate([r["boxes"].cpu().numpy() for r in results]).astype(np.float64)[kept],
    )
