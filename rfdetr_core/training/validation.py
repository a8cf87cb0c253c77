"""One pass over a split while training: metrics of the raw and the averaged weights, and the loss."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rfdetr_core.config import TrainConfig
from rfdetr_core.data.annotations import AnnotationTable
from rfdetr_core.data.loading import Batch
from rfdetr_core.data.prepared import PreparedSplit
from rfdetr_core.evaluation.detections import Detections
from rfdetr_core.evaluation.inference import detections_of
from rfdetr_core.evaluation.metrics import CocoMetrics, coco_metrics
from rfdetr_core.models.linear import constant_weights
from rfdetr_core.training.checkpoint import Source
from rfdetr_core.training.engine import Engine, memory_errors
from rfdetr_core.training.state import TrainingJob


@dataclass(frozen=True)
class Validation:
    """What was found with the weights of each kind, and the loss terms of one of them."""

    scores: dict[Source, CocoMetrics]
    detections: dict[Source, Detections]
    losses: dict[str, float]  # empty if not asked for; of the raw weights where they are evaluated

    def row(self, split: str, *, per_class: bool) -> dict[str, float]:
        """Columns of metrics.jsonl; names as in training spec section 8."""
        row = {f"{split}/{name}": value for name, value in self.losses.items()}
        for source, metrics in self.scores.items():
            row |= metric_columns(metrics, f"{split}/ema_" if source == "ema" else f"{split}/", per_class=per_class)
        return row


def metric_columns(metrics: CocoMetrics, prefix: str, *, per_class: bool) -> dict[str, float]:
    """The logged numbers of one evaluation; a class without ground truth has none."""
    numbers = {
        "mAP_50_95": metrics.map,
        "mAP_50": metrics.map50,
        "mAP_75": metrics.map75,
        "mAR": metrics.mar,
        "F1": metrics.f1,
        "F1_threshold": metrics.f1_threshold,
        "precision": metrics.precision,
        "recall": metrics.recall,
    }
    row = {prefix + name: value for name, value in numbers.items()}
    if per_class:
        row |= {f"{prefix}AP/{name}": v["ap"] for name, v in metrics.per_class.items() if v["ap"] >= 0}
    return row


def models_to_evaluate(train: TrainConfig, engine: Engine) -> dict[Source, nn.Module]:
    """The EMA's weights if there are any; the raw ones if asked for, or alone."""
    models: dict[Source, nn.Module] = {}
    if engine.ema is None or train.eval_base_model:
        models["regular"] = engine.raw_model
    if engine.ema is not None:
        models["ema"] = engine.ema.module
    return models


def validate(
    job: TrainingJob,
    engine: Engine,
    models: Mapping[Source, nn.Module],
    split: PreparedSplit,
    loader: DataLoader[Any],
    *,
    compute_loss: bool,
    stop_requested: Callable[[], bool],
) -> Validation | None:
    """Evaluate every model on a split, reading each batch once; None if a stop was asked for.

    The loss is the mean over the images of the first model's, each batch's normalised by its own boxes. Several ranks
    go over their shares of the split together; the main one has what all found, the others have no scores.

    Raises:
        DeviceMemoryError: out of memory.
    """
    world = engine.world
    parts: dict[Source, list[Detections]] = {source: [] for source in models}
    sums: dict[str, Tensor] = {}
    for model in models.values():
        world.share_buffers(model)
        model.eval()
    engine.criterion.eval()
    stopped = False
    with constant_weights(*models.values()):
        for batch in loader:
            found, losses = evaluate_batch(
                engine,
                models,
                split.table,
                batch,
                num_select=job.model.num_select,
                num_classes=len(job.dataset.class_map),
                compute_loss=compute_loss,
            )
            for source, of_batch in found.items():
                parts[source].append(of_batch)
            for name, value in losses.items():
                weighted = value * len(batch.counts)
                sums[name] = sums[name] + weighted if name in sums else weighted
            stopped = stop_requested()
            if stopped:
                break
    if world.any(stopped):
        return None
    engine.model.train()
    engine.criterion.train()
    detections = {source: world.gather(Detections.concatenate(pieces)) for source, pieces in parts.items()}
    totals: dict[str, float] = {}
    for text in world.texts(json.dumps({name: float(value) for name, value in sums.items()})):
        for name, total in json.loads(text).items():  # a rank without a batch has none
            totals[name] = totals.get(name, 0.0) + total
    return Validation(
        scores={
            source: coco_metrics(split.table, job.dataset.class_map, of_split, max_dets=job.train.eval_max_dets)
            for source, of_split in detections.items()
            if world.is_main
        },
        detections=detections,
        losses={name: total / len(split) for name, total in totals.items()},
    )


@torch.inference_mode()
def evaluate_batch(
    engine: Engine,
    models: Mapping[Source, nn.Module],
    table: AnnotationTable,
    batch: Batch,
    *,
    num_select: int,
    num_classes: int,
    compute_loss: bool,
) -> tuple[dict[Source, Detections], dict[str, Tensor]]:
    """Detections by every model, and the loss terms of the first.

    Args:
        table: the split, at whose rows `batch.images` stand.
        num_classes: of the dataset; detections of further columns of the head are dropped.

    Raises:
        DeviceMemoryError: out of memory.
    """
    found: dict[Source, Detections] = {}
    losses: dict[str, Tensor] = {}
    device, autocast = engine.device, engine.autocast
    where = f"on {device} in evaluation at batch size {len(batch.counts)}"
    smaller = f"try train.eval_batch_size: {len(batch.counts) // 2}"
    hint = smaller if len(batch.counts) > 1 else "lower model.resolution, or set train.fp16_eval: true on a GPU"
    with memory_errors(where, hint=hint, device=device):
        pixels, targets = batch.on(device)
        for source, model in models.items():
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                first = compute_loss and not losses
                outputs = model(pixels, with_aux=first)
            if first:
                terms = engine.criterion(outputs, targets)
                losses = {"loss": engine.criterion.total(terms), **terms}
            found[source] = detections_of(outputs, batch.images, table, num_select=num_select, num_classes=num_classes)
    return found, losses
