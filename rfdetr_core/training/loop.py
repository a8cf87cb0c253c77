"""The training loop: one flat function, the order of events is the order of its lines (DESIGN section 6)."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rfdetr_core.config import ModelConfig, TrainConfig
from rfdetr_core.data.loading import Batch, EpochSampler, LoaderSettings, eval_loader, train_loader
from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.data.scales import training_scales
from rfdetr_core.errors import CheckpointError, Terminated
from rfdetr_core.evaluation.inference import predict_split
from rfdetr_core.evaluation.metrics import CocoMetrics, coco_metrics
from rfdetr_core.training import checkpoint, metrics_log
from rfdetr_core.training.early_stopping import EarlyStopping, monitored_value
from rfdetr_core.training.engine import Engine, build_engine
from rfdetr_core.training.progress import Progress
from rfdetr_core.training.schedule import Schedule

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingJob:
    """What to train, on what, and where to leave it.

    `inputs` identifies configuration and data: a checkpoint of other inputs is not continued.
    """

    model: ModelConfig
    train: TrainConfig
    dataset: PreparedDataset
    checkpoints: Path  # folder of the checkpoint files
    output: Path  # folder of metrics.jsonl and metrics.csv
    batch_size: int
    grad_accum_steps: int
    inputs: str


@dataclass
class Position:
    """Where training stands, as it goes into a checkpoint: after `step` optimizer steps of `epoch`."""

    seed: int
    epoch: int = 0
    step: int = 0
    global_step: int = 0
    best: dict[str, dict[str, float]] = field(default_factory=dict)  # regular, ema -> score, epoch
    stopped_early: bool = False
    sums: dict[str, Tensor] = field(default_factory=dict)  # of the loss terms of this epoch
    history: list[dict[str, Any]] = field(default_factory=list)  # the rows of metrics.jsonl


@dataclass(frozen=True)
class TrainingResult:
    """How a training ended."""

    epochs: int
    optimizer_steps: int
    seed: int
    best_source: str  # regular or ema
    best_score: float
    best_epoch: int
    stopped_early: bool
    images_per_second: float
    seconds: float


def train(
    job: TrainingJob,
    *,
    publish: Callable[[Path], None] = lambda path: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> TrainingResult:
    """Train to the end, continuing from `checkpoint.pth` if there is one of the same inputs.

    Args:
        publish: told of every checkpoint file as soon as it is whole.
        stop_requested: asked after every optimizer step; true ends with a checkpoint and `Terminated`.

    Raises:
        TrainingError: a loss that is not finite, or out of memory.
        CheckpointError: `checkpoint.pth` is unreadable.
        Terminated: the stop was asked for; everything is resumable.
    """
    started = time.monotonic()
    config = job.train

    # ---- where to start -----------------------------------------------------------------------------------
    job.output.mkdir(parents=True, exist_ok=True)
    job.checkpoints.mkdir(parents=True, exist_ok=True)
    resumed = _resumable(job)
    position = _position(resumed, config.seed)
    torch.manual_seed(position.seed)
    engine = build_engine(job.model, config)
    stopping = EarlyStopping(config.early_stopping_patience, config.early_stopping_min_delta)
    if resumed is not None:
        _restore(resumed, engine, stopping)
    metrics_log.rewrite(job.output, position.history)

    # ---- data and schedule --------------------------------------------------------------------------------
    multi_scale = config.multi_scale != "off"
    scales = training_scales(
        job.model.resolution, job.model.block, multi_scale=multi_scale, expanded=config.expanded_scales
    )
    split = job.dataset.split("train")
    sampler = EpochSampler(
        len(split),
        batch_size=job.batch_size,
        grad_accum_steps=job.grad_accum_steps,
        seed=position.seed,
        scales=scales,
    )
    settings = LoaderSettings(config.num_workers, config.pin_memory, config.persistent_workers, config.prefetch_factor)
    loader = train_loader(
        split,
        sampler,
        settings,
        engine.device,
        seed=position.seed,
        scale_jitter=config.scale_jitter,
        flip=config.aug_config is None,
    )
    schedule = Schedule(
        kind=config.lr_scheduler,
        epochs=config.epochs,
        steps_per_epoch=sampler.steps_per_epoch,
        warmup_epochs=config.warmup_epochs,
        lr_drop=config.lr_drop,
        min_factor=config.lr_min_factor,
    )
    progress = Progress(
        style=config.progress_bar,
        total_steps=config.epochs * sampler.steps_per_epoch,
        done_steps=position.global_step,
    )
    _announce(job, engine, sampler, scales, position)
    last_save = time.monotonic()

    while position.epoch < config.epochs and not position.stopped_early:
        # ---- one epoch of optimizer steps -----------------------------------------------------------------
        sampler.start(position.epoch, position.step)
        for window in _windows(loader, job.grad_accum_steps):
            factor = schedule.factor(position.global_step)
            terms = engine.optimizer_step(window, factor=factor, global_step=position.global_step)
            position.step += 1
            position.global_step += 1
            for name, value in terms.items():
                position.sums[name] = position.sums.get(name, torch.zeros_like(value)) + value

            if progress.step(job.batch_size * job.grad_accum_steps):
                progress.show(
                    epoch=f"{position.epoch + 1}/{config.epochs}",
                    loss=float(position.sums["loss"]) / position.step,
                    lr=config.lr * factor,
                )
            stopping_now = stop_requested()
            if stopping_now or time.monotonic() - last_save > 60 * config.checkpoint_minutes:
                _save(job, engine, position, stopping, checkpoint.LATEST, publish)
                last_save = time.monotonic()
            if stopping_now:
                progress.close()
                raise Terminated(
                    f"stopped by SIGTERM after optimizer step {position.global_step}",
                    hint="run the same command again to continue",
                )

        # ---- the epoch's numbers --------------------------------------------------------------------------
        row: dict[str, Any] = {"epoch": position.epoch, "step": position.global_step - 1}
        row |= {f"train/{name}": float(value) / position.step for name, value in position.sums.items()}
        row["train/lr"] = config.lr * schedule.factor(position.global_step - 1)
        if (position.epoch + 1) % config.eval_interval == 0 or position.epoch + 1 == config.epochs:
            scores = _evaluate(job, engine, settings)
            row |= _metric_row(scores, per_class=config.log_per_class_metrics)
            progress.evaluated(max(metrics.map for metrics in scores.values()))
            _keep_best(job, engine, position, scores, publish)
            position.stopped_early = _stops_early(job, stopping, scores, position.epoch)
        row["images_per_second"] = progress.images_per_second
        position.history.append(row)
        metrics_log.append(job.output, row)
        log.info("%s", _epoch_line(row, config.epochs))

        # ---- the epoch is over ----------------------------------------------------------------------------
        position.epoch, position.step, position.sums = position.epoch + 1, 0, {}
        _save(job, engine, position, stopping, checkpoint.LATEST, publish)
        last_save = time.monotonic()
        if position.epoch % config.checkpoint_interval == 0:
            _save(job, engine, position, stopping, checkpoint.periodic_name(position.epoch - 1), publish)

    progress.close()
    metrics_log.write_csv(job.output, position.history)
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


def best_source(best: dict[str, dict[str, float]]) -> checkpoint.Source:
    """Which best weights are the best overall: the EMA's if strictly better (training spec 5.1)."""
    if "regular" not in best:
        return "ema"
    if "ema" not in best:
        return "regular"
    return "ema" if best["ema"]["score"] > best["regular"]["score"] else "regular"


