"""The commands of `python -m rfdetr_core` that make and use a detector: train, evaluate, export, predict.

Thin over `rfdetr_core.api` and `rfdetr_core.training.folder`. What can be known to be wrong is said before torch is
loaded, which takes seconds.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rfdetr_core import hardware
from rfdetr_core.config import (
    ModelSection,
    RunConfig,
    TrainConfig,
    dump_yaml,
    load_run_config,
    merge,
    parse_assignments,
)
from rfdetr_core.errors import ConfigError, StorageAccessError, Terminated
from rfdetr_core.storage import location
from rfdetr_core.storage.local import local_errors

if TYPE_CHECKING:
    from rfdetr_core.evaluation.metrics import CocoMetrics
    from rfdetr_core.prediction import Prediction
    from rfdetr_core.training.folder import Start

RESULT = "result.json"
"""How a training ended, in its folder."""

log = logging.getLogger("rfdetr_core")


def train(arguments: argparse.Namespace) -> None:
    """Train as the YAML's sections `dataset`, `model` and `train` say; the same command again continues.

    Raises:
        Terminated: SIGTERM or Ctrl-C; there is a checkpoint of the last optimizer step.
        ConfigError, DatasetError, CheckpointError, TrainingError, StorageAccessError: see `api.RFDETR.train`.
    """
    config = _run_config(arguments)
    settings = _train_config(config, arguments.output_dir)
    output = Path(settings.output_dir)
    with _stoppable() as stop:
        from rfdetr_core.training.checkpoint import BEST_TOTAL
        from rfdetr_core.training.folder import job_in_folder
        from rfdetr_core.training.loop import train as train_detector

        job = job_in_folder(config.model, settings, _start(config.model), config.dataset)
        with local_errors("write", output):
            (output / "config.yaml").write_text(dump_yaml(config))
        stop.deferred = True
        result = train_detector(job, stop_requested=lambda: stop.requested)
        stop.deferred = False
    with local_errors("write", output):
        (output / RESULT).write_text(json.dumps(asdict(result), indent=2) + "\n")
    metric = {"map": "mAP", "mar": "mAR"}[settings.best_model_metric]
    print(
        f"{result.epochs} epochs, {result.optimizer_steps} optimizer steps; best: {result.best_source} weights "
        f"of epoch {result.best_epoch + 1}, {metric} {result.best_score:.3f}"
    )
    print(output / BEST_TOTAL)


def evaluate(arguments: argparse.Namespace) -> None:
    """COCO metrics of a weight file on a split, as text and, with --json, as a file."""
    _check_target(arguments.json)
    from rfdetr_core.api import RFDETR

    metrics = RFDETR.from_checkpoint(arguments.weights).evaluate(
        dataset_dir=arguments.dataset_dir,
        split=arguments.split,
        batch_size=arguments.batch_size,
        eval_max_dets=arguments.max_dets,
        num_workers=arguments.num_workers,
    )
    for line in _metric_lines(metrics):
        print(line)
    described = {"weights": arguments.weights, "dataset": arguments.dataset_dir, "split": arguments.split}
    _write_json(arguments.json, {**described, **metrics.to_json()})


def export(arguments: argparse.Namespace) -> None:
    """Write the ONNX model of a weight file, proven to compute the same."""
    given = parse_assignments(arguments.set)
    others = [name for name in given if name != "export"]
    if others:
        raise ConfigError(f"--set {others[0]}…: export has no such section", hint="write it as export.opset=18")
    from rfdetr_core.api import RFDETR

    print(RFDETR.from_checkpoint(arguments.weights).export(arguments.output_dir, **given.get("export", {})))


def predict(arguments: argparse.Namespace) -> None:
    """Detections in pictures, as text and, with --json, as a file; boxes are x1 y1 x2 y2 in pixels."""
    _check_target(arguments.json)
    from rfdetr_core.api import RFDETR

    found = RFDETR.from_checkpoint(arguments.weights).predict(arguments.images, threshold=arguments.threshold)
    rows = [
        {"image": image, "detections": _detections(prediction)}
        for image, prediction in zip(arguments.images, found, strict=True)
    ]
    for row in rows:
        print(f"{row['image']}: {len(row['detections'])} found")
        for detection in row["detections"]:
            box = " ".join(f"{side:.1f}" for side in detection["box"])
            print(f"  {detection['class_name']} {detection['score']:.3f}  {box}")
    _write_json(arguments.json, rows)


@contextmanager
def speaking() -> Iterator[None]:
    """Log lines and warnings of ours go to stderr, one line each; stdout is left to results."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    # Idle threads that spin take the cores from whatever else runs; threads beyond the cgroup's quota throttle all.
    os.environ.setdefault("OMP_NUM_THREADS", str(hardware.cpu_count()))
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    hardware.keep_freed_memory()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _tell_warning
            yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _tell_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    log.warning("%s", " ".join(str(message).split()))


