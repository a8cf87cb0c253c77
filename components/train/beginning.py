"""What a training begins with: the checkpoints of an interrupted attempt, else pretrained weights, if there are any."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from components.runtime import StageContext
from rfdetr_core.errors import CheckpointError
from rfdetr_core.publication import unpublish
from rfdetr_core.storage import Location

if TYPE_CHECKING:
    from rfdetr_core.models.weight_file import WeightFile
    from rfdetr_core.training.state import TrainingJob

log = logging.getLogger("stage.train")


def fetch_checkpoints(context: StageContext, remote: Location, local: Path, job: TrainingJob) -> bool:
    """Take over what an earlier attempt left, if it trained the same; remove it otherwise.

    Returns whether there is something to continue.
    """
    from rfdetr_core.training import checkpoint
    from rfdetr_core.training.identity import differences

    local.mkdir()
    if not remote.list_files():
        return False
    remote.download_tree(local)
    found = checkpoint.newest_whole(local)
    if found is not None and found[1].get("inputs") == job.inputs:
        log.info("found the checkpoints of an earlier attempt")
        unpublish(context.target())  # of a finished training that is to go on
        return True
    if found is not None:
        what = differences(found[1], job.model, job.train, job.dataset.digest)
        log.warning("the checkpoints found are of another training (%s): training starts anew", what)
    unpublish(context.target())
    remote.delete_tree()
    shutil.rmtree(local)
    local.mkdir()
    return False


def resumed_checkpoint(context: StageContext) -> Callable[[], Path] | None:
    """The file of `train.resume`, fetched when a training begins; one that has checkpoints of its own needs none."""
    from rfdetr_core.pretrained import fetch_weights

    uri = context.config.train.resume
    return None if uri is None else lambda: fetch_weights(uri, cache=context.work / "resume")


def start_digest(context: StageContext) -> str | None:
    """What tells the pretrained weights from others: the MD5 that the first stage recorded."""
    if context.config.model.pretrain_weights is None:
        return None
    return str(context.read_result("dataset", "weights.json")["md5"])


def start_weights(context: StageContext) -> Callable[[], WeightFile] | None:
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
