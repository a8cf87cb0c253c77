"""The workflows of CI: no third-party action, nothing of strangers in a script, and the script itself is run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.stages import CONTAINERS
from pipelines.platform import profile_names
from rfdetr_core.data.sample import write_sample_dataset
from rfdetr_core.storage import Location
from tests.pipelines.kfp_stub import Stub, kfp_stub
from tests.processes import output_of
from tests.s3_server import s3_root, s3_server

__all__ = ["s3_root", "s3_server"]

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".github" / "scripts" / "refresh-model.sh"
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def workflow(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.load(path.read_text(), Loader=yaml.BaseLoader)  # "on" is a word there
    return loaded


def steps() -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{path.stem}: {name}", step)
        for path in FILES
        for name, job in workflow(path)["jobs"].items()
        for step in job["steps"]
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_jobs_end_and_may_do_only_what_they_say(path: Path) -> None:
    document = workflow(path)
    assert "permissions" in document and "concurrency" in document
    for name, job in document["jobs"].items():
        assert int(job["timeout-minutes"]) <= 360, name
        assert job["runs-on"] == "ubuntu-24.04"
    assert "secrets." not in path.read_text()


def test_no_action_of_others_is_used() -> None:
    assert [name for name, step in steps() if "uses" in step] == []


def test_scripts_are_bash_and_hold_nothing_that_a_stranger_may_write() -> None:
    """Inputs and payloads reach a script through its environment only."""
    for name, step in steps():
        script = step["run"]
        assert not re.search(r"\$\{\{(?!\s*matrix\.python\s*\}\})", script), name
        subprocess.run(["bash", "-n"], input=re.sub(r"\$\{\{.*?\}\}", "x", script), text=True, check=True)
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert os.access(SCRIPT, os.X_OK)


def test_refreshing_has_its_three_triggers() -> None:
    document = workflow(ROOT / ".github" / "workflows" / "refresh-model.yml")
    assert set(document["on"]) == {"workflow_dispatch", "repository_dispatch", "push"}
    assert document["on"]["push"]["paths"] == ["configs/*.yaml"]
    assert document["on"]["workflow_dispatch"]["inputs"]["profile"]["default"] in profile_names()
    refresh = document["jobs"]["refresh"]
    assert refresh["permissions"] == {"contents": "write", "id-token": "write"}
    step = next(step for step in refresh["steps"] if step["run"] == ".github/scripts/refresh-model.sh")
    names = r"\b(?:CONFIG|PROFILE|OVERRIDES|RUN_ID|RFDETR_ROOT|KF_\w+|KFP_\w+|IMAGE_\w+)\b"
    assert set(re.findall(names, SCRIPT.read_text())) <= set(step["env"])


class Identity(BaseHTTPRequestHandler):
    """As GitHub gives a job its tokens: another one each time."""

    given: list[str]

    def do_GET(self) -> None:
        assert self.headers["Authorization"] == "bearer of-this-job"
        audience = self.path.rpartition("audience=")[2]
        self.given.append(audience)
        data = json.dumps({"value": f"{audience}-{len(self.given)}"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def identity() -> Iterator[tuple[str, list[str]]]:
    handler = type("Handler", (Identity,), {"given": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/token?api-version=2", handler.given
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def stub() -> Iterator[Stub]:
    with kfp_stub() as stub:
        yield stub


@pytest.mark.slow
def test_the_script_submits_waits_and_leaves_a_verdict(
    stub: Stub, identity: tuple[str, list[str]], s3_root: Location, tmp_path: Path
) -> None:
    write_sample_dataset(tmp_path / "data", train=4, valid=2, test=2, size=64)
    (s3_root / "data").upload_tree(tmp_path / "data", progress=False)
    config = {"name": "shapes", "dataset": {"uri": f"{s3_root.uri}/data"}, "model": {"variant": "pico"}}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    images = {stage: f"registry.example/{stage}@sha256:{'ab' * 32}" for stage in CONTAINERS}
    (tmp_path / "digests.json").write_text(json.dumps(images))
    url, given = identity
    stub.states = ["PENDING", "RUNNING", "FAILED"]
    code, output = output_of(
        [str(SCRIPT)],
        folder=tmp_path,
        environment={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "CONFIG": "config.yaml",
            "PROFILE": "single-gpu",
            "OVERRIDES": '{"train": {"epochs": 3}}',
            "RFDETR_ROOT": s3_root.uri,
            "KF_PIPELINES_ENDPOINT": stub.host,
            "KFP_AUDIENCE": "kfp",
            "IMAGE_DIGESTS": "digests.json",
            "RUNNER_TEMP": str(tmp_path),
            "ACTIONS_ID_TOKEN_REQUEST_URL": url,
            "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "of-this-job",
            "KUBECONFIG": str(tmp_path / "none"),
            "STRETCH_MINUTES": "0.02",
            "POLL_SECONDS": "0.5",
        },
        timeout=120,
    )
    assert code == 2, output  # as the run failed, before any stage could say more
    assert re.match(r"# shapes-[0-9a-f]{12} failed\n", (tmp_path / "summary.md").read_text())
    [run] = stub.posted("/runs")
    assert run["runtime_config"]["parameters"]["overrides"] == {"train": {"epochs": 3}}
    used = {call.headers["authorization"] for call in stub.calls}
    assert "Bearer kfp-2" in used and all(token.startswith("Bearer kfp-") for token in used)
    assert given[:2] == ["sts.amazonaws.com", "kfp"] and len(given) >= 4
    assert (tmp_path / "aws-token").read_text().startswith("sts.amazonaws.com-")
    assert "::add-mask::kfp-2" in output
