"""The model benchmark without the reference package: what it names, refuses, and says of a process that died."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import model
from benchmarks.sides import reference_class
from rfdetr_core.api import VARIANTS


def case(weights: Path) -> model.Case:
    return model.Case(
        variant="nano",
        task="eval",
        batch=1,
        resolution=384,
        weights=str(weights),
        threads=1,
        device="cpu",
        precision="fp32",
        compiled=False,
        allocator="stage",
    )


def test_every_published_variant_has_its_arithmetic_and_its_class() -> None:
    published = {kind.variant: kind.__name__ for kind in VARIANTS if kind.variant != "pico"}
    assert {variant: reference_class(variant) for variant in model.GFLOP} == published


def test_a_variant_that_the_reference_lacks_is_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        model.main(["--variants", "pico"])
    assert "invalid choice: 'pico'" in capsys.readouterr().err


def test_a_process_that_died_has_the_last_word(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"(?s)No such file or directory.*error: the process of ours died with code 1"):
        model.Child("ours", Path(sys.executable), case(tmp_path / "absent.pth"))
