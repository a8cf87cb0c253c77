"""The F1 sweep: precision, recall and F1 at IoU 0.5 over 101 score thresholds (training spec 6.4)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rfdetr_core.data.annotations import AnnotationTable
from rfdetr_core.evaluation.detections import Detections

IOU = 0.5
THRESHOLDS: NDArray[np.float64] = np.arange(101) / 100  # linspace has 0.5700000000000001
PAIRS_AT_ONCE = 500_000  # box pairs whose overlap is computed in one go: about 100 MB

Integers = NDArray[np.int64]
Boxes = NDArray[np.float64]


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
            precision=_ratio(true, true + false),
            recall=_ratio(true, wanted),
            f1=_ratio(2 * true, true + false + wanted),
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
    matches = match(table, classes, detections, order)
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


class Matches(NamedTuple):
    """What became of K detections and N boxes."""

    hit: NDArray[np.bool_]  # (K,) found a box
    ignored: NDArray[np.bool_]  # (K,) found none, but lies in a crowd region
    found: NDArray[np.bool_]  # (N,) boxes that were found


def match(table: AnnotationTable, classes: int, detections: Detections, order: Integers) -> Matches:
    """Which of the detections `order` found a box, and which box was found, at IoU 0.5.

    `order` has the detections of one image and class together, best first.
    """
    truth_groups = np.repeat(np.arange(len(table)), table.counts) * classes + table.labels
    rows = np.argsort(truth_groups, kind="stable")
    groups = detections.images[order] * classes + detections.labels[order]
    first = np.searchsorted(truth_groups[rows], groups, side="left")
    counts = np.searchsorted(truth_groups[rows], groups, side="right") - first

    found: list[tuple[Integers, Integers, Boxes]] = []
    for chunk in _chunks(counts):
        detection = np.repeat(chunk, counts[chunk])
        within = np.arange(len(detection)) - np.repeat(np.cumsum(counts[chunk]) - counts[chunk], counts[chunk])
        row = rows[first[detection] + within]
        overlaps = _overlap(detections.boxes[order[detection]], table.boxes[row], table.crowd[row])
        near = overlaps >= IOU
        found.append((detection[near], row[near], overlaps[near]))
    detection, row, overlaps = (np.concatenate(parts) for parts in zip(*found, strict=True))
    crowd = table.crowd[row]

    hit, free = np.zeros(len(order), dtype=np.bool_), np.ones(len(table.boxes), dtype=np.bool_)
    # Best overlap first; of equal overlaps the later box, as pycocotools has it.
    best_first = np.lexsort((-row[~crowd], -overlaps[~crowd], detection[~crowd]))
    for d, r in zip(detection[~crowd][best_first].tolist(), row[~crowd][best_first].tolist(), strict=True):
        if free[r] and not hit[d]:
            hit[d], free[r] = True, False
    ignored = np.zeros(len(order), dtype=np.bool_)
    ignored[detection[crowd]] = True
    return Matches(hit, ignored & ~hit, ~free)


def ranked(detections: Detections, classes: int, max_dets: int) -> Integers:
    """The `max_dets` best detections of each image and class, those of one image and class together, best first."""
    groups = detections.images * classes + detections.labels
    order = np.lexsort((-detections.scores, groups))
    starts = np.searchsorted(groups[order], groups[order], side="left")
    return order[np.arange(len(order)) - starts < max_dets]


def _chunks(counts: Integers) -> Iterator[Integers]:
    """Positions in runs of about PAIRS_AT_ONCE pairs; at least one run."""
    run = np.cumsum(counts) // PAIRS_AT_ONCE
    yield from np.split(np.arange(len(counts)), np.flatnonzero(np.diff(run)) + 1)


def _overlap(found: Boxes, truth: Boxes, crowd: NDArray[np.bool_]) -> Boxes:
    """IoU of pairs of boxes x1, y1, x2, y2; with a crowd region, the part of the found box that lies in it."""
    sides = np.minimum(found[:, 2:], truth[:, 2:]) - np.maximum(found[:, :2], truth[:, :2])
    common = np.prod(np.clip(sides, 0.0, None), axis=1)
    area = np.prod(found[:, 2:] - found[:, :2], axis=1)
    union = area + np.prod(truth[:, 2:] - truth[:, :2], axis=1) - common
    return _ratio(common, np.where(crowd, area, union))


def _ratio(part: NDArray[Any], whole: NDArray[Any]) -> NDArray[np.float64]:
    quotient = np.zeros(np.shape(part))
    np.divide(part, whole, out=quotient, where=np.asarray(whole) > 0)
    return quotient
