"""Whether one model is better than another on the same images, and whether that is more than luck."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rfdetr_core.data.annotations import AnnotationTable, ClassMap
from rfdetr_core.evaluation.analysis import restrict
from rfdetr_core.evaluation.detections import Detections
from rfdetr_core.evaluation.f1 import F1Counts, f1_counts
from rfdetr_core.evaluation.metrics import CocoMetrics, evaluator

CONFIDENCE = 0.95
METRICS = {"map": "AP", "map50": "AP50", "map75": "AP75", "mar": "AR100"}
"""Our names and hotcoco's, whose AR100 is the recall at the last limit, whatever it is."""


def compare(
    table: AnnotationTable,
    class_map: ClassMap,
    candidate: tuple[CocoMetrics, Detections],
    champion: tuple[CocoMetrics, Detections],
    *,
    samples: int,
    seed: int,
) -> dict[str, Any]:
    """The differences candidate - champion overall and per class, with a paired bootstrap over the images.

    Images are drawn with replacement, both models are scored on the same draw, `samples` times (Efron and Tibshirani
    1993, chapter 13: percentile interval). Both were evaluated at the same limit of detections.
    """
    (ours, found), (theirs, found_by_champion) = candidate, champion
    luck: dict[str, dict[str, float | None]] = {}
    if samples:
        luck = _luck_of_coco_metrics(table, class_map, found, found_by_champion, ours.max_dets, samples, seed)
        luck["f1"] = _luck_of_f1(table, len(class_map), found, found_by_champion, ours.max_dets, samples, seed)
    unknown = dict.fromkeys(("low", "high", "standard_error", "p_value"))
    return {
        "method": "paired bootstrap over images",
        "samples": samples,
        "seed": seed,
        "confidence": CONFIDENCE,
        "metrics": {
            name: {**_difference(getattr(ours, name), getattr(theirs, name)), **luck.get(name, unknown)}
            for name in (*METRICS, "f1")
        },
        "per_class": {
            name: _difference(row["ap"], theirs.per_class[name]["ap"]) if row["boxes"] else None
            for name, row in ours.per_class.items()
        },
    }


def _difference(candidate: float, champion: float) -> dict[str, float | None]:
    return {"candidate": candidate, "champion": champion, "difference": candidate - champion}


def _luck_of_coco_metrics(
    table: AnnotationTable,
    class_map: ClassMap,
    candidate: Detections,
    champion: Detections,
    max_dets: int,
    samples: int,
    seed: int,
) -> dict[str, dict[str, float | None]]:
    from hotcoco import compare as compare_evaluations

    evaluations: list[Any] = []
    for detections in (champion, candidate):
        evaluation = evaluator(table, class_map, detections)
        restrict(evaluation, max_dets)
        evaluation.evaluate()
        evaluations.append(evaluation)
    first, second = evaluations
    intervals = compare_evaluations(first, second, n_bootstrap=samples, seed=seed, confidence=CONFIDENCE)["ci"]
    return {
        name: {
            "low": float(intervals[key]["lower"]),
            "high": float(intervals[key]["upper"]),
            "standard_error": float(intervals[key]["std_err"]),
            "p_value": _p_value(round((1 - intervals[key]["prob_positive"]) * samples), samples),
        }
        for name, key in METRICS.items()
    }


def _luck_of_f1(
    table: AnnotationTable,
    classes: int,
    candidate: Detections,
    champion: Detections,
    max_dets: int,
    samples: int,
    seed: int,
) -> dict[str, float | None]:
    """F1 is that of each model's own best threshold in each draw, as it is without draws."""
    both: list[F1Counts] = [f1_counts(table, classes, found, max_dets=max_dets) for found in (candidate, champion)]
    random = np.random.default_rng(seed)
    differences: NDArray[np.float64] = np.empty(samples)
    for i in range(samples):
        times = np.bincount(random.integers(0, len(table), len(table)), minlength=len(table)).astype(np.float64)
        ours, theirs = (counts.sweep(times).best()["f1"] for counts in both)
        differences[i] = ours - theirs
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(differences, [tail, 1 - tail])
    return {
        "low": float(low),
        "high": float(high),
        "standard_error": float(differences.std(ddof=1)) if samples > 1 else 0.0,
        "p_value": _p_value(int((differences <= 0).sum()), samples),
    }


def _p_value(not_better: int, samples: int) -> float:
    """One-sided, of "the candidate is not better"; never 0, which no number of draws can show."""
    return (not_better + 1) / (samples + 1)
