"""The F1 sweep: precision, recall and F1 at IoU 0.5 over 101 score thresholds (training spec 6.4)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rfdetr_core.data.annotations import AnnotationTable
from rfdetr_core.evaluation.detections import Detections
from rfdetr_core.evaluation.matching import Integers, match, ranked, ratio

IOU = 0.5
THRESHOLDS: NDArray[np.float64] = np.arange(101) / 100  # linspace has 0.5700000000000001


@dataclass(frozen=True)
class F1Sweep:
    """C classes at 101 thresholds; a detection counts where its score is at least the threshold. 0/0 is 0."""

    defined: NDArray[np.bool_]  # (C,) whether the class has ground truth
    precision: NDArray[np.float64]  # (C, 101)
    recall: NDArray[np.float64]  # (C, 101)
    f1: NDArray[np.float64]  # (C, 101)

    def best(self) -> dict[str, float]:
        """The lowest threshold with the highest mean F1 of the defined classes; all -1 where there is none."""
        if not self.defined.any():
            return dict.fromkeys(("f1", "f1_threshold", "precision", "recall"), -1.0)
        means = {name: getattr(self, name)[self.defined].mean(axis=0) for name in ("f1", "precision", "recall")}
        at = int(np.argmax(means["f1"]))
        return {"f1_threshold": float(THRESHOLDS[at]), **{name: float(mean[at]) for name, mean in means.items()}}

    def best_of(self, label: int) -> dict[str, float]:
        """The highest F1 of one class, its lowest threshold, precision and recall there; -1 without ground truth."""
        if not self.defined[label]:
            return dict.fromkeys(("f1", "f1_threshold", "precision", "recall"), -1.0)
        at = int(np.argmax(self.f1[label]))
        values = {name: float(getattr(self, name)[label, at]) for name in ("f1", "precision", "recall")}
        return {"f1_threshold": float(THRESHOLDS[at]), **values}


@dataclass(frozen=True)
class F1Counts:
    """K detections that were matched, and N annotated boxes: what F1 is counted from, over any sample of the images.

    Lower thresholds add detections behind the others, so that one matching serves all thresholds.
    """

    classes: int
    images: Integers  # (K,)
    cells: Integers  # (K,) label * 101 + the highest threshold that its score reaches
    true: NDArray[np.bool_]  # (K,) found a box
    false: NDArray[np.bool_]  # (K,) found none, nor lies in a crowd region
    box_images: Integers  # (N,) without crowd regions
    box_labels: Integers  # (N,)

    def sweep(self, weights: NDArray[np.float64] | None = None) -> F1Sweep:
        """Precision, recall and F1 at every threshold; with `weights` (I,), image i counts so many times."""

        def at_least(counted: NDArray[np.bool_]) -> NDArray[np.float64]:
            times = None if weights is None else weights[self.images[counted]]
            cells = np.bincount(self.cells[counted], weights=times, minlength=self.classes * len(THRESHOLDS))
            return np.cumsum(cells.reshape(self.classes, -1)[:, ::-1], axis=1)[:, ::-1].astype(np.float64)

        times = None if weights is None else weights[self.box_images]
        boxes = np.bincount(self.box_labels, weights=times, minlength=self.classes)
        true, false = at_least(self.true), at_least(self.false)
        wanted = np.broadcast_to(boxes[:, None], true.shape)
        return F1Sweep(
            defined=boxes > 0,
            precision=ratio(true, true + false),
            recall=ratio(true, wanted),
            f1=ratio(2 * true, true + false + wanted),
        )


def f1_sweep(table: AnnotationTable, classes: int, detections: Detections, *, max_dets: int) -> F1Sweep:
    """Match greedily, then count at every threshold.

    Matching is that of the COCO metrics at IoU 0.5: per image and class the `max_dets` best detections in the
    order of their scores (ties in the order given) each take the free box of largest overlap; one that finds
    none but lies in a crowd region counts neither way.
    """
    return f1_counts(table, classes, detections, max_dets=max_dets).sweep()


def f1_counts(table: AnnotationTable, classes: int, detections: Detections, *, max_dets: int) -> F1Counts:
    """The matching of `f1_sweep`, to be counted."""
    order = ranked(detections, classes, max_dets)
    [matches] = match(table, classes, detections, order)
    labels, scores = detections.labels[order], detections.scores[order]
    step = np.searchsorted(THRESHOLDS, scores, side="right") - 1
    return F1Counts(
        classes=classes,
        images=detections.images[order],
        cells=labels * len(THRESHOLDS) + step,
        true=matches.hit,
        false=~matches.hit & ~matches.ignored,
        box_images=np.repeat(np.arange(len(table)), table.counts)[~table.crowd],
        box_labels=table.labels[~table.crowd],
    )
