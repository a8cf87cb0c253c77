"""Which checkpoint a training may go on from by itself: one of the same computation.

What a person changes to get a stopped training going again must not cost what it has learned: how images are loaded,
where numbers are shown, how long and on how many devices it trains. Everything else makes another training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from rfdetr_core.config import ModelConfig, TrainConfig

NO_INFLUENCE = {
    "dataset_dir",
    "output_dir",
    "num_workers",
    "pin_memory",
    "persistent_workers",
    "prefetch_factor",
    "progress_bar",
    "checkpoint_interval",
    "checkpoint_minutes",
    "max_hours",
    "skip_corrupt",
    "log_per_class_metrics",
    "save_dataset_grids",
    "tensorboard",
    "wandb",
    "mlflow",
    "project",
    "run",
    "notes",
    # These two change what comes, and leave what was computed as it is. With other epochs the schedule follows the
    # new length from here on; an epoch that other ranks began is begun anew.
    "epochs",
    "devices",
    "num_nodes",
}
"""Fields of TrainConfig that may change between an interrupted training and its continuation."""


def training_identity(model: ModelConfig, train: TrainConfig, *, dataset_digest: str, start: str | None) -> str:
    """sha256 of all that decides what training computes.

    Args:
        start: digest of the weights that it begins with; None if they are drawn.
    """
    content = {"model": model.model_dump(mode="json"), "train": _settings(train), "dataset": dataset_digest}
    content |= {} if start is None else {"start": start}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def differences(content: Mapping[str, Any], model: ModelConfig, train: TrainConfig, dataset_digest: str) -> str:
    """What makes the training of a checkpoint another one than this, for people: the first few."""
    sections = (
        ("model", content.get("config") or {}, model.model_dump(mode="json")),
        ("train", content.get("train_config") or {}, _settings(train)),
    )
    found = [
        f"{section}.{name} {json.dumps(theirs.get(name))}, here {json.dumps(ours[name])}"
        for section, theirs, ours in sections
        for name in ours
        if theirs.get(name) != ours[name]
    ]
    if content.get("dataset_digest") != dataset_digest:
        found.append("the dataset")
    listed = "; ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
    return listed or "the start weights"


def _settings(train: TrainConfig) -> dict[str, Any]:
    return train.model_dump(mode="json", exclude=NO_INFLUENCE)
