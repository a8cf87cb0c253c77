"""The KFP API as we use it: one client with timeouts and retries, and every failure as one line for people.

What kfp.Client leaves open and is settled here: it waits for an answer without end, retries no 5xx, reads one page of
a list, and answers with stack traces of three libraries.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipelines.cluster_checks import load_cluster_config
from rfdetr_core.errors import ConfigError, RFDETRError, TransientError, UserError

TIMEOUT_SECONDS = (10, 60)  # to connect, to answer
WAITS = (1.0, 3.0, 9.0)
PAGE_SIZE = 100
HOST_VARIABLE = "KF_PIPELINES_ENDPOINT"  # kfp's own
TOKEN_VARIABLE, COOKIE_VARIABLE, CA_VARIABLE = "RFDETR_KFP_TOKEN", "RFDETR_KFP_COOKIE", "RFDETR_KFP_CA"
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
_FORWARD = "kubectl -n kubeflow port-forward svc/ml-pipeline-ui 8080:80, then --host http://localhost:8080"


@dataclass(frozen=True)
class Connection:
    """How to reach an API server; secrets come from the environment and are never shown."""

    host: str | None = None
    namespace: str | None = None
    sleep: Callable[[float], None] = field(default=time.sleep, compare=False)


class KfpApi:
    """A connection that has answered once.

    Raises:
        UserError: nobody says where it is, or it refuses.
        TransientError: it does not answer.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._connect()
        with self.errors("reach the API"):
            health = self.client._healthz_api.healthz_service_get_healthz()
        self.multi_user = bool(getattr(health, "multi_user", False))
        if self.multi_user and not connection.namespace:
            raise ConfigError(
                f"{self.host}: this KFP is shared by several namespaces, and none is named", hint="give --namespace"
            )

    def _connect(self) -> None:
        self.client = _client(self._connection)
        configuration = self.client._existing_config
        self.host = str(configuration.host)
        self.link = self.client._get_url_prefix().rstrip("/")
        self.pipelines, self.runs = self.client._pipelines_api, self.client._run_api
        self.schedules, self.experiments = self.client._recurring_run_api, self.client._experiment_api
        rest = self.runs.api_client.rest_client
        rest.pool_manager.connection_pool_kw["retries"] = 0  # urllib3's own would come on top of ours
        send = rest.request

        def request(method: str, url: str, **options: Any) -> Any:
            options["_request_timeout"] = options.get("_request_timeout") or TIMEOUT_SECONDS
            return self._send(send, method, url, options)

        rest.request = request

    @property
    def namespace(self) -> str | None:
        """What the API is told: a KFP of one namespace wants none."""
        return self._connection.namespace if self.multi_user else None

    @property
    def pods_namespace(self) -> str:
        """Where the pods of runs are."""
        return self._connection.namespace or "kubeflow"

    def _send(self, send: Callable[..., Any], method: str, url: str, options: dict[str, Any]) -> Any:
        """Again where the answer is transient, and again with fresh credentials after a 401. A POST is sent once:
        who creates something looks whether it is there before it tries again."""
        from kfp_server_api.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        for wait in (*WAITS, None) if method in ("GET", "DELETE") else (None,):
            try:
                return _json_only(send(method, url, **options))
            except (ApiException, HTTPError) as error:
                again = not isinstance(error, ApiException) or error.status in _TRANSIENT
                if wait is None or not again:
                    raise
                self._connection.sleep(wait)
        raise AssertionError("unreachable")

    def reconnect(self) -> None:
        """With the credentials as they are now: tokens expire while one waits for hours."""
        self._connect()

    @contextlib.contextmanager
    def errors(self, what: str) -> Iterator[None]:
        """Everything that may go wrong in the block, as one line: `cannot {what}: …`."""
        from kfp_server_api.exceptions import ApiException, OpenApiException
        from urllib3.exceptions import HTTPError

        try:
            with contextlib.redirect_stdout(io.StringIO()):  # kfp prints links of its own
                yield
        except ApiException as error:
            raise self._refusal(error, what) from error
        except (HTTPError, OSError) as error:
            reason = _cause(error)
            raise TransientError(f"cannot {what}: {self.host} does not answer: {reason}", hint=_FORWARD) from error
        except (OpenApiException, ValueError, TypeError, AttributeError, KeyError) as error:
            kind = NotLoggedInError if isinstance(error, WebPageError) else UserError
            raise kind(
                f"cannot {what}: {self.host} answers, but not as KFP's API does: {_line(str(error))}",
                hint=f"is it the right address, and is {COOKIE_VARIABLE} or {TOKEN_VARIABLE} needed to log in?",
            ) from error

    def _refusal(self, error: Any, what: str) -> RFDETRError:
        status, said = error.status, _said(error)
        where = f" in namespace {self._connection.namespace}" if self._connection.namespace else ""
        if status == 401:
            hint = f"put a token into {TOKEN_VARIABLE}, or a session's cookie into {COOKIE_VARIABLE}"
            return NotLoggedInError(f"cannot {what}: {self.host} wants other credentials (401)", hint=hint)
        if status == 403:
            return UserError(
                f"cannot {what}: no permission{where} (403): {said}",
                hint="ask for kubeflow-pipelines-edit",
            )
        if status == 404:
            return NotThereError(
                f"cannot {what}{where}: not found (404): {said}", hint="check the name and --namespace"
            )
        if status == 409:
            return ExistsError(f"cannot {what}: it exists already (409): {said}")
        if status in _TRANSIENT:
            return TransientError(f"cannot {what}: {self.host} answers {status}: {said}", hint="try again")
        return UserError(f"cannot {what}: {self.host} answers {status}: {said}", hint="check what was sent")

    def pages(self, call: Callable[..., Any], key: str, **options: Any) -> Iterator[Any]:
        """Every item of a list, over all its pages."""
        token = ""
        while True:
            page = call(page_token=token, page_size=PAGE_SIZE, **options)
            yield from getattr(page, key) or ()
            token = page.next_page_token or ""
            if not token:
                return

    def named(self, call: Callable[..., Any], key: str, name: str, **options: Any) -> list[Any]:
        """The items of a list that people know by this name."""
        predicate = {"operation": "EQUALS", "key": "display_name", "string_value": name}
        text = json.dumps({"predicates": [predicate]})
        # An older server may not know the filter, and answer with all of them.
        return [item for item in self.pages(call, key, filter=text, **options) if item.display_name == name]


