"""metrics.jsonl and metrics.csv hold the same rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from rfdetr_core.training import metrics_log

ROWS: list[dict[str, Any]] = [
    {"epoch": 0, "step": 4, "train/loss": 17.25, "train/lr": 1e-4},
    {"epoch": 1, "step": 9, "val/mAP_50_95": 0.5, "train/loss": 3.0, "val/AP/Größe, µm": 0.25},
]


def test_rows_are_appended_and_the_table_widens(tmp_path: Path) -> None:
    metrics_log.begin(tmp_path, [])
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    for count in (1, 2):
        metrics_log.append(tmp_path, ROWS[:count])
        lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == ROWS[:count]
    with (tmp_path / "metrics.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.reader(file))
    assert table == [
        ["epoch", "step", "train/loss", "train/lr", "val/AP/Größe, µm", "val/mAP_50_95"],
        ["0", "4", "17.25", "0.0001", "", ""],
        ["1", "9", "3.0", "", "0.25", "0.5"],
    ]


def test_begin_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    metrics_log.begin(tmp_path, ROWS)
    metrics_log.begin(tmp_path, ROWS[:1])
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == ROWS[:1]
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["epoch,step,train/loss,train/lr", "0,4,17.25,0.0001"]
