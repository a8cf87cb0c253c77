"""The whole way of a training on two nodes: the stage, a TrainJob, its pods as processes, and what is published."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.cluster import Cluster
from components.probe_batch_size.stage import main as probe_batch_size
from components.runtime import StageContext, run_stage
from components.train import nodes
from components.train.nodes import train_on_nodes
from components.train.stage import STAGE
from components.train.trainjob import AWAITED, NodeSettings
from components.validate_dataset.stage import main as validate_dataset
from rfdetr_core.publication import read_manifest
from rfdetr_core.storage import location
from tests.kubernetes_stub import KubernetesStub, kubernetes_stub
from tests.training import tiny
from tests.training.test_nodes import FOLDER, free_port

SETTINGS = NodeSettings(image="i", cpu="1", memory="2Gi", shm="64Mi", scratch="1Gi", disk="5Gi")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that has come as far as train, with a dataset of a few drawn images."""
    monkeypatch.setattr(nodes, "POLL_SECONDS", 0.05)
    source = tiny.draw(tmp_path / "source", train=8, valid=4, test=4)
    model = {name: list(value) if isinstance(value, tuple) else value for name, value in tiny.MODEL.items()}
    train = {**tiny.TRAIN, "num_nodes": 2, "batch_size": 1, "grad_accum_steps": 1, "epochs": 1}
    config = {"name": "shapes", "dataset": {"uri": str(source)}, "model": model, "train": train}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    run = tmp_path / "root" / "runs" / "two-nodes"
    assert validate_dataset(["--run-uri", str(run), "--config", str(tmp_path / "config.yaml")]) == 0
    assert probe_batch_size(["--run-uri", str(run)]) == 0
    return run


@pytest.fixture
def operator(run: Path) -> Iterator[KubernetesStub]:
    """An API with a training operator behind it, whose pods are processes of this machine."""
    with kubernetes_stub() as stub:
        threads: list[threading.Thread] = []

        def start(kind: str, job: dict[str, Any]) -> None:
            threads.append(threading.Thread(target=lambda: end(job, [pod.wait() for pod in pods_of(job)])))
            threads[-1].start()

        stub.on_create = start
        yield stub
        for thread in threads:
            thread.join()


def pods_of(job: dict[str, Any]) -> list[subprocess.Popen[bytes]]:
    trainer, port = job["spec"]["trainer"], free_port()
    started = []
    for rank in range(trainer["numNodes"]):
        variables = {
            "PET_NNODES": str(trainer["numNodes"]),
            "PET_NODE_RANK": str(rank),
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            **{row["name"]: row["value"] for row in trainer["env"]},
        }
        command = [sys.executable, *trainer["command"][1:], *trainer["args"]]
        started.append(subprocess.Popen(command, cwd=FOLDER, env={**os.environ, **variables}))
    return started


def end(job: dict[str, Any], codes: list[int]) -> None:
    kind = "Failed" if any(codes) else "Complete"
    job["status"] = {"conditions": [{"type": kind, "status": "True", "reason": "x", "message": f"exit codes {codes}"}]}


def train(api: KubernetesStub, run: Path) -> int:
    def body(context: StageContext) -> None:
        token = context.work / "token"
        token.write_text("t")
        train_on_nodes(context, SETTINGS, Cluster(api.url, "ml", token_file=token))

    return run_stage(STAGE, body, ["--run-uri", str(run)])


def status(run: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((run / "status" / f"{name}.json").read_text()))


@pytest.mark.long
def test_two_nodes_train_and_the_first_publishes(run: Path, operator: KubernetesStub) -> None:
    assert train(operator, run) == 0
    manifest = read_manifest(location(str(run / "train")))
    assert manifest is not None and manifest.inputs == status(run, "train")["inputs"]
    names = set(manifest.files)
    assert {"result.json", "metrics.jsonl", "checkpoints/checkpoint_best_total.pth"} <= names
    resolved = json.loads((run / "train" / "training_config.json").read_text())
    assert resolved["ranks"] == 2 and resolved["effective_batch_size"] == 2
    assert [status(run, f"train-node-{rank}")["state"] for rank in range(2)] == ["succeeded", "succeeded"]
    assert train(operator, run) == 0 and status(run, "train")["state"] == "already done"
    assert operator.called("POST", "trainjobs") == 1


@pytest.mark.long
def test_what_one_node_cannot_do_is_the_error_of_the_stage(run: Path, operator: KubernetesStub) -> None:
    config = run / "config.yaml"
    config.write_text(
        config.read_text().replace("lr: 0.0001", "lr: 1.0e+30").replace("clip_max_norm: 0.1", "clip_max_norm: 0.0")
    )
    assert train(operator, run) == 2
    error = status(run, "train")["error"]
    assert error["class"] == "TrainingError" and error["message"].startswith("node ") and "finite" in error["message"]
    assert not operator.objects


@pytest.mark.parametrize(("attempt", "awaited", "code"), [("job-1", False, 2), ("job-1", True, 0), ("", False, 0)])
def test_nodes_that_nobody_starts_are_refused_by_the_first_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempt: str, awaited: bool, code: int
) -> None:
    monkeypatch.setenv("RFDETR_ATTEMPT", attempt)
    monkeypatch.delenv(AWAITED, raising=False)
    if awaited:
        monkeypatch.setenv(AWAITED, "true")
    source = tiny.draw(tmp_path / "source", train=4, valid=2, test=2)
    config = {"name": "s", "dataset": {"uri": str(source)}, "model": {"variant": "pico"}, "train": {"num_nodes": 2}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    run = tmp_path / "runs" / "a"
    found = validate_dataset(["--run-uri", str(run), "--config", str(tmp_path / "config.yaml"), "--gpu-count", "4"])
    assert found == code
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["devices"] == 4  # of --gpu-count
    if code:
        assert "the pipeline was compiled for one node" in status(run, "validate_dataset")["error"]["message"]


@pytest.mark.parametrize(
    ("overrides", "gpu_count", "devices"),
    [("{}", "", 1), ("{}", "4", 4), ('{"train": {"epochs": 3}}', "4", 4), ('{"train": {"devices": 2}}', "4", 2)],
)
def test_the_gpus_of_the_pod_are_used_unless_somebody_says_otherwise(
    tmp_path: Path, overrides: str, gpu_count: str, devices: int
) -> None:
    config = {"name": "s", "dataset": {"uri": str(tmp_path / "none")}, "model": {"variant": "pico"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    run = tmp_path / "runs" / "a"
    given = ["--config", str(tmp_path / "config.yaml"), "--overrides", overrides, "--gpu-count", gpu_count]
    assert validate_dataset(["--run-uri", str(run), *given]) == 2  # there is no dataset
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["devices"] == devices
