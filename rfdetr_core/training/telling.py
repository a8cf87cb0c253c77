"""What a training says of itself: in the log, and in JSON files beside its metrics."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rfdetr_core.data.loading import EpochSampler
from rfdetr_core.storage.local import local_errors
from rfdetr_core.training import checkpoint, doctor
from rfdetr_core.training.checkpoint import Source
from rfdetr_core.training.distributed import World
from rfdetr_core.training.engine import Engine
from rfdetr_core.training.state import Position, TrainingJob
from rfdetr_core.training.validation import Validation

DOCTOR_REPORT = "doctor.json"
"""What looked wrong after the first evaluation; an empty list if nothing did."""

log = logging.getLogger(__name__)


def announce(
    job: TrainingJob, engine: Engine, images: int, sampler: EpochSampler, scales: list[int], position: Position
) -> None:
    parameters, ranks = sum(p.numel() for p in engine.raw_model.parameters()), engine.world.size
    log.info(
        "%s %.1f M parameters on %s (%s), %d train images, batch %d x %d%s = %d, %d steps per epoch, sides %s px, "
        "seed %d",
        job.model.variant,
        parameters / 1e6,
        engine.device,
        engine.precision,
        images,
        job.batch_size,
        job.grad_accum_steps,
        f" x {ranks} ranks" if ranks > 1 else "",
        job.batch_size * job.grad_accum_steps * ranks,
        sampler.steps_per_epoch,
        f"{scales[0]}..{scales[-1]}" if len(scales) > 1 else scales[0],
        position.seed,
    )
    if position.epoch >= job.train.epochs:
        asked = job.train.epochs
        log.info("%d epochs are trained already, train.epochs asks for %d: nothing to train", position.epoch, asked)
    elif position.global_step:
        log.info("continuing after epoch %d, optimizer step %d", position.epoch, position.global_step)


def tell_epoch(row: dict[str, Any], epochs: int) -> None:
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


def examine(job: TrainingJob, validation: Validation, row: Mapping[str, Any], position: Position) -> None:
    """Say what looks wrong after the first evaluation, in the log and in doctor.json."""
    source: Source = "ema" if "ema" in validation.scores else "regular"
    symptoms = doctor.examine(
        metrics=validation.scores[source],
        detections=validation.detections[source],
        table=job.dataset.split("valid").table,
        class_map=job.dataset.class_map,
        model=job.model,
        train=job.train,
        losses={name.removeprefix("train/"): row[name] for name in row if name.startswith("train/loss")},
        steps=position.global_step,
        start_weights=position.start is not None,
    )
    write_json(job.output / DOCTOR_REPORT, doctor.to_json(symptoms))
    for line in doctor.report_lines(symptoms):
        log.warning("%s", line)


def resolved_settings(job: TrainingJob, world: World, seed: int) -> dict[str, Any]:
    """What is trained, with every value that was left open; trackers show it beside the curves."""
    return {
        "model": job.model.model_dump(mode="json"),
        "train": job.train.model_dump(mode="json"),
        "dataset": {"digest": job.dataset.digest, "classes": list(job.dataset.class_map.names)},
        "batch_size": job.batch_size,
        "grad_accum_steps": job.grad_accum_steps,
        "ranks": world.size,
        "effective_batch_size": job.batch_size * job.grad_accum_steps * world.size,
        "seed": seed,
        "versions": checkpoint.versions(),
    }


def write_json(path: Path, document: Any) -> None:
    with local_errors("write", path):
        path.write_text(json.dumps(document, indent=2) + "\n")
