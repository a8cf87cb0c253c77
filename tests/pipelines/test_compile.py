"""The compiled pipeline: stable, loadable, and what DESIGN section 4 asks of its tasks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import components

from pipelines.local import STAGES


def compiled(path: Path, hash_seed: str = "0") -> bytes:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "compile", "--output", str(path)],
        env={"PYTHONHASHSEED": hash_seed, "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return path.read_bytes()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compiled") / "retrain.yaml"
    compiled(path)
    return path


@pytest.fixture(scope="module")
def ir(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text())
    return loaded


def test_compiling_twice_gives_the_same_bytes(path: Path, tmp_path: Path) -> None:
    assert compiled(tmp_path / "again.yaml", hash_seed="1") == path.read_bytes()


def test_it_loads_back(path: Path) -> None:
    pipeline = components.load_component_from_file(str(path))
    assert pipeline.name == "rfdetr-retrain"
    assert {"root", "config", "overrides", "run_id"} == set(pipeline.component_spec.inputs)


def test_every_stage_is_a_task_in_its_own_image_after_the_one_before(ir: dict[str, Any]) -> None:
    tasks = ir["root"]["dag"]["tasks"]
    executors = ir["deploymentSpec"]["executors"]
    assert {name.replace("-", "_") for name in tasks} == set(STAGES)
    for position, stage in enumerate(STAGES):
        name = stage.replace("_", "-")
        before = [STAGES[position - 1].replace("_", "-")] if position else None
        assert tasks[name].get("dependentTasks") == before
        assert f"/{name}:" in executors[f"exec-{name}"]["container"]["image"]


def test_caching_is_off_and_nothing_is_installed_at_run_time(ir: dict[str, Any], path: Path) -> None:
    for task in ir["root"]["dag"]["tasks"].values():
        assert not task["cachingOptions"].get("enableCache")
    assert "pip install" not in path.read_text()


def test_no_task_feeds_another_through_kfp(ir: dict[str, Any]) -> None:
    assert "taskOutputParameter" not in str(ir) and "taskOutputArtifact" not in str(ir)


def test_every_parameter_is_described(ir: dict[str, Any]) -> None:
    for name, parameter in ir["root"]["inputDefinitions"]["parameters"].items():
        assert parameter.get("description"), name
