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
import pickle
import platform
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch

from rfdetr_core import __version__
from rfdetr_core.errors import CheckpointError
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


def versions() -> dict[str, str]:
    """What wrote a file."""
    return {"rfdetr_core": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def save(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that `path` is always whole: temporary name, fsync, rename."""
    content = {"format_version": FORMAT_VERSION, "versions": versions(), **content}
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ours onto the CPU.

    Raises:
        CheckpointError: absent, not a checkpoint, torn, or of another format version.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file", hint="train first") from error
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a readable checkpoint: {reason}", hint="train again") from error
    found = content.get("format_version") if isinstance(content, dict) else None
    if found != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {found}, this program reads {FORMAT_VERSION}",
            hint="use the program that wrote it, or train again",
        )
    assert isinstance(content, dict)
    return content


def load_trained(path: Path) -> TrainedModel:
    """The detector of one of the best files, in eval mode on the CPU.

    Raises:
        CheckpointError: see `load`; or the weights do not fit the architecture that the file names.
    """
    content = load(path)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return build_trained(content, path, sha256=sha256)
