"""The benchmark of COCO metrics: its sides solve the same problem, and a wrong number is not praised for its speed."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import evaluation


def test_the_sides_agree_on_a_small_problem(tmp_path: Path) -> None:
    evaluation.write_problem(tmp_path, images=20, classes=3, detections=10, seed=0)
    runs = [evaluation.measure(side, tmp_path, 1) for side in ("ours", "ours, twelve numbers", "pycocotools")]
    first, *others = [run["numbers"] for run in runs if run is not None]
    assert len(others) == 2 and 0.05 < first[0] < 0.95
    assert all(numbers == pytest.approx(first, abs=1e-9) for numbers in others)
    assert all(run is not None and run["seconds"] > 0 and run["peak_mib"] > 20 for run in runs)


def test_a_side_that_is_not_installed_has_a_row_that_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(evaluation, "PEER", tmp_path / "absent")
    assert evaluation.measure("faster-coco-eval", tmp_path, 1) is None
    run = {"seconds": 2.0, "peak_mib": 100.0, "numbers": [0.5]}
    evaluation.report({"ours": [{**run, "seconds": 0.5}], "pycocotools": [run], "faster-coco-eval": []})
    shown = capsys.readouterr().out
    assert "| ours | 0.50 (0.50 to 0.50) | 4.0× | 100 | 1.00 | 0.0e+00 |" in shown
    assert "faster-coco-eval | not installed: make peer" in shown


def test_other_numbers_than_those_of_pycocotools_fail(capsys: pytest.CaptureFixture[str]) -> None:
    run = {"seconds": 2.0, "peak_mib": 100.0, "numbers": [0.5]}
    with pytest.raises(SystemExit, match=r"the numbers differ by 1\.0e-03"):
        evaluation.report({"ours": [{**run, "numbers": [0.501]}], "pycocotools": [run]})
