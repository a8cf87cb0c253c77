"""Metrics of any sample of a split's images, images drawn more than once among them, from one matching.

A library would evaluate each draw anew, and hotcoco's own bootstrap counts an image that was drawn twice once, which
makes its intervals a quarter too narrow. Here an image has a weight: how often it was drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rfdetr_core.data.annotations import AnnotationTable
from rfdetr_core.evaluation.detections import Detections
from rfdetr_core.evaluation.f1 import F1Counts, f1_counts
from rfdetr_core.evaluation.matching import IOUS, Integers, match, ranked, ratio
from rfdetr_core.evaluation.metrics import RECALLS

FIFTY, SEVENTY_FIVE = 0, 5  # positions in IOUS


@dataclass(frozen=True)
class Hits:
    """The detections that found a box at one IoU, by class and score, and those to be ignored there."""

    rows: Integers  # (H,) positions among the sorted detections
    ignored: Integers  # (G,) likewise
    ignored_before: Integers  # (H,) how many of `ignored` come before each hit


class Sampler:
    """Scores of one model on samples of a split; `scores` of every image once are those of `coco_metrics`."""

    def __init__(self, table: AnnotationTable, classes: int, detections: Detections, *, max_dets: int) -> None:
        order = ranked(detections, classes, max_dets)
        matches = match(table, classes, detections, order, IOUS)
        labels = detections.labels[order]
        # As pycocotools sorts: by score, equal ones by image and then by their order in it.
        by_score = np.lexsort((np.arange(len(order)), -detections.scores[order], labels))
        self._classes = classes
        self._images = detections.images[order][by_score]  # (K,)
        self._labels = labels[by_score]
        self._starts = np.searchsorted(self._labels, np.arange(classes))  # (C,) where each class begins
        self._hits = [_hits(m.hit[by_score], m.ignored[by_score]) for m in matches]
        self._box_images = np.repeat(np.arange(len(table)), table.counts)[~table.crowd]
        self._box_labels = table.labels[~table.crowd]
        self._f1: F1Counts = f1_counts(table, classes, detections, max_dets=max_dets)

    def scores(self, times: Integers) -> dict[str, float]:
        """map, map50, map75, mar and f1 where image i is there `times[i]` times; -1 where no box is."""
        boxes = np.bincount(self._box_labels, weights=times[self._box_images], minlength=self._classes)
        boxes = boxes.astype(np.int64)
        defined = boxes > 0
        if not defined.any():
            return dict.fromkeys(("map", "map50", "map75", "mar", "f1"), -1.0)
        until = np.concatenate([[0], np.cumsum(times[self._images])])  # (K + 1,) detections before each position
        needed = _needed(boxes)
        found = [self._at(hits, times, until, boxes, needed) for hits in self._hits]
        precision = np.array([p[defined].mean() for p, _ in found])  # (10,)
        recall = np.array([r[defined].mean() for _, r in found])
        return {
            "map": float(precision.mean()),
            "map50": float(precision[FIFTY]),
            "map75": float(precision[SEVENTY_FIVE]),
            "mar": float(recall.mean()),
            "f1": self._f1.sweep(times.astype(np.float64)).best()["f1"],
        }

    def _at(
        self, hits: Hits, times: Integers, until: Integers, boxes: Integers, needed: Integers
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Precision at every recall (C, 101), and recall (C,), at one IoU."""
        classes = np.arange(self._classes)
        labels = self._labels[hits.rows]  # (H,)
        first = np.searchsorted(labels, np.arange(self._classes + 1))  # (C + 1,) where the hits of a class begin
        right = np.concatenate([[0], np.cumsum(times[self._images[hits.rows]])])
        right_in_class = right[1:] - right[first[labels]]
        ignored = np.concatenate([[0], np.cumsum(times[self._images[hits.ignored]])])
        of_class = np.searchsorted(hits.ignored, self._starts)
        all_in_class = until[hits.rows + 1] - until[self._starts[labels]]
        all_in_class -= ignored[hits.ignored_before] - ignored[of_class[labels]]
        precision = ratio(right_in_class, all_in_class)
        # The best precision from here on, within the class: a class stands 2 above the one behind it.
        step = 2.0 * (self._classes - labels)
        envelope = np.maximum.accumulate((precision + step)[::-1])[::-1] - step
        # The first hit that reaches each recall; the counts of all classes in one rising row.
        apart = int(right[-1]) + int(boxes.max()) + 1
        at = np.searchsorted(right_in_class + labels * apart, needed + classes[:, None] * apart)
        reached = at < first[1:, None]
        values = np.where(reached, np.append(envelope, 0.0)[at], 0.0)
        return values, ratio(right[first[1:]] - right[first[:-1]], boxes)


def _hits(hit: NDArray[np.bool_], ignored: NDArray[np.bool_]) -> Hits:
    rows, skipped = np.flatnonzero(hit), np.flatnonzero(ignored)
    return Hits(rows, skipped, np.searchsorted(skipped, rows))


def _needed(boxes: Integers) -> Integers:
    """(C, 101) boxes to be found for each recall: the least n with n / boxes >= recall, in floating point as COCO's."""
    whole = np.maximum(boxes, 1)[:, None]
    needed = np.ceil(RECALLS * whole)
    needed -= (needed > 0) & ((needed - 1) / whole >= RECALLS)
    needed += needed / whole < RECALLS
    return needed.astype(np.int64)
