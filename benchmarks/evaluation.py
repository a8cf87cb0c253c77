"""COCO metrics: ours beside pycocotools and faster-coco-eval, on a random problem of the size of COCO's validation set.

    python -m benchmarks.evaluation                    # 5,000 images, 80 classes, 100 detections an image
    python -m benchmarks.evaluation --images 500 --repeats 1

Every run is a fresh process, from the annotation file and the array of detections to the twelve numbers; the sides take
turns, pycocotools once, which takes a minute. faster-coco-eval comes with `make peer`; without it its row is missing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evaluation_sides import ANNOTATIONS, DETECTIONS, SIDES
from rfdetr_core.data.annotations import AnnotationTable, ClassMap

ROOT = Path(__file__).parents[1]
PEER = ROOT / ".peer" / "bin" / "python"
REFERENCE = "pycocotools"
TOLERANCE = 1e-9
SMALLEST, LARGEST, CANVAS = 8.0, 300.0, 700  # px
BOXES_PER_IMAGE = 7.3  # COCO's validation set


def write_problem(folder: Path, images: int, classes: int, detections: int, seed: int) -> None:
    """Annotations, and detections of which a third lie near a box of mostly their class."""
    random = np.random.default_rng(seed)
    counts = random.poisson(BOXES_PER_IMAGE, images)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    boxes, labels = _boxes(random, int(offsets[-1])), random.integers(0, classes, int(offsets[-1]))
    table = AnnotationTable(
        file_names=np.array([f"{i:06}.jpg" for i in range(images)]),
        widths=np.full(images, CANVAS),
        heights=np.full(images, CANVAS),
        offsets=offsets,
        boxes=boxes,
        labels=labels,
        areas=np.prod(boxes[:, 2:] - boxes[:, :2], axis=1),
        crowd=random.random(len(boxes)) < 0.01,
    )
    class_map = ClassMap(tuple(range(1, classes + 1)), tuple(f"class {i}" for i in range(classes)))
    (folder / ANNOTATIONS).write_text(json.dumps(table.to_coco(class_map)))

    image = np.repeat(np.arange(images), detections)
    chosen = offsets[image] + (random.random(len(image)) * counts[image]).astype(np.int64)
    near = (random.random(len(image)) < 0.3) & (counts[image] > 0)
    chosen = np.where(near, chosen, 0)
    found = np.where(near[:, None], boxes[chosen] + random.normal(0, 6, (len(image), 4)), _boxes(random, len(image)))
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
    right = near & (random.random(len(image)) < 0.8)
    label = np.where(right, labels[chosen], random.integers(0, classes, len(image)))
    score = np.where(near, random.beta(2, 2, len(image)), random.beta(1, 8, len(image)))
    sides = found[:, 2:] - found[:, :2]
    np.save(folder / DETECTIONS, np.column_stack([image + 1, found[:, :2], sides, score, label + 1]))


def _boxes(random: np.random.Generator, count: int) -> Any:
    corner = random.uniform(0, CANVAS - LARGEST, (count, 2))
    sides = np.exp(random.uniform(math.log(SMALLEST), math.log(LARGEST), (count, 2)))
    return np.concatenate([corner, corner + sides], axis=1)


def measure(side: str, folder: Path, threads: int) -> dict[str, Any] | None:
    """One run in a process of its own; None where the library is not installed."""
    python = PEER if side == "faster-coco-eval" else Path(sys.executable)
    if not python.exists():
        return None
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads)}
    if python != PEER:
        environment["PYTHONPATH"] = str(ROOT)
    command = [str(python), str(Path(__file__).with_name("evaluation_sides.py")), side, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a row per side, and fail where the numbers differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--detections", type=int, default=100, help="an image")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="of all but pycocotools, which runs once")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="evaluation-") as scratch:
        write_problem(Path(scratch), options.images, options.classes, options.detections, options.seed)
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for turn in range(options.repeats):
            for side, results in runs.items():
                if side == REFERENCE and turn:
                    continue
                if (result := measure(side, Path(scratch), options.threads)) is not None:
                    results.append(result)
    report(runs)


def report(runs: dict[str, list[dict[str, Any]]]) -> None:
    """The table; ends with code 1 where a side's numbers are not those of pycocotools."""
    [reference] = runs[REFERENCE]
    print("| side | seconds, median (min to max) | faster | peak MiB | of the memory | largest difference |")
    print("|---|---|---|---|---|---|")
    worst = 0.0
    for side, results in runs.items():
        if not results:
            print(f"| {side} | not installed: make peer | | | | |")
            continue
        seconds = [result["seconds"] for result in results]
        peak = statistics.median(result["peak_mib"] for result in results)
        pairs = zip(results[0]["numbers"], reference["numbers"], strict=True)
        difference = max(abs(a - b) for a, b in pairs)
        worst = max(worst, difference)
        median = statistics.median(seconds)
        spread, faster = f"{min(seconds):.2f} to {max(seconds):.2f}", reference["seconds"] / median
        print(
            f"| {side} | {median:.2f} ({spread}) | {faster:.1f}× "
            f"| {peak:.0f} | {peak / reference['peak_mib']:.2f} | {difference:.1e} |"
        )
    if worst > TOLERANCE:
        sys.exit(f"the numbers differ by {worst:.1e}")


if __name__ == "__main__":
    main()
