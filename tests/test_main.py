"""`python -m rfdetr_core`, and what importing the package's torch-free half loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rfdetr_core.__main__ import main

COUNTS = ("--train", "2", "--valid", "1", "--test", "1", "--size", "40", "--seed", "3")


def test_a_sample_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sample"
    assert main(["data", "sample", "--out", str(out), *COUNTS, "--max-objects", "1"]) == 0
    said = capsys.readouterr()
    assert said.out == f"wrote 2 / 1 / 1 images to {out}\n" and said.err == ""
    assert sorted(path.name for path in out.rglob("*.jpg")) == [
        "test_00000.jpg", "train_00000.jpg", "train_00001.jpg", "valid_00000.jpg",
    ]  # fmt: skip


def test_every_option_arrives(tmp_path: Path) -> None:
    from tests.data.test_sample import digests

    base = ["data", "sample", "--train", "2", "--valid", "1", "--test", "1", "--size", "40"]
    assert main([*base, "--out", str(tmp_path / "base")]) == 0
    for option, value in (("--seed", "9"), ("--size", "60"), ("--max-objects", "20")):
        assert main([*base, option, value, "--out", str(tmp_path / option)]) == 0
        assert digests(tmp_path / option) != digests(tmp_path / "base"), option


def test_a_wrong_number_ends_with_2_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "sample", "--out", str(tmp_path / "x"), "--train", "0"]) == 2
    said = capsys.readouterr()
    assert said.err == "error: train: 0 is not allowed (use 1 or more)\n" and said.out == ""
    assert not (tmp_path / "x").exists()


def test_debug_shows_the_traceback_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "data", "sample", "--out", str(tmp_path / "x"), "--train", "0"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and said.endswith("error: train: 0 is not allowed (use 1 or more)\n")


@pytest.mark.parametrize("arguments", [[], ["data"], ["data", "sample"], ["nonsense"], ["data", "sample", "--out"]])
def test_an_incomplete_command_ends_with_2_and_its_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: python -m rfdetr_core" in capsys.readouterr().err


def test_the_program_exits_with_its_code(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    command = [sys.executable, "-m", "rfdetr_core", "data", "sample", *COUNTS, "--out"]
    refused = subprocess.run([*command, str(tmp_path / "full")], capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: {tmp_path / 'full'} exists and is not an empty folder")
    assert refused.stderr.count("\n") == 1
    assert subprocess.run([*command, str(tmp_path / "new")], capture_output=True).returncode == 0


TORCH_FREE = [
    "rfdetr_core",
    "rfdetr_core.__main__",
    "rfdetr_core.data.formats.coco",
    "rfdetr_core.data.images",
    "rfdetr_core.data.prepared",
    "rfdetr_core.data.report",
    "rfdetr_core.data.sample",
    "rfdetr_core.data.scales",
    "rfdetr_core.data.splitting",
    "rfdetr_core.data.validation",
    "rfdetr_core.evaluation.metrics",
    "rfdetr_core.hardware",
    "rfdetr_core.promotion",
    "rfdetr_core.registry",
]


def test_the_slim_half_loads_no_torch() -> None:
    """validate_dataset runs in an image without torch."""
    code = f"import sys, {', '.join(TORCH_FREE)}; print(*(name.split('.')[0] for name in sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert {"torch", "torchvision", "lightning_fabric", "kfp", "pycocotools", "hotcoco"}.isdisjoint(output.split())


def test_importing_the_package_alone_loads_next_to_nothing() -> None:
    code = "import sys; before = set(sys.modules); import rfdetr_core; print(*(set(sys.modules) - before))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert {"torch", "numpy", "pydantic", "PIL", "boto3"}.isdisjoint(output.split())
