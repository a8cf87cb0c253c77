"""metrics.jsonl (one object per epoch, appended) and metrics.csv (the same rows as a table), whole after each epoch."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from rfdetr_core.storage.local import local_errors

JSONL = "metrics.jsonl"
CSV = "metrics.csv"


def begin(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Start both files with the rows that a checkpoint knows: what came after it is trained, and written, again."""
    with local_errors("write", folder / JSONL):
        (folder / JSONL).write_text("".join(map(_line, rows)), encoding="utf-8")
    _write_csv(folder, rows)


def append(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Add the last of `rows`, which are all there are: a new metric widens the whole table."""
    with local_errors("write", folder / JSONL), (folder / JSONL).open("a", encoding="utf-8") as file:
        file.write(_line(rows[-1]))
    _write_csv(folder, rows)


def _write_csv(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Epoch, step, then the metrics in alphabetical order; an absent value is an empty cell."""
    names = sorted({name for row in rows for name in row} - {"epoch", "step"})
    with local_errors("write", folder / CSV), (folder / CSV).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["epoch", "step", *names])
        writer.writeheader()
        writer.writerows(rows)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"
