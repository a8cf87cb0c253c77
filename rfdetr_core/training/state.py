"""What a training is and where it stands, and how that goes into checkpoint files and back."""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from rfdetr_core.config import ModelConfig, TrainConfig
from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.errors import CheckpointError, RFDETRError
from rfdetr_core.evaluation.metrics import CocoMetrics
from rfdetr_core.models.weight_file import WeightFile, read_weight_file
from rfdetr_core.models.weights import LoadReport, load_pretrained
from rfdetr_core.training import checkpoint
from rfdetr_core.training.checkpoint import BEST_TOTAL, LATEST, Source
from rfdetr_core.training.distributed import World
from rfdetr_core.training.early_stopping import EarlyStopping
from rfdetr_core.training.engine import Engine

Publish = Callable[[Path], None]
"""Takes over a checkpoint file that is whole; files are published in the order of what they tell of each other."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingJob:
    """What to train, on what, and where to leave it.

    `inputs` identifies configuration, data and start weights: a checkpoint of other inputs is not continued by itself.
    `start_weights` and `resume` are asked when a new training begins, and not when one is continued. `resume` gives a
    checkpoint file to go on from, or weights; without both, the weights are drawn.
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
    resume: Callable[[], Path] | None = None
    predicted_peak_bytes: int | None = None  # of a worst-case step, by the probe


@dataclass(frozen=True)
class TrainingResult:
    """How a training ended."""

    epochs: int
    optimizer_steps: int
    seed: int
    best_source: str  # regular or ema
    best_score: float
    best_epoch: int  # zero-based
    stopped_early: bool
    skipped: tuple[str, ...]  # unreadable training images that were left out
    images_per_second: float  # of this process and the ranks beside it, evaluation and checkpoints included
    seconds: float  # of this process
    peak_memory_bytes: int  # most memory that a device held; on a CPU, that a process did
    predicted_peak_bytes: int | None  # by the probe, for training steps; None without one


@dataclass
class Position:
    """Where training stands, as it goes into a checkpoint: after `step` optimizer steps of `epoch`."""

    seed: int
    epoch: int = 0
    step: int = 0
    global_step: int = 0
    best: dict[Source, dict[str, float]] = field(default_factory=dict)  # source -> score, epoch, smoothed score
    smoothed: float = 0.0  # the raw weights' metric over the evaluations so far
    stopped_early: bool = False
    seconds: float = 0.0  # spent so far, over all processes
    sums: dict[str, Tensor] = field(default_factory=dict)  # of the loss terms of this epoch
    history: list[dict[str, Any]] = field(default_factory=list)  # the rows of metrics.jsonl
    start: dict[str, Any] | None = None  # what was loaded before the first step, if anything
    skipped: list[int] = field(default_factory=list)  # positions of unreadable training images
    trackers: dict[str, str] = field(default_factory=dict)  # ids of this training in W&B and MLflow

    def align(self, steps_per_epoch: int) -> None:
        """Take over a position of a training with epochs of another length: an epoch begun is begun anew."""
        if self.global_step != self.epoch * steps_per_epoch + self.step:
            self.step, self.global_step, self.sums = 0, self.epoch * steps_per_epoch, {}
            log.warning("an epoch has %d optimizer steps now: epoch %d begins anew", steps_per_epoch, self.epoch + 1)


class Outbox:
    """Checkpoint files written since the last publication.

    They are published together, checkpoint.pth last: what it tells of is there when it arrives, and where a training
    goes on from it, the best weights are those it knows.
    """

    def __init__(self, publish: Publish) -> None:
        self._publish = publish
        self._waiting: dict[str, Path] = {}

    def put(self, path: Path) -> None:
        """This file is whole; it may be written again before it is published."""
        self._waiting[path.name] = path

    def send(self) -> None:
        """Publish what waits."""
        for name in sorted(self._waiting, key=lambda name: name == LATEST):
            self._publish(self._waiting.pop(name))


@dataclass(frozen=True)
class Beginning:
    """What a training goes on from: a checkpoint's `content`, read from `path`; else `weights`, or drawn ones."""

    content: Mapping[str, Any] | None = None
    path: Path | None = None
    weights: Callable[[], WeightFile] | None = None


