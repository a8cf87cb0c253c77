"""What can be said of a weight file from its bytes, without torch: the slim stages look before a GPU is asked for.

A whole file of PyTorch is a zip archive, whose table of contents stands at the end: a cut-off one has none.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from rfdetr_core.errors import CheckpointError

AGAIN = "download it again, or give another file"


def refuse_other_forms(path: Path, shown_as: str) -> None:
    """Say early, and in words, what is no weight file; `shown_as` stands for it in messages.

    Raises:
        CheckpointError: it cannot be read, is empty, cut off, or nothing that torch.save writes.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise CheckpointError(f"{shown_as}: cannot be read: {error.strerror}", hint="check the path") from error
    if not head:
        raise CheckpointError(f"{shown_as}: the file is empty", hint=AGAIN)
    if head.startswith(b"PK"):
        if not is_zip(path):
            raise CheckpointError(f"{shown_as}: the file is cut off or damaged: its end is missing", hint=AGAIN)
    elif head[0] != 0x80:  # what a pickle starts with, as files of torch before 1.6 do
        raise CheckpointError(f"{shown_as}: not a weight file of PyTorch: it starts with {head!r}", hint=AGAIN)


def is_zip(path: Path) -> bool:
    """Whether the end of a file is that of a zip archive."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # what follows its end record contradicts it
        return False
