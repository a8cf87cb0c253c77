"""Brings the Argo resources into a cluster and starts a run: all that can be known to be wrong is said first."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import kubernetes
import urllib3

from components.train.trainjob import name_of
from pipelines.argo import NAME, as_document, workflow
from rfdetr_core.errors import ConfigError, RFDETRError, TransientError, UserError

GROUP, VERSION = "argoproj.io", "v1alpha1"
TIMEOUT = (5, 30)  # seconds to connect, to answer
RIGHTS_HINT = "bind the Role rfdetr-argo-submit of manifests/argo to your account"

Json = dict[str, Any]


class ArgoCluster:
    """Argo's resources in one namespace, with the rights of whoever the kubeconfig names.

    Raises:
        ConfigError: no kubeconfig, or no such context in it.
    """

    def __init__(self, *, context: str | None = None, namespace: str | None = None) -> None:
        configuration = kubernetes.client.Configuration()
        file = os.environ.get("KUBECONFIG") or None  # the library reads it once, when it is imported
        try:
            kubernetes.config.load_kube_config(config_file=file, context=context, client_configuration=configuration)
            _, active = kubernetes.config.list_kube_config_contexts(config_file=file)
        except kubernetes.config.ConfigException as error:
            raise ConfigError(
                f"no cluster: {' '.join(str(error).split())}",
                hint="point KUBECONFIG to the cluster's file, and give --context if it holds several",
            ) from error
        configuration.retries = 0
        self.server = configuration.host
        self.namespace = namespace or active["context"].get("namespace") or "default"
        client = kubernetes.client.ApiClient(configuration)
        self._core = kubernetes.client.CoreV1Api(client)
        self._custom = kubernetes.client.CustomObjectsApi(client)
        self._rights = kubernetes.client.AuthorizationV1Api(client)

    def check(self, *, kinds: Collection[str], accounts: Collection[str], secrets: Collection[str]) -> list[str]:
        """Whether all is there for a run; what could not be looked at, in words.

        Args:
            kinds: plurals of Argo's kinds that will be created or replaced.
            accounts: service accounts that the pods use.
            secrets: that they read.

        Raises:
            UserError: a right, the namespace, an account or a Secret is missing.
            TransientError: the API server cannot be reached.
        """
        for kind in sorted(kinds):
            for verb in ("create", "get", "update") if kind != "workflows" else ("create", "get"):
                if not self._may(verb, kind):
                    raise UserError(f"you may not {verb} {kind} in namespace {self.namespace}", hint=RIGHTS_HINT)
        unseen = []
        there = self._look(lambda: self._core.read_namespace(self.namespace, _request_timeout=TIMEOUT))
        if there is None:
            raise UserError(f"namespace {self.namespace} does not exist", hint="kubectl apply -k manifests/base")
        listed = self._look(
            lambda: self._core.list_namespaced_service_account(self.namespace, _request_timeout=TIMEOUT)
        )
        if isinstance(listed, _Forbidden):
            unseen.append("service accounts")
        else:
            missing = sorted(set(accounts) - {account.metadata.name for account in listed.items})
            if missing:
                raise UserError(
                    f"namespace {self.namespace} lacks the service accounts {', '.join(missing)}",
                    hint="kubectl apply -k manifests/argo",
                )
        for name in sorted(secrets):
            found = self._look(
                partial(self._core.read_namespaced_secret, name, self.namespace, _request_timeout=TIMEOUT)
            )
            if found is None:
                raise UserError(
                    f"namespace {self.namespace} lacks the Secret {name} that the profile names",
                    hint="kubectl create secret generic (docs/installation.md)",
                )
            if isinstance(found, _Forbidden):
                unseen.append(f"the Secret {name}")
        return unseen

    def apply(self, kind: str, resource: Any) -> str:
        """Create a resource, or replace it where it differs; "created", "replaced" or "unchanged".

        The server is asked beforehand whether it would take it.
        """
        body = as_document(resource)
        name = body["metadata"]["name"]
        found = self.read(kind, name)
        if found is None:
            self._create(kind, body, dry_run=True)
            self._create(kind, body)
            return "created"
        if found["spec"] == body["spec"]:
            return "unchanged"
        body["metadata"]["resourceVersion"] = found["metadata"]["resourceVersion"]
        self._asked(
            f"replace {kind}/{name}",
            lambda: self._custom.replace_namespaced_custom_object(
                GROUP, VERSION, self.namespace, kind, name, body, _request_timeout=TIMEOUT
            ),
        )
        return "replaced"

    def start(self, run_uri: str, arguments: Mapping[str, str], *, template: str = NAME) -> tuple[str, str]:
        """Start a run, unless one of this URI is under way or has succeeded: its workflow, and what became of it.

        The workflow's name is made of the run's URI: the same command twice starts one. After one that failed, the
        next continues it.
        """
        for number in range(1, 1000):
            name = name_of(run_uri) + (f"-{number}" if number > 1 else "")
            body = as_document(workflow(name=name, namespace=self.namespace, arguments=arguments, template=template))
            found = self.read("workflows", name)
            if found is None:
                self._create("workflows", body)
                return name, "started"
            phase = found.get("status", {}).get("phase") or "Pending"
            if phase not in ("Failed", "Error"):
                return name, "has succeeded before" if phase == "Succeeded" else f"is under way ({phase})"
        raise UserError(f"{run_uri}: a thousand workflows have failed", hint="choose another run id")

    def read(self, kind: str, name: str) -> Json | None:
        """A resource of Argo's; None if there is none."""
        found = self._look(
            lambda: self._custom.get_namespaced_custom_object(
                GROUP, VERSION, self.namespace, kind, name, _request_timeout=TIMEOUT
            )
        )
        if isinstance(found, _Forbidden):
            raise UserError(f"you may not get {kind} in namespace {self.namespace}", hint=RIGHTS_HINT)
        return None if found is None else dict(found)

    def _create(self, kind: str, body: Json, *, dry_run: bool = False) -> None:
        more = {"dry_run": "All"} if dry_run else {}
        self._asked(
            f"create {kind}/{body['metadata']['name']}",
            lambda: self._custom.create_namespaced_custom_object(
                GROUP, VERSION, self.namespace, kind, body, _request_timeout=TIMEOUT, **more
            ),
        )

    def _may(self, verb: str, kind: str) -> bool:
        attributes = {"namespace": self.namespace, "verb": verb, "group": GROUP, "resource": kind}
        review = {"spec": {"resourceAttributes": attributes}}
        answer = self._asked(
            "ask for rights",
            lambda: self._rights.create_self_subject_access_review(review, _request_timeout=TIMEOUT),
        )
        return bool(answer.status.allowed)

    def _look(self, call: Callable[[], Any]) -> Any:
        """The answer; None if there is no such object, a `_Forbidden` if it may not be looked at."""
        with self._errors("read"):
            try:
                return call()
            except kubernetes.client.ApiException as error:
                if error.status == 404:
                    return None
                if error.status == 403:
                    return _Forbidden()
                raise

    def _asked(self, what: str, call: Callable[[], Any]) -> Any:
        with self._errors(what):
            return call()

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except kubernetes.client.ApiException as error:
            raise self._refused(what, error) from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise TransientError(
                f"the Kubernetes API at {self.server} cannot be reached: {' '.join(str(error).split())[:200]}",
                hint="is the cluster up, and the kubeconfig of this one?",
            ) from error

    def _refused(self, what: str, error: kubernetes.client.ApiException) -> RFDETRError:
        said = " ".join(str(error.body or error.reason).split())[:300]
        text = f"{what} in namespace {self.namespace}: {error.status} {said}"
        if error.status == 429 or (error.status or 0) >= 500:
            return TransientError(text)
        hints = {
            401: "log in to the cluster again",
            403: RIGHTS_HINT,
            404: "is Argo Workflows installed in this cluster?",
            409: "someone else changes it at the same time: try again",
        }
        return UserError(text, hint=hints.get(error.status or 0, "the cluster takes no such resource"))


class _Forbidden:
    """What may not be looked at."""
