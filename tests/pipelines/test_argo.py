"""The Argo resources: of the same stages as the KFP DAG, legal, and nothing that would fail on the cluster only."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hera.workflows import models

from components.stages import CONTAINERS, DAG, STAGES
from components.train.trainjob import AWAITED, SETTINGS, NodeSettings, train_job
from pipelines.argo import EXECUTOR, account, as_document, as_yaml, cron_workflow, workflow_template
from pipelines.argo_lint import cron_problem, lint
from pipelines.platform import load_profile, profile_names
from pipelines.pods import node_settings
from rfdetr_core.errors import ConfigError
from tests.components.test_train_nodes import lost

Json = dict[str, Any]
IMAGES = {name: f"registry.example.com/{facts.target}@sha256:{'0' * 64}" for name, facts in CONTAINERS.items()}
ACCOUNTS = {EXECUTOR, *map(account, CONTAINERS.values())}
MANIFESTS = Path(__file__).parents[2] / "manifests"


def template_of(profile: str) -> Json:
    return as_document(workflow_template(load_profile(profile), IMAGES, namespace="ml"))


@pytest.fixture(scope="module")
def good() -> dict[str, Json]:
    """A WorkflowTemplate and a CronWorkflow without a fault."""
    arguments = {"root": "s3://b/d", "config": "s3://b/config.yaml"}
    cron = cron_workflow(cron="0 3 * * 1", timezone="Europe/Berlin", namespace="ml", arguments=arguments)
    return {"template": template_of("spot-gpu"), "cron": as_document(cron)}


def strict(model: Any) -> Any:
    """A validator of one of hera's models that takes no unknown key."""
    schema = model.model_json_schema(by_alias=True)

    def close(node: Any) -> None:
        if isinstance(node, dict):
            if node.get("type") == "object" and "properties" in node:
                node.setdefault("additionalProperties", False)
            for value in node.values():
                close(value)
        elif isinstance(node, list):
            for value in node:
                close(value)

    close(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    return {kind: strict(getattr(models, kind)) for kind in ("WorkflowTemplate", "CronWorkflow")}


def named(document: Json, name: str) -> Json:
    return next(row for row in document["spec"]["templates"] if row["name"] == name)


class TestTheTemplates:
    """What is written."""

    @pytest.mark.parametrize("profile", profile_names())
    def test_are_legal_and_lint(self, profile: str, schemas: dict[str, Any], good: dict[str, Json]) -> None:
        document = template_of(profile)
        assert [error.message for error in schemas["WorkflowTemplate"].iter_errors(document)] == []
        assert [error.message for error in schemas["CronWorkflow"].iter_errors(good["cron"])] == []
        assert lint([document, good["cron"]], accounts=ACCOUNTS) == []

    @pytest.mark.parametrize("profile", profile_names())
    def test_are_the_stages_of_the_dag_with_what_the_profile_says(self, profile: str) -> None:
        document, wanted = template_of(profile), load_profile(profile)
        tasks = named(document, "retrain")["dag"]["tasks"]
        assert [task["name"].replace("-", "_") for task in tasks] == list(STAGES)
        assert [task.get("depends") for task in tasks] == [None, *(facts.target for facts in DAG[:-1])]
        assert document["spec"]["onExit"] == "notify"
        for name, facts in CONTAINERS.items():
            template, stage = named(document, facts.target), wanted.task(name)
            container = template["container"]
            assert container["command"] == ["python", "-m", f"components.{name}.stage"]
            assert container["image"] == IMAGES[name]
            limits = container["resources"]["limits"]
            assert limits == container["resources"]["requests"]
            assert (limits["cpu"], limits["memory"]) == (stage.cpu, stage.memory)
            assert limits.get("nvidia.com/gpu") == (str(stage.gpus) if stage.gpus else None)
            sizes = {v["name"]: v["emptyDir"]["sizeLimit"] for v in template["volumes"] if "emptyDir" in v}
            assert (sizes["shm"], sizes["scratch"]) == (stage.shm, stage.scratch)
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert mounts == {"shm": "/dev/shm", "scratch": "/work", "caches": "/tmp"}
            assert template["activeDeadlineSeconds"] == str(stage.timeout_seconds)
            assert template["retryStrategy"]["limit"] == str(stage.retry.limit)
            assert len(template.get("tolerations", [])) == len(stage.tolerations)
            assert template["serviceAccountName"] == f"rfdetr-{facts.target}"
            environment = {row["name"]: row.get("value") for row in container["env"]}
            assert environment["RFDETR_ATTEMPT"] == "{{workflow.uid}}"
            assert environment["RFDETR_IMAGE"] == IMAGES[name]

    def test_only_what_waits_for_a_trainjob_may_ask_the_kubernetes_api(self) -> None:
        for profile, expected in (("single-gpu", set()), ("multi-node", {"train", "notify"})):
            document = template_of(profile)
            assert document["spec"]["automountServiceAccountToken"] is False
            asking = {t["name"] for t in document["spec"]["templates"] if t.get("automountServiceAccountToken")}
            assert asking == expected

    def test_secrets_are_named_and_never_written(self, tmp_path: Path) -> None:
        profile = tmp_path / "own.yaml"
        profile.write_text(
            "extends: cpu\ndescription: d\ns3: {secret: keys, ca_secret: authority}\nimage_pull_secrets: [pull]\n"
        )
        document = template_of(str(profile))
        train = named(document, "train")
        rows = {row["name"]: row.get("valueFrom") for row in train["container"]["env"]}
        assert rows["AWS_SECRET_ACCESS_KEY"] == {"secretKeyRef": {"name": "keys", "key": "AWS_SECRET_ACCESS_KEY"}}
        assert {"name": "ca", "secret": {"secretName": "authority"}} in train["volumes"]
        assert document["spec"]["imagePullSecrets"] == [{"name": "pull"}]
        assert lint([document], accounts=ACCOUNTS) == []

    def test_the_nodes_of_a_trainjob_get_what_the_profile_says_of_train(self) -> None:
        import kubeflow_trainer_api.models as trainer

        document, profile = template_of("multi-node"), load_profile("multi-node")
        waits = named(document, "train")
        assert waits["container"]["resources"]["limits"]["cpu"] == "500m" and "priorityClassName" not in waits
        environment = {row["name"]: row.get("value") for row in waits["container"]["env"]}
        settings = NodeSettings(**json.loads(environment[SETTINGS]))
        wanted = profile.stage("train")
        assert (settings.cpu, settings.memory, settings.shm) == (wanted.cpu, wanted.memory, wanted.shm)
        assert settings.image == IMAGES["train"] and settings.deadline_seconds == wanted.timeout_seconds
        job = train_job(settings, run_uri="s3://b/runs/a", nodes=2, devices="auto", inputs="", attempt="")
        assert lost(trainer.TrainerV1alpha1TrainJob, job) == []
        assert job["spec"]["trainer"]["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == str(wanted.gpus)
        for name in ("validate-dataset", "notify"):
            names = {row["name"] for row in named(document, name)["container"]["env"]}
            assert AWAITED in names and SETTINGS not in names

    def test_whatever_a_profile_says_of_placement_reaches_the_nodes(self, tmp_path: Path) -> None:
        import kubeflow_trainer_api.models as trainer

        path = tmp_path / "own.yaml"
        path.write_text(
            "extends: multi-node\ndescription: d\n"
            "s3: {secret: keys, ca_secret: authority}\nimage_pull_secrets: [pull]\n"
            "stages:\n  train:\n    node_selector: {pool: gpu}\n    labels: {team: vision}\n"
            "    secrets: [{secret: tracker, optional: true, entries: {key: WANDB_API_KEY}}]\n"
            "    affinity:\n      - match: [{key: zone, values: [a]}]\n"
            "      - {weight: 5, match: [{key: spot, operator: Exists}]}\n"
        )
        settings = node_settings(load_profile(str(path)), "r.example.com/train:1")
        job = train_job(settings, run_uri="s3://b/runs/a", nodes=3, devices=8, inputs="", attempt="")
        assert lost(trainer.TrainerV1alpha1TrainJob, job) == []
        [patch] = job["spec"]["runtimePatches"]
        [node] = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
        template = node["template"]["spec"]["template"]
        pod = template["spec"]
        assert pod["nodeSelector"] == {"pool": "gpu"} and template["metadata"]["labels"]["team"] == "vision"
        assert pod["imagePullSecrets"] == [{"name": "pull"}] and pod["securityContext"]["runAsNonRoot"] is True
        assert {volume["name"] for volume in pod["volumes"]} == {"shm", "scratch", "ca"}
        affinity = pod["affinity"]["nodeAffinity"]
        assert affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"][0]["matchExpressions"]
        assert affinity["preferredDuringSchedulingIgnoredDuringExecution"][0]["weight"] == 5
        secrets = {
            row["name"]: row["valueFrom"]["secretKeyRef"] for row in job["spec"]["trainer"]["env"] if "valueFrom" in row
        }
        assert secrets["WANDB_API_KEY"] == {"name": "tracker", "key": "key", "optional": True}
        assert secrets["AWS_ACCESS_KEY_ID"] == {"name": "keys", "key": "AWS_ACCESS_KEY_ID"}

    def test_several_gpu_types_do_not_go_with_a_trainjob(self, tmp_path: Path) -> None:
        path = tmp_path / "own.yaml"
        path.write_text("extends: multi-node\ndescription: d\ngpu: {types: [nvidia.com/gpu, amd.com/gpu]}\n")
        with pytest.raises(ConfigError, match=r"gpu\.types: .*gpu_type would not reach the nodes"):
            load_profile(str(path))

    def test_are_the_same_bytes_every_time(self) -> None:
        one, two = (
            as_yaml(workflow_template(load_profile("cpu"), IMAGES, namespace="ml")) for _ in range(2)
        )  # fmt: skip
        assert one == two and yaml.safe_load(one) == template_of("cpu")


Plant = Callable[[Json], Any]
FAULTS: list[tuple[str, str, Plant, str]] = [
    ("template", "a template that is not there",
     lambda d: named(d, "retrain")["dag"]["tasks"][2].update(template="trian"), "there is no template trian"),
    ("template", "an entrypoint that is not there",
     lambda d: d["spec"].update(entrypoint="main"), "entrypoint main: no such template"),
    ("template", "an exit handler that is not there",
     lambda d: d["spec"].update(onExit="tell"), "onExit tell: no such template"),
    ("template", "two templates of one name",
     lambda d: d["spec"]["templates"].append(named(d, "train")), "two templates are called train"),
    ("template", "a cycle",
     lambda d: named(d, "retrain")["dag"]["tasks"][0].update(depends="promote"), "tasks wait for each other"),
    ("template", "a task that waits for none",
     lambda d: named(d, "retrain")["dag"]["tasks"][1].update(depends="validate"), "depends on validate, which is no"),
    ("template", "an input that nobody declares",
     lambda d: named(d, "train")["container"]["args"].append("{{inputs.parameters.epochs}}"),
     "inputs parameter epochs is not declared"),
    ("template", "a workflow parameter that nobody declares, in an expression",
     lambda d: named(d, "train")["container"]["args"].append("{{=workflow.parameters.epochs + 1}}"),
     "workflow parameter epochs is not declared"),
    ("template", "an argument that is not given",
     lambda d: named(d, "train").update(inputs={"parameters": [{"name": "epochs"}]}),
     "task train: parameter epochs is not given"),
    ("template", "an output that nobody makes",
     lambda d: named(d, "retrain")["dag"]["tasks"][3].update(
         arguments={"parameters": [{"name": "x", "value": "{{tasks.train.outputs.parameters.best}}"}]}),
     "train has no output best"),
    ("template", "a volume that is not there",
     lambda d: named(d, "train").update(volumes=[]), "volume shm is mounted and not defined"),
    ("template", "a container that may become root",
     lambda d: named(d, "train")["container"].pop("securityContext"), "not what Pod Security restricted asks for"),
    ("template", "a pod that may be root",
     lambda d: d["spec"]["securityContext"].update(runAsNonRoot=False), "not what Pod Security restricted asks for"),
    ("template", "an image whose tag moves",
     lambda d: named(d, "train")["container"].update(image="r.example.com/train:latest"), "must be named by digest"),
    ("template", "a retry of what a person must mend",
     lambda d: named(d, "train")["retryStrategy"].update(expression="asInt(lastRetry.exitCode) in [2, 75]"),
     "retries exit codes [2, 75]"),
    ("template", "a retry of everything",
     lambda d: named(d, "train")["retryStrategy"].pop("expression"), "retries exit codes of all kinds"),
    ("template", "an account that is not there",
     lambda d: named(d, "train").update(serviceAccountName="trainer"), "service account trainer does not exist"),
    ("template", "a variable that is set twice",
     lambda d: named(d, "train")["container"]["env"].append({"name": "RFDETR_ATTEMPT", "value": "1"}),
     "environment variable RFDETR_ATTEMPT is set twice"),
    ("cron", "a cron with seconds, as KFP has",
     lambda d: d["spec"].update(schedules=["0 0 3 * * 1"]), "6 fields, not five"),
    ("cron", "a cron of words", lambda d: d["spec"].update(schedules=["every monday"]), "2 fields, not five"),
    ("cron", "a time zone that is none",
     lambda d: d["spec"].update(timezone="Europe/Munich"), "timezone Europe/Munich is none"),
    ("cron", "no time zone", lambda d: d["spec"].pop("timezone"), "timezone is missing"),
    ("cron", "a policy that is none",
     lambda d: d["spec"].update(concurrencyPolicy="Never"), "concurrencyPolicy Never"),
    ("cron", "another template",
     lambda d: d["spec"]["workflowSpec"]["workflowTemplateRef"].update(name="x"), "there is no WorkflowTemplate x"),
    ("cron", "an argument that is missing",
     lambda d: d["spec"]["workflowSpec"]["arguments"]["parameters"].pop(), "argument config is not given"),
    ("cron", "an argument that is none",
     lambda d: d["spec"]["workflowSpec"]["arguments"]["parameters"].append({"name": "rot", "value": "s3://b"}),
     "argument rot is none of rfdetr-retrain's"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("which", "plant", "message"), [(w, p, m) for w, _, p, m in FAULTS], ids=[f[1] for f in FAULTS]
)
def test_a_planted_fault_is_caught(which: str, plant: Plant, message: str, good: dict[str, Json]) -> None:
    documents = copy.deepcopy(good)
    plant(documents[which])
    found = lint(list(documents.values()), accounts=ACCOUNTS)
    assert any(message in problem for problem in found), found
    assert all("\n" not in problem and problem.startswith(("WorkflowTemplate ", "CronWorkflow ")) for problem in found)


@pytest.mark.parametrize(
    ("which", "plant"),
    [
        ("template", lambda d: d["spec"].update(entryPoint=d["spec"].pop("entrypoint"))),
        ("template", lambda d: named(d, "train")["container"].update(image=5)),
        ("template", lambda d: named(d, "train")["container"].update(tolerations=[])),
        ("cron", lambda d: d["spec"].update(schedule="0 3 * * 1")),
    ],
    ids=["misspelt", "a number for a text", "in the wrong place", "a field of version 3"],
)
def test_what_the_schema_catches(which: str, plant: Plant, good: dict[str, Json], schemas: dict[str, Any]) -> None:
    document = copy.deepcopy(good[which])
    plant(document)
    assert list(schemas[document["kind"]].iter_errors(document))


@pytest.mark.parametrize("cron", ["0 3 * * 1", "*/15 0-6,22 1 jan-mar mon-fri", "59 23 31 12 0", "0 0/6 * * *"])
def test_a_cron(cron: str) -> None:
    assert cron_problem(cron) == ""


@pytest.mark.parametrize(
    "cron",
    ["", "0 3 * *", "0 0 3 * * 1", "60 3 * * 1", "0 24 * * *", "0 3 0 * *", "0 3 * 13 *", "0 3 * * 7", "x 3 * * *",
     "0 3 * * 5-1", "*/0 * * * *", "*/ * * * *", "0 3 * * mon-", "mon 3 * * *", "0 3 * * L", "@daily"],
)  # fmt: skip
def test_no_cron(cron: str) -> None:
    assert cron_problem(cron)
