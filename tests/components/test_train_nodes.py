"""The TrainJob launcher against a stub of the Kubernetes API: created, found again, failed, cancelled."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubeflow_trainer_api.models as trainer
import pytest

from components.cluster import Cluster
from components.notify.stage import main as notify
from components.runtime import StageContext, run_stage
from components.train import nodes
from components.train.nodes import delete_train_jobs, train_on_nodes
from components.train.stage import STAGE
from components.train.trainjob import AWAITED, SETTINGS, NodeSettings, name_of, run_key, train_job
from rfdetr_core.config import RunConfig, dump_yaml
from rfdetr_core.errors import ConfigError, TransientError, UserError
from rfdetr_core.publication import publish
from rfdetr_core.storage import location
from tests.kubernetes_stub import KubernetesStub, kubernetes_stub

STAMP = "2026-11-26T00:00:0{}.123456789Z"


@pytest.fixture
def api() -> Iterator[KubernetesStub]:
    with kubernetes_stub() as stub:
        yield stub


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "POLL_SECONDS", 0.01)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has come as far as train."""
    folder = tmp_path / "root" / "runs" / "weekly-12"
    config = RunConfig.parse(
        {
            "name": "d",
            "dataset": {"uri": "/data"},
            "model": {"variant": "pico"},
            "train": {"num_nodes": 2, "devices": 4},
        }
    )
    for stage in ("dataset", "probe"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "result.json").write_text("{}")
        publish(tmp_path / stage, location(str(folder / stage)), inputs=stage)
    (folder / "config.yaml").write_text(dump_yaml(config))
    return folder


