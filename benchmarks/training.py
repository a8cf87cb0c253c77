"""Training, ours beside rfdetr 1.11.2, in one run: same images, same settings, taking turns.

    python -m benchmarks.training                                          # CPU: nano, 2 threads, all parts
    python -m benchmarks.training --parts loader metrics --repeats 20
    python -m benchmarks.training --parts training --scales fixed --workers 0
    python -m benchmarks.training --parts training --device cuda --precision bf16 --variant medium --batch 16 \\
        --train-images 1600 --scales multi --workers 8

Every case runs in two fresh processes, one of each side, which take turns; a ratio compares two neighbouring turns, so
a machine whose speed drifts slows both. `make peer` installs the reference.

loader    Milliseconds per 640x480 JPEG on one core. "item" is what a loading process does for an image: decode, crop,
          resize, flip; the reference's items are normalised floats as well, ours stay bytes. "input" goes on until the
          batch is the network's float input on both sides.
metrics   Seconds of mAP and F1 from given detections; the reference's with its default evaluator, as in its own
          validation without values per class, and with them, as ours always are. Its recall thresholds are float32,
          its crowds absorb by another overlap: the fourth digit of the numbers differs.
training  Whole trainings on the same folder: loading, steps, average of the weights, validation, checkpoints. A turn is
          an epoch. The reference's steps are timed by a callback that its own trainer is given, ours by a wrapper of
          the engine's step; both block there, at the first step of an epoch, until it is their turn. "seconds/step" is
          the time from the beginning of the first step to the end of the last, by their number: with the waiting for
          images, and all else between two steps. "end of epoch" is from there to the next first step: validation,
          checkpoints, and fetching the first batch.

The first turn of each side is not counted: it begins with cold caches.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.model import REFERENCE_PYTHON
from rfdetr_core.data.sample import CLASS_NAMES, draw_image

GIB = 2.0**30
WIDTH, HEIGHT = 640, 480
BOXES_PER_IMAGE = 7.3  # as in COCO
ITEM, INPUT, METRICS = "item, ms/image", "input, ms/image", "mAP and F1, s"
STEP, PEAK = "seconds/step", "peak memory, GiB"
TARGETS = {ITEM: 2.5, METRICS: 5.0, STEP: 1.4, PEAK: 1.0}
"""The ratios that we want to reach at least."""
WIDE, NARROW = 46, 20  # columns


class Side:
    """A process of one side, prepared."""

    def __init__(self, side: str, case: dict[str, Any], folder: Path) -> None:
        python = sys.executable if side == "ours" else str(REFERENCE_PYTHON)
        threads = str(case["threads"])
        counts = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}
        root = Path(__file__).parents[1]
        paths = {"PYTHONPATH": str(root)} if side == "ours" else {}
        self._errors = folder / f"{side}.log"
        with self._errors.open("w") as errors:
            self.process = subprocess.Popen(
                [python, str(Path(__file__).with_name("training_sides.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **counts, **paths},
            )
        output = folder / side
        output.mkdir()
        self.ask({**case, "side": side, "folder": str(output)})

    def ask(self, request: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a request, wait for its answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request or {}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"error: {self.process.args} died\n{self._errors.read_text()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self.process:  # closes the pipes, which ends the process
            pass


def main(argv: Sequence[str] | None = None) -> int:
    """Print the rows of every part that is asked for."""
    arguments = _arguments(argv)
    if not REFERENCE_PYTHON.exists():
        print("error: the reference package is not installed (make peer)", file=sys.stderr)
        return 2
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}, {arguments.device}")
    columns = ("reference", "ours", "ratio min", "median", "max", "target")
    _print_cells("case", "measure", columns)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if {"loader", "training"} & set(arguments.parts):
            images = {"train": arguments.train_images, "valid": arguments.valid_images, "test": 1}
            size = write_dataset(folder / "dataset", images)
            print(f"{arguments.train_images} training images of {WIDTH}x{HEIGHT}, {size / 1000:.0f} kB each")
        for part in arguments.parts:
            {"loader": _loader, "metrics": _metrics, "training": _training}[part](arguments, folder)
    return 0


def _loader(arguments: argparse.Namespace, folder: Path) -> None:
    for scales in arguments.scales:
        for until, measure in (("item", ITEM), ("input", INPUT)):
            case = {**_case(arguments, folder, "loader", scales), "threads": 1, "until": until, "device": "cpu"}
            turns = _take_turns(case, arguments.repeats)
            _print_row(f"loader, {arguments.variant}, {scales}, 1 core", measure, turns, "seconds", scale=1e3)


def _metrics(arguments: argparse.Namespace, folder: Path) -> None:
    problem = draw_problem(arguments.metric_images, arguments.metric_classes, seed=0)
    np.savez(folder / "problem.npz", **problem)  # type: ignore[arg-type]
    for per_class in (False, True):
        case = {
            "part": "metrics",
            "problem": str(folder / "problem.npz"),
            "classes": arguments.metric_classes,
            "batch": 16,
            "max_dets": 500,
            "per_class": per_class,
            "threads": arguments.threads,
            "device": "cpu",
        }
        turns = _take_turns(case, arguments.repeats)
        title = f"metrics, {arguments.metric_images} images{', reference per class' * per_class}"
        _print_row(title, METRICS, turns, "seconds")
        theirs, ours = turns[-1]
        shown = ", ".join(f"{name} {theirs[name]:.6f} / {ours[name]:.6f}" for name in ("map", "map50", "f1"))
        print(f"{'':<{WIDE}}reference / ours: {shown}")
        _print_peaks(title, turns)


def _training(arguments: argparse.Namespace, folder: Path) -> None:
    for scales in arguments.scales:
        for workers in arguments.workers:
            case = {
                **_case(arguments, folder, "training", scales),
                "workers": workers,
                "steps": arguments.train_images // arguments.batch,
                "precision": arguments.precision,
            }
            turns = _take_turns(case, arguments.repeats)
            title = f"{arguments.variant}, batch {arguments.batch}, {scales}, {workers} workers"
            _print_row(title, STEP, turns, "seconds")
            _print_row(title, "of it, waiting", turns, "wait")
            _print_row(title, "validation, s", turns, "validation")
            _print_row(title, "end of epoch, s", turns, "end")
            _print_row(title, "whole epoch, s", turns, "epoch")
            _print_peaks(title, turns)
            if any(theirs["sides"] != ours["sides"] for theirs, ours in turns):
                print(f"{title:<{WIDE}}the two sides did not train at the same sizes")


def _case(arguments: argparse.Namespace, folder: Path, part: str, scales: str) -> dict[str, Any]:
    return {
        "part": part,
        "dataset": str(folder / "dataset"),
        "variant": arguments.variant,
        "classes": len(CLASS_NAMES),
        "batch": arguments.batch,
        "multi_scale": scales == "multi",
        "threads": arguments.threads,
        "device": arguments.device,
        "precision": "fp32",
    }


def _take_turns(case: dict[str, Any], repeats: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Pairs of answers, the reference's and ours, without the first: it begins with cold caches."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        Side("ours", case, Path(scratch)) as ours,
        Side("reference", case, Path(scratch)) as reference,
    ):
        return [(reference.ask(), ours.ask()) for _ in range(1 + repeats)][1:]


def _print_row(
    title: str,
    measure: str,
    turns: Sequence[tuple[dict[str, Any], dict[str, Any]]],
    key: str,
    *,
    scale: float = 1.0,
) -> None:
    theirs, ours = ([answer[key] * scale for answer in side] for side in zip(*turns, strict=True))
    ratios = [a / b if b > 0 else math.inf for a, b in zip(theirs, ours, strict=True)]
    cells = [f"{statistics.median(values):.4g}" for values in (theirs, ours)]
    cells += [f"{f(ratios):.2f}" for f in (min, statistics.median, max)]
    _print_cells(title, measure, [*cells, f">= {TARGETS[measure]}" if measure in TARGETS else ""])


def _print_peaks(title: str, turns: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    theirs, ours = (max(answer["peak"] for answer in side) / GIB for side in zip(*turns, strict=True))
    _print_cells(title, PEAK, [f"{theirs:.2f}", f"{ours:.2f}", "", f"{theirs / ours:.2f}", "", f">= {TARGETS[PEAK]}"])


def _print_cells(title: str, measure: str, cells: Sequence[str]) -> None:
    print(f"{title:<{WIDE}}{measure:<{NARROW}}" + "".join(f"{cell:>12}" for cell in cells), flush=True)


def write_dataset(folder: Path, images: dict[str, int]) -> float:
    """Drawn JPEGs in the COCO layout of Roboflow exports; returns their mean size in bytes."""
    sizes = []
    for number, (split, count) in enumerate(images.items()):
        target = folder / split
        target.mkdir(parents=True)
        rows: list[dict[str, Any]] = []
        for index in range(count):
            drawn, shapes = draw_image(np.random.default_rng([number, index]), WIDTH, 6)
            x_scale, y_scale = WIDTH / drawn.width, HEIGHT / drawn.height
            path = target / f"{index:05d}.jpg"
            drawn.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(path, quality=92)
            sizes.append(path.stat().st_size)
            for label, (x, y, w, h) in shapes:
                box = [x * x_scale, y * y_scale, w * x_scale, h * y_scale]
                row = {"id": len(rows) + 1, "image_id": index, "category_id": label + 1, "bbox": box, "iscrowd": 0}
                rows.append({**row, "area": box[2] * box[3]})
        document = {
            "images": [{"id": i, "file_name": f"{i:05d}.jpg", "width": WIDTH, "height": HEIGHT} for i in range(count)],
            "annotations": rows,
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASS_NAMES)],
        }
        (target / "_annotations.coco.json").write_text(json.dumps(document))
    return float(np.mean(sizes))


def draw_problem(images: int, classes: int, *, seed: int, found_per_image: int = 100) -> dict[str, NDArray[Any]]:
    """Boxes of many images and what a fair detector would find: most of them, some twice, and much that is not there.

    Classes are as unevenly frequent as in COCO. Boxes x1, y1, x2, y2 in pixels; those of an image stand together.
    """
    rng = np.random.default_rng(seed)
    sizes = rng.integers(320, 641, (images, 2))
    frequency = 1.0 / np.arange(1, classes + 1) ** 0.8
    counts = rng.poisson(BOXES_PER_IMAGE, images)
    image_of = np.repeat(np.arange(images), counts)
    labels = rng.choice(classes, len(image_of), p=frequency / frequency.sum())
    boxes = _random_boxes(rng, sizes[image_of])
    sides = boxes[:, 2:] - boxes[:, :2]

    hits = np.repeat(
        np.arange(len(boxes)), np.where(rng.random(len(boxes)) < 0.85, 1 + rng.poisson(0.7, len(boxes)), 0)
    )
    blur = rng.choice([0.05, 0.2, 0.35], len(hits))
    moved = boxes[hits] + rng.normal(0.0, 1.0, (len(hits), 4)) * np.tile(sides[hits], 2) * blur[:, None] / 2
    hit_labels = np.where(rng.random(len(hits)) < 0.9, labels[hits], rng.integers(classes, size=len(hits)))
    hit_scores = np.clip(rng.beta(5, 2, len(hits)) - blur, 0.01, 0.999)
    hit_counts = np.bincount(image_of[hits], minlength=images)
    noise_of = np.repeat(np.arange(images), np.maximum(0, found_per_image - hit_counts))

    found_image = np.concatenate([image_of[hits], noise_of])
    found_boxes = np.concatenate([moved, _random_boxes(rng, sizes[noise_of])])
    found_labels = np.concatenate([hit_labels, rng.integers(classes, size=len(noise_of))])
    found_scores = np.concatenate([hit_scores, rng.beta(1, 12, len(noise_of))])
    order = np.lexsort((-found_scores, found_image))
    return {
        "sizes": sizes,
        "box_counts": counts,
        "boxes": boxes.astype(np.float32),
        "box_sides": sides,
        "labels": labels.astype(np.int64),
        "crowd": rng.random(len(boxes)) < 0.01,
        "found_counts": np.bincount(found_image, minlength=images),
        "found_boxes": found_boxes[order].astype(np.float32),
        "found_labels": found_labels[order].astype(np.int64),
        "found_scores": found_scores[order].astype(np.float32),
    }


def _random_boxes(rng: np.random.Generator, sizes: NDArray[np.int64]) -> NDArray[np.float64]:
    sides = np.clip(rng.lognormal(np.log(0.15), 0.8, sizes.shape), 0.01, 0.95) * sizes
    corners = rng.random(sizes.shape) * (sizes - sides)
    return np.concatenate([corners, corners + sides], axis=1)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m benchmarks.training"
    )
    parts = ["loader", "metrics", "training"]
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--variant", default="nano")
    parser.add_argument("--scales", nargs="+", default=["fixed", "multi"], choices=["fixed", "multi"])
    parser.add_argument("--workers", nargs="+", type=int, default=[2, 0], help="loading processes, of training")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="of metrics and training")
    parser.add_argument("--train-images", type=int, default=24, help="a multiple of the batch, at least five of it")
    parser.add_argument("--valid-images", type=int, default=8)
    parser.add_argument("--metric-images", type=int, default=2000)
    parser.add_argument("--metric-classes", type=int, default=80)
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side that count")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    arguments = parser.parse_args(argv)
    if arguments.train_images % arguments.batch or arguments.train_images < 5 * arguments.batch:
        parser.error("--train-images must be a multiple of --batch, and at least five of it")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
