"""The TrainJob of a run that trains on several nodes (Kubeflow Trainer, trainer.kubeflow.org/v1alpha1).

What every node has in common, volumes, security context and what may be restarted, is the TrainingRuntime of
manifests/multi-node; a TrainJob adds what one run asks for.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rfdetr_core.errors import ConfigError

TRAINJOBS = "apis/trainer.kubeflow.org/v1alpha1/trainjobs"
SETTINGS = "RFDETR_TRAINJOB"
"""Environment variable of the train stage: a JSON object, the fields of `NodeSettings`. Set by the profile."""

AWAITED = "RFDETR_TRAINJOBS"
"""Set for every stage that must know that a TrainJob trains: the first one, train and notify."""

RUN_LABEL = "rfdetr/run"
"""Which run a TrainJob belongs to, as `run_key` writes it."""
INPUTS, RUN_URI = "rfdetr/inputs", "rfdetr/run-uri"
"""Annotations: what it trains, as the stage's `inputs`, and for whom."""

CONTAINER = "node"
"""Kubeflow Trainer's name of the container that trains."""
MANAGER = "rfdetr.io/pipeline"


@dataclass(frozen=True)
class NodeSettings:
    """What each node of a training gets: quantities as Kubernetes writes them."""

    image: str
    cpu: str
    memory: str
    shm: str
    scratch: str
    disk: str
    gpus: int = 0
    gpu_type: str = ""
    runtime: str = "rfdetr-torch"
    deadline_seconds: int = 604800
    environment: dict[str, str] = field(default_factory=dict)
    secrets: list[dict[str, Any]] = field(default_factory=list)  # name, secret, entry of it, optional
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    pod: dict[str, Any] = field(default_factory=dict)  # part of a pod's spec: where it may run, who pulls its image

    @classmethod
    def from_environment(cls) -> NodeSettings | None:
        """The profile's, or None where this stage trains by itself.

        Raises:
            ConfigError: not what a profile writes.
        """
        text = os.environ.get(SETTINGS)
        if not text:
            return None
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{SETTINGS}: {error}", hint="compile the pipeline again with this version") from error


def run_key(run_uri: str) -> str:
    """A run in 16 characters that a label may have: another root is another run, whatever its id."""
    return hashlib.sha256(run_uri.rstrip("/").encode()).hexdigest()[:16]


def name_of(run_uri: str) -> str:
    """The TrainJob's name: the same for the same run, so that a second try finds the first one's job.

    At most 40 characters: Kubernetes appends to it for what the job owns, 63 in all.
    """
    run_id = run_uri.rstrip("/").rpartition("/")[2]
    return f"rfdetr-{run_id[:23].rstrip('-')}-{run_key(run_uri)[:8]}"


def train_job(
    settings: NodeSettings, *, run_uri: str, nodes: int, devices: int | str, inputs: str, attempt: str
) -> dict[str, Any]:
    """The object to create.

    Args:
        nodes, devices: `train.num_nodes` and `train.devices`; a count of devices is also how many GPUs a node gets.
        inputs, attempt: of the stage.
    """
    resources = {"cpu": settings.cpu, "memory": settings.memory, "ephemeral-storage": settings.disk}
    if settings.gpu_type:
        resources[settings.gpu_type] = str(devices if isinstance(devices, int) else settings.gpus)
    environment = {**settings.environment, "RFDETR_IMAGE": settings.image, "RFDETR_ATTEMPT": attempt}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {
            "name": name_of(run_uri),
            "labels": {"app.kubernetes.io/name": "rfdetr-pipeline", RUN_LABEL: run_key(run_uri)},
            "annotations": {INPUTS: inputs, RUN_URI: run_uri},
        },
        "spec": {
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": settings.runtime},
            "activeDeadlineSeconds": settings.deadline_seconds,
            "trainer": {
                "numNodes": nodes,
                "image": settings.image,
                "command": ["python", "-m", "components.train.node"],
                "args": ["--run-uri", run_uri],
                "env": [*_plain(environment), *map(_from_secret, settings.secrets)],
                "resourcesPerNode": {"requests": resources, "limits": resources},
            },
            "runtimePatches": [_patch(settings, run_uri)],
        },
    }


def _plain(values: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in sorted(values.items())]


def _from_secret(row: Mapping[str, Any]) -> dict[str, Any]:
    entry = {"name": row["secret"], "key": row["entry"], **({"optional": True} if row.get("optional") else {})}
    return {"name": row["name"], "valueFrom": {"secretKeyRef": entry}}


def _patch(settings: NodeSettings, run_uri: str) -> dict[str, Any]:
    """What the runtime cannot know: where nodes may be, and the sizes of volumes that it names."""
    pod = {
        **settings.pod,
        "volumes": [
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shm}},
            {"name": "scratch", "emptyDir": {"sizeLimit": settings.scratch}},
            *settings.pod.get("volumes", ()),
        ],
    }
    metadata = {"labels": {**settings.labels, RUN_LABEL: run_key(run_uri)}, "annotations": settings.annotations}
    template = {"metadata": metadata, "spec": pod}
    jobs = [{"name": CONTAINER, "template": {"spec": {"template": template}}}]
    return {"manager": MANAGER, "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": jobs}}}}
