"""docs/parameters.md: current, complete, and true to the classes it is made from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rfdetr_core.config import NOT_BUILT, ModelSection, RunConfig, TrainConfig
from rfdetr_core.config.problems import field_paths
from rfdetr_core.config.table import CHECKED_BY_A_FUNCTION, OURS, SEED_MODEL, SEED_TRAIN, markdown
from rfdetr_core.errors import ConfigError
from tests.config.test_train import BESIDE_SEED, SEED

PAGE = Path(__file__).parents[2] / "docs" / "parameters.md"
NAMED_IN_THE_TEXT = {"dataset_dir", "lr_drop", "group_detr", "ia_bce_loss", "segmentation_head", "num_select"}
"""What the seed names beside its reference table."""


def rows() -> dict[str, list[str]]:
    """Cells after the name, by dotted field."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in markdown().splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif line.startswith("| `") and section not in ("The run", "Variants"):
            name, *cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            found[f"{section}.{name.strip('`')}"] = cells
    return found


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == markdown() + "\n", "docs/parameters.md is not what the classes say: run make docs"


def test_the_command_writes_the_page() -> None:
    command = [sys.executable, "-m", "rfdetr_core.config.table"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == markdown() + "\n"


def test_every_field_has_one_row_with_all_its_cells() -> None:
    table = rows()
    assert list(table) == [path for path in field_paths(RunConfig) if "." in path]
    for path, cells in table.items():
        assert len(cells) == 5, path
        assert cells[0] and cells[1] and cells[3] and cells[4], path


def test_the_seed_is_the_seed() -> None:
    assert {*SEED, *NAMED_IN_THE_TEXT} == SEED_TRAIN
    assert {*SEED, *BESIDE_SEED} == set(TrainConfig.model_fields)
    assert set(ModelSection.model_fields) >= SEED_MODEL
    assert OURS["train"] <= set(TrainConfig.model_fields) - SEED_TRAIN
    assert OURS["model"] <= set(ModelSection.model_fields) - SEED_MODEL


@pytest.mark.parametrize(
    ("path", "cells"),
    [
        ("train.epochs", ["whole number", "`100`", "≥ 1", "seed"]),
        ("train.lr", ["number", "`0.0001`", "> 0", "seed"]),
        ("train.auto_batch_ema_headroom", ["number", "`0.7`", "> 0, ≤ 1", "seed"]),
        ("train.batch_size", ["whole number or choice", "`4`", '`"auto"`, ≥ 1', "seed"]),
        ("train.lr_scheduler", ["choice", '`"step"`', '`"step"`, `"cosine"`', "seed"]),
        ("train.class_names", ["list of text or null", "`null`", "", "1.11"]),
        ("train.checkpoint_minutes", ["number", "`15.0`", "> 0", "ours"]),
        ("model.gradient_checkpointing", ["boolean", "`false`", "", "seed"]),
        ("model.projector_scale", ["list of choices", "the variant's", '`"P3"`, `"P4"`, `"P5"`', "1.11"]),
        ("dataset.uri", ["text", "required", "", "ours"]),
    ],
)
def test_cells(path: str, cells: list[str]) -> None:
    assert rows()[path][:4] == cells


@pytest.mark.parametrize("path", CHECKED_BY_A_FUNCTION)
def test_ranges_that_a_function_checks(path: str) -> None:
    name = path.removeprefix("train.")
    assert rows()[path][2].endswith(", ".join(CHECKED_BY_A_FUNCTION[path]))
    TrainConfig.parse({name: 1})
    TrainConfig.parse({name: "auto"})
    with pytest.raises(ConfigError, match="at least 1"):
        TrainConfig.parse({name: 0})


def test_what_is_not_built_is_told() -> None:
    table = rows()
    assert {path for path, cells in table.items() if "*Not built: " in cells[4]} == set(NOT_BUILT)
    for path, row in NOT_BUILT.items():
        assert f"*Not built: {row.missing}; accepted: `" in table[path][4]


def test_a_name_in_angle_brackets_is_no_html() -> None:
    assert "checkpoint_&lt;N>.pth" in rows()["train.checkpoint_interval"][4]
