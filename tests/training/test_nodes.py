"""Two machines train what one process trains: here processes with folders of their own, over the loopback interface."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.errors import ConfigError, Terminated, TransientError
from rfdetr_core.training import checkpoint
from rfdetr_core.training.loop import train
from rfdetr_core.training.nodes import Nodes, this_node
from tests.training import tiny
from tests.training.test_distributed import children

FOLDER = Path(__file__).parents[2]


def variables(rank: int, port: int) -> dict[str, str]:
    return {
        "PET_NNODES": "2",
        "PET_NODE_RANK": str(rank),
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def other_node(dataset: PreparedDataset, folder: Path, port: int, settings: dict[str, Any]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.training.node", str(dataset.folder), str(folder), json.dumps(settings)]
    environment = {**os.environ, **variables(1, port)}
    return subprocess.Popen(command, cwd=FOLDER, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    number = free_port()
    for name, value in variables(0, number).items():
        monkeypatch.setenv(name, value)
    return number


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    folder = tmp_path_factory.mktemp("nodes")
    return tiny.prepare(tiny.draw(folder / "source", train=11, valid=5, test=3), folder / "prepared")


@pytest.mark.long
@pytest.mark.parameter("num_nodes", "devices")
def test_two_nodes_continue_what_one_process_began(
    dataset: PreparedDataset, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second node has an empty disk: checkpoint and best weights come to it from the first."""
    settings: dict[str, Any] = {"epochs": 2, "eval_batch_size": 2, "run_test": True, "lr": 1e-3}
    with monkeypatch.context() as alone:
        alone.delenv("PET_NNODES")
        train(tiny.job(dataset, tmp_path / "one", batch=2, **settings))
        stop: list[str] = []
        job = tiny.job(dataset, tmp_path / "first", batch=2, **{**settings, "checkpoint_interval": 1})
        with pytest.raises(Terminated):  # after the first epoch
            train(job, publish=lambda path: stop.append(path.name), stop_requested=lambda: bool(stop))
    together = {**settings, "num_nodes": 2, "batch": 1}
    published: list[str] = []
    with other_node(dataset, tmp_path / "second", port, together) as other:
        result = train(
            tiny.job(dataset, tmp_path / "first", **together), publish=lambda path: published.append(path.name)
        )
        said = other.communicate(timeout=60)[0]
    assert other.returncode == 0, said
    assert {**json.loads(said), "seconds": 0, "images_per_second": 0} == {
        **json.loads(json.dumps(result.__dict__)), "seconds": 0, "images_per_second": 0,
    }  # fmt: skip
    assert published[-1] == checkpoint.LATEST
    first, second, one = (tmp_path / name for name in ("first", "second", "one"))
    best = (first / checkpoint.BEST_TOTAL).read_bytes()
    assert (second / checkpoint.BEST_TOTAL).read_bytes() == best
    assert not (second / "metrics.jsonl").exists() and not list(tmp_path.glob("*/.ranks*"))
    for expected, found in zip(*(rows(folder) for folder in (one, first)), strict=True):
        assert expected.keys() == found.keys()
        for name in ("train/loss", "train/loss_bbox", "val/mAP_50_95", "test/mAP_50_95"):
            if name in expected:
                assert found[name] == pytest.approx(expected[name], rel=1e-3), name


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.long
@pytest.mark.parameter("num_nodes")
def test_a_node_that_is_lost(dataset: PreparedDataset, tmp_path: Path, port: int) -> None:
    settings: dict[str, Any] = {"epochs": 1000, "eval_interval": 1000, "num_nodes": 2, "batch": 1}
    settings["checkpoint_interval"] = 1
    other = other_node(dataset, tmp_path / "second", port, settings)
    published: list[str] = []

    def publish(path: Path) -> None:
        if not published:
            for pid in children(other.pid):  # its torchrun, its ranks
                os.kill(pid, signal.SIGKILL)
            other.kill()
        published.append(path.name)

    started = time.monotonic()
    with pytest.raises(TransientError, match=r"lost the other nodes|or one was lost"):
        train(tiny.job(dataset, tmp_path / "first", **settings), publish=publish)
    other.communicate()
    assert time.monotonic() - started < 120
    assert checkpoint.newest_whole(tmp_path / "first") is not None


@pytest.mark.parameter("num_nodes")
class TestWhichNode:
    """What the environment says."""

    def test_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("PET_NNODES", raising=False)
        assert this_node(1) == Nodes()
        monkeypatch.setenv("PET_NNODES", "1")
        assert this_node(1).is_first

    def test_one_of_two(self, port: int) -> None:
        assert this_node(2) == Nodes(2, 0, "127.0.0.1", port)

    @pytest.mark.parametrize(
        ("nodes", "changes", "message"),
        [
            (2, {"PET_NNODES": ""}, "train.num_nodes: 2 nodes are asked for, and this process is on its own"),
            (1, {}, "train.num_nodes: 1, but PET_NNODES says 2 nodes"),
            (3, {}, "train.num_nodes: 3, but PET_NNODES says 2 nodes"),
            (2, {"PET_NODE_RANK": "2"}, "PET_NODE_RANK: '2' is not one of 0..1"),
            (2, {"PET_NODE_RANK": ""}, "PET_NODE_RANK: '' is not one of 0..1"),
            (2, {"PET_MASTER_ADDR": ""}, "name no port of the first node"),
            (2, {"PET_MASTER_PORT": "0"}, "name no port of the first node"),
        ],
    )
    def test_what_contradicts_it(
        self, nodes: int, changes: dict[str, str], message: str, port: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in changes.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError) as caught:
            this_node(nodes)
        assert message in str(caught.value) and caught.value.hint
