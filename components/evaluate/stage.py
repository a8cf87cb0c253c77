"""evaluate: COCO metrics of the trained weights, and of the current champion, on the same split."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.runtime import Stage, StageContext, run_stage
from rfdetr_core import hardware
from rfdetr_core.registry import CHECKPOINT, Registry

STAGE = Stage(
    name="evaluate",
    folder="evaluate",
    summary="Evaluate the trained weights and the champion on the test split.",
    reads=("name", "evaluate", "train.eval_max_dets", "train.accelerator", "train.num_workers", "train.fp16_eval"),
    after=("dataset", "train"),
)

log = logging.getLogger("stage.evaluate")


def body(context: StageContext) -> None:
    """Write metrics.json, detections.json and report.html."""
    from rfdetr_core.data.prepared import PreparedDataset
    from rfdetr_core.evaluation.evaluate import split_digest
    from rfdetr_core.evaluation.report import evaluation_html

    hardware.keep_freed_memory()
    dataset = PreparedDataset(context.prepared_dataset())
    name = context.config.evaluate.split
    split = dataset.split(name)
    weights = context.fetch_file("train", f"checkpoints/{CHECKPOINT}")
    candidate, metrics, detections = _evaluate(context, weights, dataset, name)
    document = {
        "candidate": candidate,
        "champion": _champion(context, dataset, name),
        "split": name,
        "images": len(split),
        "test_digest": split_digest(dataset.folder / name),
    }
    log.info("candidate: mAP %.4f, mAP50 %.4f on %s", metrics.map, metrics.map50, name)
    context.facts |= {"map": metrics.map, "map50": metrics.map50}
    (context.output / "metrics.json").write_text(json.dumps(document, indent=2) + "\n")
    (context.output / "detections.json").write_text(json.dumps(detections.to_coco(dataset.class_map)))
    (context.output / "report.html").write_text(
        evaluation_html(
            name=context.config.name,
            document=document,
            metrics=metrics,
            split=split,
            class_map=dataset.class_map,
            detections=detections,
            sample_images=context.config.evaluate.sample_images,
        )
    )


def _champion(context: StageContext, dataset: Any, split: str) -> dict[str, Any] | None:
    """The champion's metrics on this run's split, measured now; None where there is no champion."""
    registry = Registry(context.root, context.config.name)
    champion = registry.champion()
    if champion is None:
        log.info("no champion of %s yet", context.config.name)
        return None
    from rfdetr_core.publication import fetch

    folder = fetch(registry.version(champion.version), context.work / "champion", names=[CHECKPOINT])
    found, metrics, _ = _evaluate(context, folder / CHECKPOINT, dataset, split)
    log.info("champion %s: mAP %.4f, mAP50 %.4f", champion.version, metrics.map, metrics.map50)
    return {"version": champion.version, **found}


def _evaluate(context: StageContext, weights: Path, dataset: Any, split: str) -> tuple[dict[str, Any], Any, Any]:
    """What metrics.json says of one set of weights, its metrics, and its detections."""
    from rfdetr_core.data.loading import LoaderSettings
    from rfdetr_core.evaluation.evaluate import evaluate_model
    from rfdetr_core.training.checkpoint import load_trained
    from rfdetr_core.training.engine import first_device

    config = context.config
    trained = load_trained(weights)
    metrics, detections = evaluate_model(
        trained,
        dataset.split(split),
        dataset.class_map,
        batch_size=config.evaluate.batch_size or 8,
        max_dets=config.train.eval_max_dets,
        device=first_device(config.train),
        loading=LoaderSettings(config.train.num_workers, None, None, None),
        fp16=config.train.fp16_eval,
    )
    found = {
        **metrics.to_json(),
        "source": trained.source,
        "epoch": trained.epoch,
        "weights_sha256": trained.sha256,
    }
    return found, metrics, detections


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_stage(STAGE, body, argv)


if __name__ == "__main__":
    sys.exit(main())