class _Stop:
    """SIGTERM and Ctrl-C: at once as an exception, or noted where training ends at a safe point by itself."""

    def __init__(self) -> None:
        self.requested = False
        self.deferred = False

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler; the second signal does not wait."""
        if self.requested or not self.deferred:
            raise Terminated(f"stopped by {signal.Signals(signum).name}", hint="run the same command again to continue")
        self.requested = True
        print("stopping at the next step; once more stops at once", file=sys.stderr)


@contextmanager
def _stoppable() -> Iterator[_Stop]:
    stop = _Stop()
    before = {number: signal.signal(number, stop.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_config(arguments: argparse.Namespace) -> RunConfig:
    """The YAML with what the command line says over it."""
    overrides = parse_assignments(arguments.set)
    if arguments.dataset_dir is not None:
        if "uri" in overrides.get("dataset", {}):
            raise ConfigError("--dataset-dir and --set dataset.uri say the same", hint="give one of them")
        overrides = merge(overrides, {"dataset": {"uri": arguments.dataset_dir}})
    if arguments.pretrain_weights is not None:
        from rfdetr_core.pretrained import fetch_weights

        weights = str(fetch_weights(arguments.pretrain_weights).absolute())
        overrides = merge(overrides, {"model": {"pretrain_weights": weights}})
    return load_run_config(arguments.config, overrides)


def _train_config(config: RunConfig, output_dir: str) -> TrainConfig:
    """The `train` section for a training in a folder, with the dataset of the `dataset` section."""
    source = location(config.dataset.uri).local_path
    if source is None:
        raise ConfigError(
            f"dataset.uri: {config.dataset.uri} is no folder of this machine",
            hint="give a local copy with --dataset-dir, or use rfdetr-pipeline run",
        )
    if not config.dataset.reduce:
        raise ConfigError(
            "dataset.reduce: false is not possible here: train without a pipeline keeps reduced images",
            hint="leave it out, or give a dataset that the pipeline prepared with it",
        )
    given = config.train.model_dump(exclude_unset=True)
    layout = config.dataset.format
    if layout != "auto" and given.setdefault("dataset_file", layout) != layout:
        raise ConfigError(
            f"train.dataset_file: {given['dataset_file']} contradicts dataset.format: {layout}", hint="give one of them"
        )
    return TrainConfig.parse({**given, "dataset_dir": source, "output_dir": output_dir}, source="train")


def _start(model: ModelSection) -> Start | None:
    """The pretrained weights that the YAML or --pretrain-weights names."""
    from rfdetr_core.detector_files import refuse_another_variant
    from rfdetr_core.models.weight_file import WeightFile, read_weight_file
    from rfdetr_core.pretrained import fetch_weights
    from rfdetr_core.training.checkpoint import sha256_of
    from rfdetr_core.training.folder import Start

    if model.pretrain_weights is None:
        log.warning("training starts from random weights, which takes many epochs; --pretrain-weights gives others")
        return None
    path = fetch_weights(model.pretrain_weights)

    def read() -> WeightFile:
        file = read_weight_file(path)
        refuse_another_variant(file, model)
        return file

    return Start(read, sha256_of(path))


def _metric_lines(metrics: CocoMetrics) -> Iterator[str]:
    names = (("mAP", metrics.map), ("mAP50", metrics.map50), ("mAP75", metrics.map75), ("mAR", metrics.mar))
    yield "  ".join(f"{name} {_number(value)}" for name, value in names)
    yield (
        f"F1 {_number(metrics.f1)} at score {_number(metrics.f1_threshold)}, "
        f"precision {_number(metrics.precision)}, recall {_number(metrics.recall)}"
    )
    for name, values in metrics.per_class.items():
        yield f"  {name}: AP {_number(values['ap'])}  AP50 {_number(values['ap50'])}  {values['boxes']:.0f} boxes"


def _number(value: float) -> str:
    """-1 is COCO's way to say that nothing of that kind is annotated."""
    return "–" if value < 0 else f"{value:.3f}"


def _detections(found: Prediction) -> list[dict[str, Any]]:
    return [
        {"class_id": int(label), "class_name": name, "score": float(score), "box": [float(side) for side in box]}
        for label, name, score, box in zip(found.class_ids, found.class_names, found.scores, found.boxes, strict=True)
    ]


def _check_target(path: str | None) -> None:
    """Say before the work, and not after it, that its result cannot be written."""
    if path is not None and (Path(path).is_dir() or not Path(path).parent.is_dir()):
        raise StorageAccessError(f"--json {path}: cannot be written", hint="give a file in a folder that exists")


def _write_json(path: str | None, content: Any) -> None:
    if path is not None:
        with local_errors("write", Path(path)):
            Path(path).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
