"""Random detection problems, and pycocotools as the judge of them."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rfdetr_core.data.annotations import AnnotationTable, ClassMap
from rfdetr_core.evaluation.detections import Detections


def classes(count: int) -> ClassMap:
    return ClassMap(tuple(range(10, 10 + count)), tuple(f"class {i}" for i in range(count)))


def table_of(images: int, rows: list[tuple[int, int, Any, bool]], *, areas: Any = None) -> AnnotationTable:
    """Rows are (image, label, (x1, y1, x2, y2), crowd), in the order of their images."""
    boxes = np.array([box for _, _, box, _ in rows], dtype=np.float64).reshape(-1, 4)
    counts = np.bincount([image for image, *_ in rows], minlength=images) if rows else np.zeros(images, dtype=np.int64)
    size = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    return AnnotationTable(
        file_names=np.array([f"{i}.jpg" for i in range(images)], dtype=np.str_),
        widths=np.full(images, 640, dtype=np.int64),
        heights=np.full(images, 480, dtype=np.int64),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=boxes,
        labels=np.array([label for _, label, _, _ in rows], dtype=np.int64),
        areas=size if areas is None else np.array(areas, dtype=np.float64),
        crowd=np.array([crowd for *_, crowd in rows], dtype=np.bool_),
    )


def detections_of(rows: list[tuple[int, int, float, Any]]) -> Detections:
    """Rows are (image, label, score, (x1, y1, x2, y2))."""
    return Detections(
        images=np.array([image for image, *_ in rows], dtype=np.int64),
        labels=np.array([label for _, label, _, _ in rows], dtype=np.int64),
        scores=np.array([score for _, _, score, _ in rows], dtype=np.float64),
        boxes=np.array([box for *_, box in rows], dtype=np.float64).reshape(-1, 4),
    )


def random_boxes(rng: np.random.Generator, count: int, *, whole: bool) -> Any:
    """Sides from 1 to 300 px, so that small, medium and large ones and the borders between them occur."""
    xy = rng.uniform(0, 200, (count, 2))
    wh = np.exp(rng.uniform(0, np.log(300), (count, 2)))
    wh[rng.random(count) < 0.2] = rng.choice([32, 96])  # areas of exactly 32^2 and 96^2
    boxes = np.concatenate([xy, xy + wh], axis=1)
    return np.round(boxes) + np.array([0, 0, 1, 1]) if whole else boxes


def random_problem(
    seed: int, *, images: int = 8, labels: int = 4, detections: int = 400, crowd: float = 0.1
) -> tuple[AnnotationTable, ClassMap, Detections]:
    """Boxes, crowds, empty images, a class that occurs nowhere, near and far detections, many equal scores."""
    rng = np.random.default_rng(seed)
    whole = bool(seed % 2)
    owner = np.sort(rng.integers(0, max(1, images - 1), int(rng.integers(1, 60))))  # the last image stays empty
    truth = random_boxes(rng, len(owner), whole=whole)
    label = rng.integers(0, max(1, labels - 1), len(owner))  # the last class has no ground truth
    rows = [(int(i), int(c), b, bool(rng.random() < crowd)) for i, c, b in zip(owner, label, truth, strict=True)]
    table = table_of(images, rows, areas=rng.uniform(1, 20_000, len(rows)) if seed % 3 == 0 else None)

    chosen = rng.integers(0, len(rows), detections)
    near = rng.random(detections) < 0.7
    moved = truth[chosen] + (np.round if whole else np.asarray)(rng.normal(0, 4, (detections, 4)))
    moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
    boxes = np.where(near[:, None], moved, random_boxes(rng, detections, whole=whole))
    scores = rng.random(detections)
    scores[rng.random(detections) < 0.4] = rng.choice([0.25, 0.5, 0.75])  # ties
    return (
        table,
        classes(labels),
        Detections(
            images=np.where(near, owner[chosen], rng.integers(0, images, detections)),
            labels=np.where(rng.random(detections) < 0.8, label[chosen], rng.integers(0, labels, detections)),
            scores=scores,
            boxes=boxes,
        ),
    )


def pycocotools(table: AnnotationTable, class_map: ClassMap, detections: Detections, limits: list[int]) -> COCOeval:
    """Evaluated and accumulated with these maxDets; not summarised, which reads the third limit only."""
    document, results = table.to_coco(class_map), detections.to_coco(class_map)
    truth = COCO()
    truth.dataset = document
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found = truth.loadRes(results) if results else COCO()
        if not results:
            found.dataset = {**document, "annotations": []}
            found.createIndex()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.maxDets = limits
        evaluation.evaluate()
        evaluation.accumulate()
        if limits == [1, 10, 100]:
            evaluation.summarize()
    return evaluation


def mean(values: Any) -> float:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else -1.0
