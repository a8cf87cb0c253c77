"""What a profile needs of the cluster, looked at before anything is created there: namespace, account, Secrets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from components.stages import CONTAINERS
from pipelines.platform import Profile
from rfdetr_core.errors import TransientError, UserError


def wanted_secrets(profile: Profile) -> dict[str, set[str]]:
    """Name → entries of every Secret that must be there; none are named of those for pulling images."""
    found: dict[str, set[str]] = {name: set() for name in profile.image_pull_secrets}
    if profile.s3.ca_secret:
        found[profile.s3.ca_secret] = {"ca.crt"}
    for stage in CONTAINERS:
        for secret in profile.secrets(stage):
            if not secret.optional:
                found[secret.secret] = found.get(secret.secret, set()) | set(secret.entries)
    return found


def check_cluster(profile: Profile, namespace: str) -> str:
    """Look; what could not be looked at is said in the text that is returned, empty if all was.

    Raises:
        UserError: something is missing.
        TransientError: the cluster does not answer.
    """
    wanted = wanted_secrets(profile)
    if not wanted and profile.service_account is None:
        return ""
    core = _core_api()
    if core is None:
        return "not checked, for want of a kubeconfig: the profile's Secrets and service account"
    unseen = list(_missing(core, profile, namespace, wanted))
    return f"not checked, for want of permission: {', '.join(unseen)}" if unseen else ""


def _missing(core: Any, profile: Profile, namespace: str, wanted: dict[str, set[str]]) -> Iterator[str]:
    if _read(core.read_namespace, f"namespace {namespace}", namespace) is None:
        yield f"namespace {namespace}"
    account = profile.service_account
    if account is not None:
        what = f"service account {account}"
        if _read(core.read_namespaced_service_account, f"{what} in namespace {namespace}", account, namespace) is None:
            yield what
    for name, entries in sorted(wanted.items()):
        found = _read(core.read_namespaced_secret, f"Secret {name} in namespace {namespace}", name, namespace)
        if found is None:
            yield f"Secret {name}"
            continue
        absent = sorted(entries - set(found.data or {}))
        if absent:
            raise UserError(
                f"Secret {name} in namespace {namespace} has no entry {', '.join(absent)}",
                hint="add it, or name its entries in the profile",
            )


def _read(call: Any, what: str, *arguments: str) -> Any:
    """The object; None without permission to see it."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        return call(*arguments, _request_timeout=(10, 30))
    except ApiException as error:
        if error.status == 404:
            raise UserError(f"{what} does not exist", hint="create it, or change the profile") from None
        if error.status in (401, 403):
            return None
        raise TransientError(f"cannot look for {what}: the cluster answers {error.status}", hint="try again") from error
    except (HTTPError, OSError) as error:
        raise TransientError(
            f"cannot look for {what}: the cluster of the kubeconfig does not answer", hint="check the kubeconfig"
        ) from error


def load_cluster_config() -> str:
    """Set up Kubernetes' client, in a pod or by the kubeconfig; why it cannot be, empty if it is."""
    from kubernetes import config

    try:
        config.load_incluster_config()
        return ""
    except config.ConfigException:
        pass
    try:
        config.load_kube_config(config_file=os.environ.get("KUBECONFIG"))
    except (config.ConfigException, OSError, TypeError, ValueError) as error:
        return " ".join(str(error).split())
    return ""


def _core_api() -> Any:
    from kubernetes import client

    if load_cluster_config():
        return None
    settings = client.Configuration.get_default_copy()
    settings.retries = 1
    return client.CoreV1Api(client.ApiClient(settings))


def pod_log(namespace: str, kfp_run_id: str, stage: str) -> str | None:
    """What the newest pod of a stage has printed so far; None if there is none, or nobody to ask."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    core = _core_api()
    if core is None:
        return None
    selector = f"pipeline/runid={kfp_run_id},app.kubernetes.io/component={stage}"
    try:
        pods = core.list_namespaced_pod(namespace, label_selector=selector, _request_timeout=(10, 30)).items
        if not pods:
            return None
        newest = max(pods, key=lambda pod: pod.metadata.creation_timestamp)
        return str(
            core.read_namespaced_pod_log(newest.metadata.name, namespace, container="main", _request_timeout=(10, 60))
        )
    except ApiException as error:
        if error.status in (400, 404):  # it waits for its container
            return None
        raise UserError(
            f"cannot read the log of {stage} in namespace {namespace}: the cluster answers {error.status}",
            hint="ask for the right to read pods/log",
        ) from error
    except (HTTPError, OSError) as error:
        raise TransientError("the cluster of the kubeconfig does not answer", hint="check the kubeconfig") from error