def _windows(loader: Any, accum: int) -> Iterator[list[Batch]]:
    """Groups of `accum` micro-batches: what one optimizer step consumes."""
    window: list[Batch] = []
    for batch in loader:
        window.append(batch)
        if len(window) == accum:
            yield window
            window = []


def _resumable(job: TrainingJob) -> dict[str, Any] | None:
    path = job.checkpoints / checkpoint.LATEST
    if not path.exists():
        return None
    content = checkpoint.load(path)
    if content.get("inputs") != job.inputs:
        log.warning("%s was made with another configuration or dataset: training starts anew", path.name)
        return None
    return content


def _position(resumed: dict[str, Any] | None, seed: int | None) -> Position:
    if resumed is not None:
        return Position(**resumed["position"])
    return Position(seed=secrets.randbelow(2**31) if seed is None else seed)


def _restore(content: dict[str, Any], engine: Engine, stopping: EarlyStopping) -> None:
    try:
        engine.raw_model.load_state_dict(content["model"])
        engine.optimizer.load_state_dict(content["optimizer"])
        if engine.ema is not None:
            engine.ema.module.load_state_dict(content["ema_model"])
            engine.ema.updates = content["ema_updates"]
        engine.fabric.strategy.precision.load_state_dict(content["scaler"])
        stopping.best, stopping.wait = content["early_stopping"]["best"], content["early_stopping"]["wait"]
        torch.set_rng_state(content["rng"]["torch"])
        if engine.device.type == "cuda":
            torch.cuda.set_rng_state(content["rng"]["cuda"], engine.device)
    except (KeyError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{checkpoint.LATEST} does not fit this training: {reason}", hint="run with --force to start anew"
        ) from error


