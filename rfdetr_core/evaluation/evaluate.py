"""Evaluates trained weights on a split of a prepared dataset, with the classes matched by name."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from rfdetr_core.data.annotations import ClassMap
from rfdetr_core.data.loading import LoaderSettings, eval_loader, worker_errors
from rfdetr_core.data.prepared import PreparedSplit
from rfdetr_core.evaluation.detections import Detections
from rfdetr_core.evaluation.inference import predict_split
from rfdetr_core.evaluation.metrics import CocoMetrics, coco_metrics
from rfdetr_core.models.weights import TrainedModel


def evaluate_model(
    trained: TrainedModel,
    split: PreparedSplit,
    class_map: ClassMap,
    *,
    batch_size: int,
    max_dets: int,
    device: torch.device,
    loading: LoaderSettings,
    fp16: bool = False,
) -> tuple[CocoMetrics, Detections]:
    """COCO metrics and detections of a model on a split; with `fp16` under float16 autocast, but on a CPU.

    The model may know other classes, or the same in another order: detections are carried over by class name,
    and those of a class that the split does not have are dropped.
    """
    module = trained.module.to(device)
    batches = eval_loader(
        split,
        loading,
        device,
        resolution=trained.config.resolution,
        batch_size=batch_size,
        channels=trained.config.num_channels,
    )
    with worker_errors():
        detections = predict_split(
            module,
            batches,
            split.table,
            num_select=trained.config.num_select,
            num_classes=len(trained.class_names),
            device=device,
            autocast=half_precision(device) if fp16 else None,
        )
    detections = by_name(detections, trained.class_names, class_map)
    return coco_metrics(split.table, class_map, detections, max_dets=max_dets), detections


def half_precision(device: torch.device) -> torch.dtype | None:
    """What autocast takes where float16 is asked for; None on a CPU, which has no use for it."""
    return None if device.type == "cpu" else torch.float16


def by_name(detections: Detections, names: tuple[str, ...], class_map: ClassMap) -> Detections:
    """Detections labelled by position in `names`, relabelled for `class_map`."""
    if names == class_map.names:
        return detections
    labels = {name: label for label, name in enumerate(class_map.names)}
    translation = np.array([labels.get(name, -1) for name in names], dtype=np.int64)
    translated = translation[detections.labels]
    return replace(detections, labels=translated).select(translated >= 0)


def split_digest(folder: Path) -> str:
    """sha256 over a prepared split's annotations and index: two evaluations with the same one are comparable."""
    digest = hashlib.sha256()
    for name in ("annotations.coco.json", "index.json"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()
