"""submit --if-changed: a run only where it can make something new, by the first stage's own word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rfdetr_core.config import load_run_config
from rfdetr_core.data.sample import write_sample_dataset
from rfdetr_core.publication import publish
from rfdetr_core.registry import Registry
from rfdetr_core.storage import Location
from tests.pipelines.kfp_stub import Stub
from tests.pipelines.test_submit import Command, command, s3_root, s3_server, stub

__all__ = ["command", "s3_root", "s3_server", "stub"]


@pytest.fixture
def data(s3_root: Location, tmp_path: Path) -> Location:
    write_sample_dataset(tmp_path / "data", train=4, valid=2, test=2, size=64)
    (s3_root / "data").upload_tree(tmp_path / "data", progress=False)
    return s3_root / "data"


def asked(command: Command, data: Location, *more: str) -> tuple[int, str]:
    return command("submit", "--if-changed", "--set", f"dataset.uri={data.uri}", *more)


def become_champion(root: Location, run_id: str, parameters: dict[str, Any], tmp_path: Path) -> None:
    """As promote leaves it."""
    digest = (root / "datasets").list_files()[0].name.split("/")[0]
    overrides = {"train": {"devices": 1}, **parameters["overrides"]}
    config = load_run_config(parameters["config"], overrides).as_dict()
    folder = tmp_path / "version"
    folder.mkdir()
    (folder / "provenance.json").write_text(json.dumps({"dataset": {"digest": digest}, "config": config}))
    registry = Registry(root, "shapes")
    publish(folder, registry.version(run_id), inputs="x", progress=False)
    registry.pointer.write_json({"version": run_id, "metrics": {}, "test_digest": "x"})


@pytest.mark.slow
def test_a_run_is_started_only_for_new_data_or_another_config(
    command: Command, stub: Stub, s3_root: Location, data: Location, tmp_path: Path
) -> None:
    code, output = asked(command, data)
    assert code == 0, output
    assert "there is no champion of shapes yet\n" in output and "started: shapes-" in output
    [run] = stub.posted("/runs")
    assert not [info for info in (s3_root / "runs").list_files() if info.name.startswith("check-")]
    become_champion(s3_root, run["display_name"], run["runtime_config"]["parameters"], tmp_path)

    before = stub.changes()
    code, output = asked(command, data, "--set", "notify.format=slack")  # of no model
    assert code == 0, output
    assert f"dataset and config are those of the champion {run['display_name']}\nnothing to do\n" in output
    assert stub.changes() == before

    code, output = asked(command, data, "--set", "train.epochs=7")
    assert code == 0 and f"config changed since the champion {run['display_name']}" in output
    (s3_root / "data" / "train" / "new.jpg").write_bytes((s3_root / "data" / "train" / "train_00000.jpg").read_bytes())
    annotations = s3_root / "data" / "train" / "_annotations.coco.json"
    said = annotations.read_json()
    said["images"].append({**said["images"][0], "id": 99, "file_name": "new.jpg"})
    annotations.write_json(said)
    code, output = asked(command, data)
    assert code == 0 and f"dataset changed since the champion {run['display_name']}" in output
    names = [body["display_name"] for body in stub.posted("/runs")]
    assert len(set(names)) == 3

    # It was decided, and lost: the same once more would lose again.
    decision = {"outcome": "keep", "reason": "map 0.1 against 0.2"}
    (tmp_path / "promote").mkdir()
    (tmp_path / "promote" / "decision.json").write_text(json.dumps(decision))
    publish(tmp_path / "promote", s3_root / "runs" / names[2] / "promote", inputs="x", progress=False)
    before = stub.changes()
    code, output = asked(command, data)
    assert code == 0
    assert f"the run {names[2]} was made of the same dataset and config (keep: map 0.1 against 0.2)" in output
    assert stub.changes() == before


@pytest.mark.slow
def test_a_dataset_that_is_none_is_submitted_nowhere(command: Command, stub: Stub, s3_root: Location) -> None:
    code, output = asked(command, s3_root / "nothing")
    assert code == 2
    assert output.splitlines()[-1] == (
        "error: validate_dataset failed, so nothing was submitted (its error stands above)"
    )
    assert stub.changes() == []
    assert (s3_root / "runs").list_files() == []
