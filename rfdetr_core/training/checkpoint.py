"""Checkpoint files: their names, what they hold, how they are written and read (DESIGN section 6).

    checkpoint.pth               the last optimizer step: everything needed to continue
    checkpoint_<N>.pth           the same, at the end of epoch N (zero-based), every checkpoint_interval epochs
    checkpoint_best_regular.pth  weights only: best validation score of the raw weights
    checkpoint_best_ema.pth      weights only: best validation score of the EMA
    checkpoint_best_total.pth    the better of the two; the one that later stages use

All are read with `weights_only=True`: no pickle is ever executed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from pathlib import Path
from typing import Any, Literal

import torch

from rfdetr_core import __version__
from rfdetr_core.errors import CheckpointError, StorageAccessError
from rfdetr_core.models.weights import TrainedModel, build_trained

FORMAT_VERSION = 1
LATEST = "checkpoint.pth"
BEST_TOTAL = "checkpoint_best_total.pth"
Source = Literal["regular", "ema"]


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
        reason = error.strerror if isinstance(error, OSError) else str(error).partition("\n")[0]
        raise StorageAccessError(
            f"{path}: cannot be written: {reason}", hint="make room on the disk, or give another folder"
        ) from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ours onto the CPU.

    Raises:
        CheckpointError: absent, not a checkpoint, torn, or of another format version.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file", hint="train first") from error
    except Exception as error:  # a torn file shows as any of a dozen types, by where it is torn
        reason = str(error).partition("\n")[0][:150] or type(error).__name__
        raise CheckpointError(
            f"{path}: not a readable checkpoint: {reason}", hint="remove it, and train again"
        ) from error
    found = content.get("format_version") if isinstance(content, dict) else None
    if not isinstance(content, dict) or found != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {found}, this program reads {FORMAT_VERSION}",
            hint="use the program that wrote it, or train again",
        )
    return content


def load_trained(path: Path) -> TrainedModel:
    """The detector of one of the best files, in eval mode on the CPU.

    Raises:
        CheckpointError: see `load`; or the weights do not fit the architecture that the file names.
    """
    content = load(path)
    if "source" not in content:
        raise CheckpointError(
            f"{path}: a checkpoint for resuming, which holds more than one set of weights", hint=f"give {BEST_TOTAL}"
        )
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return build_trained(content, path, sha256=sha256)
