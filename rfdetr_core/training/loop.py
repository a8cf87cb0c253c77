"""The training loop: one flat function, the order of events is the order of its lines (DESIGN section 6)."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from rfdetr_core.data.loading import Batch, EpochSampler, LoaderSettings, eval_loader, train_loader
from rfdetr_core.data.prepared import PreparedSplit
from rfdetr_core.data.scales import configured_scales
from rfdetr_core.errors import Terminated
from rfdetr_core.evaluation.detections import Detections
from rfdetr_core.evaluation.inference import predict_split
from rfdetr_core.evaluation.metrics import CocoMetrics, coco_metrics
from rfdetr_core.storage.local import local_errors
from rfdetr_core.training import metrics_log
from rfdetr_core.training.checkpoint import LATEST, Source, periodic_name
from rfdetr_core.training.early_stopping import EarlyStopping, monitored_value
from rfdetr_core.training.engine import Engine, build_engine, memory_errors
from rfdetr_core.training.progress import Progress
from rfdetr_core.training.schedule import Schedule
from rfdetr_core.training.state import (
    Position,
    Publish,
    TrainingJob,
    best_source,
    keep_best,
    load_start_weights,
    mend_best_files,
    monitored,
    restore,
    resumable,
    save,
    start_position,
)

__all__ = ["TrainingJob", "TrainingResult", "train"]

WEIGHTS_REPORT = "weights.json"
"""What of the start weights was loaded, cut or left out; only where a training starts from some."""

log = logging.getLogger(__name__)


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
    images_per_second: float  # of this process, evaluation and checkpoints included
    seconds: float  # of this process


def train(
    job: TrainingJob,
    *,
    publish: Publish = lambda path: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> TrainingResult:
    """Train to the end, continuing from `checkpoint.pth` if there is one of the same inputs.

    Args:
        publish: told of every checkpoint file as soon as it is whole.
        stop_requested: asked after every optimizer step and every evaluated batch; true ends with a checkpoint and
            `Terminated`.

    Raises:
        TrainingError: a loss that is not finite, or out of memory.
        CheckpointError: `checkpoint.pth` or the start weights are unreadable, or do not fit.
        StorageAccessError: a checkpoint cannot be written.
        Terminated: the stop was asked for; everything is resumable.
    """
    started = time.monotonic()
    config = job.train

    # ---- where to start -----------------------------------------------------------------------------------
    for folder in (job.output, job.checkpoints):
        with local_errors("write", folder):
            folder.mkdir(parents=True, exist_ok=True)
    content = resumable(job)
    position = start_position(content, config.seed)
    torch.manual_seed(position.seed)
    engine = build_engine(job.model, config)
    stopping = EarlyStopping(config.early_stopping_patience, config.early_stopping_min_delta)
    if content is None:
        load_start_weights(job, engine, position)
    else:
        restore(content, engine, stopping, position)
        mend_best_files(job, position.best, publish)
    if position.start is not None:
        (job.output / WEIGHTS_REPORT).write_text(json.dumps(position.start, indent=2) + "\n")
    del content  # weights, moments and average once more, in host memory
    metrics_log.begin(job.output, position.history)

    # ---- data and schedule --------------------------------------------------------------------------------
    train_split, valid_split = job.dataset.split("train"), job.dataset.split("valid")
    scales = configured_scales(job.model, config)
    sampler = EpochSampler(
        len(train_split),
        batch_size=job.batch_size,
        grad_accum_steps=job.grad_accum_steps,
        seed=position.seed,
        scales=scales,
    )
    loader, valid_loader = _loaders(job, engine, sampler, train_split, valid_split, position.seed)
    schedule = Schedule(
        kind=config.lr_scheduler,
        epochs=config.epochs,
        steps_per_epoch=sampler.steps_per_epoch,
        warmup_epochs=config.warmup_epochs,
        lr_drop=config.lr_drop,
        min_factor=config.lr_min_factor,
    )
    total_steps = config.epochs * sampler.steps_per_epoch
    _announce(job, engine, len(train_split), sampler, scales, position)
    last_save = time.monotonic()

    with Progress(style=config.progress_bar, total_steps=total_steps, done_steps=position.global_step) as progress:
        while position.epoch < config.epochs and not position.stopped_early:
            # ---- one epoch of optimizer steps -------------------------------------------------------------
            sampler.start(position.epoch, position.step)
            for window in _windows(loader, job.grad_accum_steps):
                factor = schedule.factor(position.global_step)
                terms = engine.optimizer_step(window, factor=factor, global_step=position.global_step)
                position.step += 1
                position.global_step += 1
                for name, value in terms.items():
                    position.sums[name] = position.sums[name] + value if name in position.sums else value

                if progress.step(job.batch_size * job.grad_accum_steps):
                    progress.show(
                        epoch=f"{position.epoch + 1}/{config.epochs}",
                        loss=float(position.sums["loss"]) / position.step,
                        lr=config.lr * factor,
                    )
                stopping_now = stop_requested()
                if stopping_now or time.monotonic() - last_save > 60 * config.checkpoint_minutes:
                    save(job, engine, position, stopping, LATEST, publish)
                    last_save = time.monotonic()
                if stopping_now:
                    raise _terminated(position)

            # ---- the epoch's numbers ----------------------------------------------------------------------
            row: dict[str, Any] = {"epoch": position.epoch, "step": position.global_step - 1}
            row |= {f"train/{name}": float(value) / position.step for name, value in position.sums.items()}
            row["train/lr"] = config.lr * schedule.factor(position.global_step - 1)
            if (position.epoch + 1) % config.eval_interval == 0 or position.epoch + 1 == config.epochs:
                scores = _evaluate(job, engine, valid_split, valid_loader, stop_requested)
                if scores is None:
                    save(job, engine, position, stopping, LATEST, publish)
                    raise _terminated(position)
                row |= _metric_row(scores, per_class=config.log_per_class_metrics)
                progress.evaluated(max(metrics.map for metrics in scores.values()))
                if position.epoch >= config.skip_best_epochs:
                    keep_best(job, engine, position.best, scores, position.epoch, publish)
                    position.stopped_early = config.early_stopping and _stops_early(job, stopping, scores)
            row["images_per_second"] = progress.images_per_second
            position.history.append(row)
            metrics_log.append(job.output, position.history)
            _tell(row, config.epochs)

            # ---- the epoch is over ------------------------------------------------------------------------
            position.epoch, position.step, position.sums = position.epoch + 1, 0, {}
            save(job, engine, position, stopping, LATEST, publish)
            last_save = time.monotonic()
            if position.epoch % config.checkpoint_interval == 0:
                save(job, engine, position, stopping, periodic_name(position.epoch - 1), publish)

    if not position.best:  # lost after the last epoch (see mend_best_files): the weights at hand are the best
        scores = _evaluate(job, engine, valid_split, valid_loader, stop_requested)
        if scores is None:
            raise _terminated(position)
        keep_best(job, engine, position.best, scores, position.epoch - 1, publish)
    source = best_source(position.best)
    return TrainingResult(
        epochs=position.epoch,
        optimizer_steps=position.global_step,
        seed=position.seed,
        best_source=source,
        best_score=position.best[source]["score"],
        best_epoch=int(position.best[source]["epoch"]),
        stopped_early=position.stopped_early,
        images_per_second=progress.images_per_second,
        seconds=time.monotonic() - started,
    )


def _loaders(
    job: TrainingJob, engine: Engine, sampler: EpochSampler, train: PreparedSplit, valid: PreparedSplit, seed: int
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Training batches in the sampler's order, and every validation image once."""
    config = job.train
    settings = LoaderSettings(config.num_workers, config.pin_memory, config.persistent_workers, config.prefetch_factor)
    train_batches = train_loader(
        train,
        sampler,
        settings,
        engine.device,
        seed=seed,
        scale_jitter=config.scale_jitter,
        flip=config.aug_config is None,
    )
    eval_batches = eval_loader(
        valid,
        settings,
        engine.device,
        resolution=job.model.resolution,
        batch_size=config.eval_batch_size or job.batch_size,
    )
    for loader in (train_batches, eval_batches):
        # A loader draws a number whenever it begins. From torch's own stream, which drop path reads on a CPU, a
        # resumed epoch would draw once more than an uninterrupted one.
        loader.generator = torch.Generator()
    return train_batches, eval_batches


