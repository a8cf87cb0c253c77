"""Mutated datasets end in a result or in a typed error: a few here, ten thousand in `make test-long`."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from tests.data import mutations


def check(count: int, seed: int, work: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's words on broken tags
        outcomes, wrong = mutations.run(count, seed, work)
    assert not wrong, "\n".join(wrong)
    assert sum(outcomes.values()) == count and min(outcomes["usable"], outcomes["DatasetError"]) > count // 50


def test_mutated_datasets(tmp_path: Path) -> None:
    check(150, 1, tmp_path)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_ten_thousand_mutated_datasets(tmp_path: Path) -> None:
    check(10_000, 2, tmp_path)
