"""`model.device` and `model.amp` of rfdetr 1.x: other spellings of fields of `train` (training spec 1.1 and 1.3)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any, TypeGuard

from rfdetr_core.config.problems import broken_rule, show

MOVED_TO_TRAIN = {"device": "train.accelerator", "amp": "train.amp_dtype (null for amp: false)"}
"""Fields of the model section that say what `train` says, and where."""

_DEVICE = re.compile(r"(?P<kind>cpu|cuda|mps)|cuda:(?P<number>\d{1,3})")


def legal_device(value: str) -> str:
    """The value, if it names a device."""
    if not _DEVICE.fullmatch(value):
        rule = 'must be "cpu", "cuda", "cuda:N" (N is the number of a GPU) or "mps"'
        raise broken_rule("device", rule, ("cpu", "cuda"))
    return value


def is_device(value: Any) -> TypeGuard[str]:
    """Whether it names a device."""
    return isinstance(value, str) and _DEVICE.fullmatch(value) is not None


def train_settings(device: str) -> dict[str, str]:
    """What `train` calls it: "cuda:1" is accelerator "cuda" with devices "1,", a list of one."""
    kind, _, number = device.partition(":")
    return {"accelerator": kind, **({"devices": f"{int(number)},"} if number else {})}


def contradiction(device: str, train: Mapping[str, Any]) -> str:
    """The field of `train` that says something else than the device, with its value; empty if none does."""
    for name, value in train_settings(device).items():
        given = train.get(name)
        unsaid = (None, "auto") if name == "accelerator" else (None, 1, "1")
        if given not in unsaid and {"gpu": "cuda"}.get(str(given), given) != value:
            return f"train.{name} is {show(given)}"
    return ""


def amp_dtype(amp: bool | None, given: Any) -> Any:
    """`train.amp_dtype`, of which `amp: false` takes the "auto"."""
    return None if amp is False and given == "auto" else given


def warn_moved_to_train(name: str) -> None:
    """Say that a field of the model section belongs to `train`."""
    warnings.warn(f"model.{name} is deprecated: give {MOVED_TO_TRAIN[name]}", FutureWarning, stacklevel=2)
