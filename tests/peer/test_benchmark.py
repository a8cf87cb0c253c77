"""The comparison with the reference package runs, and finds both sides to compute the same."""

from __future__ import annotations

import re

import pytest

from benchmarks import model
from tests.peer.test_published_package import PEER

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not PEER.exists(), reason="the reference package is not installed: make peer"),
]


@pytest.mark.parametrize("task", ["eval", "export", "train"])
def test_both_sides_compute_the_same(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--variants", "nano", "--threads", "1", "--batches", "1", "--train-batches", "1", "--repeats", "1"]
    assert model.main([*sizes, "--tasks", task]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    (difference,) = re.findall(r"\d+e[-+]\d+", line)  # 0e+00 where both are equal
    assert float(difference) < 1e-4, line
