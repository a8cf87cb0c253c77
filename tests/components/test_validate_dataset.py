"""The validate_dataset stage: what it takes, what it leaves, what it does not do twice."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from components.validate_dataset import stage
from rfdetr_core.data import preparing
from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.storage import Location
from tests.data.helpers import annotation, document, grid_dataset, image_row, write_dataset, write_split
from tests.s3_server import s3_root, s3_server  # noqa: F401

RUN = "r1"


def run(root: str, folder: Path, uri: str, *, name: str = RUN, **dataset: Any) -> int:
    sections = {"name": "grid", "dataset": {"uri": uri, **dataset}, "model": {"variant": "pico"}}
    (folder / "config.yaml").write_text(json.dumps(sections))
    return stage.main(["--run-uri", f"{root}/runs/{name}", "--config", str(folder / "config.yaml")])


def result(root: Path, name: str = RUN, file: str = "report.json") -> Any:
    return json.loads((root / "runs" / name / "dataset" / file).read_text())


def status(root: Path, name: str = RUN) -> Any:
    return json.loads((root / "runs" / name / "status" / "validate_dataset.json").read_text())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = grid_dataset(tmp_path / "source", 6)
    shutil.copytree(folder / "valid", folder / "test")
    return folder


def test_from_a_prefix_and_from_archives_it_is_one_dataset(
    source: Path,
    tmp_path: Path,
    s3_root: Location,  # noqa: F811
) -> None:
    (s3_root / "data").upload_tree(source, progress=False)
    shutil.make_archive(str(tmp_path / "d"), "zip", source)
    shutil.make_archive(str(tmp_path / "d"), "gztar", source)
    (s3_root / "d.zip").upload_file(tmp_path / "d.zip")
    uris = [str(source), str(tmp_path / "d.tar.gz"), f"{s3_root.uri}/data", f"{s3_root.uri}/d.zip"]
    for i, uri in enumerate(uris):
        assert run(str(tmp_path / "root"), tmp_path, uri, name=f"r{i}") == 0
    found = {result(tmp_path / "root", f"r{i}", "dataset.json")["digest"] for i in range(len(uris))}
    assert len(found) == 1
    dataset = PreparedDataset(tmp_path / "root" / "datasets" / found.pop())
    assert len(dataset.split("train")) == 6


def test_an_unchanged_prefix_is_neither_fetched_nor_read_again(
    source: Path,
    tmp_path: Path,
    s3_root: Location,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (s3_root / "data").upload_tree(source, progress=False)
    root = str(s3_root)
    assert run(root, tmp_path, f"{s3_root.uri}/data") == 0
    read = [(s3_root / f"runs/{RUN}/dataset/{name}").read_bytes() for name in stage.REMEMBERED]

    def fetched(*_: object, **__: object) -> None:
        raise AssertionError("the dataset was fetched again")

    monkeypatch.setattr(stage, "local_dataset", fetched)
    assert run(root, tmp_path, f"{s3_root.uri}/data", name="r2") == 0
    assert [(s3_root / f"runs/r2/dataset/{name}").read_bytes() for name in stage.REMEMBERED] == read
    # other options, and other bytes, are another dataset
    assert run(root, tmp_path, f"{s3_root.uri}/data", name="r3", strict=True) == 70
    (s3_root / "data/train/train000.png").write_bytes((source / "train" / "train001.png").read_bytes())
    assert run(root, tmp_path, f"{s3_root.uri}/data", name="r4") == 70


def test_unchanged_data_is_not_prepared_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    assert run(str(root), tmp_path, str(source)) == 0
    shutil.copytree(source, tmp_path / "elsewhere")

    def encoded(*_: object) -> None:
        raise AssertionError("an image was decoded again")

    monkeypatch.setattr(preparing, "encode", encoded)
    assert run(str(root), tmp_path, str(tmp_path / "elsewhere"), name="r2") == 0
    one, other = (result(root, name, "dataset.json") for name in (RUN, "r2"))
    assert one["location"] == other["location"]
    assert len([p for p in (root / "datasets").iterdir() if p.name != "sources"]) == 1


def test_a_failure_leaves_its_report_and_the_ten_worst_in_the_log(tmp_path: Path, capsys: Any) -> None:
    rows = [image_row(i + 1, f"{i}.png") for i in range(14)]
    boxes = [annotation(1, 1, bbox=(5, 5, 0, 9)), *(annotation(i, 99) for i in range(2, 9))]
    write_dataset(tmp_path / "s", document(rows, boxes))
    (tmp_path / "s" / "train" / "5.png").write_bytes(b"")
    root = tmp_path / "root"
    assert run(str(root), tmp_path, str(tmp_path / "s")) == 2
    report = result(root)
    assert report["usable"] is False
    found = {row["code"]: (row["severity"], row["count"]) for row in report["findings"]}
    assert found["unknown-image"] == ("error", 7) and found["empty-image"] == ("error", 1)
    assert found["box-empty"] == ("warning", 1)
    assert "Not usable" in (root / "runs" / RUN / "dataset" / "report.html").read_text()
    assert not (root / "datasets").exists() and not (root / "runs" / RUN / "dataset" / "_SUCCESS.json").exists()
    log = capsys.readouterr().out
    assert log.index("unknown-image, 7") < log.index("empty-image, 1") < log.index("box-empty, 1")
    assert status(root)["exit_code"] == 2


def test_strict_and_tolerate(tmp_path: Path) -> None:
    rows = [image_row(i + 1, f"{i}.png") for i in range(9)]
    boxes = [annotation(1), annotation(2, bbox=(5, 5, 0, 9)), annotation(3, bbox=(-5, 5, 9, 9))]
    write_dataset(tmp_path / "s", document(rows, boxes))
    write_split(tmp_path / "s", "test", document([image_row(1, "t.png")], [annotation(1)]), seed=3)
    (tmp_path / "s" / "train" / "5.png").write_bytes(b"")
    root, uri = tmp_path / "root", str(tmp_path / "s")
    assert run(str(root), tmp_path, uri) == 2
    assert run(str(root), tmp_path, uri, tolerate={"empty-image": 1}) == 0
    assert result(root)["splits"]["train"]["images"] == 8
    assert run(str(root), tmp_path, uri, name="r2", tolerate={"empty-image": 1, "box-empty": 0}) == 2
    assert "box-empty" in [row["code"] for row in result(root, "r2")["findings"] if row["severity"] == "error"]
    assert run(str(root), tmp_path, uri, name="r3", tolerate={"empty-image": 1}, strict=True) == 2
    errors = {row["code"] for row in result(root, "r3")["findings"] if row["severity"] == "error"}
    assert errors == {"box-empty", "box-clipped"}
    allowed = {"empty-image": 1, "box-empty": 1, "box-clipped": 1}
    assert run(str(root), tmp_path, uri, name="r4", tolerate=allowed, strict=True) == 0


@pytest.mark.parametrize(
    ("tolerate", "message"),
    [
        ({"box-emtpy": 1}, "dataset.tolerate: 'box-emtpy' is no check (did you mean box-empty?)"),
        ({"no-boxes": 1}, "dataset.tolerate.no-boxes: 1 is not possible"),
        ({"box-empty": -1}, "dataset.tolerate.box-empty: -1 is not allowed"),
    ],
)
def test_what_cannot_be_tolerated(tmp_path: Path, tolerate: Any, message: str, capsys: Any) -> None:
    assert run(str(tmp_path / "root"), tmp_path, str(tmp_path), tolerate=tolerate) == 2
    assert message in capsys.readouterr().out


def test_an_absent_test_split_may_be_valid(tmp_path: Path) -> None:
    source = grid_dataset(tmp_path / "source", 6)
    root = tmp_path / "root"
    assert run(str(root), tmp_path, str(source), missing_test="valid") == 0
    report = result(root)
    assert {name: split["images"] for name, split in report["splits"].items()} == {"train": 6, "valid": 2, "test": 2}
    assert [row["rows"] for row in report["findings"] if row["code"] == "test-is-valid"] == [
        ["test: 2 images of valid"]
    ]
    dataset = PreparedDataset(root / result(root, file="dataset.json")["location"])
    assert dataset.split("test").index.sha256 == dataset.split("valid").index.sha256


def test_it_needs_no_torch(source: Path, tmp_path: Path) -> None:
    import subprocess

    (tmp_path / "config.yaml").write_text(
        json.dumps({"name": "a", "dataset": {"uri": str(source)}, "model": {"variant": "pico"}})
    )
    code = (
        "import sys\nfor name in ('torch', 'kfp', 'simplejpeg', 'hotcoco', 'scipy'): sys.modules[name] = None\n"
        "from components.validate_dataset import stage\n"
        f"sys.exit(stage.main(['--run-uri', {str(tmp_path / 'root/runs/r')!r}, "
        f"'--config', {str(tmp_path / 'config.yaml')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
