"""The manifests: what is committed is what kustomize renders, and every resource is legal, least and restricted."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import kubeflow_trainer_api.models as trainer
import kubernetes_validate
import pytest
import typer
import yaml
from hera.workflows import models

from components.cluster import Cluster
from components.images import built_images
from components.stages import CONTAINERS
from components.train.trainjob import CONTAINER, TRAINJOBS, NodeSettings
from pipelines.argo import EXECUTOR, PRIORITY, account, as_yaml, workflow_template
from pipelines.argo_lint import cron_problem, lint
from pipelines.cli import app
from pipelines.platform import load_profile
from tests.components.test_train_nodes import lost
from tests.pipelines.test_argo import strict

Json = dict[str, Any]
MANIFESTS = Path(__file__).parents[2] / "manifests"
RENDERED = {
    folder.name: folder
    for folder in (
        MANIFESTS / "base", MANIFESTS / "argo", MANIFESTS / "multi-node", *sorted((MANIFESTS / "overlays").iterdir())
    )
}  # fmt: skip
KUBERNETES = "1.33"
IAM = MANIFESTS / "overlays" / "aws-irsa" / "iam"


def documents(name: str) -> list[Json]:
    return list(yaml.safe_load_all((MANIFESTS / "rendered" / f"{name}.yaml").read_text()))


BASE = documents("base") + documents("argo")
ALL = [  # each once: overlays repeat what they leave as it is
    (name, document)
    for name in RENDERED
    for document in documents(name)
    if name in ("base", "argo") or document not in BASE
]
IDS = [f"{name}-{document['kind']}-{document['metadata']['name']}" for name, document in ALL]


def of_kind(name: str, kind: str) -> dict[str, Json]:
    return {row["metadata"]["name"]: row for row in documents(name) if row["kind"] == kind}


def pods(document: Json) -> Iterator[Json]:
    """The specs of the pods that a resource makes."""
    spec = document.get("spec", {})
    if document["kind"] == "CronJob":
        yield spec["jobTemplate"]["spec"]["template"]["spec"]
    elif document["kind"] == "StatefulSet":
        yield spec["template"]["spec"]
    elif document["kind"] == "TrainingRuntime":
        for job in spec["template"]["spec"]["replicatedJobs"]:
            yield job["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("name", RENDERED)
def test_what_is_committed_is_what_kustomize_renders(name: str) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: what is committed in manifests/rendered cannot be compared")
    command = ["kubectl", "kustomize", str(RENDERED[name])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert list(yaml.safe_load_all(done.stdout)) == documents(name), "make manifests"


@pytest.mark.parametrize("name", RENDERED)
def test_of_kustomize_only_resources_and_patches_are_used(name: str) -> None:
    assert set(yaml.safe_load((RENDERED[name] / "kustomization.yaml").read_text())) <= {"resources", "patches"}


@pytest.mark.parametrize(("name", "document"), ALL, ids=IDS)
def test_is_legal(name: str, document: Json) -> None:
    """Strictly: an unknown key is a fault."""
    if document["kind"] == "WorkflowTemplate":
        assert list(strict(models.WorkflowTemplate).iter_errors(document)) == []
    elif document["kind"] == "TrainingRuntime":
        assert lost(trainer.TrainerV1alpha1TrainingRuntime, document) == []
    else:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_a_misspelt_key_would_be_found() -> None:
    job = of_kind("base", "CronJob")["rfdetr-submit"]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**job, "spec": {**job["spec"], "timezone": "Etc/UTC"}}, KUBERNETES, strict=True)
    runtime = of_kind("multi-node", "TrainingRuntime")["rfdetr-torch"]
    assert lost(trainer.TrainerV1alpha1TrainingRuntime, {**runtime, "spec": {**runtime["spec"], "mlpolicy": {}}})


@pytest.mark.parametrize(("name", "document"), [row for row in ALL if list(pods(row[1]))])
def test_pods_are_restricted(name: str, document: Json) -> None:
    for pod in pods(document):
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False and pod["serviceAccountName"]
        for container in (*pod["containers"], *pod.get("initContainers", ())):
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False and security["readOnlyRootFilesystem"] is True
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert not container["image"].endswith(":latest") and ":" in container["image"]
            volumes = {row["name"] for row in (*pod.get("volumes", ()), {"name": "data"})}
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def test_the_namespace_refuses_pods_that_are_not() -> None:
    labels = of_kind("base", "Namespace")["rfdetr"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize(("name", "document"), [row for row in ALL if row[1]["kind"] in ("Role", "ClusterRole")])
def test_rights_are_few(name: str, document: Json) -> None:
    assert document["kind"] == "Role"
    for rule in document["rules"]:
        assert not {"*", "deletecollection", "escalate", "bind", "impersonate"} & {
            *rule["verbs"], *rule["resources"], *rule["apiGroups"]
        }  # fmt: skip
        assert "pods/exec" not in rule["resources"]
        if {"secrets", "configmaps"} & {*rule["resources"]}:
            assert rule["verbs"] == ["get"] and rule["resourceNames"]


@pytest.mark.parametrize(("name", "document"), [row for row in ALL if row[1]["kind"] == "RoleBinding"])
def test_bindings_lead_somewhere(name: str, document: Json) -> None:
    assert document["roleRef"]["name"] in of_kind(name, "Role")
    known = {account for of in ("base", "argo", "multi-node") for account in of_kind(of, "ServiceAccount")}
    assert {subject["name"] for subject in document["subjects"]} <= known


def test_the_train_stage_may_do_what_its_client_asks_for_and_no_more() -> None:
    """Every call of components.cluster, as RBAC names it."""
    wanted = {("trainjobs", verb) for verb in ("create", "get", "list", "delete")}
    wanted |= {("pods", "list"), ("pods/log", "get")}
    rules = of_kind("multi-node", "Role")["rfdetr-train-jobs"]["rules"]
    assert {(resource, verb) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]} == wanted
    assert TRAINJOBS.split("/")[1] == "trainer.kubeflow.org" in rules[0]["apiGroups"]
    calls = {name for name in vars(Cluster) if not name.startswith("_")} - {"of_this_pod"}
    assert calls == {"create", "read", "select", "delete", "log"}


class TestArgo:
    """manifests/argo."""

    def test_the_template_is_what_the_program_writes(self) -> None:
        written = as_yaml(workflow_template(load_profile("single-gpu"), built_images(), namespace="rfdetr"))
        assert (MANIFESTS / "argo" / "workflow-template.yaml").read_text() == written, "make manifests"

    def test_its_accounts_are_there(self) -> None:
        accounts = of_kind("argo", "ServiceAccount")
        assert set(accounts) == {EXECUTOR, *map(account, CONTAINERS.values())}
        template = of_kind("argo", "WorkflowTemplate")["rfdetr-retrain"]
        assert lint([template], accounts=accounts) == []
        assert PRIORITY in of_kind("base", "PriorityClass")

    def test_no_stage_has_a_token_but_argo_s_own_container(self) -> None:
        accounts = of_kind("argo", "ServiceAccount")
        mounting = {name for name, row in accounts.items() if row.get("automountServiceAccountToken") is not False}
        assert mounting == {EXECUTOR}
        token = of_kind("argo", "Secret")[f"{EXECUTOR}.service-account-token"]
        assert token["metadata"]["annotations"] == {"kubernetes.io/service-account.name": EXECUTOR}


class TestMultiNode:
    """manifests/multi-node."""

    def test_the_runtime_has_what_a_trainjob_refers_to(self) -> None:
        runtime = of_kind("multi-node", "TrainingRuntime")[NodeSettings("", "", "", "", "", "").runtime]
        (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
        (pod,) = pods(runtime)
        assert job["name"] == CONTAINER == pod["containers"][0]["name"]
        assert job["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
        assert {volume["name"] for volume in pod["volumes"]} == {"shm", "scratch", "caches"}
        assert pod["serviceAccountName"] in of_kind("multi-node", "ServiceAccount")

    def test_what_a_person_must_mend_is_not_tried_again(self) -> None:
        runtime = of_kind("multi-node", "TrainingRuntime")["rfdetr-torch"]
        jobs = runtime["spec"]["template"]["spec"]
        rule = jobs["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"][0]
        assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2, 70]
        assert jobs["failurePolicy"]["rules"][0]["action"] == "FailJobSet"
        assert jobs["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]


class TestSchedule:
    """The CronJob that submits."""

    def test_asks_for_what_submit_takes(self) -> None:
        """Its arguments, without a cluster: what is wrong with an option or a profile would be said first."""
        cron = of_kind("base", "CronJob")["rfdetr-submit"]
        assert cron_problem(cron["spec"]["schedule"]) == "" and cron["spec"]["timeZone"] == "Etc/UTC"
        assert cron["spec"]["suspend"] is True and cron["spec"]["concurrencyPolicy"] == "Forbid"
        (pod,) = pods(cron)
        container = pod["containers"][0]
        assert container["command"][:3] == ["python", "-m", "pipelines"]
        command = typer.main.get_command(app)
        options = {name for option in command.commands[container["command"][3]].params for name in option.opts}
        assert {argument.partition("=")[0] for argument in container["args"]} <= options


@pytest.mark.parametrize("profile", sorted(MANIFESTS.glob("**/profile.yaml")), ids=lambda path: path.parent.name)
def test_profiles_beside_overlays(profile: Path) -> None:
    found, name = load_profile(str(profile)), profile.parent.name
    assert found.service_account in {**of_kind("base", "ServiceAccount"), **of_kind(name, "ServiceAccount")}
    if found.s3.secret is not None:
        launcher = yaml.safe_load(of_kind(name, "ConfigMap")["kfp-launcher"]["data"]["providers"])["s3"]["default"]
        secret = launcher["credentials"]["secretRef"]
        entries = (found.s3.access_key_entry, found.s3.secret_key_entry)
        assert (secret["secretName"], secret["accessKeyKey"], secret["secretKeyKey"]) == (found.s3.secret, *entries)
        assert found.s3.endpoint_url == f"http://{launcher['endpoint']}"


class TestIam:
    """The policies of manifests/overlays/aws-irsa/iam."""

    POLICIES: ClassVar[dict[str, Json]] = {
        path.stem: json.loads(path.read_text()) for path in sorted(IAM.glob("*.json"))
    }

    def test_one_for_every_account_that_reaches_the_store(self) -> None:
        assert set(self.POLICIES) == {"trust", "run", "submit", *(facts.target for facts in CONTAINERS.values())}

    @pytest.mark.parametrize("name", sorted(set(POLICIES) - {"trust"}))
    def test_is_least(self, name: str) -> None:
        for statement in self.POLICIES[name]["Statement"]:
            assert set(statement) <= {"Sid", "Effect", "Action", "Resource", "Condition"}
            assert statement["Effect"] == "Allow" and not any("*" in action for action in statement["Action"])
            assert all(re.match(r"arn:aws:s3:::example-bucket", resource) for resource in statement["Resource"])
            assert ("Condition" in statement) == (statement["Action"] == ["s3:ListBucket"])

    def may(self, name: str, action: str, key: str) -> bool:
        """Whether a policy allows an action on an object."""
        resource = f"arn:aws:s3:::example-bucket/rfdetr/{key}"
        return any(
            action in row["Action"] and re.fullmatch(pattern.replace("*", ".*"), resource)
            for row in self.POLICIES[name]["Statement"]
            for pattern in row["Resource"]
        )

    def test_every_account_of_argo_has_the_role_of_its_stage(self) -> None:
        accounts = of_kind("aws-irsa-argo", "ServiceAccount")
        for facts in CONTAINERS.values():
            role = accounts[account(facts)]["metadata"]["annotations"]["eks.amazonaws.com/role-arn"]
            assert role.endswith(f":role/rfdetr-{facts.target}")
        assert "annotations" not in accounts[EXECUTOR]["metadata"]

    def test_only_promote_touches_the_registry(self) -> None:
        champion = "models/detector/champion.json"
        writers = {name for name in self.POLICIES if name != "trust" and self.may(name, "s3:PutObject", champion)}
        assert writers == {"run", "promote"}  # run: the one account of a KFP run
        for name in writers:
            assert self.may(name, "s3:DeleteObject", "models/detector/.probe-0011223344556677")
            assert not self.may(name, "s3:DeleteObject", champion)

    def test_every_stage_writes_its_part_of_the_run(self) -> None:
        for facts in CONTAINERS.values():
            assert self.may(facts.target, "s3:PutObject", f"runs/a/status/{facts.name}.json")
            assert self.may(facts.target, "s3:GetObject", "runs/a/config.yaml")
        assert not self.may("submit", "s3:PutObject", "runs/a/config.yaml")
