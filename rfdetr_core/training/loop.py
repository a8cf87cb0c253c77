"""The training loop: one flat function, the order of events is the order of its lines (DESIGN section 6)."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from rfdetr_core import hardware
from rfdetr_core.data.loading import worker_errors
from rfdetr_core.data.scales import configured_scales
from rfdetr_core.errors import Terminated
from rfdetr_core.evaluation.metrics import CocoMetrics
from rfdetr_core.storage.local import local_errors
from rfdetr_core.training import checkpoint, metrics_log
from rfdetr_core.training.batches import build_loaders, count_skipped, split_loader, windows, write_previews
from rfdetr_core.training.canary import run_canary
from rfdetr_core.training.checkpoint import BEST_TOTAL, LATEST, Source, periodic_name
from rfdetr_core.training.clock import Clock
from rfdetr_core.training.device_memory import memory_of
from rfdetr_core.training.distributed import ALONE, ShareOfEpoch, World, chosen_devices
from rfdetr_core.training.early_stopping import EarlyStopping, monitored_value
from rfdetr_core.training.engine import Engine, build_engine, fabric_accelerator
from rfdetr_core.training.launch import train_on_several
from rfdetr_core.training.loggers import open_loggers
from rfdetr_core.training.nodes import this_node
from rfdetr_core.training.progress import Progress
from rfdetr_core.training.schedule import Schedule
from rfdetr_core.training.state import (
    Outbox,
    Position,
    Publish,
    TrainingJob,
    TrainingResult,
    begin_together,
    best_source,
    keep_best,
    load_start_weights,
    mend_best_files,
    monitored,
    restore,
    save,
    smooth,
    start_position,
)
from rfdetr_core.training.telling import announce, examine, resolved_settings, tell_epoch, write_json
from rfdetr_core.training.train_metrics import TrainMetrics
from rfdetr_core.training.validation import metric_columns, models_to_evaluate, validate

__all__ = ["TrainingJob", "TrainingResult", "train"]

WEIGHTS_REPORT = "weights.json"
"""What of the start weights was loaded, cut or left out; only where a training starts from some."""

TRAINING_CONFIG = "training_config.json"
"""Everything that was resolved: settings, classes, batch, seed, versions."""

QUIET = {"progress_bar": None, "tensorboard": False, "wandb": False, "mlflow": False}
"""Settings of the ranks beside the main one: who shows and tracks nothing."""

log = logging.getLogger(__name__)


def train(
    job: TrainingJob,
    *,
    publish: Publish = lambda path: None,
    stop_requested: Callable[[], bool] = lambda: False,
    world: World = ALONE,
) -> TrainingResult:
    """Train to the end, continuing from `checkpoint.pth` if there is one of the same inputs.

    With several `train.devices`, or `train.num_nodes`, the training is one process for each device, and this one waits
    for those of its node: what follows is done by all of them alike, but the main rank alone writes, tells and decides.
    At the end all nodes have the best weights.

    Args:
        publish: takes over checkpoint files: at the end of the epochs of `checkpoint_interval`, every
            `checkpoint_minutes`, and when training ends or stops. It may wait for an earlier one, and raise.
        stop_requested: asked before every micro-batch and after every evaluated batch; true ends with a checkpoint and
            `Terminated`.
        world: where this process is one of several.

    Raises:
        TrainingError: a loss that is not finite, or out of memory.
        CheckpointError: `checkpoint.pth` or the start weights are unreadable, or do not fit.
        StorageAccessError: a checkpoint cannot be written.
        Terminated: the stop was asked for; everything is resumable.
    """
    started = time.monotonic()
    config = job.train
    if world.size == 1:
        devices = chosen_devices(config.devices, fabric_accelerator(config.accelerator))
        nodes = this_node(config.num_nodes)
        if nodes.count * len(devices) > 1:
            return train_on_several(job, devices, nodes=nodes, publish=publish, stop_requested=stop_requested)
    if fabric_accelerator(config.accelerator) == "cpu":
        hardware.keep_freed_memory()  # until the process ends

    # ---- where to start -----------------------------------------------------------------------------------
    for folder in (job.output, job.checkpoints):
        with local_errors("write", folder):
            folder.mkdir(parents=True, exist_ok=True)
    begin = begin_together(job, world)
    position = start_position(begin, config.seed)
    position.seed = world.from_main(position.seed)
    torch.manual_seed(position.seed)
    engine = build_engine(job.model, config, world, accumulates=job.grad_accum_steps > 1)
    stopping, outbox = EarlyStopping(config.early_stopping_patience, config.early_stopping_min_delta), Outbox(publish)
    if begin.content is not None:
        restore(begin, engine, stopping, position)
        if world.is_main:
            mend_best_files(job, position.best, outbox)
        position.best = world.from_main(position.best)
    elif begin.weights is not None:
        load_start_weights(begin.weights, engine, position)
    resolved = resolved_settings(job, world, position.seed)
    del begin  # weights, moments and average once more, in host memory
    if world.is_main:
        write_json(job.output / TRAINING_CONFIG, resolved)
        if position.start is not None:
            write_json(job.output / WEIGHTS_REPORT, position.start)
        metrics_log.begin(job.output, position.history)

    # ---- data and schedule --------------------------------------------------------------------------------
    train_split, valid_split = job.dataset.split("train"), job.dataset.split("valid")
    scales = configured_scales(job.model, config)
    sampler = ShareOfEpoch(
        len(train_split),
        world,
        batch_size=job.batch_size,
        grad_accum_steps=job.grad_accum_steps,
        seed=position.seed,
        scales=scales,
        per_sample=config.multi_scale == "per-sample",
    )
    position.align(sampler.steps_per_epoch)
    loader, valid_loader = build_loaders(job, engine, sampler, train_split, valid_split, position.seed)
    schedule = Schedule(
        kind=config.lr_scheduler,
        epochs=config.epochs,
        steps_per_epoch=sampler.steps_per_epoch,
        warmup_epochs=config.warmup_epochs,
        lr_drop=config.lr_drop,
        min_factor=config.lr_min_factor,
    )
    total_steps = config.epochs * sampler.steps_per_epoch
    announce(job, engine, len(train_split), sampler, scales, position)
    memory = memory_of(engine.device)
    if position.epoch < config.epochs and not position.stopped_early:
        run_canary(job, engine, memory)
    memory.begin()
    if not position.global_step and world.is_main:
        write_previews(job, sampler, loader, valid_loader)
    clock, budget = Clock(position.seconds), 3600.0 * (config.max_hours or math.inf)
    save_now = partial(_save, clock, job, engine, position, stopping, outbox)
    publish_now = partial(_publish, clock, outbox)
    shown = config if world.is_main else config.model_copy(update=QUIET)

    with (
        worker_errors(),
        open_loggers(
            shown,
            job.output,
            parameters=resolved,
            history=position.history,
            runs=position.trackers,
        ) as loggers,
        Progress(style=shown.progress_bar, total_steps=total_steps, done_steps=position.global_step) as progress,
    ):
        while (
            position.epoch < config.epochs
            and not position.stopped_early
            and not (position.epoch and world.any(clock.total >= budget))
        ):
            # ---- one epoch of optimizer steps -------------------------------------------------------------
            sampler.start(position.epoch, position.step)
            evaluates = (position.epoch + 1) % config.eval_interval == 0 or position.epoch + 1 == config.epochs
            train_metrics = None
            if config.compute_train_metrics and evaluates and world.is_main:
                train_metrics = TrainMetrics(num_queries=job.model.num_queries, num_select=job.model.num_select)
            for window in windows(loader, job.grad_accum_steps, clock):
                factor = schedule.factor(position.global_step)
                world.own_stream(position.seed, position.global_step)
                with clock.running("step"):
                    terms = engine.optimizer_step(
                        window,
                        factor=factor,
                        global_step=position.global_step,
                        image_names=train_split.table.file_names,
                        observe=train_metrics.add if train_metrics is not None else None,
                        stop_requested=lambda: world.any(stop_requested()),
                    )
                if terms is None:
                    save_now(LATEST)
                    publish_now()
                    raise _terminated(position)
                count_skipped(position, window, train_split, config.skip_corrupt, world)
                position.step += 1
                position.global_step += 1
                for name, value in terms.items():
                    position.sums[name] = position.sums[name] + value if name in position.sums else value

                if progress.step(job.batch_size * job.grad_accum_steps * world.size):
                    progress.show(
                        epoch=f"{position.epoch + 1}/{config.epochs}",
                        loss=float(position.sums["loss"]) / position.step,
                        lr=config.lr * factor,
                    )
                if clock.since_publication > 60 * config.checkpoint_minutes:
                    save_now(LATEST)
                    publish_now()

            # ---- the epoch's numbers ----------------------------------------------------------------------
            row: dict[str, Any] = {"epoch": position.epoch, "step": position.global_step - 1}
            row |= {f"train/{name}": float(value) / position.step for name, value in position.sums.items()}
            rate = schedule.factor(position.global_step - 1)
            row |= {"train/lr": config.lr * rate}
            row |= {"train/lr_min": min(engine.base_rates) * rate, "train/lr_max": max(engine.base_rates) * rate}
            if evaluates or world.any(clock.total >= budget):
                with clock.running("eval"):
                    validation = validate(
                        job,
                        engine,
                        models_to_evaluate(config, engine),
                        valid_split,
                        valid_loader,
                        compute_loss=config.compute_val_loss is True,
                        stop_requested=stop_requested,
                    )
                if validation is None:
                    save_now(LATEST)
                    publish_now()
                    raise _terminated(position)
                row |= validation.row("val", per_class=config.log_per_class_metrics)
                if train_metrics is not None:
                    metrics = train_metrics.result(job.dataset.class_map, max_dets=config.eval_max_dets)
                    row |= metric_columns(metrics, "train/", per_class=False)
                if world.is_main:
                    progress.evaluated(max(metrics.map for metrics in validation.scores.values()))
                    if not any(name.startswith("val/") for past in position.history for name in past):
                        examine(job, validation, row, position)
                    smooth(job, position, validation.scores)
                    if position.epoch >= config.skip_best_epochs:
                        with clock.running("checkpoint"):
                            keep_best(job, engine, position, validation.scores, position.epoch, outbox)
                        position.stopped_early = config.early_stopping and _stops_early(
                            job, stopping, validation.scores
                        )
            row |= clock.lap()
            row["images_per_second"] = progress.images_per_second
            row, position.best, position.stopped_early = world.from_main([row, position.best, position.stopped_early])
            position.history.append(row)
            if world.is_main:
                metrics_log.append(job.output, position.history)
                loggers.log(row)
                tell_epoch(row, config.epochs)
            clock.warn_of_waiting(config.num_workers)

            # ---- the epoch is over ------------------------------------------------------------------------
            position.epoch, position.step, position.sums = position.epoch + 1, 0, {}
            save_now(LATEST)
            if position.epoch % config.checkpoint_interval == 0:
                if not config.dont_save_weights:
                    save_now(periodic_name(position.epoch - 1))
                publish_now()

        # ---- what is left to do when the last epoch is over -----------------------------------------------
        if position.epoch < config.epochs and not position.stopped_early:
            log.info("train.max_hours: %g h are over after epoch %d", config.max_hours or 0.0, position.epoch)
        if not position.best:  # none was evaluated here: lost files (see mend_best_files), or resumed when finished
            validation = validate(
                job,
                engine,
                models_to_evaluate(config, engine),
                valid_split,
                valid_loader,
                compute_loss=False,
                stop_requested=stop_requested,
            )
            if validation is None:
                raise _terminated(position)
            if world.is_main:
                smooth(job, position, validation.scores)
                keep_best(job, engine, position, validation.scores, max(0, position.epoch - 1), outbox)
            position.best = world.from_main(position.best)
            save_now(LATEST)
        if config.run_test and not any("test/" in name for past in position.history for name in past):
            publish_now()  # the test may be interrupted
            world.file_from_main(job.checkpoints / BEST_TOTAL)
            test_row = _test(job, engine, position, stop_requested)
            position.history.append(test_row)
            if world.is_main:
                metrics_log.append(job.output, position.history)
                loggers.log(test_row)
            save_now(LATEST)
        publish_now()

    world.file_from_main(job.checkpoints / BEST_TOTAL)
    source = best_source(position.best)
    return TrainingResult(
        epochs=position.epoch,
        optimizer_steps=position.global_step,
        seed=position.seed,
        best_source=source,
        best_score=position.best[source]["score"],
        best_epoch=int(position.best[source]["epoch"]),
        stopped_early=position.stopped_early,
        skipped=tuple(str(train_split.table.file_names[image]) for image in position.skipped),
        images_per_second=progress.images_per_second,
        seconds=time.monotonic() - started,
        peak_memory_bytes=max(int(peak) for peak in world.texts(str(memory.peak()))),
        predicted_peak_bytes=job.predicted_peak_bytes,
    )


def _save(
    clock: Clock,
    job: TrainingJob,
    engine: Engine,
    position: Position,
    stopping: EarlyStopping,
    outbox: Outbox,
    name: str,
) -> None:
    if engine.world.is_main:
        with clock.running("checkpoint"):
            position.seconds = clock.total
            save(job, engine, position, stopping, name, outbox)


def _publish(clock: Clock, outbox: Outbox) -> None:
    with clock.running("checkpoint"):
        outbox.send()
    clock.published()


def _test(job: TrainingJob, engine: Engine, position: Position, stop_requested: Callable[[], bool]) -> dict[str, Any]:
    """A row of metrics: the best weights on the test split."""
    trained = checkpoint.load_trained(job.checkpoints / BEST_TOTAL)
    split = job.dataset.split("test")
    models: dict[Source, nn.Module] = {"regular": trained.module.to(engine.device)}
    loss = job.train.compute_test_loss
    loader = split_loader(job, engine, split)
    found = validate(job, engine, models, split, loader, compute_loss=loss, stop_requested=stop_requested)
    if found is None:
        raise _terminated(position)
    if engine.world.is_main:
        log.info("best weights on the test split: mAP %.3f", found.scores["regular"].map)
    row: dict[str, Any] = {"epoch": position.epoch, "step": max(0, position.global_step - 1)}
    return row | found.row("test", per_class=job.train.log_per_class_metrics)


def _terminated(position: Position) -> Terminated:
    return Terminated(
        f"stopped on request after optimizer step {position.global_step}",
        hint="run the same command again to continue",
    )


def _stops_early(job: TrainingJob, stopping: EarlyStopping, scores: dict[Source, CocoMetrics]) -> bool:
    values = {source: monitored(job.train, metrics) for source, metrics in scores.items()}
    value = monitored_value(values.get("regular"), values.get("ema"), use_ema=job.train.early_stopping_use_ema)
    if not stopping.should_stop(value):
        return False
    log.info("early stopping: no gain of %g in %d evaluations", stopping.min_delta, stopping.patience)
    return True