def beginning(job: TrainingJob) -> Beginning:
    """The newest whole checkpoint of the same inputs; else `job.resume`; else `job.start_weights`.

    Where another training begins, the folder is cleared: files of two trainings must not lie side by side under the
    same names.

    Raises:
        CheckpointError: a checkpoint is unreadable, or `job.resume` is of another architecture or other classes.
    """
    found = checkpoint.newest_whole(job.checkpoints)
    if found is not None and found[1].get("inputs") == job.inputs:
        return Beginning(content=found[1], path=found[0])
    if job.resume is not None:
        return _resumed(job, job.resume())
    if found is not None:
        log.warning("%s was made with another configuration or dataset: training starts anew", found[0].name)
    _clear(job.checkpoints)
    return Beginning(weights=job.start_weights)


def begin_together(job: TrainingJob, world: World) -> Beginning:
    """Together: `beginning`, the main rank first, since it may clear the folder; other nodes get its checkpoint.

    Raises:
        RFDETRError: the nodes would go on from different points all the same, or train different things.
    """
    begin = beginning(job) if world.is_main else None
    own = begin is not None and begin.path is not None and begin.path.parent.resolve() == job.checkpoints.resolve()
    name = world.from_main(begin.path.name if own and begin is not None and begin.path is not None else None)
    if name is not None:
        world.file_from_main(job.checkpoints / name)
    if begin is None:
        begin = beginning(job)
    step = (begin.content or {}).get("position", {}).get("global_step", 0)  # what is not whole is refused by all
    if len(set(world.texts(f"{job.inputs} {step}"))) > 1:
        raise RFDETRError(
            "the nodes begin with different trainings or checkpoints",
            hint="give all of them the same config, and each an empty folder of its own",
        )
    return begin


def _resumed(job: TrainingJob, path: Path) -> Beginning:
    """Go on from a file that the user named: fully from a checkpoint, with its weights only from any other."""
    try:
        content = checkpoint.load(path)
    except CheckpointError as error:
        if not path.exists():
            raise CheckpointError(f"train.resume: {path}: no such file", hint="check the path") from error
        content = {}  # no checkpoint of ours, or damaged: the reader of weight files tells
    if "position" not in content:
        log.warning("train.resume: %s holds weights only: optimizer and schedule start from step 0", path.name)
        weights = read_weight_file(path)
        _clear(job.checkpoints, keep=path)  # until this training has a checkpoint of its own, it may begin again
        return Beginning(weights=lambda: weights)
    refuse_another_detector(job, content, path)
    position = {**content["position"], "stopped_early": False, "seconds": 0.0, "trackers": {}}
    stopping = content["early_stopping"]
    if path.parent.resolve() != job.checkpoints.resolve():
        _clear(job.checkpoints)
        position["best"] = {}  # of files that lie elsewhere
    if content.get("dataset_digest") != job.dataset.digest:  # other images, and scores that cannot be compared
        position["skipped"], position["best"] = [], {}
        stopping = {"best": -math.inf, "wait": 0}
    if job.train.seed not in (None, position["seed"]):
        log.warning("train.seed: %s has no effect: %s began with %d", job.train.seed, path.name, position["seed"])
    log.info("resuming %s after epoch %d, optimizer step %d", path, position["epoch"], position["global_step"])
    return Beginning(content={**content, "position": position, "early_stopping": stopping}, path=path)


def refuse_another_detector(job: TrainingJob, content: Mapping[str, Any], path: Path) -> None:
    """Refuse a checkpoint whose weights mean something else.

    Raises:
        CheckpointError: other classes, or another architecture; the message names the difference.
    """
    hint = "resume with the settings that it was trained with, or give it as pretrain_weights"
    classes = [row["name"] for row in content.get("classes", ())]
    names = list(job.dataset.class_map.names)
    if classes != names:
        gone, new = sorted(set(classes) - set(names)), sorted(set(names) - set(classes))
        what = "; ".join(
            f"{text} {', '.join(part[:8])}" for text, part in (("it alone has", gone), ("it lacks", new)) if part
        )
        raise CheckpointError(f"{path}: is of other classes: {what or 'another order'}", hint=hint)
    theirs, ours = content.get("config", {}), job.model.model_dump(mode="json")
    differing = [
        f"{name} {theirs.get(name)}, here {ours[name]}"
        for name in sorted(ARCHITECTURE & ours.keys())
        if name in theirs and theirs[name] != ours[name]
    ]
    if differing:
        raise CheckpointError(f"{path}: is of another architecture: {'; '.join(differing)}", hint=hint)


ARCHITECTURE = {*checkpoint.PUBLISHED_FIELDS} - {"resolution", "num_select", "ia_bce_loss"}
"""Fields of ModelConfig that decide which tensors there are, and of which shape."""


