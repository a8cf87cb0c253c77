"""The Kubernetes API as a pod may use it: the few calls of a stage that starts other pods.

Over urllib3, which the storage client brings into every image: the client library would be 30 MB in each, for five
calls. Programs of people (pipelines/) use that library, which knows their kubeconfig.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import urllib3

from rfdetr_core.errors import ConfigError, RFDETRError, TransientError, UserError

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TIMEOUT = urllib3.Timeout(connect=10, read=30)

Json = dict[str, Any]


class AlreadyThere(RFDETRError):  # noqa: N818
    """An object of that name exists."""


class Cluster:
    """The API server, with the rights of one service account in one namespace.

    Every method raises:
        TransientError: the server cannot be reached, is overloaded or failed.
        UserError: it refused: rights, a namespace or kind that is not there, an object that is not legal.

    Args:
        server: such as https://10.0.0.1:443.
        token_file: read anew for every call, since the cluster renews it every hour.
        ca_file: whose certificates the server's are signed with.
    """

    def __init__(self, server: str, namespace: str, *, token_file: Path, ca_file: Path | None = None) -> None:
        self.namespace, self._server, self._token_file = namespace, server, token_file
        self._pool = urllib3.PoolManager(
            ca_certs=str(ca_file) if ca_file else None, timeout=TIMEOUT, retries=False, maxsize=2
        )

    @classmethod
    def of_this_pod(cls, folder: Path = SERVICE_ACCOUNT) -> Cluster:
        """What Kubernetes tells every pod.

        Raises:
            ConfigError: this process is in none, or its service account has no token.
        """
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not host:
            raise ConfigError(
                "no Kubernetes cluster: this process is in no pod", hint="several nodes need one: submit to a cluster"
            )
        try:
            namespace = (folder / "namespace").read_text().strip()
        except OSError as error:
            raise ConfigError(
                f"the pod has no service account token: {folder / 'namespace'}: {error.strerror}",
                hint="let the run's service account mount it (automountServiceAccountToken)",
            ) from error
        host = f"[{host}]" if ":" in host else host
        return cls(f"https://{host}:{port}", namespace, token_file=folder / "token", ca_file=folder / "ca.crt")

    def create(self, path: str, body: Json) -> Json:
        """Create an object of the namespace; `path` is its kind's, such as apis/batch/v1/jobs.

        Raises:
            AlreadyThere: there is one of that name.
        """
        found: Json = json.loads(self._call("POST", path, "", body=body))
        return found

    def read(self, path: str, name: str) -> Json | None:
        """An object; None if there is none."""
        answer = self._call("GET", path, f"/{name}", missing_ok=True)
        return json.loads(answer) if answer else None

    def select(self, path: str, labels: Mapping[str, str]) -> list[Json]:
        """The objects that bear all these labels."""
        selector = ",".join(f"{name}={value}" for name, value in labels.items())
        return list(json.loads(self._call("GET", path, "", query={"labelSelector": selector}))["items"])

    def delete(self, path: str, name: str) -> None:
        """Delete an object and, before it goes, what it owns; no error if it is gone."""
        options = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Foreground"}
        self._call("DELETE", path, f"/{name}", body=options, missing_ok=True)

    def log(self, pod: str, *, container: str, since: str = "") -> list[str]:
        """Lines of a container, each after the time it was written at; none while it has not started.

        Args:
            since: only lines of this second and later (RFC 3339).
        """
        query = {"container": container, "timestamps": "true", **({"sinceTime": since} if since else {})}
        answer = self._call("GET", "api/v1/pods", f"/{pod}/log", query=query, missing_ok=True, waiting_ok=True)
        return answer.decode(errors="replace").splitlines()

    def _call(
        self,
        method: str,
        path: str,
        rest: str,
        *,
        body: Json | None = None,
        query: Mapping[str, str] | None = None,
        missing_ok: bool = False,
        waiting_ok: bool = False,
    ) -> bytes:
        group, _, kind = path.rpartition("/")
        url = f"{self._server}/{group}/namespaces/{self.namespace}/{kind}{rest}"
        what = f"{method} {kind}{rest} in namespace {self.namespace}"
        try:
            headers = {"Authorization": f"Bearer {self._token_file.read_text().strip()}"}
            if body is not None:
                headers["Content-Type"] = "application/json"
            answer = self._pool.request(
                method,
                f"{url}?{urlencode(query)}" if query else url,
                headers=headers,
                body=None if body is None else json.dumps(body),
            )
        except OSError as error:
            raise ConfigError(f"{self._token_file}: {error.strerror}", hint="see the run's service account") from error
        except urllib3.exceptions.HTTPError as error:
            raise TransientError(
                f"Kubernetes API: {what}: {' '.join(str(error).split())}", hint="is there a NetworkPolicy in between?"
            ) from error
        if answer.status < 300:
            return answer.data
        if (answer.status == 404 and missing_ok) or (answer.status == 400 and waiting_ok):
            return b""
        raise _refused(answer.status, what, _message(answer.data))


def _message(content: bytes) -> str:
    """What a Status object says, in one line."""
    try:
        text = str(json.loads(content)["message"])
    except (ValueError, KeyError, TypeError):
        text = content.decode(errors="replace")[:200]
    return " ".join(text.split())


def _refused(status: int, what: str, message: str) -> RFDETRError:
    said = f"Kubernetes API: {what}: {status} {message}"
    if status == 409:
        return AlreadyThere(said)
    if status == 429 or status >= 500:
        return TransientError(said)
    hint = {
        401: "the token of the run's service account is not valid",
        403: "give the run's service account the Role of manifests/ (docs/installation.md), or name another one",
        404: "is what it asks for installed in this cluster? docs/installation.md lists what several nodes need",
        422: "the cluster has another version of that kind, or a policy against it",
    }
    return UserError(said, hint=hint.get(status, "the cluster's administrator knows more"))
