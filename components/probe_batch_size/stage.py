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

log = logging.getLogger("stage.probe_batch_size")


def body(context: StageContext) -> None:
    """Write probe.json."""
    from rfdetr_core.training.batch_size import probe

    hardware.keep_freed_memory()  # as train does: the probe times and measures the step that train will run
    dataset = context.read_result("dataset", "dataset.json")
    train = dataset["splits"]["train"]
    model = context.detector(len(dataset["classes"]))
    result = probe(model, context.config.train, images=train["images"], max_boxes=train["max_boxes_per_image"])
    log.info(
        "batch %d x %d (stopped by: %s), %.2f s per optimizer step at %d px on %s",
        result.batch_size,
        result.grad_accum_steps,
        result.stopped_by,
        result.seconds_per_optimizer_step,
        result.side,
        result.device,
    )
    context.facts |= {"batch_size": result.batch_size, "grad_accum_steps": result.grad_accum_steps}
    (context.output / "probe.json").write_text(json.dumps(result.to_json(), indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_stage(STAGE, body, argv)


if __name__ == "__main__":
    sys.exit(main())
