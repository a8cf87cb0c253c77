"""One evaluation by one library, from files to the twelve numbers; run in a process of its own by evaluation.py.

    python evaluation_sides.py <side> <folder>

Prints one line of JSON: seconds, peak memory, and the numbers. The reference's environment has numpy and its library
only, so that nothing of ours is imported but by our own side.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ANNOTATIONS, DETECTIONS = "annotations.coco.json", "detections.npy"


def ours(folder: Path) -> Callable[[], list[float]]:
    """All of `coco_metrics`: the twelve numbers, those at 500 detections, per class, and the F1 sweep."""
    from rfdetr_core.evaluation.metrics import coco_metrics

    return lambda: list(coco_metrics(*_problem(folder), max_dets=500).coco.values())


def twelve(folder: Path) -> Callable[[], list[float]]:
    """The twelve numbers alone, as the others compute them."""
    from rfdetr_core.evaluation.metrics import COCO_MAX_DETS, evaluator, twelve_numbers

    def run() -> list[float]:
        evaluation = evaluator(*_problem(folder))
        evaluation.params.maxDets = list(COCO_MAX_DETS)
        evaluation.evaluate()
        evaluation.accumulate()
        found = evaluation.eval
        return list(twelve_numbers(found["precision"], found["recall"], list(COCO_MAX_DETS)).values())

    return run


def _problem(folder: Path) -> Any:
    from rfdetr_core.data.annotations import AnnotationTable, ClassMap
    from rfdetr_core.evaluation.detections import Detections

    document = json.loads((folder / ANNOTATIONS).read_bytes())
    names = tuple(category["name"] for category in document["categories"])
    rows = np.load(folder / DETECTIONS)
    boxes = np.concatenate([rows[:, 1:3], rows[:, 1:3] + rows[:, 3:5]], axis=1)
    detections = Detections(rows[:, 0].astype(np.int64) - 1, rows[:, 6].astype(np.int64) - 1, rows[:, 5], boxes)
    return AnnotationTable.from_coco(document), ClassMap(tuple(range(1, len(names) + 1)), names), detections


def pycocotools(folder: Path) -> Callable[[], list[float]]:
    """The reference implementation."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return lambda: _reference(COCO, COCOeval, folder)


def faster_coco_eval(folder: Path) -> Callable[[], list[float]]:
    """Its fastest replacement in C++."""
    from faster_coco_eval import COCO, COCOeval_faster

    return lambda: _reference(COCO, COCOeval_faster, folder)


def _reference(coco: Any, evaluator: Any, folder: Path) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco(str(folder / ANNOTATIONS))
        evaluation = evaluator(truth, truth.loadRes(np.load(folder / DETECTIONS)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats[:12]]


SIDES = {"ours": ours, "ours, twelve numbers": twelve, "pycocotools": pycocotools, "faster-coco-eval": faster_coco_eval}


def main() -> None:
    """Load the library, then time."""
    side, folder = sys.argv[1], Path(sys.argv[2])
    run = SIDES[side](folder)
    started = time.perf_counter()
    numbers = run()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak_mib": peak, "numbers": numbers}))


if __name__ == "__main__":
    main()
