"""What can be said of a weight file from its bytes, without torch: the slim stages look before a GPU is asked for.

A whole file of PyTorch is a zip archive, whose table of contents stands at the end: a cut-off one has none.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

from rfdetr_core.errors import CheckpointError

AGAIN = "download it again, or give another file"

_OTHER_HEADS = re.compile(
    r"(?:(?:model|module|_orig_mod)\.)*(segmentation_head|keypoint_embed)\.(?:\w+\.)*(?:weight|bias)"
)
_OTHER_KINDS = {"segmentation": "masks", "keypoint": "keypoints"}
"""Kinds of models that are no detectors -> what they find, and this program does not."""
_PICKLE_LIMIT = 64 << 20  # bytes; that of a training checkpoint has less than one MiB


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


def kind_of_keys(texts: Iterable[str]) -> str | None:
    """Either segmentation or keypoint, if one of the keys of a state dict is no detector's."""
    heads = (found[1].partition("_")[0] for text in texts if (found := _OTHER_HEADS.fullmatch(text)) is not None)
    return next(heads, None)


def kind_in_file(path: Path) -> str | None:
    """The same of a file, whose pickle is looked through and not executed; None as well where that cannot tell."""
    if not is_zip(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            record = next((entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")), None)
            if record is None or record.file_size > _PICKLE_LIMIT:
                return None
            steps = pickletools.genops(archive.read(record))
            return kind_of_keys(value for _, value, _ in steps if isinstance(value, str))
    except Exception:  # damaged, in any of a dozen ways: whoever loads it says so
        return None


def other_kind(shown_as: str, kind: str) -> CheckpointError:
    """The refusal of weights of a kind that `kind_of_keys` names."""
    return CheckpointError(
        f"{shown_as}: holds the weights of a {kind} model, and {_OTHER_KINDS[kind]} are not built: "
        "this program has detectors only",
        hint="give the weights of a detector, such as rf-detr-nano.pth",
    )
