"""The report on the reference numbers: nothing is forgotten, and a breach is seen."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.models import golden_report
from tests.models.golden_check import FLOAT32, Check, Deviation, by_file, entries
from tests.models.golden_report import CASES, LEFT_OUT, computed, forgotten, is_long, main, report, stored_files


@pytest.mark.long
def test_every_entry_is_compared_or_left_out_for_a_reason_and_never_both() -> None:
    compared = by_file([computed(name) for name in CASES])
    for file in stored_files():
        if not is_long(file):
            assert forgotten(file, compared.get(file, [])) == []
        for deviation in compared.get(file, []):
            assert not golden_report.reason(file, deviation.entry)
    assert all(deviation.ok for deviations in compared.values() for deviation in deviations)


@pytest.mark.long
def test_every_entry_of_full_size_is_compared_or_left_out_for_a_reason_and_never_both() -> None:
    compared = by_file([computed(name) for name in golden_report.LONG_CASES])
    assert set(compared) == {file for file in stored_files() if is_long(file)} - {"full_seg_nano.npz"}
    for file, deviations in compared.items():
        assert forgotten(file, deviations) == []
        assert not any(golden_report.reason(file, deviation.entry) for deviation in deviations)


def test_each_reason_is_of_use() -> None:
    found = {golden_report.reason(file, entry) for file in stored_files() for entry in entries(file)}
    assert found == {*LEFT_OUT, ""}


def one_case(largest: float, file: str = "tiny_up192.npz") -> Callable[[], Check]:
    def compute() -> Check:
        check = Check()
        for entry in entries(file):
            if not golden_report.reason(file, entry):
                check.deviations.append(Deviation(file, entry, "boxes", 4, largest, FLOAT32["boxes"]))
        return check

    return compute


@pytest.mark.parametrize(
    ("largest", "verdict"), [(1e-5, "ok"), (3e-5, "BREACH"), (float("nan"), "BREACH"), (float("inf"), "BREACH")]
)
def test_a_row_tells_what_is_out_of_tolerance(largest: float, verdict: str) -> None:
    rows = report(by_file([one_case(largest)()]), fast=True)
    (line,) = [line for line in golden_report.table(rows).splitlines() if line.startswith("tiny_up192.npz")]
    assert line.split()[2] == verdict
    assert ("in eval." in line) == (verdict == "BREACH")


def test_a_breach_is_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(golden_report, "stored_files", lambda: ["full_nano_eval.npz", "tiny_up192.npz"])
    for largest, code in ((1e-5, 0), (3e-5, 1)):
        monkeypatch.setattr(golden_report, "CASES", {f"off by {largest}": one_case(largest)})
        assert main(["--fast"]) == code
    printed = capsys.readouterr().out
    assert "left out by --fast" in printed
    assert printed.endswith("BREACH in tiny_up192.npz\n")


def test_a_file_or_an_entry_without_a_case_is_a_breach() -> None:
    rows = {row.file: row for row in report({}, fast=False)}
    assert not rows["tiny.npz"].ok
    assert "NO CASE for" in rows["tiny.npz"].results
    assert rows["full_seg_nano.npz"].ok
    assert rows["full_seg_nano.npz"].results == "segmentation is not built"


@pytest.mark.parametrize(
    ("kind", "found", "stored", "largest"),
    [
        ("boxes", [1.0, 2.5], [1.0, 2.0], 0.5),
        ("boxes", [float("inf")], [float("inf")], 0.0),
        ("boxes", [1.0], [1.0, 2.0], float("inf")),
        ("losses", [2.2, 0.001], [2.0, 0.0], 0.1),
        ("norms", [3.0], [1.0], 1.0),
        ("gradients", [3.0, 0.0], [3.0, 4.0], 0.8),
        ("sums", [11.0], [10.0], 0.1),
        ("equal", [1, 2, 3, 5], [1, 2, 3, 4], 0.25),
        ("equal", {"a": [1], "b": 2}, {"b": 2, "a": [1, 1]}, 0.5),
        ("losses", {"a": 1.0}, {"a": 1.0, "b": 1.0}, float("inf")),
    ],
)
def test_how_deviations_are_measured(kind: str, found: object, stored: object, largest: float) -> None:
    check = Check()
    check.values("tiny.npz", "entry", kind, found, stored)
    assert check.deviations[0].largest == pytest.approx(largest)


def test_a_difference_that_is_no_number_is_no_match() -> None:
    check = Check()
    check.values("tiny.npz", "entry", "boxes", [float("nan")], [1.0])
    assert not check.deviations[0].ok
