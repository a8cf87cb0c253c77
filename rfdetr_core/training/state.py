"""What a training is and where it stands, and how that goes into checkpoint files and back."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rfdetr_core.config import ModelConfig, TrainConfig
from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.errors import CheckpointError
from rfdetr_core.evaluation.metrics import CocoMetrics
from rfdetr_core.models.weight_file import WeightFile
from rfdetr_core.models.weights import LoadReport, load_pretrained
from rfdetr_core.training import checkpoint
from rfdetr_core.training.checkpoint import BEST_TOTAL, LATEST, Source
from rfdetr_core.training.early_stopping import EarlyStopping
from rfdetr_core.training.engine import Engine

Publish = Callable[[Path], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingJob:
    """What to train, on what, and where to leave it.

    `inputs` identifies configuration, data and start weights: a checkpoint of other inputs is not continued.
    `start_weights` is asked when a new training begins, and not when one is continued; None starts from random ones.
    """

    model: ModelConfig
    train: TrainConfig
    dataset: PreparedDataset
    checkpoints: Path  # folder of the checkpoint files
    output: Path  # folder of metrics.jsonl and metrics.csv
    batch_size: int
    grad_accum_steps: int
    inputs: str
    start_weights: Callable[[], WeightFile] | None = None


@dataclass
class Position:
    """Where training stands, as it goes into a checkpoint: after `step` optimizer steps of `epoch`."""

    seed: int
    epoch: int = 0
    step: int = 0
    global_step: int = 0
    best: dict[Source, dict[str, float]] = field(default_factory=dict)  # source -> score, epoch
    stopped_early: bool = False
    sums: dict[str, Tensor] = field(default_factory=dict)  # of the loss terms of this epoch
    history: list[dict[str, Any]] = field(default_factory=list)  # the rows of metrics.jsonl
    start: dict[str, Any] | None = None  # what was loaded before the first step, if anything


def resumable(job: TrainingJob) -> dict[str, Any] | None:
    """The content of `checkpoint.pth` if it is of the same inputs.

    If not, the folder is cleared: files of two trainings must not lie side by side under the same names.

    Raises:
        CheckpointError: it is unreadable.
    """
    path = job.checkpoints / LATEST
    if path.exists():
        content = checkpoint.load(path)
        if content.get("inputs") == job.inputs:
            return content
        log.warning("%s was made with another configuration or dataset: training starts anew", path.name)
    for stale in checkpoint.own_files(job.checkpoints):
        stale.unlink()
    return None


def start_position(content: Mapping[str, Any] | None, seed: int | None) -> Position:
    """The position of a checkpoint, else the beginning with the given seed or a drawn one.

    Raises:
        CheckpointError: the checkpoint has no position that this program knows.
    """
    if content is None:
        return Position(seed=secrets.randbelow(2**31) if seed is None else seed)
    try:
        return Position(**content["position"])
    except (KeyError, TypeError) as error:
        raise _misfit(error) from error


def load_start_weights(job: TrainingJob, engine: Engine, position: Position) -> None:
    """Begin a new training from `job.start_weights`: the model, and the average from the same.

    Raises:
        CheckpointError: they cannot be read, or do not fit.
    """
    if job.start_weights is None:
        return
    report = load_pretrained(engine.raw_model, job.start_weights())
    if engine.ema is not None:
        engine.ema.module.load_state_dict(engine.raw_model.state_dict())
    tell(report)
    position.start = report.to_json()


def tell(report: LoadReport) -> None:
    """Log what became of a weight file: as a warning where something is left out or stays as it was drawn."""
    level = logging.WARNING if report.missing or report.unexpected else logging.INFO
    for line in report.lines():
        log.log(level, "%s", line)


def restore(content: Mapping[str, Any], engine: Engine, stopping: EarlyStopping, position: Position) -> None:
    """Put a checkpoint's weights, moments, averages, counters and random state where they belong.

    Raises:
        CheckpointError: they do not fit.
    """
    try:
        engine.raw_model.load_state_dict(content["model"])
        engine.optimizer.load_state_dict(content["optimizer"])
        if engine.ema is not None:
            engine.ema.module.load_state_dict(content["ema_model"])
            engine.ema.updates = content["ema_updates"]
        stopping.best, stopping.wait = content["early_stopping"]["best"], content["early_stopping"]["wait"]
        position.sums = {name: value.to(engine.device) for name, value in position.sums.items()}
        torch.set_rng_state(content["rng"]["torch"])
        # A run may go on on another kind of device: what that one lacks starts afresh.
        if engine.device.type == "cuda" and "cuda" in content["rng"]:
            torch.cuda.set_rng_state(content["rng"]["cuda"], engine.device)
        if content["scaler"]:
            engine.fabric.strategy.precision.load_state_dict(content["scaler"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise _misfit(error) from error


def _misfit(error: Exception) -> CheckpointError:
    reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
    return CheckpointError(
        f"{LATEST} does not fit this training: {reason}",
        hint="remove it, or give --force to the stage, to start anew",
    )


def mend_best_files(job: TrainingJob, best: dict[Source, dict[str, float]], publish: Publish) -> None:
    """Make files and record agree: weights that were lost leave `best`, and the best overall is what it says.

    Files reach a store one by one: a pod may be lost when it has the newest checkpoint, but not yet the best
    weights that this checkpoint tells of. Then the next evaluation counts as the first.
    """
    for source, record in list(best.items()):
        path = job.checkpoints / checkpoint.best_name(source)
        if not path.exists() or checkpoint.load(path)["epoch"] < record["epoch"]:
            log.warning("%s of epoch %d was lost: the next evaluation counts", path.name, int(record["epoch"]) + 1)
            del best[source]
    if not best:
        return
    total, source = job.checkpoints / BEST_TOTAL, best_source(best)
    content = checkpoint.load(job.checkpoints / checkpoint.best_name(source))
    found = checkpoint.load(total) if total.exists() else {}
    if (found.get("source"), found.get("epoch")) != (source, content["epoch"]):
        checkpoint.save(content, total)
        publish(total)


def best_source(best: Mapping[Source, Mapping[str, float]]) -> Source:
    """Which best weights are the best overall: the EMA's if strictly better (training spec 5.1)."""
    if "regular" not in best:
        return "ema"
    if "ema" not in best:
        return "regular"
    return "ema" if best["ema"]["score"] > best["regular"]["score"] else "regular"


