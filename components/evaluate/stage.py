"""evaluate: COCO metrics of the trained weights, and of the current champion, on the same split."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from components.runtime import Stage, StageContext, run_stage
from rfdetr_core import hardware
from rfdetr_core.errors import CheckpointError, PublicationError
from rfdetr_core.publication import fetch, read_manifest
from rfdetr_core.registry import CHECKPOINT, Registry

if TYPE_CHECKING:
    from rfdetr_core.evaluation.measure import Contender

STAGE = Stage(
    name="evaluate",
    folder="evaluate",
    summary="Evaluate the trained weights and the champion on the test split.",
    reads=("name", "evaluate", "train.eval_max_dets", "train.accelerator", "train.num_workers", "train.fp16_eval"),
    after=("dataset", "train"),
)

log = logging.getLogger("stage.evaluate")


def body(context: StageContext) -> None:
    """Write the files of docs/evaluation.md."""
    from rfdetr_core.data.prepared import PreparedDataset
    from rfdetr_core.evaluation.measure import Contender, measure
    from rfdetr_core.evaluation.report import evaluation_html
    from rfdetr_core.training.checkpoint import load_trained
    from rfdetr_core.training.engine import first_device

    hardware.keep_freed_memory()
    config = context.config
    dataset = PreparedDataset(context.prepared_dataset())
    weights = context.fetch_file("train", f"checkpoints/{CHECKPOINT}")
    candidate = Contender(load_trained(weights), weights)
    measured = measure(candidate, _champion(context), dataset, config, first_device(config.train))
    if (note := measured.document["split_note"]) is not None:
        log.warning("%s", note)
    context.facts |= {"map": measured.metrics.map, "map50": measured.metrics.map50}
    for name, content in (("metrics.json", measured.document), ("confusion.json", measured.confusion)):
        (context.output / name).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    measured.detections.write_coco(context.output / "detections.json", measured.class_map)
    if measured.champion_detections is not None:
        measured.champion_detections.write_coco(context.output / "champion_detections.json", measured.class_map)
    page = evaluation_html(config.name, measured, sample_images=config.evaluate.sample_images)
    (context.output / "report.html").write_text(page)


def outdated(context: StageContext) -> str | None:
    """Whether another champion than the one that was measured has to be beaten, until promote has decided."""
    if read_manifest(context.run / "promote") is not None:
        return None
    champion = Registry(context.root, context.config.name).champion()
    if champion is None or champion.version == context.run.name:  # gone; or promote won, and has yet to say so
        return None
    measured = context.read_result("evaluate", "metrics.json")["champion"]
    before = measured["version"] if measured else None
    if before == champion.version:
        return None
    return f"the champion is {champion.version} now, and {before or 'none'} was measured"


def _champion(context: StageContext) -> Contender | None:
    """The champion as the registry has it; None where no version was promoted yet.

    Raises:
        PublicationError: its weights are gone, not those that were published, or of no use to this program.
    """
    from rfdetr_core.evaluation.measure import Contender
    from rfdetr_core.training.checkpoint import load_trained

    name = context.config.name
    registry = Registry(context.root, name)
    champion = registry.champion()
    if champion is None:
        log.info("no champion of %s yet", name)
        return None
    place = registry.version(champion.version)
    try:
        weights = fetch(place, context.work / "champion", names=[CHECKPOINT]) / CHECKPOINT
        return Contender(load_trained(weights), weights, champion.version)
    except (PublicationError, CheckpointError) as error:
        raise PublicationError(
            f"{champion.version}, the champion of {name}, cannot be evaluated: {error.message}",
            hint=f"restore {place.uri}, or make another version the champion: "
            f"rfdetr-pipeline models rollback {name} --root {context.root.uri}",
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_stage(STAGE, body, argv, outdated=outdated)


if __name__ == "__main__":
    sys.exit(main())
