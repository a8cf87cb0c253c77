"""The table of checks: each has a test that plants what it finds."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from rfdetr_core.data.checks import CHECKS, CheckOptions, checked_limits
from rfdetr_core.data.findings import Report
from rfdetr_core.errors import ConfigError
from tests.data import test_validation, test_voc, test_yolo

ELSEWHERE = {
    "bad-categories": "test_validation",
    "exif-orientation": "test_images",
    "exif-ignored": "test_images",
    "oversized-image": "test_validation.test_a_bomb_is_refused_by_its_header",
    "split-by-hash": "test_splitting",
    "too-few-images": "test_splitting",
    "test-is-valid": "test_validate_dataset.test_an_absent_test_split_may_be_valid",
}
"""Checks with tests of their own rather than a row of a table."""


def test_every_check_is_planted_by_a_test() -> None:
    tables = {module.__name__: set(module.CASES) for module in (test_validation, test_yolo, test_voc)}
    planted = set().union(*tables.values()) | set(ELSEWHERE)
    assert set(CHECKS) == planted
    for code in ELSEWHERE:
        files = [
            *Path(__file__).parent.glob("test_*.py"),
            *(Path(__file__).parents[1] / "components").glob("test_*.py"),
        ]
        assert any(code in path.read_text() for path in files if path != Path(__file__)), code


def test_every_code_that_is_reported_is_in_the_table() -> None:
    data = Path(__file__).parents[2] / "rfdetr_core" / "data"
    for path in data.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name) and node.args:
                name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
                first = node.args[0]
                if name in ("remark", "Problem", "Remark", "LineProblem") and isinstance(first, ast.Constant):
                    assert first.value in CHECKS, f"{path}: {first.value}"


def test_docs_list_every_check() -> None:
    text = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text()
    assert [code for code in CHECKS if f"`{code}`" not in text] == []


def test_a_limit_decides_what_stops() -> None:
    for options, count, severity in (
        (CheckOptions(), 1, "warning"),
        (CheckOptions(strict=True), 1, "error"),
        (CheckOptions(tolerate={"box-empty": 2}), 2, "warning"),
        (CheckOptions(tolerate={"box-empty": 2}), 3, "error"),
        (CheckOptions(strict=True, tolerate={"box-empty": 2}), 2, "warning"),
    ):
        report = Report(options)
        report.add("box-empty", ["row"] * count)
        assert report.findings["box-empty"].severity == severity
    for options, expected in ((CheckOptions(), "error"), (CheckOptions(tolerate={"unknown-image": 1}), "warning")):
        report = Report(options)
        report.add("unknown-image", ["row"])
        assert report.findings["unknown-image"].severity == expected


def test_limits_of_what_is_no_check_are_refused() -> None:
    assert checked_limits({"no-boxes": 0, "box-empty": 3}) == {"no-boxes": 0, "box-empty": 3}
    with pytest.raises(ConfigError, match="nothing can be dropped"):
        checked_limits({"empty-split": 1})
    with pytest.raises(ConfigError, match=r"'qqq' is no check \(docs/datasets\.md"):
        checked_limits({"qqq": 1})