def _clear(folder: Path, *, keep: Path | None = None) -> None:
    for stale in checkpoint.own_files(folder):
        if keep is None or stale.resolve() != keep.resolve():
            stale.unlink()


def start_position(begin: Beginning, seed: int | None) -> Position:
    """The position of a checkpoint, else the beginning with the given seed or a drawn one.

    Raises:
        CheckpointError: the checkpoint has no position that this program knows.
    """
    if begin.content is None:
        return Position(seed=secrets.randbelow(2**31) if seed is None else seed)
    try:
        return Position(**begin.content["position"])
    except (KeyError, TypeError) as error:
        raise _misfit(error, begin.path) from error


def load_start_weights(weights: Callable[[], WeightFile], engine: Engine, position: Position) -> None:
    """Begin a new training from weights: the model, and the average from the same.

    Raises:
        CheckpointError: they cannot be read, or do not fit.
    """
    report = load_pretrained(engine.raw_model, weights())
    if engine.ema is not None:
        engine.ema.module.load_state_dict(engine.raw_model.state_dict())
    tell(report)
    position.start = report.to_json()


def tell(report: LoadReport) -> None:
    """Log what became of a weight file: as a warning where something is left out or stays as it was drawn."""
    level = logging.WARNING if report.missing or report.unexpected else logging.INFO
    for line in report.lines():
        log.log(level, "%s", line)


