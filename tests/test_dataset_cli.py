"""`python -m rfdetr_core data validate|convert|stats`, as a person uses it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rfdetr_core.__main__ import main
from rfdetr_core.data.prepared import PreparedDataset
from tests.data.helpers import annotation, document, grid_dataset, write_dataset


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return grid_dataset(tmp_path_factory.mktemp("cli") / "s", 14)


def test_validate_says_what_it_found_and_holds(source: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["data", "validate", str(source), "--report", str(tmp_path / "r")]) == 0
    out = capsys.readouterr().out
    assert "split-by-hash: split absent from the source" in out and "train: 13 images" in out and "0 cat: train" in out
    assert str(tmp_path / "r" / "report.html") in out
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert report["usable"] is True and report["splits"]["train"]["images"] == 13
    page = (tmp_path / "r" / "report.html").read_text()
    assert "Samples of each class" in page and "data:image/jpeg" in page and "Shapes" in page


def test_what_cannot_be_used_ends_with_2_and_a_report(tmp_path: Path, capsys: Any) -> None:
    write_dataset(tmp_path / "s", document(annotations=[annotation(image=9)]))
    assert main(["data", "validate", str(tmp_path / "s"), "--report", str(tmp_path / "r")]) == 2
    said = capsys.readouterr()
    assert "error         1  unknown-image: annotation of an image that is not listed" in said.out
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert json.loads((tmp_path / "r" / "report.json").read_text())["usable"] is False


def test_headers_only_finds_all_but_broken_pixels(source: Path, tmp_path: Path, capsys: Any) -> None:
    write_dataset(tmp_path, document())
    path = tmp_path / "train" / "a.png"
    data = path.read_bytes()
    path.write_bytes(data[:300] + bytes(64) + data[364:])
    more = ["--set", "dataset.missing_test=valid", "--set", "dataset.tolerate={unreadable-image: 0}"]
    assert main(["data", "validate", str(tmp_path), "--headers-only", *more]) == 0
    assert main(["data", "validate", str(tmp_path), *more]) == 2
    assert "unreadable-image" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["coco", "yolo", "prepared"])
def test_convert_and_stats(source: Path, tmp_path: Path, form: str, capsys: Any) -> None:
    out = tmp_path / "deep" / form
    assert main(["data", "convert", str(source), "--to", form, "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    assert main(["data", "stats", str(out), "--json", str(tmp_path / "s.json")]) == 0
    assert "boxes in an image" in capsys.readouterr().out
    found = json.loads((tmp_path / "s.json").read_text())
    assert sum(split["images"] for split in found["splits"].values()) == 16
    if form == "prepared":
        assert len(PreparedDataset(out).split("train")) == found["splits"]["train"]["images"] == 13
    assert sorted(p.name for p in out.parent.iterdir()) == [form], "nothing temporary is left"
    assert main(["data", "convert", str(source), "--to", form, "--out", str(out)]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, capsys: Any) -> None:
    write_dataset(tmp_path / "s", document(annotations=[annotation(image=9)]))
    assert main(["data", "convert", str(tmp_path / "s"), "--to", "yolo", "--out", str(tmp_path / "o")]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone"], "gone: no such folder"),
        (["gone.zip"], "gone.zip: no such file"),
        ([".", "--set", "export.opset=18"], "--set export…: has no effect on a dataset"),
        ([".", "--set", "dataset.format=voc8"], 'dataset.format: "voc8" is not allowed'),
    ],
)
def test_mistakes_are_told_in_a_line(arguments: list[str], message: str, capsys: Any) -> None:
    assert main(["data", "validate", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
