"""train: fine-tune the detector on the prepared dataset; continue where an interrupted attempt stopped.

Checkpoints lie at <run>/train/checkpoints/ while training goes on, uploaded by a background thread, so that a
lost pod costs at most `train.checkpoint_minutes` or one epoch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace

from components.runtime import Stage, StageContext, run_stage
from components.train.beginning import fetch_checkpoints, resumed_checkpoint, start_digest, start_weights
from components.train.trainjob import NodeSettings
from components.train.uploader import Uploader

STAGE = Stage(
    name="train",
    folder="train",
    summary="Train the detector, or continue its training.",
    reads=("model", "train"),
    after=("dataset", "probe"),
)
CHECKPOINTS = "checkpoints"


def body(context: StageContext) -> None:
    """Train here, or let a TrainJob train where the profile says so."""
    settings = NodeSettings.from_environment()
    if settings is None:
        train_here(context)
    else:
        from components.cluster import Cluster
        from components.train.nodes import train_on_nodes

        train_on_nodes(context, settings, Cluster.of_this_pod())


def train_here(context: StageContext) -> None:
    """Write checkpoints/, metrics.jsonl, metrics.csv and result.json; weights.json with pretrained weights.

    Of several nodes the first one does.
    """
    from rfdetr_core.data.prepared import PreparedDataset
    from rfdetr_core.training.batch_size import on_this_device
    from rfdetr_core.training.checkpoint import LATEST
    from rfdetr_core.training.identity import training_identity
    from rfdetr_core.training.loop import TrainingJob, train
    from rfdetr_core.training.nodes import this_node
    from rfdetr_core.training.worst_case import DatasetFacts

    node = this_node(context.config.train.num_nodes)  # before anything is fetched
    remote, local = context.target() / CHECKPOINTS, context.work / CHECKPOINTS
    dataset = PreparedDataset(context.prepared_dataset())
    model, settings = context.detector(len(dataset.class_map)), context.config.train
    probed = context.read_result("probe", "probe.json")
    found = on_this_device(probed, model, settings, DatasetFacts.of(dataset.document))
    job = TrainingJob(
        model=model,
        train=settings,
        dataset=dataset,
        checkpoints=local,
        output=context.output,
        batch_size=found["batch_size"],
        grad_accum_steps=found["grad_accum_steps"],
        inputs=training_identity(model, settings, dataset_digest=dataset.digest, start=start_digest(context)),
        predicted_peak_bytes=found["predicted_peak_bytes"],
    )
    if not node.is_first:
        local.mkdir()  # the first one's checkpoint comes from there
    if not node.is_first or not fetch_checkpoints(context, remote, local, job):
        job = replace(job, start_weights=start_weights(context), resume=resumed_checkpoint(context))
    context.stop.deferred = True  # SIGTERM: finish the optimizer step, leave a checkpoint, then end
    with Uploader(remote, last=LATEST, staging=context.work) as uploader:
        result = train(job, publish=uploader.upload, stop_requested=lambda: context.stop.requested)
    context.stop.deferred = False
    if not node.is_first:
        context.published_elsewhere = True
        return
    context.uploaded = {f"{CHECKPOINTS}/{name}": digest for name, digest in uploader.uploaded.items()}
    context.facts |= {"best": result.best_score, "best_source": result.best_source, "epochs": result.epochs}
    (context.output / "result.json").write_text(json.dumps(asdict(result), indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_stage(STAGE, body, argv)


if __name__ == "__main__":
    sys.exit(main())