def restore(begin: Beginning, engine: Engine, stopping: EarlyStopping, position: Position) -> None:
    """Put a checkpoint's weights, moments, averages, counters and random state where they belong.

    Raises:
        CheckpointError: they do not fit.
    """
    content = begin.content or {}
    try:
        engine.raw_model.load_state_dict(content["model"])
        decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
        engine.optimizer.load_state_dict(content["optimizer"])
        for group, decay in zip(engine.optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay  # the configuration's, which a resumed training may change
        if engine.ema is not None and content["ema_model"] is not None:
            engine.ema.module.load_state_dict(content["ema_model"])
            engine.ema.updates = content["ema_updates"]
        elif engine.ema is not None:
            engine.ema.module.load_state_dict(engine.raw_model.state_dict())
            log.warning("the checkpoint has no averaged weights (train.use_ema): the average begins with its weights")
        stopping.best, stopping.wait = content["early_stopping"]["best"], content["early_stopping"]["wait"]
        position.sums = {name: value.to(engine.device) for name, value in position.sums.items()}
        engine.set_random_state(content["rng"])
        if content["scaler"]:
            engine.fabric.strategy.precision.load_state_dict(content["scaler"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise _misfit(error, begin.path) from error


def _misfit(error: Exception, path: Path | None) -> CheckpointError:
    reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:160]
    return CheckpointError(
        f"{path} does not fit this training: {reason}",
        hint="give another output folder, or --force to the stage, to start anew",
    )


def mend_best_files(job: TrainingJob, best: dict[Source, dict[str, float]], outbox: Outbox) -> None:
    """Make files and record agree: weights that were lost leave `best`, and the best overall is what it says.

    Files reach a store one by one: a pod may be lost when it has the newest checkpoint, but not yet the best
    weights that this checkpoint tells of. Then the next evaluation counts as the first.
    """
    total = job.checkpoints / BEST_TOTAL
    if job.train.dont_save_weights:  # there is no other file
        found = _readable(total)
        if best and (not found or found["epoch"] < best[best_source(best)]["epoch"]):
            log.warning("%s was lost: the next evaluation counts", BEST_TOTAL)
            best.clear()
        return
    for source, record in list(best.items()):
        path = job.checkpoints / checkpoint.best_name(source)
        found = _readable(path)
        if not found or found["epoch"] < record["epoch"]:
            log.warning("%s of epoch %d was lost: the next evaluation counts", path.name, int(record["epoch"]) + 1)
            del best[source]
    if best:
        _copy_best_overall(job, best_source(best), outbox)


def _copy_best_overall(job: TrainingJob, source: Source, outbox: Outbox) -> None:
    """Make checkpoint_best_total.pth the best weights of this kind, unless it is already."""
    total = job.checkpoints / BEST_TOTAL
    content = checkpoint.load(job.checkpoints / checkpoint.best_name(source))
    found = _readable(total)
    if (found.get("source"), found.get("epoch")) != (source, content["epoch"]):
        checkpoint.save(content, total)
        outbox.put(total)


def _readable(path: Path) -> dict[str, Any]:
    """The content of a best file; empty if it is absent or damaged."""
    try:
        return checkpoint.load(path) if path.exists() else {}
    except CheckpointError as error:
        log.warning("%s", error.message)
        return {}


def best_source(best: Mapping[Source, Mapping[str, float]]) -> Source:
    """Which best weights are the best overall: the EMA's if strictly better (training spec 5.1)."""
    if "regular" not in best:
        return "ema"
    if "ema" not in best:
        return "regular"
    return "ema" if best["ema"]["score"] > best["regular"]["score"] else "regular"


def _best_overall(best: Mapping[Source, Mapping[str, float]]) -> tuple[Source, float] | None:
    return (best_source(best), best[best_source(best)]["epoch"]) if best else None


def keep_best(
    job: TrainingJob,
    engine: Engine,
    position: Position,
    scores: Mapping[Source, CocoMetrics],
    epoch: int,
    outbox: Outbox,
) -> None:
    """Write the best files that the evaluation of `epoch` improves on, and note it in `position.best`.

    The first evaluation counts. `smooth_alpha` decides by the smoothed score of the raw weights whether they are
    better; which kind is the best overall is decided by the scores themselves (training spec 5.2). So raw weights of
    a lower score may take the place of those that were the best overall: then the EMA's are.
    """
    best = position.best
    before = _best_overall(best)
    improved: list[Source] = []
    for source, metrics in scores.items():
        score = monitored(job.train, metrics)
        decisive = position.smoothed if source == "regular" else score
        if source not in best or decisive > best[source]["decisive"]:
            best[source] = {"score": score, "decisive": decisive, "epoch": epoch}
            improved.append(source)
    demoted = bool(improved) and best_source(best) not in improved and _best_overall(best) != before
    if demoted and job.train.dont_save_weights:
        del best[best_source(best)]  # no file has these weights
    for source in improved:
        module = engine.ema.module if source == "ema" and engine.ema is not None else engine.raw_model
        content = {
            "model": module.state_dict(),
            "source": source,
            "epoch": epoch,
            "metrics": scores[source].to_json(),
            **checkpoint.published_sections(job.model, job.dataset.class_map.names, notes=job.train.notes),
            **_provenance(job),
        }
        names = [] if job.train.dont_save_weights else [checkpoint.best_name(source)]
        names += [BEST_TOTAL] if source == best_source(best) else []
        for name in names:
            checkpoint.save(content, job.checkpoints / name)
            outbox.put(job.checkpoints / name)
    if demoted and not job.train.dont_save_weights:
        _copy_best_overall(job, best_source(best), outbox)
    if improved:
        log.info("best so far: %s", "  ".join(f"{source} {kept['score']:.4f}" for source, kept in best.items()))


def smooth(job: TrainingJob, position: Position, scores: Mapping[Source, CocoMetrics]) -> None:
    """Follow the raw weights' metric: m <- a m + (1 - a) score, from 0 (training spec 5.2)."""
    if "regular" in scores:
        alpha = job.train.smooth_alpha
        position.smoothed = alpha * position.smoothed + (1.0 - alpha) * monitored(job.train, scores["regular"])


def monitored(train: TrainConfig, metrics: CocoMetrics) -> float:
    """The number that decides which weights are the best, and when training stops early."""
    return metrics.mar if train.best_model_metric == "mar" else metrics.map


def save(
    job: TrainingJob, engine: Engine, position: Position, stopping: EarlyStopping, name: str, outbox: Outbox
) -> None:
    """Write everything needed to continue after the last optimizer step."""
    content = {
        "model": engine.raw_model.state_dict(),
        "ema_model": engine.ema.module.state_dict() if engine.ema is not None else None,
        "ema_updates": engine.ema.updates if engine.ema is not None else 0,
        "optimizer": engine.optimizer.state_dict(),
        "scaler": engine.fabric.strategy.precision.state_dict(),
        "early_stopping": {"best": stopping.best, "wait": stopping.wait},
        "rng": engine.random_state(),
        "position": {part.name: getattr(position, part.name) for part in fields(position)},
        **_provenance(job),
    }
    checkpoint.save(content, job.checkpoints / name)
    outbox.put(job.checkpoints / name)


def _provenance(job: TrainingJob) -> dict[str, Any]:
    return {
        "inputs": job.inputs,
        "config": job.model.model_dump(mode="json"),
        "train_config": job.train.model_dump(mode="json"),
        "classes": job.dataset.class_map.to_json(),
        "dataset_digest": job.dataset.digest,
    }
