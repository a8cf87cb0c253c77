"""What `evaluate` says of a candidate and a champion on one split: the content of its files (docs/evaluation.md)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rfdetr_core.config import RunConfig
from rfdetr_core.data.annotations import AnnotationTable, ClassMap
from rfdetr_core.data.loading import LoaderSettings
from rfdetr_core.data.prepared import PreparedDataset, PreparedSplit
from rfdetr_core.errors import CheckpointError, DatasetError
from rfdetr_core.evaluation.analysis import Outcome, confusion, error_analysis, outcome
from rfdetr_core.evaluation.comparison import compare
from rfdetr_core.evaluation.detections import Detections
from rfdetr_core.evaluation.evaluate import evaluate_model, half_precision, split_digest
from rfdetr_core.evaluation.latency import measure_latency
from rfdetr_core.evaluation.metrics import CocoMetrics
from rfdetr_core.models.weights import TrainedModel

SCHEMA_VERSION = 2
SMALL, LARGE = 32.0**2, 96.0**2  # square pixels: COCO's borders between small, medium and large
USELESS = 0.5  # score threshold of a model of which no threshold is the best, as it finds nothing
SEED = 0  # of the bootstrap: the same draws every time

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Contender:
    """Weights that take part, as read from `path`; `version` names a champion."""

    trained: TrainedModel
    path: Path
    version: str | None = None


@dataclass(frozen=True)
class Measurement:
    """What the files of the stage are written from."""

    document: dict[str, Any]  # metrics.json
    confusion: dict[str, Any]  # confusion.json
    split: PreparedSplit
    class_map: ClassMap
    metrics: CocoMetrics  # of the candidate
    detections: Detections
    seen: Outcome  # at the score of the best mean F1
    champion_detections: Detections | None


def measure(
    candidate: Contender, champion: Contender | None, dataset: PreparedDataset, config: RunConfig, device: torch.device
) -> Measurement:
    """Evaluate, time and compare both on the split of `config.evaluate.split`, or on valid where that has no box.

    Raises:
        CheckpointError: the candidate does not know a class of the dataset, or a model's outputs are not finite.
        DatasetError: there is nothing to measure on.
    """
    name, note = choose_split(dataset, config.evaluate.split)
    refuse_other_classes(candidate, dataset.class_map)
    split, class_map = dataset.split(name), dataset.class_map
    contenders = [candidate, champion] if champion else [candidate]
    if champion and (missing := [name for name in class_map.names if name not in champion.trained.class_names]):
        log.warning("champion %s does not know %s, and finds none of it", champion.version, _some(missing))
    found = [_evaluate(contender, split, class_map, config, device) for contender in contenders]
    autocast = half_precision(device) if config.train.fp16_eval else None
    latencies = measure_latency([contender.trained for contender in contenders], device, autocast=autocast)
    rows = [
        _row(contender, result, latency, split.table, class_map)
        for contender, result, latency in zip(contenders, found, latencies, strict=True)
    ]
    metrics, detections = found[0]
    threshold = metrics.f1_threshold if metrics.f1 > 0 else USELESS
    seen = outcome(split.table, len(class_map), detections, score=threshold, max_dets=metrics.max_dets)
    comparison = None
    if champion:
        samples = config.evaluate.bootstrap_samples
        log.info("comparing with the champion on %d draws of the images", samples)
        result = compare(split.table, found[0], found[1], samples=samples, seed=SEED)
        comparison = {"champion": champion.version, **result}
    usable = ~split.table.crowd
    document = {
        "schema_version": SCHEMA_VERSION,
        "split": name,
        "requested_split": config.evaluate.split,
        "split_note": note,
        "images": len(split),
        "boxes": int(usable.sum()),
        "boxes_by_size": _sizes(split.table.areas[usable]),
        "test_digest": split_digest(dataset.folder / name),
        "candidate": rows[0],
        "champion": {"version": champion.version, **rows[1]} if champion else None,
        "comparison": comparison,
    }
    return Measurement(
        document=document,
        confusion=confusion(split.table, class_map, seen),
        split=split,
        class_map=class_map,
        metrics=metrics,
        detections=detections,
        seen=seen,
        champion_detections=found[1][1] if champion else None,
    )


def choose_split(dataset: PreparedDataset, wanted: str) -> tuple[str, str | None]:
    """The split to measure on, and a sentence where it is another than the wanted one.

    Raises:
        DatasetError: neither it nor valid has a box.
    """
    boxes = {name: int(split["boxes"]) for name, split in dataset.document["splits"].items()}
    if boxes.get(wanted):
        return wanted, None
    if boxes.get("valid"):
        return "valid", f"measured on valid, because no image of {wanted} has a box"
    raise DatasetError(
        f"no image of {' or '.join(dict.fromkeys([wanted, 'valid']))} has a box: there is nothing to measure on",
        hint="annotate images of these splits, then run again from validate_dataset",
    )


def refuse_other_classes(candidate: Contender, class_map: ClassMap) -> None:
    """Refuse a candidate that was trained for other classes than the dataset's; their order is free.

    Raises:
        CheckpointError: it does not know a class.
    """
    known = candidate.trained.class_names
    missing = [name for name in class_map.names if name not in known]
    if missing:
        others = f"{_some(known)}; the dataset has {_some(missing)} as well"
        raise CheckpointError(
            f"{candidate.path.name}: trained for other classes: {others}",
            hint="train on this dataset: run train again with --force, or give the run a new id",
        )


def _some(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names[:5]) + (f", … {len(names)} in all" if len(names) > 5 else "")


def _evaluate(
    contender: Contender, split: PreparedSplit, class_map: ClassMap, config: RunConfig, device: torch.device
) -> tuple[CocoMetrics, Detections]:
    try:
        metrics, detections = evaluate_model(
            contender.trained,
            split,
            class_map,
            batch_size=config.evaluate.batch_size or 8,
            max_dets=config.train.eval_max_dets,
            device=device,
            loading=LoaderSettings(config.train.num_workers, None, None, None),
            fp16=config.train.fp16_eval,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{contender.path}: {error.message}", hint=error.hint) from error
    who = f"champion {contender.version}" if contender.version else "candidate"
    log.info("%s: mAP %.4f, mAP50 %.4f, F1 %.4f", who, metrics.map, metrics.map50, metrics.f1)
    return metrics, detections


def _row(
    contender: Contender,
    found: tuple[CocoMetrics, Detections],
    latency: dict[str, Any],
    table: AnnotationTable,
    class_map: ClassMap,
) -> dict[str, Any]:
    """A ROW of docs/evaluation.md."""
    trained, (metrics, detections) = contender.trained, found
    known = trained.class_names
    return {
        **metrics.to_json(),
        "errors": error_analysis(table, class_map, detections, max_dets=metrics.max_dets),
        "source": trained.source,
        "epoch": trained.epoch,
        "weights_sha256": trained.sha256,
        "weights_bytes": contender.path.stat().st_size,
        "parameters": sum(parameter.numel() for parameter in trained.module.parameters()),
        "variant": trained.config.variant,
        "resolution": trained.config.resolution,
        "classes": list(known),
        "missing_classes": [name for name in class_map.names if name not in known],
        "dropped_classes": [name for name in known if name not in class_map.names],
        "latency": latency,
    }


def _sizes(areas: Any) -> dict[str, int]:
    """Boxes by annotated area; one of exactly a border counts as the larger, while COCO's numbers count it twice."""
    counts = np.bincount(np.searchsorted([SMALL, LARGE], areas, side="right"), minlength=3)
    return {name: int(n) for name, n in zip(("small", "medium", "large"), counts, strict=True)}
