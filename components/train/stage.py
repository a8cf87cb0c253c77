"""train: fine-tune the detector on the prepared dataset; continue where an interrupted attempt stopped.

Checkpoints lie at <run>/train/checkpoints/ while training goes on, uploaded by a background thread, so that a
lost pod costs at most `train.checkpoint_minutes` or one epoch.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from components.runtime import Stage, StageContext, run_stage
from components.train.uploader import Uploader
from rfdetr_core import hardware
from rfdetr_core.errors import CheckpointError
from rfdetr_core.publication import unpublish
from rfdetr_core.storage import Location

if TYPE_CHECKING:
    from rfdetr_core.models.weight_file import WeightFile

STAGE = Stage(
    name="train",
    folder="train",
    summary="Train the detector, or continue its training.",
    reads=("model", "train"),
    after=("dataset", "probe"),
)
CHECKPOINTS = "checkpoints"

log = logging.getLogger("stage.train")


def body(context: StageContext) -> None:
    """Write checkpoints/, metrics.jsonl, metrics.csv and result.json; weights.json with pretrained weights."""
    from rfdetr_core.data.prepared import PreparedDataset
    from rfdetr_core.training.checkpoint import LATEST
    from rfdetr_core.training.loop import TrainingJob, train

    hardware.keep_freed_memory()
    remote, local = context.target() / CHECKPOINTS, context.work / CHECKPOINTS
    continued = _fetch_checkpoints(context, remote, local)
    dataset = PreparedDataset(context.prepared_dataset())
    probe = context.read_result("probe", "probe.json")
    job = TrainingJob(
        model=context.detector(len(dataset.class_map)),
        train=context.config.train,
        dataset=dataset,
        checkpoints=local,
        output=context.output,
        batch_size=probe["batch_size"],
        grad_accum_steps=probe["grad_accum_steps"],
        inputs=context.inputs,
        start_weights=None if continued else _start_weights(context),
    )
    context.stop.deferred = True  # SIGTERM: finish the optimizer step, leave a checkpoint, then end
    with Uploader(remote, last=LATEST) as uploader:
        result = train(job, publish=uploader.upload, stop_requested=lambda: context.stop.requested)
    context.stop.deferred = False
    context.uploaded = {f"{CHECKPOINTS}/{name}": digest for name, digest in uploader.uploaded.items()}
    context.facts |= {"best": result.best_score, "best_source": result.best_source, "epochs": result.epochs}
    (context.output / "result.json").write_text(json.dumps(asdict(result), indent=2) + "\n")


def _start_weights(context: StageContext) -> Callable[[], WeightFile] | None:
    """The pretrained weights, which are read when the model is there."""
    from rfdetr_core.detector_files import refuse_another_variant
    from rfdetr_core.models.weight_file import read_weight_file
    from rfdetr_core.pretrained import fetch_weights

    model = context.config.model
    if model.pretrain_weights is None:
        return None
    path = fetch_weights(model.pretrain_weights, cache=context.work / "weights")
    seen = context.read_result("dataset", "weights.json")

    def read() -> WeightFile:
        file = read_weight_file(path)
        if file.md5 != seen["md5"]:
            raise CheckpointError(
                f"{model.pretrain_weights}: its content has changed since validate_dataset looked at it",
                hint="start a new run, or run validate_dataset again with --force",
            )
        refuse_another_variant(file, model)
        return file

    return read


def _fetch_checkpoints(context: StageContext, remote: Location, local: Path) -> bool:
    """Take over what an interrupted attempt left, if it trained the same; remove it otherwise.

    Returns whether there is something to continue.
    """
    from rfdetr_core.training import checkpoint

    local.mkdir()
    if not remote.list_files():
        return False
    if (remote / checkpoint.LATEST).exists():
        remote.download_tree(local)
        if checkpoint.load(local / checkpoint.LATEST).get("inputs") == context.inputs:
            log.info("found the checkpoints of an interrupted attempt")
            return True
        log.info("the checkpoints found are of another configuration or dataset: training starts anew")
    unpublish(context.target())
    remote.delete_tree()
    shutil.rmtree(local)
    local.mkdir()
    return False


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_stage(STAGE, body, argv)


if __name__ == "__main__":
    sys.exit(main())
