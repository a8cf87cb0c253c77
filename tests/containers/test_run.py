"""The whole DAG in real containers, over the local S3 server: promoted, failing, killed, stopped."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components.stages import STAGES
from pipelines.containers.engine import Engine
from rfdetr_core.data.sample import write_sample_dataset
from rfdetr_core.publication import read_manifest
from rfdetr_core.storage import location
from tests.pipelines.test_run import CONFIG, Project
from tests.processes import output_of, without_settings

pytestmark = [pytest.mark.containers, pytest.mark.timeout(900)]


def command(run_id: str, *arguments: str) -> list[str]:
    run = [sys.executable, "-m", "pipelines", "run", "--in-containers", "--config", "config.yaml", "--run-id", run_id]
    return [*run, *arguments]


def run(folder: Path, run_id: str, *arguments: str) -> tuple[int, str]:
    return output_of(command(run_id, *arguments), folder=folder, environment=without_settings(), timeout=840)


def left_over(engine: Engine) -> list[str]:
    return engine.tool.run("ps", "--all", "--quiet", "--filter", "label=rfdetr.attempt").split()


def services() -> set[str]:
    """Process ids of podman's services."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            if b"system\0service" in path.read_bytes():
                found.add(path.parent.name)
    return found


def state(project: Project, run_id: str, stage: str) -> Any:
    return json.loads((project.root / "runs" / run_id / "status" / f"{stage}.json").read_text())


@pytest.fixture(scope="module")
def project(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("project")
    write_sample_dataset(folder / "data", train=24, valid=8, test=8, size=96)
    (folder / "config.yaml").write_text(CONFIG)
    code, output = run(folder, "r1")
    assert code == 0, output
    return Project(folder, output)


def test_the_dag_ends_in_a_promoted_model(project: Project, engine: Engine) -> None:
    for stage in STAGES:
        found = project.json(f"status/{stage}.json")
        assert found["state"] == "succeeded"
        assert f"/{stage.replace('_', '-')}:" in found["image"] and "(sha256:" in found["image"]
        assert re.search(rf"│ {stage} +│ succeeded +│", project.output)
    assert "promotion: promote" in project.output
    pointer = json.loads((project.root / "models" / "shapes" / "champion.json").read_text())
    assert pointer["version"] == "r1"
    manifest = read_manifest(location(str(project.root / "models" / "shapes" / "versions" / "r1")))
    assert manifest is not None and "model.onnx" in manifest.files
    assert left_over(engine) == []


def test_what_the_ui_shows_belongs_to_who_ran_it(project: Project) -> None:
    """Written by uid 10001 of the containers; the folder above keeps others out."""
    artifacts = project.folder / "runs" / "kfp" / "r1" / "artifacts"
    assert next(artifacts.rglob("report")).read_text().startswith("<!")
    assert artifacts.parent.stat().st_mode & 0o077 == 0
    assert {path.stat().st_mode & 0o777 for path in artifacts.rglob("*") if path.is_dir()} == {0o777}


def test_a_failing_stage_fails_the_run_with_its_own_message_and_limits_are_seen(project: Project) -> None:
    code, output = run(project.folder, "r1", "--set", "export.logits_tolerance=1e-30", "--cpus", "1", "--memory", "3g")
    assert code == 2
    assert output.count("already done: s3://rfdetr/runs/r1/") == 4
    assert "export_onnx failed with exit code 2: model.onnx differs from the trained model" in output
    assert re.search(r"│ promote +│ not started ", output) and "Traceback" not in output
    hardware = project.json("status/export_onnx.json")["hardware"]
    assert (hardware["cpus"], hardware["memory_bytes"]) == (1, 3 << 30)


def test_a_training_that_was_killed_is_continued_by_the_same_command(project: Project, engine: Engine) -> None:
    """Meanwhile its container is looked at: how a stage runs is not what the runner says but what the engine does."""
    arguments = ("--set", "train.epochs=8", "--set", "train.checkpoint_interval=1")
    started = subprocess.Popen(
        command("killed", *arguments),
        cwd=project.folder,
        env=without_settings(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert started.stdout is not None
    before = ""
    checkpoint = project.root / "runs" / "killed" / "train" / "checkpoints" / "checkpoint.pth"
    with started:
        for line in started.stdout:
            before += line
            if re.search(r"epoch [2-6]/8 done", line) and checkpoint.exists():
                break
        else:
            pytest.fail(f"no checkpoint after six epochs: {before}")
        deadline = time.monotonic() + 60
        while not checkpoint.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        [container] = left_over(engine)
        [found] = json.loads(engine.tool.run("inspect", container))
        engine.tool.run("kill", "--signal", "KILL", container)
        output, _ = started.communicate(timeout=120)
    assert started.returncode == 137, output
    assert re.search(r"│ train +│ killed ", output) and re.search(r"│ evaluate +│ not started ", output)
    assert "train failed with exit code 137: killed: " in output
    assert left_over(engine) == []

    assert found["Config"]["User"] == "10001:10001"
    host = found["HostConfig"]
    assert host["ReadonlyRootfs"] is True and host["NetworkMode"] == "host" and not host["Privileged"]
    assert any("no-new-privileges" in option for option in host["SecurityOpt"])
    assert not found.get("EffectiveCaps") and not found.get("BoundingCaps")
    writable = {mount["Destination"] for mount in found["Mounts"] if mount["RW"]}
    assert writable == {"/work", str(project.folder / "runs" / "kfp" / "killed" / "artifacts")}
    assert str(project.folder / "data") in {mount["Destination"] for mount in found["Mounts"] if not mount["RW"]}

    code, output = run(project.folder, "killed", *arguments)
    assert code == 0, output
    assert output.count("already done: s3://rfdetr/runs/killed/") == 2
    step = re.search(r"continuing after epoch (\d+), optimizer step (\d+)", output)
    assert step is not None and int(step[1]) >= 1, output
    assert "epoch 1/8 done" not in output and "epoch 8/8 done" in output
    assert state(project, "killed", "promote")["state"] == "succeeded"


@pytest.fixture
def heard_ctrl_c() -> Iterator[None]:
    """A shell lets its background jobs ignore Ctrl-C, and programs inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard_ctrl_c")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_the_stage_in_its_container(project: Project, engine: Engine, signum: int) -> None:
    name, before = f"stop-{signum}", services()
    started = subprocess.Popen(
        command(name, "--set", "train.epochs=1000"),
        cwd=project.folder,
        env=without_settings(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert started.stdout is not None
    with started:
        for line in started.stdout:
            if "epoch 1/1000 done" in line:
                break
        else:
            pytest.fail("training never began")
        started.send_signal(signum)
        rest, _ = started.communicate(timeout=120)
    assert started.returncode == 130 and "to continue" in rest
    assert left_over(engine) == []
    assert state(project, name, "train")["state"] == "preempted"
    assert (project.root / "runs" / name / "train" / "checkpoints" / "checkpoint.pth").exists()
    assert services() == before
