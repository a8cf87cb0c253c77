"""How far what we compute is off the stored reference numbers, entry by entry.

An entry is an array of a .npz file, or a key of a .json file: `section/key` where the file has sections.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from tests.models import golden

SECTIONED = ("tiny.json", "full.json", "units.json")
"""Files whose keys are sections; a section that is not a mapping is an entry itself."""

FLOAT32: dict[str, float] = {
    "logits": 1e-4,
    "boxes": 2e-5,  # fractions of the image
    "features": 1e-4,
    "scores": 1e-6,
    "pixels": 5e-3,
    "losses": 1e-4,
    "norms": 1e-2,
    "gradients": 5e-3,
    "sums": 1e-5,
    "order": 2e-5,  # between the scores of the chosen tokens and the best scores
    "equal": 0.0,
}
"""The largest deviation that is allowed, by kind; `_MEASURES` says how each is measured."""
FLOAT64 = {kind: min(tolerance, 1e-9) for kind, tolerance in FLOAT32.items()}


class Deviation(NamedTuple):
    """The result of comparing one entry."""

    file: str
    entry: str
    kind: str
    count: int
    """Numbers compared."""
    largest: float
    """Infinite where names or shapes differ."""
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.largest <= self.tolerance  # not for NaN


class Check:
    """Collects the deviations of a case; `tolerances` by kind."""

    def __init__(self, tolerances: Mapping[str, float] = FLOAT32) -> None:
        self.tolerances = tolerances
        self.deviations: list[Deviation] = []

    def __call__(self, file: str, entry: str, kind: str, found: Any, tolerance: float | None = None) -> None:
        """Compare what was found with a stored entry: an array, a number, or numbers by name."""
        stored = entries(file)[entry]
        self.values(file, entry, kind, found, stored, tolerance)

    def values(self, file: str, entry: str, kind: str, found: Any, stored: Any, tolerance: float | None = None) -> None:
        """Compare with a part of an entry, or with what follows from it."""
        if isinstance(stored, Mapping):
            same_names = set(found) == set(stored)
            found = [found.get(name) for name in stored] if same_names else []
            stored = list(stored.values())
            if kind == "equal":  # shapes, of any length
                found, stored = list(map(str, found)), list(map(str, stored))
        a, b = np.asarray(_plain(found)), np.asarray(_plain(stored))
        if a.shape != b.shape:
            largest = math.inf
        elif not b.size:
            largest = 0.0
        else:
            largest = float((a != b).mean()) if kind == "equal" else _measure(kind, a, b)
        limit = self.tolerances[kind] if tolerance is None else tolerance
        self.deviations.append(Deviation(file, entry, kind, b.size, largest, limit))


def _plain(values: Any) -> Any:
    if isinstance(values, Tensor):
        return values.detach().cpu().numpy()
    return [_plain(value) for value in values] if isinstance(values, list | tuple) else values


def _measure(kind: str, found: np.ndarray[Any, Any], stored: np.ndarray[Any, Any]) -> float:
    a, b = found.astype(np.float64), stored.astype(np.float64)
    if kind == "gradients":  # relative, as a vector
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))
    same = a == b  # infinities have no difference
    difference = np.abs(np.subtract(a, b, where=~same, out=np.zeros_like(a)))
    if kind == "losses":  # relative, for terms of at least 0.01
        difference = difference / np.maximum(np.abs(b), 1e-2)
    elif kind == "norms":  # relative to the norm plus one: some are 0 in exact arithmetic
        difference = difference / (np.abs(b) + 1.0)
    elif kind == "sums":
        difference = difference / np.maximum(np.abs(b), 1.0)
    return float(difference.max())


def entries(file: str) -> dict[str, Any]:
    """Every entry of a stored file."""
    stem, _, suffix = file.rpartition(".")
    if suffix == "npz":
        return dict(golden.arrays(stem))
    content = golden.scalars(stem)
    if file not in SECTIONED:
        return content
    found: dict[str, Any] = {}
    for section, part in content.items():
        found |= (
            {f"{section}/{key}": value for key, value in part.items()} if isinstance(part, dict) else {section: part}
        )
    return found


def breaches(check: Check) -> list[Deviation]:
    """What is out of tolerance; a case that compared nothing is a defect."""
    assert check.deviations
    return [deviation for deviation in check.deviations if not deviation.ok]


def by_file(checks: list[Check]) -> dict[str, list[Deviation]]:
    """All deviations, by the file they belong to."""
    found: dict[str, list[Deviation]] = defaultdict(list)
    for check in checks:
        for deviation in check.deviations:
            found[deviation.file].append(deviation)
    return found
