"""Which detection found which box: the matching of COCO, for all images and classes at once.

Per image and class the best detections come first (ties in the order given), and each takes the free box of largest
overlap; one that finds none but lies in a crowd region is ignored. Overlaps are computed in numpy and once for all
thresholds; only pairs that overlap by half are walked through.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rfdetr_core.data.annotations import AnnotationTable
from rfdetr_core.evaluation.detections import Detections

IOUS: NDArray[np.float64] = np.linspace(0.5, 0.95, 10)  # COCO's
PAIRS_AT_ONCE = 500_000  # box pairs whose overlap is computed in one go: about 100 MB

Integers = NDArray[np.int64]
Boxes = NDArray[np.float64]


class Matches(NamedTuple):
    """What became of K detections and N boxes."""

    hit: NDArray[np.bool_]  # (K,) found a box
    ignored: NDArray[np.bool_]  # (K,) found none, but lies in a crowd region
    found: NDArray[np.bool_]  # (N,) boxes that were found


def ranked(detections: Detections, classes: int, max_dets: int) -> Integers:
    """The `max_dets` best detections of each image and class, those of one image and class together, best first."""
    groups = detections.images * classes + detections.labels
    order = np.lexsort((-detections.scores, groups))
    starts = np.searchsorted(groups[order], groups[order], side="left")
    return order[np.arange(len(order)) - starts < max_dets]


def match(
    table: AnnotationTable, classes: int, detections: Detections, order: Integers, ious: NDArray[np.float64] = IOUS[:1]
) -> list[Matches]:
    """What became of the detections `order`, as `ranked` gives them, at each threshold of 0.5 or more."""
    detection, row, overlaps = _near_pairs(table, classes, detections, order)
    # Best overlap first; of equal overlaps the later box, as pycocotools has it.
    best_first = np.lexsort((-row, -overlaps, detection))
    detection, row, overlaps = detection[best_first], row[best_first], overlaps[best_first]
    found = []
    for iou in ious:
        near = overlaps >= min(iou, 1 - 1e-10)  # as pycocotools has it
        found.append(_assign(detection[near], row[near], table.crowd, len(order)))
    return found


def _assign(detection: Integers, row: Integers, crowd: NDArray[np.bool_], count: int) -> Matches:
    hit, free, in_crowd = np.zeros(count, dtype=np.bool_), np.ones(len(crowd), dtype=np.bool_), crowd[row]
    for d, r in zip(detection[~in_crowd].tolist(), row[~in_crowd].tolist(), strict=True):
        if free[r] and not hit[d]:
            hit[d], free[r] = True, False
    ignored = np.zeros(count, dtype=np.bool_)
    ignored[detection[in_crowd]] = True
    return Matches(hit, ignored & ~hit, ~free)


def _near_pairs(
    table: AnnotationTable, classes: int, detections: Detections, order: Integers
) -> tuple[Integers, Integers, Boxes]:
    """Position in `order`, row of the table and overlap of all pairs of one class that overlap by half at least."""
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
        near = overlaps >= IOUS[0]
        found.append((detection[near], row[near], overlaps[near]))
    detection, row, overlaps = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return detection, row, overlaps


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
    return ratio(common, np.where(crowd, area, union))


def ratio(part: NDArray[Any], whole: NDArray[Any]) -> NDArray[np.float64]:
    """part / whole, and 0 where the whole is 0."""
    quotient = np.zeros(np.shape(part))
    np.divide(part, whole, out=quotient, where=np.asarray(whole) > 0)
    return quotient
