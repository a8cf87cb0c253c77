"""rfdetr-pipeline argo against a stub of the Kubernetes API: what is created, and what is said before that."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.stages import CONTAINERS
from pipelines.argo import EXECUTOR, account
from pipelines.cli import main
from rfdetr_core.storage import Location
from tests.kubernetes_stub import KubernetesStub, kubernetes_stub
from tests.s3_server import s3_root, s3_server

__all__ = ["s3_root", "s3_server"]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def api() -> Iterator[KubernetesStub]:
    with kubernetes_stub() as stub:
        stub.objects["namespaces", "ml"] = {"metadata": {"name": "ml"}}
        for name in (EXECUTOR, *map(account, CONTAINERS.values())):
            stub.objects["serviceaccounts", name] = {"metadata": {"name": name}}
        stub.refuse = lambda method, kind: 403 if kind == "secrets" else 0  # as for most people
        yield stub


@pytest.fixture
def run(
    api: KubernetesStub,
    tmp_path: Path,
    s3_root: Location,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """`argo submit` with a config in the store: exit code, output, error."""
    (s3_root / "config.yaml").write_bytes(b"name: d\ndataset: {uri: s3://b/source}\nmodel: {variant: pico}\n")
    digests = {name: f"r.example.com/{name}@sha256:{'0' * 64}" for name in CONTAINERS}
    (tmp_path / "digests.json").write_text(json.dumps(digests))
    kubeconfig(tmp_path / "kubeconfig", api.url)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))

    def submit(*more: str) -> tuple[int, str, str]:
        common = {
            "--config": f"{s3_root.uri}/config.yaml",
            "--root": s3_root.uri,
            "--run-id": "weekly-1",
            "--digests": str(tmp_path / "digests.json"),
        }
        given = [word for name, value in common.items() if name not in more for word in (name, value)]
        monkeypatch.setattr(sys, "argv", ["rfdetr-pipeline", "argo", "submit", *given, *(w for w in more if w)])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return submit


def kubeconfig(path: Path, server: str) -> None:
    path.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "test",
                "clusters": [{"name": "c", "cluster": {"server": server}}],
                "users": [{"name": "u", "user": {"token": "mine"}}],
                "contexts": [{"name": "test", "context": {"cluster": "c", "user": "u", "namespace": "ml"}}],
            }
        )
    )


def created(api: KubernetesStub) -> list[tuple[str, str]]:
    kinds = ("workflowtemplates", "workflows", "cronworkflows")
    return sorted(key for key in api.objects if key[0] in kinds)


class TestSubmit:
    """A run."""

    def test_brings_the_template_and_starts_one_run(self, run: Run, api: KubernetesStub, s3_root: Location) -> None:
        code, output, error = run("--set", "train.epochs=3")
        assert code == 0, error
        name = next(name for kind, name in created(api) if kind == "workflows")
        assert f"workflow {name} started" in output and f"{s3_root.uri}/runs/weekly-1" in output
        assert "not looked at" not in output  # the profile names no Secret
        workflow = api.objects["workflows", name]
        assert workflow["spec"]["workflowTemplateRef"] == {"name": "rfdetr-retrain"}
        given = {row["name"]: row["value"] for row in workflow["spec"]["arguments"]["parameters"]}
        assert given == {
            "root": s3_root.uri,
            "config": f"{s3_root.uri}/config.yaml",
            "overrides": '{"train": {"epochs": 3}}',
            "run_id": "weekly-1",
        }
        assert api.tokens == {"Bearer mine"}
        assert any("dryRun=All" in path for _, path in api.calls)

    def test_twice_starts_one(self, run: Run, api: KubernetesStub) -> None:
        assert run()[0] == 0
        before = created(api)
        for phase, said in (("Running", "is under way (Running)"), ("Succeeded", "has succeeded before")):
            api.objects[before[0] if before[0][0] == "workflows" else before[1]]["status"] = {"phase": phase}
            code, output, _ = run()
            assert code == 0 and said in output and "WorkflowTemplate rfdetr-retrain: unchanged" in output
            assert created(api) == before

    def test_after_one_that_failed_the_next_continues_it(self, run: Run, api: KubernetesStub) -> None:
        assert run()[0] == 0
        first = next(key for key in created(api) if key[0] == "workflows")
        api.objects[first]["status"] = {"phase": "Failed"}
        code, output, _ = run()
        assert code == 0 and f"workflow {first[1]}-2 started" in output

    def test_another_profile_replaces_the_template(self, run: Run, api: KubernetesStub) -> None:
        assert run("--profile", "cpu")[0] == 0
        assert "WorkflowTemplate rfdetr-retrain: replaced" in run()[1]
        assert api.called("PUT", "workflowtemplates") == 1

    def test_a_schedule(self, run: Run, api: KubernetesStub) -> None:
        code, output, error = run("--cron", "0 3 * * 1", "--timezone", "Europe/Berlin", "--run-id", "")
        assert code == 2 and "--run-id" in error  # an empty word is no option
        code, output, error = run("--cron", "0 3 * * 1", "--timezone", "Europe/Berlin", "--run-id=")
        assert (code, error) == (0, "") and "CronWorkflow rfdetr-retrain: created" in output
        spec = api.objects["cronworkflows", "rfdetr-retrain"]["spec"]
        assert spec["schedules"] == ["0 3 * * 1"] and spec["timezone"] == "Europe/Berlin"
        assert spec["concurrencyPolicy"] == "Forbid"


class TestBadInput:
    """One line, the right exit code, and nothing is created."""

    @pytest.fixture(autouse=True)
    def nothing_is_created(self, api: KubernetesStub) -> Iterator[None]:
        yield
        assert created(api) == []

    def refused(self, run: Run, *arguments: str, code: int = 2) -> str:
        found, output, error = run(*arguments)
        assert found == code and output == ""
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    def test_no_kubeconfig(self, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
        assert "no cluster: " in self.refused(run)

    def test_an_unknown_context(self, run: Run) -> None:
        assert "no cluster: " in self.refused(run, "--context", "production")

    def test_an_api_that_cannot_be_reached(self, run: Run, tmp_path: Path) -> None:
        kubeconfig(tmp_path / "kubeconfig", "http://127.0.0.1:9")
        said = self.refused(run, code=75)
        assert "the Kubernetes API at http://127.0.0.1:9 cannot be reached" in said

    @pytest.mark.parametrize("verb", ["create", "update"])
    def test_no_permission(self, run: Run, api: KubernetesStub, verb: str) -> None:
        api.allows = lambda asked, kind: asked != verb
        said = self.refused(run)
        assert f"you may not {verb} workf" in said and "rfdetr-argo-submit" in said

    def test_a_namespace_that_is_missing(self, run: Run) -> None:
        assert "namespace nowhere does not exist" in self.refused(run, "--namespace", "nowhere")

    def test_service_accounts_that_are_missing(self, run: Run, api: KubernetesStub) -> None:
        api.objects.pop(("serviceaccounts", "rfdetr-train"))
        assert "lacks the service accounts rfdetr-train" in self.refused(run)

    def test_a_secret_that_is_missing(self, run: Run, api: KubernetesStub, tmp_path: Path) -> None:
        api.refuse = lambda method, kind: 0
        profile = tmp_path / "own.yaml"
        profile.write_text("extends: cpu\ndescription: d\ns3: {secret: keys}\n")
        assert "lacks the Secret keys that the profile names" in self.refused(run, "--profile", str(profile))

    def test_argo_that_is_not_installed(self, run: Run, api: KubernetesStub) -> None:
        api.refuse = lambda method, kind: 404 if kind == "workflowtemplates" else 0
        assert "is Argo Workflows installed in this cluster?" in self.refused(run)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--profile", "gpu"), "gpu: no such profile"),
            (("--digests", "nowhere.json"), "nowhere.json: no such file (make push REGISTRY=... writes it)"),
            (("--config", "config.yaml"), "--config: config.yaml: a cluster does not see this machine"),
            (("--root", "runs"), "--root: runs: a cluster does not see this machine"),
            (("--set", "train.num_nodes=2"), "train.num_nodes: 2, and the profile single-gpu trains on one node"),
            (("--set", "train.epoch=2"), "train.epoch: unknown field"),
            (("--cron", "0 3 * * 1"), "--run-id does not go with --cron"),
            (("--cron", "0 0 3 * * 1", "--run-id="), "6 fields, not five"),
            (("--cron", "0 3 * * 1", "--timezone", "Berlin", "--run-id="), "timezone Berlin is none"),
        ],
    )
    def test_what_is_known_beforehand(
        self, run: Run, api: KubernetesStub, arguments: tuple[str, ...], message: str
    ) -> None:
        assert message in self.refused(run, *arguments)
        assert api.calls == []


class TestCompile:
    """To a file."""

    def compile(self, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["rfdetr-pipeline", "argo", "compile", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code

    def test_writes_what_kubectl_takes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path, schedule = tmp_path / "build" / "workflow.yaml", ("--cron", "0 3 * * 1", "--timezone", "Europe/Berlin")
        given = ("--root", "s3://b/d", "--config", "s3://b/c.yaml")
        self.compile(monkeypatch, "--output", str(path), "--profile", "spot-gpu", *schedule, *given)
        documents: list[dict[str, Any]] = list(yaml.safe_load_all(path.read_text()))
        assert [document["kind"] for document in documents] == ["WorkflowTemplate", "CronWorkflow"]
        assert documents[0]["metadata"]["annotations"]["rfdetr/profile"] == "spot-gpu"

    def test_a_schedule_without_what_it_needs(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(AssertionError):
            self.compile(monkeypatch, "--output", str(tmp_path / "w.yaml"), "--cron", "0 3 * * 1")
        assert "argument root is not given" in capsys.readouterr().err
        assert not (tmp_path / "w.yaml").exists()