def _windows(loader: DataLoader[Any], accum: int) -> Iterator[list[Batch]]:
    """Groups of `accum` micro-batches: what one optimizer step consumes."""
    window: list[Batch] = []
    for batch in loader:
        window.append(batch)
        if len(window) == accum:
            yield window
            window = []


def _terminated(position: Position) -> Terminated:
    return Terminated(
        f"stopped on request after optimizer step {position.global_step}",
        hint="run the same command again to continue",
    )


def _announce(
    job: TrainingJob, engine: Engine, images: int, sampler: EpochSampler, scales: list[int], position: Position
) -> None:
    parameters = sum(p.numel() for p in engine.raw_model.parameters())
    log.info(
        "%s %.1f M parameters on %s (%s), %d train images, batch %d x %d, %d steps per epoch, sides %s px, seed %d",
        job.model.variant,
        parameters / 1e6,
        engine.device,
        engine.precision,
        images,
        job.batch_size,
        job.grad_accum_steps,
        sampler.steps_per_epoch,
        f"{scales[0]}..{scales[-1]}" if len(scales) > 1 else scales[0],
        position.seed,
    )
    if position.global_step:
        log.info("continuing after epoch %d, optimizer step %d", position.epoch, position.global_step)


def _evaluate(
    job: TrainingJob,
    engine: Engine,
    split: PreparedSplit,
    loader: DataLoader[Any],
    stop_requested: Callable[[], bool],
) -> dict[Source, CocoMetrics] | None:
    """Validation metrics of the EMA, and of the raw weights if asked for or alone; None if a stop was asked for.

    Each batch is read once and run through both.
    """
    models: dict[Source, nn.Module] = {}
    if engine.ema is None or job.train.eval_base_model:
        models["regular"] = engine.raw_model.eval()
    if engine.ema is not None:
        models["ema"] = engine.ema.module
    parts: dict[Source, list[Detections]] = {source: [] for source in models}
    hint = "lower train.eval_batch_size"
    for batch in loader:
        with memory_errors(f"on {engine.device} in evaluation at batch size {len(batch.counts)}", hint=hint):
            for source, model in models.items():
                detections = predict_split(
                    model,
                    [batch],
                    split.table,
                    num_select=job.model.num_select,
                    num_classes=len(job.dataset.class_map),
                    device=engine.device,
                    autocast=engine.autocast,
                )
                parts[source].append(detections)
        if stop_requested():
            return None
    engine.model.train()
    return {
        source: coco_metrics(
            split.table, job.dataset.class_map, Detections.concatenate(found), max_dets=job.train.eval_max_dets
        )
        for source, found in parts.items()
    }


