"""The stages of the pipeline: one definition, from which the KFP DAG, the Argo templates and the images are made.

Knows nothing of kfp, Kubernetes or torch; `components/<stage>/stage.py` is the program of each.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StageFacts:
    """One container of the pipeline."""

    name: str
    """As Python and status files call it, such as train: the program is components.<name>.stage."""
    title: str
    """As a pipeline UI shows it."""
    folder: str
    """Where below the run its result is published; empty for one that publishes nothing."""
    torch: bool
    """Whether its image stands on the torch image."""
    gpu: bool
    """Whether it computes on a GPU where there is one. The proof of the ONNX model runs on a CPU in any case."""

    @property
    def target(self) -> str:
        """The target of images/Containerfile, which is also what Kubernetes may call it: no underscores."""
        return self.name.replace("_", "-")


DAG: tuple[StageFacts, ...] = (
    StageFacts("validate_dataset", "Validate dataset", "dataset", torch=False, gpu=False),
    StageFacts("probe_batch_size", "Probe batch size", "probe", torch=True, gpu=True),
    StageFacts("train", "Train", "train", torch=True, gpu=True),
    StageFacts("evaluate", "Evaluate", "evaluate", torch=True, gpu=True),
    StageFacts("export_onnx", "Export ONNX", "export", torch=True, gpu=False),
    StageFacts("promote", "Promote", "promote", torch=False, gpu=False),
)
"""Each runs after the one before it."""

NOTIFY = StageFacts("notify", "Notify", "", torch=False, gpu=False)
"""Runs at the end, however the others ended."""

STAGES: tuple[str, ...] = tuple(stage.name for stage in DAG)
"""Names of the stages that make a model, in order."""

CONTAINERS: dict[str, StageFacts] = {stage.name: stage for stage in (*DAG, NOTIFY)}
"""Everything that has an image of its own, by name."""
