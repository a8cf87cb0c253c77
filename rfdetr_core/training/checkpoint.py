"""Checkpoint files: their names, what they hold, how they are written and read (DESIGN section 6).

    checkpoint.pth               the last optimizer step: everything needed to continue
    checkpoint_<N>.pth           the same, at the end of epoch N (zero-based), every checkpoint_interval epochs
    checkpoint_best_regular.pth  weights only: best validation score of the raw weights
    checkpoint_best_ema.pth      weights only: best validation score of the EMA
    checkpoint_best_total.pth    the better of the two; the one that later stages use

The best files are in the published form too (model spec 7.2), so that rfdetr 1.11 loads them: it reads `model`,
`args`, `model_name` and `model_config`, and leaves our own sections alone.

All are read with `weights_only=True`: no pickle is ever executed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from rfdetr_core import __version__
from rfdetr_core.coco_names import names_by_slot
from rfdetr_core.config import ModelConfig
from rfdetr_core.data.loading import is_worker_death
from rfdetr_core.errors import CheckpointError, StorageAccessError
from rfdetr_core.models.inert_pickle import reason_in, verify_records
from rfdetr_core.models.weights import TrainedModel, build_trained

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
LATEST = "checkpoint.pth"
BEST_TOTAL = "checkpoint_best_total.pth"
Source = Literal["regular", "ema"]

PUBLISHED_FIELDS = (
    "encoder",
    "hidden_dim",
    "patch_size",
    "num_windows",
    "out_feature_indexes",
    "projector_scale",
    "dec_layers",
    "sa_nheads",
    "ca_nheads",
    "dec_n_points",
    "resolution",
    "positional_encoding_size",
    "num_queries",
    "num_select",
    "group_detr",
    "num_classes",
    "num_channels",
    "two_stage",
    "bbox_reparam",
    "lite_refpoint_refine",
    "layer_norm",
    "ia_bce_loss",
    "segmentation_head",
)
"""Architecture fields that the published package has under the same name."""


def best_name(source: Source) -> str:
    """File name of the best weights of one kind."""
    return f"checkpoint_best_{source}.pth"


def periodic_name(epoch: int) -> str:
    """File name of the checkpoint at the end of a zero-based epoch."""
    return f"checkpoint_{epoch}.pth"


def own_files(folder: Path) -> list[Path]:
    """The checkpoint files in a folder that may hold others' files as well."""
    return [
        path
        for path in folder.iterdir()
        if re.fullmatch(r"checkpoint(_\d+|_best_(regular|ema|total))?\.pth", path.name)
    ]


def versions() -> dict[str, str]:
    """What wrote a file."""
    return {"rfdetr_core": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def published_sections(config: ModelConfig, class_names: Sequence[str], notes: Any = None) -> dict[str, Any]:
    """What rfdetr 1.11 wants to know of `model`: the class, its architecture, the class names (model spec 7.2).

    `notes` are the user's, plain JSON.
    """
    fields = config.model_dump(mode="json")
    args = {name: fields[name] for name in ("num_classes", "num_queries", "group_detr", "patch_size", "resolution")}
    if tuple(class_names) != names_by_slot():  # without names, 91 slots are COCO's ids there as here
        args["class_names"] = list(class_names)
    if notes is not None:
        args["notes"] = notes
    return {
        "model_name": "RFDETR" + "".join(part.capitalize() for part in config.variant.split("-")),
        "model_config": {name: fields[name] for name in PUBLISHED_FIELDS},
        "args": args,
    }


def save(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that `path` is always whole: temporary name, fsync, rename.

    The temporary name is the same every time, so that what a killed process left is overwritten.

    Raises:
        StorageAccessError: the disk is full or read-only, or the folder is gone.
    """
    content = {"format_version": FORMAT_VERSION, "versions": versions(), **content}
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer turns an OSError into a RuntimeError
        temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and is_worker_death(error):  # has nothing to do with the file
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error).partition("\n")[0]
        raise StorageAccessError(
            f"{path}: cannot be written: {reason}", hint="make room on the disk, or give another folder"
        ) from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ours onto the CPU.

    Raises:
        CheckpointError: absent, not a checkpoint, torn or altered, or of another format version.
    """
    try:
        verify_records(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file", hint="train first") from error
    except CheckpointError:
        raise
    except Exception as error:  # a torn file shows as any of a dozen types, by where it is torn
        reason = reason_in(str(error)) or type(error).__name__
        raise CheckpointError(
            f"{path}: not a readable checkpoint: {reason}", hint="remove it, and train again"
        ) from error
    found = content.get("format_version") if isinstance(content, dict) else None
    if found == 1 and "model_config" in content:  # it has no published sections; our own lies under their name
        content["config"] = content.pop("model_config")
    elif found != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {found}, this program reads {FORMAT_VERSION}",
            hint="use the program that wrote it, or train again",
        )
    return dict(content)


def newest_whole(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint for resuming that can be read, and its content; None if there is none of that name.

    An unreadable one is passed over with a warning that names it and the one used instead.

    Raises:
        CheckpointError: there are some, and none can be read.
    """
    periodic = [path for path in folder.glob("checkpoint_*.pth") if re.fullmatch(r"checkpoint_\d+\.pth", path.name)]
    periodic.sort(key=lambda path: int(path.stem.rpartition("_")[2]), reverse=True)
    broken: list[CheckpointError] = []
    for path in [folder / LATEST, *periodic]:
        if not path.exists():
            continue
        try:
            content = load(path)
        except CheckpointError as error:
            broken.append(error)
            continue
        for reason in broken:
            log.warning("%s; %s is used instead", reason.message, path.name)
        return path, content
    if broken:
        raise broken[0]
    return None


def load_trained(path: Path) -> TrainedModel:
    """The detector of one of our best files, in eval mode on the CPU.

    Raises:
        CheckpointError: see `load` and `trained_from`.
    """
    return trained_from(load(path), path)


def trained_from(content: dict[str, Any], path: Path) -> TrainedModel:
    """The same, from what `load` gave.

    Raises:
        CheckpointError: it is a checkpoint for resuming, or its weights do not fit the architecture it names.
    """
    if "source" not in content:
        raise CheckpointError(
            f"{path}: a checkpoint for resuming, which holds more than one set of weights", hint=f"give {BEST_TOTAL}"
        )
    ours = {name: part for name, part in content.items() if name != "model_config"}
    if "config" in content:
        ours["model_config"] = content["config"]
    return build_trained(ours, path, sha256=sha256_of(path))


def sha256_of(path: Path) -> str:
    """Lower-case hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
