"""The DAG for Argo Workflows alone: a WorkflowTemplate of the same stages, and a CronWorkflow that starts it.

Made from components/stages.py and the profile, as the KFP DAG is. What Argo can and KFP cannot: a retry that looks at
the exit code (75, 137 and 143 again, 2 and 70 never), an account for every stage, none of which may ask the Kubernetes
API for anything (Argo's own container uses that of rfdetr-executor), a read-only root filesystem, priority, and time to
leave a checkpoint when a node is drained.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from hera.workflows import models

from components.stages import DAG, NOTIFY, StageFacts
from pipelines.platform import Profile, StageProfile
from pipelines.pods import (
    CONTAINER_SECURITY,
    placement,
    pod_security,
    resources,
    secret_environment,
    trainjob_environment,
    volumes,
)
from pipelines.yaml_files import dump_documents

NAME = "rfdetr-retrain"
EXECUTOR = "rfdetr-executor"
"""Account of Argo's own container in every pod (manifests/argo)."""
PRIORITY = "rfdetr-training"
"""Priority class of what computes (manifests/base)."""

RETRIED = (75, 137, 143)
"""Exit codes worth another try (DESIGN section 4); a pod that its node lost has none, and is Error to Argo."""

RUN_URI = (
    "{{workflow.parameters.root}}/runs/"
    "{{=workflow.parameters.run_id == '' ? workflow.uid : workflow.parameters.run_id}}"
)
GRACE_SECONDS = 120
"""Between SIGTERM and SIGKILL for training, which leaves a checkpoint."""

KEPT_SECONDS = {"secondsAfterSuccess": 7 * 86400, "secondsAfterFailure": 30 * 86400}


def account(stage: StageFacts) -> str:
    """The service account of a stage."""
    return f"rfdetr-{stage.target}"


def workflow_template(
    profile: Profile, images: Mapping[str, str], *, namespace: str, name: str = NAME
) -> models.WorkflowTemplate:
    """The DAG for one profile.

    Args:
        images: container → image, as `pinned_images` gives them.
    """
    templates = [_dag(), *(_stage(profile, stage, images[stage.name]) for stage in (*DAG, NOTIFY))]
    spec = {
        "entrypoint": "retrain",
        "onExit": NOTIFY.target,
        "arguments": {"parameters": _parameters(profile)},
        "serviceAccountName": EXECUTOR,
        "automountServiceAccountToken": False,
        "executor": {"serviceAccountName": EXECUTOR},
        "securityContext": pod_security(profile),
        "imagePullSecrets": [{"name": secret} for secret in profile.image_pull_secrets] or None,
        "podMetadata": {"labels": {"app.kubernetes.io/name": "rfdetr-pipeline"}},
        "podGC": {"strategy": "OnWorkflowSuccess"},
        "ttlStrategy": KEPT_SECONDS,
        "templates": templates,
    }
    return models.WorkflowTemplate.model_validate(
        {
            "apiVersion": "argoproj.io/v1alpha1",
            "kind": "WorkflowTemplate",
            "metadata": {
                "name": name,
                "namespace": namespace,
                "labels": {"app.kubernetes.io/name": "rfdetr-pipeline"},
                "annotations": {
                    "workflows.argoproj.io/description": f"Retrain an RF-DETR detector; profile {profile.name}.",
                    "rfdetr/profile": profile.name,
                },
            },
            "spec": {key: value for key, value in spec.items() if value is not None},
        }
    )


def cron_workflow(
    *, cron: str, timezone: str, namespace: str, arguments: Mapping[str, str], name: str = NAME
) -> models.CronWorkflow:
    """A schedule that starts the WorkflowTemplate of this name.

    Args:
        cron: minute, hour, day, month, day of the week: five fields, other than KFP's six.
        timezone: of the tz database, such as Europe/Berlin.
        arguments: of the workflow; what is not given is the template's default.
    """
    parameters = [{"name": key, "value": value} for key, value in arguments.items()]
    return models.CronWorkflow.model_validate(
        {
            "apiVersion": "argoproj.io/v1alpha1",
            "kind": "CronWorkflow",
            "metadata": {
                "name": name,
                "namespace": namespace,
                "labels": {"app.kubernetes.io/name": "rfdetr-pipeline"},
            },
            "spec": {
                "schedules": [cron],
                "timezone": timezone,
                "concurrencyPolicy": "Forbid",
                "startingDeadlineSeconds": 3600,
                "successfulJobsHistoryLimit": 3,
                "failedJobsHistoryLimit": 3,
                "workflowSpec": {
                    "workflowTemplateRef": {"name": name},
                    "arguments": {"parameters": parameters},
                },
            },
        }
    )


