"""`rfdetr-pipeline weights put`: from a file to the URI that a configuration names, through a real S3 server."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
from pathlib import Path

import pytest
import torch

from pipelines.cli import main
from pipelines.s3_server import LocalS3Server
from rfdetr_core.config import ModelConfig
from rfdetr_core.models.detector import RFDETR
from rfdetr_core.models.weight_file import read_weight_file
from rfdetr_core.models.weights import load_pretrained
from rfdetr_core.pretrained import fetch_weights
from rfdetr_core.storage import Location, location
from tests.pipelines.test_cli_errors import rfdetr_pipeline
from tests.s3_server import s3_root, s3_server

__all__ = ["s3_root", "s3_server"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small detector as an older program would have written it."""
    torch.manual_seed(0)
    model = RFDETR(ModelConfig(variant="pico", num_classes=2, num_queries=4, group_detr=1, num_select=4))
    path = tmp_path_factory.mktemp("weights") / "blood-cells.pth"
    args = argparse.Namespace(class_names=["rbc", "wbc"], output_dir=Path("/runs/1"))
    torch.save({"model": model.state_dict(), "model_name": "RFDETRPico", "ema_model": {}, "args": args}, path)
    return path


def put(weights: Path, folder: Path, root: str) -> tuple[int, list[str]]:
    """Exit code and all output of the command."""
    output = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
        pytest.raises(SystemExit) as ended,
    ):
        patch.setenv("RF_HOME", str(folder / "cache"))
        patch.setattr("sys.argv", ["rfdetr-pipeline", "weights", "put", str(weights), "--root", root])
        main()
    return int(ended.value.code or 0), output.getvalue().splitlines()


def test_from_a_file_to_the_uri_of_a_configuration(
    weights: Path, s3_root: Location, s3_server: LocalS3Server, tmp_path: Path
) -> None:
    """In a process of its own the first time; all other tests call the command, which is spared to load torch."""
    environment = {**s3_server.environment, "RF_HOME": str(tmp_path / "cache")}
    code, output = rfdetr_pipeline(tmp_path, "weights", "put", str(weights), "--root", s3_root.uri, **environment)
    assert code == 0, output
    lines = output.splitlines()
    uri = f"{s3_root.uri}/weights/{hashlib.md5(weights.read_bytes()).hexdigest()}/blood-cells.pth"
    size = f"{weights.stat().st_size / 1e6:.1f} MB"
    assert lines == [
        f"put blood-cells.pth ({size}) into the store",
        f"model.pretrain_weights: {uri}",
        "variant: pico",
        "classes: 2: rbc, wbc",
        "note: the file also holds averaged weights (ema_model): they are not used, model is",
        "note: unknown classes in its metadata, never loaded: pathlib.PosixPath",
    ]
    # What the train stage does with that URI.
    model = RFDETR(ModelConfig(variant="pico", num_classes=3, num_queries=4, group_detr=1, num_select=4))
    report = load_pretrained(model, read_weight_file(fetch_weights(uri, cache=tmp_path / "cache")))
    assert (report.class_rows, report.missing) == ((3, 4), ())

    code, again = put(weights, tmp_path, s3_root.uri)
    assert code == 0
    assert again == [f"blood-cells.pth ({size}) is in the store already", *lines[1:]]
    assert [info.name for info in s3_root.list_files()] == [uri.removeprefix(f"{s3_root.uri}/")]


def test_a_file_that_is_none_is_not_put(tmp_path: Path) -> None:
    (tmp_path / "page.pth").write_text("<html>")
    code, lines = put(tmp_path / "page.pth", tmp_path, str(tmp_path / "store"))
    assert code == 2
    assert len(lines) == 1 and "page.pth: not a weight file of PyTorch" in lines[0]
    assert location(str(tmp_path / "store")).list_files() == []


@pytest.mark.parametrize("told_by", ["class", "tensors"])
def test_weights_of_a_segmentation_model_are_not_put(weights: Path, tmp_path: Path, told_by: str) -> None:
    state, name = read_weight_file(weights).state, "RFDETRSegNano"
    if told_by == "tensors":  # of a file without any name
        state, name = {**state, "segmentation_head.bias": torch.ones(1)}, ""
    torch.save({"model": state, "model_name": name}, tmp_path / "w.pth")
    code, lines = put(tmp_path / "w.pth", tmp_path, str(tmp_path / "store"))
    assert code == 2
    assert len(lines) == 1 and "w.pth: holds the weights of a segmentation model, and masks are not built" in lines[0]
    assert location(str(tmp_path / "store")).list_files() == []


def test_weights_of_a_size_that_is_not_built_are_not_put(weights: Path, tmp_path: Path) -> None:
    torch.save({"model": read_weight_file(weights).state, "model_name": "RFDETR2XLarge"}, tmp_path / "w.pth")
    code, lines = put(tmp_path / "w.pth", tmp_path, str(tmp_path / "store"))
    assert code == 2
    assert len(lines) == 1 and "w.pth: holds weights of the kind 2xlarge" in lines[0]


def test_a_users_own_file_under_a_published_name_is_remarked_on_in_one_line(weights: Path, tmp_path: Path) -> None:
    own = tmp_path / "rf-detr-nano.pth"
    own.write_bytes(weights.read_bytes())
    code, lines = put(own, tmp_path, str(tmp_path / "store"))
    assert code == 0
    remarks = [line for line in lines if "is not the published file of that name" in line]
    assert len(remarks) == 1 and remarks[0].startswith("note: ")
    assert not any("Warning" in line or "warnings.warn" in line for line in lines)


def test_a_store_is_needed(weights: Path, tmp_path: Path) -> None:
    code, output = rfdetr_pipeline(tmp_path, "weights", "put", str(weights))
    assert code == 2
    assert output == ("error: no store to put the weights into (give --root s3://bucket/prefix, or set RFDETR_ROOT)\n")
