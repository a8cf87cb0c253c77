"""The comparison of trainings with the reference package runs, and both sides do the same work."""

from __future__ import annotations

import re

import pytest

from benchmarks import training
from tests.peer.test_published_package import PEER

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not PEER.exists(), reason="the reference package is not installed: make peer"),
]


def test_both_sides_count_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    """Up to what rounding of recall thresholds and the rule for crowds make."""
    assert training.main(["--parts", "metrics", "--repeats", "1", "--metric-images", "200"]) == 0
    pairs = re.findall(r"(map|map50|f1) (\d\.\d+) / (\d\.\d+)", capsys.readouterr().out)
    assert [name for name, *_ in pairs] == ["map", "map50", "f1"] * 2
    for name, theirs, ours in pairs:
        assert float(ours) == pytest.approx(float(theirs), rel=5e-3) and float(ours) > 0.1, name


def test_loaders_are_timed(capsys: pytest.CaptureFixture[str]) -> None:
    assert training.main(["--parts", "loader", "--repeats", "1", "--train-images", "10"]) == 0
    lines = capsys.readouterr().out.splitlines()[-4:]
    for line in lines:
        theirs, ours, *_ = map(float, line.partition("ms/image")[2].split()[:5])
        assert 0.5 < ours < theirs, line


def test_whole_trainings_see_the_same_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--train-images", "10", "--valid-images", "2", "--scales", "multi", "--workers", "0"]
    assert training.main(["--parts", "training", "--repeats", "1", *few]) == 0
    output = capsys.readouterr().out
    for measure in ("seconds/step", "of it, waiting", "validation, s", "end of epoch, s", "whole epoch, s"):
        assert re.search(rf"{measure} +\d", output), output
    assert "did not train at the same sizes" not in output