def keep_best(
    job: TrainingJob,
    engine: Engine,
    best: dict[Source, dict[str, float]],
    scores: Mapping[Source, CocoMetrics],
    epoch: int,
    publish: Publish,
) -> None:
    """Write the best files that the evaluation of `epoch` improves on, and note it in `best`; the first counts."""
    improved: list[Source] = []
    for source, metrics in scores.items():
        score = monitored(job.train, metrics)
        if source not in best or score > best[source]["score"]:
            best[source] = {"score": score, "epoch": epoch}
            improved.append(source)
    for source in improved:
        module = engine.ema.module if source == "ema" and engine.ema is not None else engine.raw_model
        content = {
            "model": module.state_dict(),
            "source": source,
            "epoch": epoch,
            "metrics": scores[source].to_json(),
            **checkpoint.published_sections(job.model, job.dataset.class_map.names),
            **_provenance(job),
        }
        total = [BEST_TOTAL] if source == best_source(best) else []
        for name in (checkpoint.best_name(source), *total):
            checkpoint.save(content, job.checkpoints / name)
            publish(job.checkpoints / name)
    if improved:
        log.info("best so far: %s", "  ".join(f"{source} {kept['score']:.4f}" for source, kept in best.items()))


def monitored(train: TrainConfig, metrics: CocoMetrics) -> float:
    """The number that decides which weights are the best, and when training stops early."""
    return metrics.mar if train.best_model_metric == "mar" else metrics.map


def save(
    job: TrainingJob, engine: Engine, position: Position, stopping: EarlyStopping, name: str, publish: Publish
) -> None:
    """Write everything needed to continue after the last optimizer step."""
    rng = {"torch": torch.get_rng_state()}
    if engine.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(engine.device)
    content = {
        "model": engine.raw_model.state_dict(),
        "ema_model": engine.ema.module.state_dict() if engine.ema is not None else None,
        "ema_updates": engine.ema.updates if engine.ema is not None else 0,
        "optimizer": engine.optimizer.state_dict(),
        "scaler": engine.fabric.strategy.precision.state_dict(),
        "early_stopping": {"best": stopping.best, "wait": stopping.wait},
        "rng": rng,
        "position": {part.name: getattr(position, part.name) for part in fields(position)},
        **_provenance(job),
    }
    checkpoint.save(content, job.checkpoints / name)
    publish(job.checkpoints / name)


def _provenance(job: TrainingJob) -> dict[str, Any]:
    return {
        "inputs": job.inputs,
        "config": job.model.model_dump(mode="json"),
        "train_config": job.train.model_dump(mode="json"),
        "classes": job.dataset.class_map.to_json(),
        "dataset_digest": job.dataset.digest,
    }