def _metric_row(scores: dict[Source, CocoMetrics], *, per_class: bool) -> dict[str, float]:
    """Names as in training spec section 8."""
    row: dict[str, float] = {}
    for source, metrics in scores.items():
        prefix = "val/ema_" if source == "ema" else "val/"
        numbers = {
            "mAP_50_95": metrics.map,
            "mAP_50": metrics.map50,
            "mAP_75": metrics.map75,
            "mAR": metrics.mar,
            "F1": metrics.f1,
            "F1_threshold": metrics.f1_threshold,
            "precision": metrics.precision,
            "recall": metrics.recall,
        }
        row |= {prefix + name: value for name, value in numbers.items()}
        if per_class:
            row |= {f"{prefix}AP/{name}": v["ap"] for name, v in metrics.per_class.items() if v["ap"] >= 0}
    return row


def _stops_early(job: TrainingJob, stopping: EarlyStopping, scores: dict[Source, CocoMetrics]) -> bool:
    values = {source: monitored(job.train, metrics) for source, metrics in scores.items()}
    value = monitored_value(values.get("regular"), values.get("ema"), use_ema=job.train.early_stopping_use_ema)
    if not stopping.should_stop(value):
        return False
    log.info("early stopping: no gain of %g in %d evaluations", stopping.min_delta, stopping.patience)
    return True


def _tell(row: dict[str, Any], epochs: int) -> None:
    """The epoch's line, and one of AP per class where there is any."""
    parts = [f"epoch {row['epoch'] + 1}/{epochs} done", f"loss {row['train/loss']:.3f}"]
    for prefix, title in (("val/", ""), ("val/ema_", "EMA ")):
        if f"{prefix}mAP_50_95" in row:
            parts.append(f"{title}mAP {row[f'{prefix}mAP_50_95']:.3f}  {title}mAP50 {row[f'{prefix}mAP_50']:.3f}")
    log.info("%s", "  ".join([*parts, f"{row['images_per_second']:.1f} images/s"]))
    best = "val/ema_AP/" if any(name.startswith("val/ema_AP/") for name in row) else "val/AP/"
    classes = [f"{name.removeprefix(best)} {value:.3f}" for name, value in row.items() if name.startswith(best)]
    if classes:
        log.info("%sAP per class: %s", "EMA " if "ema" in best else "", "  ".join(classes))
