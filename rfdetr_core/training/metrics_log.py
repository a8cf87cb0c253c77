"""metrics.jsonl (one object per epoch, appended) and metrics.csv (the same rows as a table)."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

JSONL = "metrics.jsonl"
CSV = "metrics.csv"


def rewrite(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Begin with the rows a checkpoint knows: what came after it is trained, and written, again."""
    (folder / JSONL).write_text("".join(_line(row) for row in rows))


def append(folder: Path, row: dict[str, Any]) -> None:
    """Add one row."""
    with (folder / JSONL).open("a") as file:
        file.write(_line(row))


def write_csv(folder: Path, rows: list[dict[str, Any]]) -> None:
    """All rows: epoch, step, then the metrics in alphabetical order; an absent value is an empty cell."""
    names = sorted({name for row in rows for name in row} - {"epoch", "step"})
    with (folder / CSV).open("w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", "step", *names])
        writer.writeheader()
        writer.writerows(rows)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"