def _announce(job: TrainingJob, engine: Engine, sampler: EpochSampler, scales: list[int], position: Position) -> None:
    parameters = sum(p.numel() for p in engine.raw_model.parameters())
    log.info(
        "%s %.1f M parameters on %s (%s), %d train images, batch %d x %d, %d steps per epoch, sides %s px, seed %d",
        job.model.variant,
        parameters / 1e6,
        engine.device,
        engine.precision,
        len(job.dataset.split("train")),
        job.batch_size,
        job.grad_accum_steps,
        sampler.steps_per_epoch,
        f"{scales[0]}..{scales[-1]}" if len(scales) > 1 else scales[0],
        position.seed,
    )
    if position.global_step:
        log.info("continuing after epoch %d, optimizer step %d", position.epoch, position.global_step)


def _evaluate(job: TrainingJob, engine: Engine, settings: LoaderSettings) -> dict[checkpoint.Source, CocoMetrics]:
    """Validation metrics of the EMA, and of the raw weights if asked for or alone."""
    models: dict[checkpoint.Source, nn.Module] = {}
    if engine.ema is None or job.train.eval_base_model:
        models["regular"] = engine.raw_model
    if engine.ema is not None:
        models["ema"] = engine.ema.module
    split = job.dataset.split("valid")
    loader = eval_loader(
        split,
        settings,
        engine.device,
        resolution=job.model.resolution,
        batch_size=job.train.eval_batch_size or job.batch_size,
    )
    scores: dict[checkpoint.Source, CocoMetrics] = {}
    for source, model in models.items():
        model.eval()
        detections = predict_split(
            model,
            loader,
            split.table,
            num_select=job.model.num_select,
            num_classes=len(job.dataset.class_map),
            device=engine.device,
            autocast=engine.autocast,
        )
        scores[source] = coco_metrics(split.table, job.dataset.class_map, detections, max_dets=job.train.eval_max_dets)
    engine.model.train()
    return scores


def _metric_row(scores: dict[checkpoint.Source, CocoMetrics], *, per_class: bool) -> dict[str, float]:
    """Names as in training spec section 8."""
    row: dict[str, float] = {}
    for source, metrics in scores.items():
        prefix = "val/ema_" if source == "ema" else "val/"
        row[f"{prefix}mAP_50_95"] = metrics.map
        row[f"{prefix}mAP_50"] = metrics.map50
        row[f"{prefix}mAP_75"] = metrics.map75
        row[f"{prefix}mAR"] = metrics.mar
        if per_class:
            row |= {f"{prefix}AP/{name}": v["ap"] for name, v in metrics.per_class.items() if v["ap"] >= 0}
    return row


