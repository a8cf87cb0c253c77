"""What a model gets wrong at its operating point: image by image, class by class, and by kind of error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rfdetr_core.data.annotations import AnnotationTable, ClassMap
from rfdetr_core.evaluation.detections import Detections
from rfdetr_core.evaluation.f1 import IOU
from rfdetr_core.evaluation.matching import match, ranked
from rfdetr_core.evaluation.metrics import evaluator

BACKGROUND = "background"
OTHERS = "other classes"
ERROR_KINDS = {
    "classification": "Cls",
    "localisation": "Loc",
    "both": "Both",
    "duplicate": "Dupe",
    "background": "Bkg",
    "missed": "Miss",
}
"""Our names of the error kinds and hotcoco's; they are those of TIDE (Bolya et al. 2020, section 2)."""
OVERLAPS_NOTHING = 0.1  # IoU: below it a detection has nothing to do with any box


@dataclass(frozen=True)
class Outcome:
    """The detections that a user would see at a score threshold, and what became of them and of the annotated boxes."""

    score: float
    detections: Detections  # K of them; those that lie in a crowd region are left out
    hit: NDArray[np.bool_]  # (K,) found a box of their class at IoU 0.5
    missed: NDArray[np.bool_]  # (N,) boxes that none found; crowd regions are never missed
    f1: NDArray[np.float64]  # (I,) of each image; 1 where nothing is annotated and nothing found
    wrong: NDArray[np.int64]  # (I,) false detections and missed boxes

    def worst(self, count: int) -> NDArray[np.int64]:
        """Images of the lowest F1, of equal ones those of the most errors; at most half of them. Worst first."""
        return np.lexsort((-self.wrong, self.f1))[: min(count, (len(self.f1) + 1) // 2)]

    def best(self, count: int) -> NDArray[np.int64]:
        """Images of the highest F1, of equal ones those of the most boxes found; at most the other half. Best first."""
        found = np.bincount(self.detections.images[self.hit], minlength=len(self.f1))
        return np.lexsort((-found, self.wrong, -self.f1))[: min(count, len(self.f1) // 2)]


def outcome(table: AnnotationTable, classes: int, detections: Detections, *, score: float, max_dets: int) -> Outcome:
    """Match the detections of at least this score, as the F1 sweep does."""
    order = ranked(detections, classes, max_dets)
    order = order[detections.scores[order] >= score]
    [matches] = match(table, classes, detections, order)
    kept, hit = order[~matches.ignored], matches.hit[~matches.ignored]
    seen = detections.select(kept)
    missed = ~table.crowd & ~matches.found
    image_of = np.repeat(np.arange(len(table)), table.counts)
    true = np.bincount(seen.images[hit], minlength=len(table))
    wrong = np.bincount(seen.images[~hit], minlength=len(table)) + np.bincount(image_of[missed], minlength=len(table))
    f1 = np.ones(len(table))
    np.divide(2 * true, 2 * true + wrong, out=f1, where=true + wrong > 0)
    return Outcome(score, seen, hit, missed, f1, wrong)


def confusion(table: AnnotationTable, class_map: ClassMap, seen: Outcome) -> dict[str, Any]:
    """Which class is taken for which, background among them: counts, a row per true class, a column per found one.

    Unlike everywhere else a detection is compared with the boxes of all classes: the best of an image first, each
    takes the free box of largest overlap, from IoU 0.5 on. What finds none is found in the background; a box that
    none finds is taken for it.
    """
    found = evaluator(table, class_map, seen.detections)
    matrix = found.confusion_matrix(iou_thr=IOU, max_det=max(1, len(seen.detections.scores)))["matrix"]
    return {
        "iou": IOU,
        "score": seen.score,
        "classes": [*class_map.names, BACKGROUND],
        "matrix": matrix.astype(np.int64).tolist(),
    }


def condensed(document: dict[str, Any], most: int) -> tuple[list[str], list[list[int]]]:
    """Names and counts of a confusion matrix with at most `most` classes; the least frequent ones are one row.

    Background stays the last.
    """
    names, matrix = list(document["classes"]), np.array(document["matrix"], dtype=np.int64)
    classes = len(names) - 1
    if classes <= most:
        return names, matrix.tolist()
    weight = matrix.sum(axis=0) + matrix.sum(axis=1)
    kept = np.sort(np.argsort(-weight[:classes], kind="stable")[: most - 1])
    group = np.full(len(names), len(kept))  # of each class: its new row
    group[kept] = np.arange(len(kept))
    group[-1] = len(kept) + 1
    small = np.zeros((len(kept) + 2, len(kept) + 2), dtype=np.int64)
    np.add.at(small, (group[:, None], group[None, :]), matrix)
    return [*(names[i] for i in kept), OTHERS, BACKGROUND], small.tolist()


def error_analysis(
    table: AnnotationTable, class_map: ClassMap, detections: Detections, *, max_dets: int
) -> dict[str, dict[str, float]]:
    """How many errors of each kind there are, over all scores, and how much AP50 rises where they are mended.

    The kinds exclude each other; what they cost does not add up, since mending one changes the ranks of the others.
    """
    evaluation = evaluator(table, class_map, detections)
    # Boxes of all sizes together and at one limit only: a quarter of the work.
    evaluation.params.maxDets = [max_dets]
    evaluation.params.areaRng = [[0.0, 1e10]]
    evaluation.params.areaRngLbl = ["all"]
    evaluation.evaluate()
    found = evaluation.tide_errors(pos_thr=IOU, bg_thr=OVERLAPS_NOTHING)
    return {
        "delta_ap50": {name: float(found["delta_ap"][key]) for name, key in ERROR_KINDS.items()},
        "counts": {name: int(found["counts"][key]) for name, key in ERROR_KINDS.items()},
    }