SETTINGS_OF_TWO = NodeSettings(
    image="registry.example.com/rfdetr/train@sha256:" + "0" * 64,
    cpu="32",
    memory="192Gi",
    shm="64Gi",
    scratch="250Gi",
    disk="254Gi",
    gpus=8,
    gpu_type="nvidia.com/gpu",
    deadline_seconds=3600,
    environment={"AWS_ENDPOINT_URL": "http://minio:9000"},
    secrets=[{"name": "AWS_SECRET_ACCESS_KEY", "secret": "rfdetr-s3", "entry": "secretkey"}],
    pod={"tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]},
)


def cluster(api: KubernetesStub, folder: Path) -> Cluster:
    token = folder / "token"
    token.write_text("secret-token\n")
    return Cluster(api.url, "ml", token_file=token)


def stage(api: KubernetesStub, run: Path, tmp_path: Path, *arguments: str) -> int:
    """The stage, as it runs in the pod of the profile multi-node."""

    def body(context: StageContext) -> None:
        train_on_nodes(context, SETTINGS_OF_TWO, cluster(api, tmp_path))

    return run_stage(STAGE, body, ["--run-uri", str(run), *arguments])


def status(run: Path, name: str = "train") -> dict[str, Any]:
    return dict(json.loads((run / "status" / f"{name}.json").read_text()))


def end(job: dict[str, Any], kind: str = "Complete", **more: str) -> None:
    job["status"] = {"conditions": [{"type": kind, "status": "True", "reason": "JobsDone", "message": "", **more}]}


def trains(api: KubernetesStub, run: Path, tmp_path: Path) -> None:
    """From now on TrainJobs do what they are made for: the first node publishes."""

    def publish_as_the_first_node(kind: str, job: dict[str, Any]) -> None:
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        (out / "result.json").write_text("{}")
        publish(out, location(str(run / "train")), inputs=job["metadata"]["annotations"]["rfdetr/inputs"])
        pod(api, 0)
        api.logs["node-0"] = [f"{STAMP.format(1)} epoch 1/2", f"{STAMP.format(1)} again"]
        end(job)

    api.on_create = publish_as_the_first_node


def pod(api: KubernetesStub, node: int, **state: Any) -> None:
    name = name_of_only(api)
    labels = {"jobset.sigs.k8s.io/jobset-name": name, "batch.kubernetes.io/job-completion-index": str(node)}
    api.objects["pods", f"node-{node}"] = {
        "metadata": {"name": f"node-{node}", "labels": labels}, "status": {"phase": "Running", **state}
    }  # fmt: skip


def name_of_only(api: KubernetesStub) -> str:
    return next(name for kind, name in api.objects if kind == "trainjobs")


def fails(api: KubernetesStub, run: Path, *errors: tuple[int, str, str], **condition: str) -> None:
    """From now on TrainJobs fail, and their nodes say why."""

    def fail(kind: str, job: dict[str, Any]) -> None:
        for node, name, message in errors:
            content = {
                "inputs": job["metadata"]["annotations"]["rfdetr/inputs"],
                "started": "2026-11-26T00:00:07+00:00",
                "error": {"class": name, "message": message, "hint": "do this"},
            }
            location(str(run / "status" / f"train-node-{node}.json")).write_json(content)
        end(job, "Failed", **condition)

    api.on_create = fail


class TestTheTrainJob:
    """What is created."""

    def job(self) -> dict[str, Any]:
        return train_job(
            SETTINGS_OF_TWO, run_uri="s3://b/d/runs/weekly-12", nodes=2, devices=4, inputs="abc", attempt="job-1"
        )

    def test_is_what_the_operator_takes(self) -> None:
        """Its models drop what they do not know: nothing may be missing when it comes back."""
        assert lost(trainer.TrainerV1alpha1TrainJob, self.job()) == []
        wrong = self.job()
        wrong["spec"]["podSpecOverrides"] = []
        wrong["spec"]["trainer"]["numNode"] = 3
        assert lost(trainer.TrainerV1alpha1TrainJob, wrong) == ["/spec/trainer/numNode", "/spec/podSpecOverrides"]

    def test_says_what_the_run_asks_for(self) -> None:
        spec = self.job()["spec"]
        assert spec["trainer"]["numNodes"] == 2 and spec["activeDeadlineSeconds"] == 3600
        assert spec["trainer"]["command"] == ["python", "-m", "components.train.node"]
        assert spec["trainer"]["args"] == ["--run-uri", "s3://b/d/runs/weekly-12"]
        wanted = {
            "cpu": "32",
            "memory": "192Gi",
            "ephemeral-storage": "254Gi",
            "nvidia.com/gpu": "4",
        }  # of train.devices, not of the profile
        assert spec["trainer"]["resourcesPerNode"] == {"requests": wanted, "limits": wanted}
        environment = {row["name"]: row.get("value", row.get("valueFrom")) for row in spec["trainer"]["env"]}
        assert environment["RFDETR_ATTEMPT"] == "job-1" and environment["RFDETR_IMAGE"] == SETTINGS_OF_TWO.image
        assert environment["AWS_SECRET_ACCESS_KEY"] == {"secretKeyRef": {"name": "rfdetr-s3", "key": "secretkey"}}
        assert SETTINGS not in environment  # a node trains, and starts no TrainJob

    def test_the_profile_says_how_many_gpus_auto_is(self) -> None:
        job = train_job(SETTINGS_OF_TWO, run_uri="/r/runs/a", nodes=2, devices="auto", inputs="", attempt="")
        assert job["spec"]["trainer"]["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == "8"

    @pytest.mark.parametrize("run_id", ["a", "2026-11-26", "x" * 63, "a-b-c-" * 10 + "abc"])
    def test_its_name_leaves_room_for_those_of_its_pods(self, run_id: str) -> None:
        name = name_of(f"s3://b/d/runs/{run_id}")
        assert len(name) <= 40 and name == name_of(f"s3://b/d/runs/{run_id}/") and "--" not in name
        assert name != name_of(f"s3://b/other/runs/{run_id}")


def lost(model: Any, document: Any) -> list[str]:
    """Keys that a round trip through one of the operator's models loses."""
    found: list[str] = []

    def compare(before: Any, after: Any, path: str) -> None:
        if isinstance(before, dict):
            for key, value in before.items():
                if not isinstance(after, dict) or key not in after:
                    found.append(f"{path}/{key}")
                else:
                    compare(value, after[key], f"{path}/{key}")
        elif isinstance(before, list):
            for position, value in enumerate(before):
                compare(value, after[position], f"{path}[{position}]")
        elif before != after:
            found.append(f"{path}: {before!r} became {after!r}")

    compare(document, model.from_dict(document).to_dict(), "")
    return found


class TestCreated:
    """All goes well."""

    def test_waits_tells_and_ends_with_what_was_published(
        self, api: KubernetesStub, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        trains(api, run, tmp_path)
        with caplog.at_level(logging.INFO):
            assert stage(api, run, tmp_path) == 0
        assert status(run)["state"] == "succeeded"
        assert [r.getMessage() for r in caplog.records if "node 0" in r.getMessage()] == [
            "node 0: epoch 1/2",
            "node 0: again",
        ]
        assert api.tokens == {"Bearer secret-token"}
        assert api.called("POST", "trainjobs") == 1 and api.called("DELETE", "trainjobs") == 0
        assert stage(api, run, tmp_path) == 0 and api.called("POST", "trainjobs") == 1
        assert status(run)["state"] == "already done"

    def test_lines_are_told_once_and_in_time(
        self, api: KubernetesStub, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        trains(api, run, tmp_path)
        publish_now, reads = api.on_create, 0

        def later(kind: str, job: dict[str, Any]) -> None:
            nonlocal reads
            if kind == "trainjobs":
                reads += 1
                pod(api, 1)
                api.logs["node-1"] = [f"{STAMP.format(1)} first", f"{STAMP.format(2)} second"][:reads]
                if reads == 4:
                    publish_now(kind, job)

        api.on_create, api.on_read = lambda kind, job: None, later
        with caplog.at_level(logging.INFO):
            assert stage(api, run, tmp_path) == 0
        told = [r.getMessage() for r in caplog.records if r.getMessage().startswith("node 1")]
        assert told == ["node 1: first", "node 1: second"]

    def test_complete_and_nothing_published(self, api: KubernetesStub, run: Path, tmp_path: Path) -> None:
        api.on_create = lambda kind, job: end(job)
        assert stage(api, run, tmp_path) == 75
        assert "is complete, and" in status(run)["error"]["message"]


class TestFoundAgain:
    """The job of an earlier try."""

    @pytest.fixture
    def earlier(self, api: KubernetesStub, run: Path, tmp_path: Path) -> dict[str, Any]:
        """A try whose process was lost while the TrainJob goes on."""
        asked = 0

        def lose(method: str, kind: str) -> int:
            nonlocal asked
            asked += method == "GET"
            return 403 if asked > 2 else 0

        api.refuse = lose
        assert stage(api, run, tmp_path) == 2
        api.refuse = lambda method, kind: 0
        body = api.bodies[0]
        job = {**body, "metadata": {**body["metadata"], "creationTimestamp": "2026-11-26T00:00:00Z"}}
        api.objects["trainjobs", body["metadata"]["name"]] = job
        api.calls.clear()
        return job

    def test_is_waited_for(self, api: KubernetesStub, run: Path, tmp_path: Path, earlier: dict[str, Any]) -> None:
        trains(api, run, tmp_path)
        publish_now = api.on_create
        api.on_read = lambda kind, job: publish_now(kind, job) if len(api.calls) > 4 else None
        assert stage(api, run, tmp_path) == 0
        assert api.called("POST", "trainjobs") == 1 and api.called("DELETE", "trainjobs") == 0  # 409

    @pytest.mark.parametrize("what", ["failed", "complete", "another training"])
    def test_makes_room(
        self, api: KubernetesStub, run: Path, tmp_path: Path, earlier: dict[str, Any], what: str
    ) -> None:
        trains(api, run, tmp_path)
        if what == "another training":
            earlier["metadata"]["annotations"]["rfdetr/inputs"] = "other"
        else:
            end(earlier, "Failed" if what == "failed" else "Complete")
        assert stage(api, run, tmp_path) == 0
        assert api.called("DELETE", "trainjobs") == 1 and api.called("POST", "trainjobs") == 2

    def test_that_does_not_go(
        self, api: KubernetesStub, run: Path, tmp_path: Path, earlier: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(nodes, "GOING_SECONDS", 0.1)
        earlier["metadata"]["deletionTimestamp"] = "2026-11-26T00:00:01Z"
        assert stage(api, run, tmp_path) == 75
        assert "was deleted and does not go" in status(run)["error"]["message"]


class TestFailed:
    """The stage fails as its nodes did, and leaves nothing behind."""

    @pytest.mark.parametrize(
        ("errors", "condition", "code", "message"),
        [
            ([(0, "TransientError", "rank 0 lost the other nodes"), (1, "DatasetError", "x.jpg cannot be read")], {}, 2,
             "node 1: x.jpg cannot be read"),
            ([(0, "TransientError", "rank 0 of 2 was ended by SIGKILL")], {}, 75, "node 0: rank 0 of 2 was ended"),
            ([(1, "KeyError", "'boxes'")], {}, 70, "node 1: 'boxes'"),
            ([(0, "Terminated", "stopped by SIGTERM")], {}, 75, "node 0: stopped by SIGTERM"),
            ([], {"reason": "DeadlineExceeded", "message": "active for 3600 s"}, 2, "took longer than the profile"),
            ([], {"reason": "JobSetFailed", "message": "jobset failed"}, 75, "failed: JobSetFailed: jobset failed"),
        ],
    )  # fmt: skip
    def test_why(
        self, api: KubernetesStub, run: Path, tmp_path: Path, errors: Any, condition: Any, code: int, message: str
    ) -> None:
        fails(api, run, *errors, **condition)
        assert stage(api, run, tmp_path) == code
        assert message in status(run)["error"]["message"]
        assert not [name for kind, name in api.objects if kind == "trainjobs"]

    def test_out_of_memory(self, api: KubernetesStub, run: Path, tmp_path: Path) -> None:
        def fail(kind: str, job: dict[str, Any]) -> None:
            killed = {"terminated": {"reason": "OOMKilled", "exitCode": 137}}
            pod(api, 1, phase="Failed", containerStatuses=[{"state": killed}])
            end(job, "Failed")

        api.on_create = fail
        assert stage(api, run, tmp_path) == 75
        assert status(run)["error"]["message"] == "node 1 of 2 ran out of memory"

    def test_a_status_of_an_earlier_attempt_is_not_the_reason(
        self, api: KubernetesStub, run: Path, tmp_path: Path
    ) -> None:
        fails(api, run, (0, "ConfigError", "old"))
        assert stage(api, run, tmp_path) == 2
        path = run / "status" / "train-node-0.json"
        path.write_text(path.read_text().replace("2026-11-26T00:00:07", "2026-11-25T00:00:07"))
        api.on_create = lambda kind, job: end(job, "Failed")
        assert stage(api, run, tmp_path) == 75

    def test_a_pod_that_cannot_start(
        self,
        api: KubernetesStub,
        run: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(nodes, "STUCK_SECONDS", 0.1)
        waiting = {"reason": "CreateContainerConfigError", "message": 'secret "rfdetr-s3" not found'}
        api.on_create = lambda kind, job: pod(
            api, 0, phase="Pending", containerStatuses=[{"state": {"waiting": waiting}}]
        )
        assert stage(api, run, tmp_path) == 2
        what = 'CreateContainerConfigError: secret "rfdetr-s3" not found'
        assert status(run)["error"]["message"] == f"node 0 cannot start: {what}"
        assert caplog.messages.count(f"node 0 waits: {what}") == 1
        assert not [name for kind, name in api.objects if kind == "trainjobs"]

    def test_deleted_by_someone(self, api: KubernetesStub, run: Path, tmp_path: Path) -> None:
        api.on_create = lambda kind, job: api.objects.clear()
        assert stage(api, run, tmp_path) == 75
        assert "was deleted while it trained" in status(run)["error"]["message"]


class TestCancelled:
    """By a signal to the stage, or at the end of the run by notify."""

    def test_a_signal_deletes_it(self, api: KubernetesStub, run: Path, tmp_path: Path) -> None:
        api.on_create = lambda kind, job: threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert stage(api, run, tmp_path) == 143
        assert status(run)["state"] == "preempted"
        assert api.called("DELETE", "trainjobs") == 1
        assert api.bodies[-1]["propagationPolicy"] == "Foreground"
        assert not api.objects

    def test_by_the_label_of_the_run(self, api: KubernetesStub, tmp_path: Path) -> None:
        uris = [f"s3://b/d/runs/{name}" for name in ("one", "two")]
        for uri in uris:
            cluster(api, tmp_path).create(
                "apis/trainer.kubeflow.org/v1alpha1/trainjobs",
                train_job(SETTINGS_OF_TWO, run_uri=uri, nodes=2, devices=1, inputs="", attempt=""),
            )
        assert delete_train_jobs(uris[0], cluster(api, tmp_path)) == [name_of(uris[0])]
        assert [name for _, name in api.objects] == [name_of(uris[1])]
        assert f"labelSelector=rfdetr%2Frun%3D{run_key(uris[0])}" in api.calls[-2][1]


class TestAtTheEndOfARun:
    """notify."""

    @pytest.mark.parametrize(("awaited", "left"), [(True, []), (False, ["trainjobs"])])
    def test_deletes_what_is_left(
        self,
        api: KubernetesStub,
        run: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        awaited: bool,
        left: list[str],
    ) -> None:
        monkeypatch.setattr(Cluster, "of_this_pod", lambda: cluster(api, tmp_path))
        monkeypatch.delenv(AWAITED, raising=False)
        if awaited:
            monkeypatch.setenv(AWAITED, "true")
        job = train_job(SETTINGS_OF_TWO, run_uri=location(str(run)).uri, nodes=2, devices=1, inputs="", attempt="")
        cluster(api, tmp_path).create("apis/trainer.kubeflow.org/v1alpha1/trainjobs", job)
        assert notify(["--run-uri", str(run), "--state", "CANCELLED"]) == 0
        assert [kind for kind, _ in api.objects] == left
        assert status(run, "notify").get("train_jobs") == ([job["metadata"]["name"]] if awaited else None)

    def test_tells_all_the_same_if_it_may_not(
        self, api: KubernetesStub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Cluster, "of_this_pod", lambda: cluster(api, tmp_path))
        monkeypatch.setenv(AWAITED, "true")
        api.refuse = lambda method, kind: 403
        assert notify(["--run-uri", str(run), "--state", "FAILED"]) == 0
        assert "403" in status(run, "notify")["train_jobs"] and (run / "summary.json").exists()


class TestTheApi:
    """What it may answer."""

    @pytest.mark.parametrize(
        ("answer", "code", "hint"),
        [
            (401, 2, "the token of the run's service account is not valid"),
            (403, 2, "give the run's service account the Role of manifests/"),
            (404, 2, "is what it asks for installed in this cluster?"),
            (422, 2, "the cluster has another version of that kind"),
        ],
    )
    def test_a_refusal_is_one_line_and_nothing_is_created(
        self, api: KubernetesStub, run: Path, tmp_path: Path, answer: int, code: int, hint: str
    ) -> None:
        api.refuse = lambda method, kind: answer if method == "POST" else 0
        assert stage(api, run, tmp_path) == code
        error = status(run)["error"]
        assert error["message"].startswith(f"Kubernetes API: POST trainjobs in namespace ml: {answer} ")
        assert hint in error["hint"] and "\n" not in error["message"]
        assert not api.objects

    def test_rights_are_missed_before_anything_is_created(self, api: KubernetesStub, run: Path, tmp_path: Path) -> None:
        api.refuse = lambda method, kind: 403 if kind == "pods" else 0
        assert stage(api, run, tmp_path) == 2
        assert api.called("POST", "trainjobs") == 0

    def test_logs_that_may_not_be_read_stop_nothing(
        self, api: KubernetesStub, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        trains(api, run, tmp_path)
        api.refuse = lambda method, kind: (
            403 if method == "GET" and api.calls[-1][1].split("?")[0].endswith("log") else 0
        )
        assert stage(api, run, tmp_path) == 0
        assert sum("logs cannot be read" in message for message in caplog.messages) == 1

    def test_it_may_be_away_for_a_while(self, api: KubernetesStub, run: Path, tmp_path: Path) -> None:
        trains(api, run, tmp_path)
        api.refuse = lambda method, kind: 503 if len(api.calls) in (1, 3, 4) else 0
        assert stage(api, run, tmp_path) == 0

    def test_it_may_be_away_for_long(
        self, api: KubernetesStub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Then the TrainJob is left alone: the next try waits for it."""
        monkeypatch.setattr(nodes, "AWAY_SECONDS", 0.1)
        api.refuse = lambda method, kind: 503 if len(api.calls) > 2 else 0
        assert stage(api, run, tmp_path) == 75
        assert "the TrainJob goes on" in status(run)["error"]["hint"]
        assert [kind for kind, _ in api.objects] == ["trainjobs"] and api.called("DELETE", "trainjobs") == 0

    def test_unreachable(self, tmp_path: Path) -> None:
        (tmp_path / "token").write_text("t")
        with pytest.raises(TransientError, match=r"^Kubernetes API: GET trainjobs/x in namespace ml: .*refused"):
            Cluster("http://127.0.0.1:9", "ml", token_file=tmp_path / "token").read("trainjobs", "x")

    def test_no_token(self, api: KubernetesStub, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="No such file"):
            Cluster(api.url, "ml", token_file=tmp_path / "none").read("trainjobs", "x")

    def test_outside_of_a_cluster(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        with pytest.raises(ConfigError, match="this process is in no pod"):
            Cluster.of_this_pod()
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
        with pytest.raises(ConfigError, match="the pod has no service account token"):
            Cluster.of_this_pod(tmp_path)

    def test_settings_that_are_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(SETTINGS, raising=False)
        assert NodeSettings.from_environment() is None
        monkeypatch.setenv(SETTINGS, '{"imag": "x"}')
        with pytest.raises(ConfigError, match=SETTINGS):
            NodeSettings.from_environment()
