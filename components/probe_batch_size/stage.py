"""probe_batch_size: prove the given batch, or find one, by real training steps on their worst case."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence

from components.runtime import Stage, StageContext, run_stage
from rfdetr_core import hardware

STAGE = Stage(
    name="probe_batch_size",
    folder="probe",
    summary="Prove the batch size, or find it, by worst-case training steps.",
    reads=("model", "train", "probe"),
    after=("dataset",),
)

PROBE = "probe.json"

log = logging.getLogger("stage.probe_batch_size")


def body(context: StageContext) -> None:
    """Write probe.json, probe.png and report.html."""
    from rfdetr_core.training.batch_size import probe
    from rfdetr_core.training.probe_report import PICTURE, REPORT, picture, report_html, summary
    from rfdetr_core.training.worst_case import DatasetFacts

    hardware.keep_freed_memory()  # as train does: the probe times and measures the step that train will run
    dataset = context.read_result("dataset", "dataset.json")
    model = context.detector(len(dataset["classes"]))
    price = context.config.probe.price_per_hour
    result = probe(model, context.config.train, DatasetFacts.of(dataset), price_per_hour=price).to_json()
    for line in summary(result):
        log.info("%s", line)
    context.facts |= {"batch_size": result["batch_size"], "grad_accum_steps": result["grad_accum_steps"]}
    (context.output / PROBE).write_text(json.dumps(result, indent=2) + "\n")
    picture(result).save(context.output / PICTURE)
    (context.output / REPORT).write_text(report_html(result))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_stage(STAGE, body, argv)


if __name__ == "__main__":
    sys.exit(main())
