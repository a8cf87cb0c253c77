"""COCO detection metrics: counted by hotcoco, held equal to pycocotools by the tests (DESIGN section 7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rfdetr_core.data.annotations import AnnotationTable, ClassMap
from rfdetr_core.errors import CheckpointError
from rfdetr_core.evaluation.detections import Detections
from rfdetr_core.evaluation.f1 import F1Sweep, f1_sweep

__all__ = ["COCO_MAX_DETS", "RECALLS", "CocoMetrics", "Detections", "coco_metrics"]

COCO_MAX_DETS = (1, 10, 100)


@dataclass(frozen=True)
class CocoMetrics:
    """What one evaluation yields; -1 where COCO defines no value (nothing of that kind in the ground truth)."""

    coco: dict[str, float]  # the twelve numbers of COCO, at [1, 10, 100] detections
    max_dets: int
    map: float  # AP 50:95 at max_dets
    map50: float  # AP 50 at max_dets
    map75: float  # AP 75 at max_dets
    mar: float  # AR 50:95 at max_dets
    f1: float  # best mean F1 of the classes at IoU 0.5, over 101 score thresholds; at max_dets
    f1_threshold: float  # the score threshold that gives it ...
    precision: float  # ... and the mean precision
    recall: float  # ... and recall there
    per_class: dict[str, dict[str, float]]  # name -> boxes, ap, ap50, ap75, ar, and its own best f1 as above
    precision50: NDArray[np.float64]  # (101, classes) precision at IoU 0.5 over RECALLS; -1 without ground truth
    scores50: NDArray[np.float64]  # (101, classes) the score at which that recall is reached
    sweep: F1Sweep

    def to_json(self) -> dict[str, Any]:
        """All scalars, without the curves."""
        return {
            "map": self.map,
            "map50": self.map50,
            "map75": self.map75,
            "mar": self.mar,
            "f1": self.f1,
            "f1_threshold": self.f1_threshold,
            "precision": self.precision,
            "recall": self.recall,
            "max_dets": self.max_dets,
            "coco": self.coco,
            "per_class": self.per_class,
        }


RECALLS: NDArray[np.float64] = np.linspace(0.0, 1.0, 101)


def coco_metrics(table: AnnotationTable, class_map: ClassMap, detections: Detections, *, max_dets: int) -> CocoMetrics:
    """Evaluate the detections of one split.

    The twelve COCO numbers use [1, 10, 100] detections per image and class; `map`, `map50`, `map75`, `mar`, the
    F1 and the per-class values use exactly `max_dets` >= 1. Crowd regions absorb detections as in pycocotools.

    Raises:
        CheckpointError: a score or a box is not finite, and has no place in an order.
    """
    if not (np.isfinite(detections.scores).all() and np.isfinite(detections.boxes).all()):
        raise CheckpointError(
            "the model's scores or boxes are not finite on some image",
            hint="without train.fp16_eval, if that is on; else these weights are of no use: train again",
        )
    evaluation = evaluator(table, class_map, detections)
    evaluation.params.maxDets = sorted({*COCO_MAX_DETS, max_dets})
    evaluation.evaluate()
    evaluation.accumulate()
    limits = list(evaluation.params.maxDets)
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    at = limits.index(max_dets)
    boxes = np.bincount(table.labels[~table.crowd], minlength=len(class_map))
    sweep = f1_sweep(table, len(class_map), detections, max_dets=max_dets)
    per_class = {
        name: {
            "ap": _mean(precision[:, :, label, 0, at]),
            "ap50": _mean(precision[0, :, label, 0, at]),
            "ap75": _mean(precision[5, :, label, 0, at]),
            "ar": _mean(recall[:, label, 0, at]),
            **sweep.best_of(label),
            "boxes": int(boxes[label]),
        }
        for label, name in enumerate(class_map.names)
    }
    return CocoMetrics(
        coco=twelve_numbers(precision, recall, limits),
        max_dets=max_dets,
        map=_mean(precision[..., 0, at]),
        map50=_mean(precision[0, ..., 0, at]),
        map75=_mean(precision[5, ..., 0, at]),
        mar=_mean(recall[..., 0, at]),
        **sweep.best(),
        per_class=per_class,
        precision50=np.asarray(precision[0, :, :, 0, at]),
        scores50=np.asarray(evaluation.eval["scores"][0, :, :, 0, at]),
        sweep=sweep,
    )


def evaluator(table: AnnotationTable, class_map: ClassMap, detections: Detections) -> Any:
    """hotcoco's COCOeval of a split, not evaluated yet; ids are those of `AnnotationTable.to_coco`."""
    from hotcoco import COCO, COCOeval  # a compiled module: loaded by whoever evaluates

    images = [
        {"id": i + 1, "file_name": str(name), "width": int(w), "height": int(h)}
        for i, (name, w, h) in enumerate(zip(table.file_names, table.widths, table.heights, strict=True))
    ]
    categories = [{"id": class_map.category_id(i), "name": name} for i, name in enumerate(class_map.names)]
    truth = COCO.from_arrays(
        images,
        categories,
        np.repeat(np.arange(1, len(table) + 1), table.counts),
        table.labels + 1,
        _to_xywh(table.boxes),
        area=table.areas,
        iscrowd=table.crowd,
    )
    results = np.column_stack(
        [detections.images + 1, _to_xywh(detections.boxes), detections.scores, detections.labels + 1]
    )
    return COCOeval(truth, truth.load_res(results.astype(np.float64)), "bbox")


def _to_xywh(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def twelve_numbers(precision: Any, recall: Any, limits: list[int]) -> dict[str, float]:
    """Of precision (10 IoU, 101 recall, classes, 4 areas, limits) and recall (10 IoU, classes, 4 areas, limits)."""
    one, ten, hundred = (limits.index(limit) for limit in COCO_MAX_DETS)
    return {
        "AP": _mean(precision[..., 0, hundred]),
        "AP50": _mean(precision[0, ..., 0, hundred]),
        "AP75": _mean(precision[5, ..., 0, hundred]),
        "AP_small": _mean(precision[..., 1, hundred]),
        "AP_medium": _mean(precision[..., 2, hundred]),
        "AP_large": _mean(precision[..., 3, hundred]),
        "AR_1": _mean(recall[..., 0, one]),
        "AR_10": _mean(recall[..., 0, ten]),
        "AR_100": _mean(recall[..., 0, hundred]),
        "AR_small": _mean(recall[..., 1, hundred]),
        "AR_medium": _mean(recall[..., 2, hundred]),
        "AR_large": _mean(recall[..., 3, hundred]),
    }


def _mean(values: Any) -> float:
    """Mean over the defined entries; -1 where none is."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else -1.0