def workflow(*, name: str, namespace: str, arguments: Mapping[str, str], template: str = NAME) -> models.Workflow:
    """One run of the WorkflowTemplate."""
    parameters = [{"name": key, "value": value} for key, value in arguments.items()]
    return models.Workflow.model_validate(
        {
            "apiVersion": "argoproj.io/v1alpha1",
            "kind": "Workflow",
            "metadata": {
                "name": name,
                "namespace": namespace,
                "labels": {"app.kubernetes.io/name": "rfdetr-pipeline"},
            },
            "spec": {"workflowTemplateRef": {"name": template}, "arguments": {"parameters": parameters}},
        }
    )


def as_document(resource: Any) -> dict[str, Any]:
    """A resource as Kubernetes reads it."""
    document: dict[str, Any] = resource.model_dump(mode="json", by_alias=True, exclude_none=True)
    return document


def as_yaml(*resources_: Any) -> str:
    """Resources as a file for `kubectl apply` or `argo`; the same bytes every time."""
    documents = [as_document(resource) for resource in resources_]
    head = "# RF-DETR retraining for Argo Workflows, by rfdetr-pipeline argo compile.\n"
    return head + dump_documents(*documents)


def _parameters(profile: Profile) -> list[dict[str, Any]]:
    """The inputs of the KFP pipeline that are not the profile's."""
    described = {
        "root": ("Where everything lies, an S3 prefix such as s3://bucket/detector.", profile.inputs.root),
        "config": ("The run's YAML, an s3:// URI.", profile.inputs.config),
        "overrides": ('A JSON object merged over the YAML, such as {"train": {"epochs": 50}}.', "{}"),
        "run_id": ("Name of the run; empty for the workflow's uid. The same id continues a run.", ""),
    }
    return [
        {"name": name, "description": text, **({} if value is None else {"value": value})}
        for name, (text, value) in described.items()
    ]


def _dag() -> dict[str, Any]:
    tasks = [{"name": stage.target, "template": stage.target} for stage in DAG]
    for before, task in itertools.pairwise(tasks):
        task["depends"] = before["name"]
    return {"name": "retrain", "dag": {"tasks": tasks}}


def _stage(profile: Profile, stage: StageFacts, image: str) -> dict[str, Any]:
    """The template of one container."""
    wanted = profile.task(stage.name)
    pod_volumes, mounts = volumes(profile, wanted)
    awaits = bool(profile.trainjob) and stage.name in ("train", "notify")  # they ask the Kubernetes API
    gpu_type = profile.gpu.type if profile.gpu is not None else None
    template: dict[str, Any] = {
        "name": stage.target,
        "serviceAccountName": account(stage),
        "automountServiceAccountToken": awaits,
        "metadata": {
            "labels": {"app.kubernetes.io/component": stage.target, **wanted.labels},
            **({"annotations": dict(wanted.annotations)} if wanted.annotations else {}),
        },
        "container": {
            "image": image,
            "command": ["python", "-m", f"components.{stage.name}.stage"],
            "args": _arguments(profile, stage),
            "env": _environment(profile, stage, image),
            "resources": resources(wanted, gpu_type),
            "securityContext": CONTAINER_SECURITY,
            "volumeMounts": mounts,
        },
        "volumes": pod_volumes,
        "activeDeadlineSeconds": str(wanted.timeout_seconds),
        "retryStrategy": _retry(wanted),
        **placement(wanted),
    }
    if wanted.gpus:
        template["priorityClassName"] = PRIORITY
    if stage.name == "train":
        template["podSpecPatch"] = f'{{"terminationGracePeriodSeconds": {GRACE_SECONDS}}}'
    return template


def _arguments(profile: Profile, stage: StageFacts) -> list[str]:
    arguments = ["--run-uri", RUN_URI]
    resolving = ["--config", "{{workflow.parameters.config}}", "--overrides", "{{workflow.parameters.overrides}}"]
    if stage.name == "validate_dataset":
        gpus = profile.stage("train").gpus
        return [*arguments, *resolving, *(["--gpu-count", str(gpus)] if gpus else [])]
    if stage == NOTIFY:
        return [*arguments, *resolving, "--state", "{{workflow.status}}"]
    return arguments


def _environment(profile: Profile, stage: StageFacts, image: str) -> list[dict[str, Any]]:
    plain = {
        "RFDETR_ATTEMPT": "{{workflow.uid}}",
        **profile.environment(stage.name, image),
        **trainjob_environment(profile, stage, image),
    }
    rows: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in sorted(plain.items())]
    for row in secret_environment(profile, stage.name):
        entry = {"name": row["secret"], "key": row["entry"], "optional": row["optional"] or None}
        rows.append({"name": row["name"], "valueFrom": {"secretKeyRef": entry}})
    return rows


def _retry(wanted: StageProfile) -> dict[str, Any]:
    codes = ", ".join(map(str, RETRIED))
    retry = wanted.retry
    return {
        "limit": str(retry.limit),
        "retryPolicy": "Always",
        "expression": f"lastRetry.status == 'Error' || asInt(lastRetry.exitCode) in [{codes}]",
        "backoff": {
            "duration": str(retry.wait_seconds),
            "factor": str(round(retry.factor)),
            "cap": str(retry.longest_wait_seconds),
        },
    }