class NotLoggedInError(UserError):
    """401: worth another try with fresh credentials."""


class WebPageError(ValueError):
    """An answer that is no JSON, as a gateway sends one to log in."""


class NotThereError(UserError):
    """404."""


class ExistsError(UserError):
    """409: another one created it first."""


def _client(connection: Connection) -> Any:
    """A kfp.Client; all that it would print or warn of is ours to say."""
    host = connection.host or os.environ.get(HOST_VARIABLE)
    if not host:
        _need_kubeconfig()
    elif not re.match(r"https?://[^/\s]", host):
        raise ConfigError(f"--host: {host!r} is no http(s) address", hint="such as http://localhost:8080")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import kfp

        ca = os.environ.get(CA_VARIABLE)
        if ca and not Path(ca).is_file():
            raise ConfigError(
                f"{CA_VARIABLE}: {ca}: no such file", hint="name the file with your authority's certificate"
            )

        class Client(kfp.Client):  # type: ignore[misc]
            """Asks nothing while it is made: kfp's own tries five times, and prints stack traces."""

            def get_kfp_healthz(self, sleep_duration: int = 5) -> Any:
                return SimpleNamespace(multi_user=False)

        return Client(
            host=host,
            namespace=connection.namespace or "kubeflow",
            existing_token=os.environ.get(TOKEN_VARIABLE) or None,
            cookies=os.environ.get(COOKIE_VARIABLE) or None,
            ssl_ca_cert=ca or None,
        )


def _json_only(answer: Any) -> Any:
    """Refuse a web page: kfp's client would take it for an answer without fields."""
    if answer.data.strip()[:1] not in (b"", b"{", b"["):
        raise WebPageError("it sent a web page")
    return answer


def _need_kubeconfig() -> None:
    """Without an address kfp goes through the cluster's API server, and without a kubeconfig to localhost:80."""
    reason = load_cluster_config()
    if reason:
        raise ConfigError(f"no --host, and no kubeconfig that leads to a cluster: {_line(reason)}", hint=_FORWARD)


def _said(error: Any) -> str:
    """What the server had to say, whichever of its forms it took."""
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else error.body or error.reason or ""
    try:
        told = json.loads(body)
        body = told.get("error_message") or told.get("message") or told.get("error") or body
    except (ValueError, AttributeError):
        pass
    return _line(str(body))


def _line(text: str) -> str:
    return " ".join(text.split())[:300] or "it said nothing"


def _cause(error: BaseException) -> str:
    """The innermost reason, without the addresses of objects."""
    reason = getattr(error, "reason", None)
    if isinstance(reason, BaseException):
        return _cause(reason)
    return _line(re.sub(r"^<[^>]*>: |^[A-Za-z]+\([^)]*\): ", "", str(error)))
