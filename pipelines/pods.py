"""Profiles as parts of a pod in Kubernetes' own words: for Argo's templates and for the pods of a TrainJob."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from components.stages import CONTAINERS, StageFacts
from components.train.trainjob import AWAITED, SETTINGS, NodeSettings
from pipelines.platform import CA_FOLDER, CACHES, SCRATCH, SHM, Profile, StageProfile, Toleration, quantity_bytes
from rfdetr_core.config import RunConfig
from rfdetr_core.errors import ConfigError

CACHES_SIZE = "2Gi"


def placement(wanted: StageProfile) -> dict[str, Any]:
    """nodeSelector, tolerations and affinity, as far as there are any."""
    required = [_term(row.match) for row in wanted.affinity if row.weight is None]
    preferred = [
        {"weight": row.weight, "preference": _term(row.match)} for row in wanted.affinity if row.weight is not None
    ]
    affinity: dict[str, Any] = {}
    if required:
        affinity["requiredDuringSchedulingIgnoredDuringExecution"] = {"nodeSelectorTerms": required}
    if preferred:
        affinity["preferredDuringSchedulingIgnoredDuringExecution"] = preferred
    parts = {
        "nodeSelector": dict(wanted.node_selector),
        "tolerations": [_toleration(row) for row in wanted.tolerations],
        "affinity": {"nodeAffinity": affinity} if affinity else None,
    }
    return {name: value for name, value in parts.items() if value}


def _term(match: Any) -> dict[str, Any]:
    rows = [{"key": r.key, "operator": r.operator, **({"values": list(r.values)} if r.values else {})} for r in match]
    return {"matchExpressions": rows}


def _toleration(row: Toleration) -> dict[str, Any]:
    values = {
        "key": row.key, "operator": row.operator, "value": row.value, "effect": row.effect,
        "tolerationSeconds": row.seconds,
    }  # fmt: skip
    return {name: value for name, value in values.items() if value is not None}


def secret_environment(profile: Profile, name: str) -> list[dict[str, Any]]:
    """The entries of Secrets that a stage gets: environment variable, Secret, entry, and whether it may be absent."""
    return [
        {"name": variable, "secret": row.secret, "entry": entry, "optional": row.optional}
        for row in profile.secrets(name)
        for entry, variable in row.entries.items()
    ]


def resources(wanted: StageProfile, gpu_type: str | None = None) -> dict[str, Any]:
    """Requests and limits, which are equal."""
    values = {"cpu": wanted.cpu, "memory": wanted.memory, "ephemeral-storage": disk(wanted)}
    if wanted.gpus and gpu_type is not None:
        values[gpu_type] = str(wanted.gpus)
    return {"requests": values, "limits": dict(values)}


def disk(wanted: StageProfile) -> str:
    """Of the node's disk: the scratch volume, and room for caches and logs."""
    return f"{-(-quantity_bytes(wanted.scratch) // 2**30) + 4}Gi"


def pod_security(profile: Profile) -> dict[str, Any]:
    """Of a pod: what Pod Security "restricted" asks for, and that volumes are its own."""
    user, group = profile.security.run_as_user, profile.security.run_as_group
    return {
        "runAsNonRoot": True,
        "runAsUser": user,
        "runAsGroup": group,
        "fsGroup": group,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


CONTAINER_SECURITY: dict[str, Any] = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
"""Of a container: the rest of "restricted", and a root filesystem that nobody writes."""


def volumes(profile: Profile, wanted: StageProfile) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All that a stage may write, and certificates: volumes of the pod, and where the container sees them."""
    found: list[tuple[dict[str, Any], str]] = [
        ({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": wanted.shm}}, SHM),
        ({"name": "scratch", "emptyDir": {"sizeLimit": wanted.scratch}}, SCRATCH),
        ({"name": "caches", "emptyDir": {"sizeLimit": CACHES_SIZE}}, CACHES),
    ]
    mounts = [{"name": volume["name"], "mountPath": path} for volume, path in found]
    if profile.s3.ca_secret is not None:
        found.append(({"name": "ca", "secret": {"secretName": profile.s3.ca_secret}}, CA_FOLDER))
        mounts.append({"name": "ca", "mountPath": CA_FOLDER, "readOnly": True})
    return [volume for volume, _ in found], mounts


def trainjob_environment(profile: Profile, stage: StageFacts, image: str) -> dict[str, str]:
    """What the stages around a TrainJob must know: train how to make it, the first one and notify that there is one."""
    if profile.trainjob is None or stage.name not in ("validate_dataset", "train", "notify"):
        return {}
    if stage.name != "train":
        return {AWAITED: "true"}
    settings = json.dumps(asdict(node_settings(profile, image)), sort_keys=True)
    return {SETTINGS: settings, AWAITED: "true"}


def node_settings(profile: Profile, image: str) -> NodeSettings:
    """What each node of a TrainJob gets; `image` is that of train.

    Args:
        profile: one with a section trainjob.
    """
    assert profile.trainjob is not None
    wanted = profile.stage("train")
    pod = placement(wanted)
    if profile.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in profile.image_pull_secrets]
    pod["securityContext"] = pod_security(profile)
    if profile.s3.ca_secret is not None:
        pod["volumes"] = [{"name": "ca", "secret": {"secretName": profile.s3.ca_secret}}]
        mount = {"name": "ca", "mountPath": CA_FOLDER, "readOnly": True}
        pod["containers"] = [{"name": "node", "volumeMounts": [mount]}]
    return NodeSettings(
        image=image,
        cpu=wanted.cpu,
        memory=wanted.memory,
        shm=wanted.shm,
        scratch=wanted.scratch,
        disk=disk(wanted),
        gpus=wanted.gpus,
        gpu_type=profile.gpu.type if profile.gpu is not None and wanted.gpus else "",
        runtime=profile.trainjob.runtime,
        deadline_seconds=wanted.timeout_seconds,
        environment=profile.environment("train", image),
        secrets=secret_environment(profile, "train"),
        labels={"app.kubernetes.io/component": CONTAINERS["train"].target, **wanted.labels},
        annotations=dict(wanted.annotations),
        pod=pod,
    )


def refuse_nodes_without_trainjob(config: RunConfig, profile: Profile) -> None:
    """Refuse a training on several nodes where the profile has one.

    Raises:
        ConfigError: as the name says.
    """
    if config.train.num_nodes > 1 and profile.trainjob is None:
        raise ConfigError(
            f"train.num_nodes: {config.train.num_nodes}, and the profile {profile.name} trains on one node",
            hint="use the profile multi-node, or one with a section trainjob",
        )
