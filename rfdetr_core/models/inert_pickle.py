"""Files of torch.save, read without executing anything in them.

Every file is read with `weights_only=True`, where a pickle can name classes and call only those that are
allowed. Classes that this program does not know are allowed by name, and each name stands for `Inert`: it takes
what it is given, keeps it as data, imports nothing and calls nothing.
"""

from __future__ import annotations

import argparse
import re
import types
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rfdetr_core.errors import CheckpointError
from rfdetr_core.models.file_form import AGAIN, is_zip, refuse_other_forms

_NAMESPACES = ("argparse.Namespace", "types.SimpleNamespace")
_KNOWN = {*_NAMESPACES, "collections.defaultdict"}
_FOLDER = 0x10  # the attribute bit of MS-DOS


class Inert:
    """Stands for any class of a file's metadata: keeps the state that it is given, and does nothing."""

    dotted = ""
    kept: dict[Any, Any]

    def __new__(cls, *_: Any, **__: Any) -> Inert:
        made = super().__new__(cls)
        made.kept = {}  # here: a pickle makes objects without __init__, and an empty one is given no state either
        return made

    def __setstate__(self, state: Any) -> None:
        # In a dict of its own: no name in the file can become an attribute of this object.
        parts = state if isinstance(state, tuple) else (state,)
        self.kept = {key: value for part in parts if isinstance(part, dict) for key, value in part.items()}


def load_inert(path: Path) -> tuple[Any, tuple[str, ...]]:
    """What a file holds, on the CPU, and the dotted names of the unknown classes in it.

    Raises:
        CheckpointError: absent, not a file of torch.save, damaged, or it holds code.
    """
    refuse_other_forms(path, str(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on pickle protocols
            verify_records(path)
            unknown = _unknown_classes(path)
            allowed: list[Any] = [
                (type(ascii(name)[1:-1], (Inert,), {"dotted": name}), name) for name in (*_NAMESPACES, *unknown)
            ]
            with torch.serialization.safe_globals([*allowed, (_plain_dict, "collections.defaultdict")]):
                return torch.load(path, map_location="cpu", weights_only=True), unknown
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file shows as any of a dozen types, by where it is damaged
        raise _unreadable(path, str(error) or type(error).__name__) from error


class Plain:
    """Turns what was unpickled into dicts, lists, numbers and texts; what is neither becomes None.

    Each container is converted once: a file can refer to one object a million times, or an object to itself.
    """

    def __init__(self) -> None:
        self.known: dict[int, Any] = {}

    def mapping(self, value: Any) -> dict[str, Any]:
        plain = self.of(value)
        return plain if isinstance(plain, dict) else {}

    def of(self, value: Any) -> Any:
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, argparse.Namespace | types.SimpleNamespace):
            value = vars(value)  # real ones arrive only where the host program allowed them
        if isinstance(value, Inert):
            value = value.kept or None
        if isinstance(value, Mapping):
            if id(value) not in self.known:
                table = self.known[id(value)] = {}
                table.update({str(key): self.of(entry) for key, entry in value.items() if isinstance(key, str | int)})
            return self.known[id(value)]
        if isinstance(value, list | tuple | set):
            if id(value) not in self.known:
                rows = self.known[id(value)] = []
                rows.extend(self.of(entry) for entry in value)
            return self.known[id(value)]
        return None


def kind_of(value: Any) -> str:
    """What something is, for a message."""
    if isinstance(value, Inert):
        return f"an object of the unknown class {shown(value.dotted)}"
    if value is None:
        return "nothing"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def shown(text: str) -> str:
    """A name out of a file, so that it can stand in a one-line message."""
    plain = ascii(text)[1:-1]
    return plain if len(plain) <= 150 else plain[:150] + "..."


def shape_text(shape: tuple[int, ...]) -> str:
    """'256 x 3 x 16 x 16'; 'a scalar' for none."""
    return " x ".join(map(str, shape)) or "a scalar"


# Opening


def verify_records(path: Path) -> None:
    """Hold the records of a zip file against their checksums, which torch itself does not: 0.3 s per GB."""
    if not is_zip(path):
        return
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise CheckpointError(f"{path}: not a weight file of PyTorch: its records are compressed", hint=AGAIN)
        root = records[0].filename.partition("/")[0] if records else ""
        if f"{root}/data.pkl" not in archive.namelist():
            raise CheckpointError(f"{path}: not a weight file of PyTorch: a zip file without data.pkl", hint=AGAIN)
        # torch would skip what is marked as a folder, and hand out whatever memory it was going to fill.
        if (folder := next((record for record in records if record.external_attr & _FOLDER), None)) is not None:
            raise CheckpointError(f"{path}: the file is damaged: {shown(folder.filename)} is a folder", hint=AGAIN)
        # All zero: written under torch.serialization.set_crc32_options(False).
        if any(record.CRC for record in records) and (damaged := archive.testzip()) is not None:
            raise CheckpointError(f"{path}: the file is damaged: {shown(damaged)} has another checksum", hint=AGAIN)


def _plain_dict(*_: Any) -> dict[Any, Any]:
    """What a defaultdict becomes: its factory would be called later."""
    return {}


def _unreadable(path: Path, text: str) -> CheckpointError:
    """What torch says, without its advice to trust the file."""
    again = "save it again with the program that wrote it, its metadata as plain dicts"
    if (found := re.search(r"GLOBAL (\S+) whose module", text)) is not None:
        return CheckpointError(
            f"{path}: refused: it asks to run {shown(found[1])}, which no weight file needs",
            hint="do not use this file",
        )
    if (found := re.search(r"GLOBAL (\S+) was not an allowed", text)) is not None:
        return CheckpointError(
            f"{path}: refused: it needs {shown(found[1])}, and a file in the format before torch 1.6 "
            "cannot be read without it",
            hint=again,
        )
    if (found := re.search(rf"{re.escape(__name__)}\.([\w.]+)", text)) is not None:
        return CheckpointError(f"{path}: refused: it holds a {found[1]} that cannot be read as plain data", hint=again)
    return CheckpointError(f"{path}: not a readable weight file: {reason_in(text)}", hint=AGAIN)


def reason_in(text: str) -> str:
    """One line out of an error of torch: the cause, without places in its sources and advice on its use."""
    reason = (text.partition("WeightsUnpickler error:")[2] or text).strip().partition("\n")[0]
    reason = re.sub(r"^\[enforce fail at [^]]*\][. ]*", "", reason)
    return shown(re.split(r"\.? +(?:This is an internal miniz error|\(Could this error message)", reason)[0])


def _unknown_classes(path: Path) -> tuple[str, ...]:
    """Dotted names; only zip files can tell, and in the older format nothing unknown is allowed."""
    if not is_zip(path):
        return ()
    found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return tuple(sorted(set(found) - _KNOWN))
