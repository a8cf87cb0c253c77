"""Bad input: one clear line, the right exit code, no traceback (issue "The main job", bad input)."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from pipelines.s3_server import LocalS3Server
from tests.processes import output_of, without_settings
from tests.s3_server import BUCKET, s3_server

__all__ = ["s3_server"]


def rfdetr_pipeline(folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """Exit code and all output of the command, run in `folder`."""
    alone = {**without_settings(), "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull}
    command = [sys.executable, "-m", "pipelines", *arguments]
    return output_of(command, folder=folder, environment={**alone, **environment}, timeout=120)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("name: shapes\ndataset: {uri: data}\nmodel: {variant: pico}\n")
    return path


def run(config: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    return rfdetr_pipeline(config.parent, "run", "--config", str(config), *arguments, **environment)


def test_a_missing_config(tmp_path: Path) -> None:
    code, output = rfdetr_pipeline(tmp_path, "run", "--config", "nowhere.yaml")
    assert code == 2
    assert output.count("\n") == 1 and "nowhere.yaml" in output and output.startswith("error: ")


def test_a_config_that_is_a_folder(tmp_path: Path) -> None:
    code, output = rfdetr_pipeline(tmp_path, "run", "--config", str(tmp_path))
    assert code == 2 and output.count("\n") == 1


def test_an_unknown_key_names_the_nearest(config: Path) -> None:
    config.write_text(config.read_text() + "train: {epoch: 3}\n")
    code, output = run(config)
    assert code == 2
    assert output.count("\n") == 1
    assert "train.epoch: unknown field" in output and "train.epochs" in output


def test_a_field_that_is_not_built_yet(config: Path) -> None:
    code, output = run(config, "--set", "model.cuda_graphs=true")
    assert code == 2
    assert "model.cuda_graphs: true is not built yet; leave it at false" in output


def test_an_assignment_without_equals_sign(config: Path) -> None:
    code, output = run(config, "--set", "train.epochs")
    assert code == 2 and output.count("\n") == 1


def test_a_run_id_that_is_none(config: Path) -> None:
    code, output = run(config, "--run-id", "Upper Case")
    assert code == 2
    assert output == ("error: --run-id: 'Upper Case' is not allowed (a-z, 0-9 and -, at most 63, such as nightly-7)\n")


def test_an_s3_dataset_without_a_root_in_the_same_store(config: Path) -> None:
    code, output = run(config, "--set", "dataset.uri=s3://mine/data")
    assert code == 2
    assert output.startswith("error: s3://mine/data is in S3, and without --root the run uses a store of its own")


def test_debug_shows_the_traceback(config: Path) -> None:
    code, output = run(config, "--run-id", "Upper Case", "--debug")
    assert code != 0 and "Traceback" in output


def test_a_dataset_folder_without_annotations(config: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "train").mkdir(parents=True)
    code, output = run(config, "--root", str(tmp_path / "store"), "--run-id", "r1")
    assert code == 2
    assert "looked for train/_annotations.coco.json (COCO as Roboflow exports it)" in output
    assert "validate_dataset failed with exit code 2" in output
    assert "Traceback" not in output
    assert not list((tmp_path / "store").rglob("_SUCCESS.json"))


def test_a_dataset_folder_that_does_not_exist(config: Path, tmp_path: Path) -> None:
    code, output = run(config, "--root", str(tmp_path / "store"), "--run-id", "r1")
    assert code == 2
    assert "data: no such folder" in output


def test_wrong_s3_credentials(config: Path, s3_server: LocalS3Server) -> None:
    environment = {**s3_server.environment, "AWS_SECRET_ACCESS_KEY": "wrong"}
    code, output = run(config, "--root", f"s3://{BUCKET}/x", "--run-id", "r1", **environment)
    assert code == 2
    assert "credentials" in output and "Traceback" not in output and "wrong" not in output.split("s3://")[0]


def test_a_bucket_that_does_not_exist(config: Path, s3_server: LocalS3Server) -> None:
    code, output = run(config, "--root", "s3://no-such-bucket/x", "--run-id", "r1", **s3_server.environment)
    assert code == 2
    assert "no-such-bucket" in output and "Traceback" not in output


def test_an_endpoint_that_does_not_answer(config: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    environment = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "NO_PROXY": "127.0.0.1",
    }
    code, output = run(config, "--root", "s3://bucket/x", "--run-id", "r1", **environment)
    assert code == 75
    assert endpoint in output and "Traceback" not in output