def _keep_best(
    job: TrainingJob,
    engine: Engine,
    position: Position,
    scores: dict[checkpoint.Source, CocoMetrics],
    publish: Callable[[Path], None],
) -> None:
    """Write the best files that this evaluation improves on; the first evaluation always counts."""
    improved = False
    for source, metrics in scores.items():
        score = metrics.mar if job.train.best_model_metric == "mar" else metrics.map
        if position.epoch < job.train.skip_best_epochs and position.epoch + 1 < job.train.epochs:
            continue
        if source in position.best and score <= position.best[source]["score"]:
            continue
        position.best[source] = {"score": score, "epoch": position.epoch}
        _write_weights(job, engine, position, source, metrics, checkpoint.best_name(source), publish)
        improved = True
        if best_source(position.best) == source:
            _write_weights(job, engine, position, source, metrics, checkpoint.BEST_TOTAL, publish)
    if improved:
        log.info("best so far: %s", "  ".join(f"{k} {v['score']:.4f}" for k, v in position.best.items()))


def _stops_early(
    job: TrainingJob, stopping: EarlyStopping, scores: dict[checkpoint.Source, CocoMetrics], epoch: int
) -> bool:
    if not job.train.early_stopping or epoch < job.train.skip_best_epochs:
        return False
    by_mar = job.train.best_model_metric == "mar"
    values = {source: metrics.mar if by_mar else metrics.map for source, metrics in scores.items()}
    value = monitored_value(values.get("regular"), values.get("ema"), use_ema=job.train.early_stopping_use_ema)
    if not stopping.should_stop(value):
        return False
    log.info("early stopping: no gain of %g in %d evaluations", stopping.min_delta, stopping.patience)
    return True


def _write_weights(
    job: TrainingJob,
    engine: Engine,
    position: Position,
    source: checkpoint.Source,
    metrics: CocoMetrics,
    name: str,
    publish: Callable[[Path], None],
) -> None:
    module = engine.ema.module if source == "ema" and engine.ema is not None else engine.raw_model
    content = {
        "model": module.state_dict(),
        "source": source,
        "epoch": position.epoch,
        "metrics": metrics.to_json(),
        **_provenance(job),
    }
    checkpoint.save(content, job.checkpoints / name)
    publish(job.checkpoints / name)


def _save(
    job: TrainingJob,
    engine: Engine,
    position: Position,
    stopping: EarlyStopping,
    name: str,
    publish: Callable[[Path], None],
) -> None:
    """Everything needed to continue after the last optimizer step."""
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
        "position": {key: getattr(position, key) for key in Position.__dataclass_fields__},
        **_provenance(job),
    }
    checkpoint.save(content, job.checkpoints / name)
    publish(job.checkpoints / name)


def _provenance(job: TrainingJob) -> dict[str, Any]:
    return {
        "inputs": job.inputs,
        "model_config": job.model.model_dump(mode="json"),
        "train_config": job.train.model_dump(mode="json"),
        "classes": job.dataset.class_map.to_json(),
        "dataset_digest": job.dataset.digest,
    }


def _epoch_line(row: dict[str, Any], epochs: int) -> str:
    parts = [f"epoch {row['epoch'] + 1}/{epochs} done", f"loss {row['train/loss']:.3f}"]
    for name, title in (("val/mAP_50_95", "mAP"), ("val/mAP_50", "mAP50"), ("val/ema_mAP_50_95", "EMA mAP")):
        if name in row:
            parts.append(f"{title} {row[name]:.3f}")
    if "val/ema_mAP_50" in row:
        parts.append(f"EMA mAP50 {row['val/ema_mAP_50']:.3f}")
    parts.append(f"{row['images_per_second']:.1f} images/s")
    return "  ".join(parts)
