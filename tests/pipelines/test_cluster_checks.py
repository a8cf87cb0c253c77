"""What a profile needs of the cluster is looked at first, against a stand-in for Kubernetes' API."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from pipelines.cluster_checks import pod_log
from tests.pipelines.kfp_stub import Stub
from tests.pipelines.test_submit import Command, command, s3_root, s3_server, stub

__all__ = ["command", "s3_root", "s3_server", "stub"]

PROFILE = """
extends: cpu
description: x
service_account: trainer
s3: {secret: store}
image_pull_secrets: [pull]
"""


class Kubernetes(BaseHTTPRequestHandler):
    """Answers with the objects that are there; `forbidden` are paths nobody may see."""

    objects: dict[str, object]
    forbidden: set[str]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/api/v1/")
        if path in self.forbidden:
            return self._answer(403, {"message": "forbidden"})
        if path not in self.objects:
            return self._answer(404, {"message": "not found"})
        return self._answer(200, self.objects[path])

    def _answer(self, status: int, body: object) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(body, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def cluster(command: Command, tmp_path: Path) -> Iterator[type[Kubernetes]]:
    entry = base64.b64encode(b"x").decode()
    keys = {"AWS_ACCESS_KEY_ID": entry, "AWS_SECRET_ACCESS_KEY": entry}
    objects = {
        "namespaces/kubeflow": {},
        "namespaces/kubeflow/serviceaccounts/trainer": {},
        "namespaces/kubeflow/secrets/store": {"data": keys},
        "namespaces/kubeflow/secrets/pull": {"data": {".dockerconfigjson": entry}},
    }
    handler = type("Handler", (Kubernetes,), {"objects": objects, "forbidden": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    one = {"name": "here"}
    address = {"server": f"http://127.0.0.1:{server.server_port}"}
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{**one, "cluster": address}],
        "contexts": [{**one, "context": {"cluster": "here", "user": "here"}}],
        "users": [{**one, "user": {}}],
    }
    (tmp_path / "no-kubeconfig").write_text(yaml.safe_dump(kubeconfig))  # it is one now
    (tmp_path / "ours.yaml").write_text(PROFILE)
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()


def submit(command: Command) -> tuple[int, str]:
    return command("submit", "--profile", "ours.yaml")


def test_all_is_there(command: Command, cluster: type[Kubernetes], stub: Stub) -> None:
    code, output = submit(command)
    assert code == 0 and "not checked" not in output
    assert stub.posted("/runs")[0]["service_account"] == "trainer"


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("namespaces/kubeflow", "namespace kubeflow does not exist (create it, or change the profile)"),
        ("namespaces/kubeflow/serviceaccounts/trainer", "service account trainer in namespace kubeflow does not exist"),
        ("namespaces/kubeflow/secrets/store", "Secret store in namespace kubeflow does not exist"),
        ("namespaces/kubeflow/secrets/pull", "Secret pull in namespace kubeflow does not exist"),
    ],
)
def test_what_is_missing_is_one_clear_line_before_anything_is_created(
    command: Command, cluster: type[Kubernetes], stub: Stub, missing: str, words: str
) -> None:
    del cluster.objects[missing]
    code, output = submit(command)
    assert code == 2
    assert output.startswith(f"error: {words}") and output.count("\n") == 1
    assert stub.changes() == []


def test_a_secret_without_the_entry_that_is_used(command: Command, cluster: type[Kubernetes], stub: Stub) -> None:
    cluster.objects["namespaces/kubeflow/secrets/store"] = {"data": {"AWS_ACCESS_KEY_ID": "eA=="}}
    code, output = submit(command)
    assert code == 2 and stub.changes() == []
    assert output == (
        "error: Secret store in namespace kubeflow has no entry AWS_SECRET_ACCESS_KEY"
        " (add it, or name its entries in the profile)\n"
    )


def test_what_may_not_be_looked_at_is_said(command: Command, cluster: type[Kubernetes], stub: Stub) -> None:
    cluster.forbidden = {"namespaces/kubeflow", "namespaces/kubeflow/secrets/store"}
    code, output = submit(command)
    assert code == 0
    assert "not checked, for want of permission: namespace kubeflow, Secret store\n" in output


def test_a_cluster_that_does_not_answer(
    command: Command, cluster: type[Kubernetes], stub: Stub, tmp_path: Path
) -> None:
    path = tmp_path / "no-kubeconfig"
    path.write_text(path.read_text().replace("http://127.0.0.1:", "http://127.0.0.1:9#"))
    code, output = submit(command)
    assert code == 75 and stub.changes() == []
    assert "the cluster of the kubeconfig does not answer (check the kubeconfig)" in output


def test_the_log_of_a_stage_that_still_runs(cluster: type[Kubernetes]) -> None:
    assert pod_log("other", "run-1", "train") is None
    pods = [
        {"metadata": {"name": name, "creationTimestamp": f"2026-01-01T00:00:0{n}Z"}, "spec": {"containers": []}}
        for n, name in enumerate(("first-try", "second-try"))
    ]
    cluster.objects["namespaces/kubeflow/pods"] = {"items": pods}
    cluster.objects["namespaces/kubeflow/pods/second-try/log"] = "epoch 1/9 done\n"
    assert pod_log("kubeflow", "run-1", "train") == "epoch 1/9 done\n"
