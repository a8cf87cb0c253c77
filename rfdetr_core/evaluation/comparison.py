"""Whether one model is better than another on the same images, and whether that is more than luck."""

from __future__ import annotations

from typing import Any

import numpy as np

from rfdetr_core.data.annotations import AnnotationTable
from rfdetr_core.evaluation.bootstrap import Sampler
from rfdetr_core.evaluation.detections import Detections
from rfdetr_core.evaluation.metrics import CocoMetrics

CONFIDENCE = 0.95
METRICS = ("map", "map50", "map75", "mar", "f1")

Found = tuple[CocoMetrics, Detections]


def compare(table: AnnotationTable, candidate: Found, champion: Found, *, samples: int, seed: int) -> dict[str, Any]:
    """The differences candidate - champion overall and per class, with a paired bootstrap over the images.

    Images are drawn with replacement, both models are scored on the same draw, `samples` times (Efron and Tibshirani
    1993, chapter 13: percentile interval). Both were evaluated at the same limit of detections.
    """
    (ours, _), (theirs, _) = candidate, champion
    luck = _luck(table, candidate, champion, samples, seed) if samples else {}
    unknown = dict.fromkeys(("low", "high", "standard_error", "p_value"))
    return {
        "method": "paired bootstrap over images",
        "samples": samples,
        "seed": seed,
        "confidence": CONFIDENCE,
        "metrics": {
            name: {**_difference(getattr(ours, name), getattr(theirs, name)), **luck.get(name, unknown)}
            for name in METRICS
        },
        "per_class": {
            name: _difference(row["ap"], theirs.per_class[name]["ap"]) if row["boxes"] else None
            for name, row in ours.per_class.items()
        },
    }


def _difference(candidate: float, champion: float) -> dict[str, float]:
    return {"candidate": candidate, "champion": champion, "difference": candidate - champion}


def _luck(
    table: AnnotationTable, candidate: Found, champion: Found, samples: int, seed: int
) -> dict[str, dict[str, float]]:
    """Interval, standard error and p-value of each metric's difference."""
    ours, theirs = (
        Sampler(table, len(metrics.per_class), detections, max_dets=metrics.max_dets)
        for metrics, detections in (candidate, champion)
    )
    random, images = np.random.default_rng(seed), len(table)
    differences = np.empty((samples, len(METRICS)))
    for draw in differences:
        times = np.bincount(random.integers(0, images, images), minlength=images)
        a, b = ours.scores(times), theirs.scores(times)
        draw[:] = [a[name] - b[name] for name in METRICS]
    tail = (1 - CONFIDENCE) / 2
    lows, highs = np.quantile(differences, [tail, 1 - tail], axis=0)
    return {
        name: {
            "low": float(lows[i]),
            "high": float(highs[i]),
            "standard_error": float(differences[:, i].std(ddof=min(1, samples - 1))),
            # One-sided, of "the candidate is not better"; never 0, which no number of draws can show.
            "p_value": (int((differences[:, i] <= 0).sum()) + 1) / (samples + 1),
        }
        for i, name in enumerate(METRICS)
    }
