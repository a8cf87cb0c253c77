"""A stand-in for KFP's API server that answers as the real one and records what it was asked.

What is imitated: ids, names that exist already (409), filters and pages of lists, states of runs, 401, 403, 404 and 5xx
with the bodies of the real server, an answer that gets lost after the work is done, and a login page in its place.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

PAGE = 2  # items of a page at most: every list of three has two
PREFIX = "/apis/v2beta1"


@dataclass
class Call:
    """One request."""

    method: str
    path: str
    query: dict[str, str]
    body: Any
    headers: dict[str, str]


@dataclass
class Stub:
    """The server's state; tests set it up and look at it."""

    host: str = ""
    calls: list[Call] = field(default_factory=list)
    kinds: dict[str, list[dict[str, Any]]] = field(
        default_factory=lambda: {
            "experiments": [],
            "pipelines": [],
            "pipeline_versions": [],
            "runs": [],
            "recurring_runs": [],
        }
    )
    states: list[str] = field(default_factory=lambda: ["PENDING"])  # of a run, one look after the other
    troubles: list[tuple[str, int]] = field(default_factory=list)  # (method and path, status): the next ones like it
    lost_answers: list[str] = field(default_factory=list)  # paths whose next POST is done and answered by a 500
    multi_user: bool = False
    login_page: bool = False
    token: str = ""

    def posted(self, what: str) -> list[Any]:
        """Bodies that were posted to a path that ends so."""
        return [call.body for call in self.calls if call.method == "POST" and call.path.endswith(what)]

    def changes(self) -> list[str]:
        """Everything that was not a look."""
        return [f"{call.method} {call.path.removeprefix(PREFIX)}" for call in self.calls if call.method != "GET"]


@contextmanager
def kfp_stub() -> Iterator[Stub]:
    """A running server on the loopback interface."""
    stub = Stub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"stub": stub}))
    stub.host = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    stub: Stub

    def _handle(self) -> None:
        stub, address = self.stub, urlsplit(self.path)
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        json_body = raw and "json" in (self.headers.get("Content-Type") or "")
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        body = json.loads(raw) if json_body else raw
        stub.calls.append(
            Call(self.command, address.path, query, body, {name.lower(): value for name, value in self.headers.items()})
        )
        if stub.login_page:
            return self._answer(200, b"<html><title>Log in</title></html>", "text/html")
        if stub.token and self.headers.get("Authorization") != f"Bearer {stub.token}":
            return self._error(401, "Request header error: there is no user identity header.")
        for position, (what, status) in enumerate(stub.troubles):
            if re.fullmatch(what, f"{self.command} {address.path.removeprefix(PREFIX)}"):
                del stub.troubles[position]
                return self._error(status, {403: "User is not authorized with reason: no verb create"}.get(status, "x"))
        answer = self._act(address.path.removeprefix(PREFIX), query, body, raw)
        if self.command == "POST" and address.path.removeprefix(PREFIX) in stub.lost_answers:
            stub.lost_answers.remove(address.path.removeprefix(PREFIX))
            return self._error(500, "InternalServerError: connection reset by the database")
        if isinstance(answer, int):
            said = {404: "Run not found.", 409: "Already exist error: already exists"}[answer]
            return self._error(answer, said)
        return self._answer(200, json.dumps(answer).encode())

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_DELETE(self) -> None:
        self._handle()

    def _act(self, path: str, query: dict[str, str], body: Any, raw: bytes) -> Any:
        stub = self.stub
        if path == "/healthz":
            return {"multi_user": stub.multi_user}
        if path == "/pipelines/upload_version":
            return self._create(
                "pipeline_versions", {"display_name": query["name"], "pipeline_id": query["pipelineid"]}
            )
        if match := re.fullmatch(r"/pipelines/([^/]+)/versions", path):
            return self._list("pipeline_versions", query, pipeline_id=match[1])
        if match := re.fullmatch(r"/(experiments|pipelines|runs|recurringruns)", path):
            kind = match[1].replace("recurringruns", "recurring_runs")
            if self.command == "POST":
                return self._create(kind, body)
            belongs = {"experiment_id": query["experiment_id"]} if "experiment_id" in query else {}
            return self._list(kind, query, **belongs)
        if match := re.fullmatch(r"/(runs|recurringruns)/([^/:]+)(?::(\w+))?", path):
            return self._one(match[1].replace("recurringruns", "recurring_runs"), match[2], match[3])
        raise AssertionError(f"{self.command} {path} is not imitated")

    def _one(self, kind: str, identity: str, verb: str | None) -> Any:
        rows, key = self.stub.kinds[kind], {"runs": "run_id", "recurring_runs": "recurring_run_id"}[kind]
        row = next((row for row in rows if row[key] == identity), None)
        if row is None:
            return 404
        if self.command == "DELETE":
            rows.remove(row)
        elif verb == "terminate":
            row["state"] = "CANCELING"
        elif verb in ("enable", "disable"):
            row["mode"] = verb.upper()
        elif kind == "runs":
            states = self.stub.states
            row["state"] = states.pop(0) if len(states) > 1 else states[0]
            return row
        return row if self.command == "GET" else {}

    def _create(self, kind: str, body: dict[str, Any]) -> Any:
        rows = self.stub.kinds[kind]
        unique = kind in ("experiments", "pipelines", "pipeline_versions")
        same = [row for row in rows if row["display_name"] == body["display_name"]]
        if unique and any(
            row.get("pipeline_id") == body.get("pipeline_id") or kind != "pipeline_versions" for row in same
        ):
            return 409
        key = {"pipeline_versions": "pipeline_version_id"}.get(kind, f"{kind[:-1]}_id")
        row = {**body, key: f"00000000-0000-4000-8000-{len(self.stub.calls):012d}"}
        if kind == "runs":
            row |= {"state": self.stub.states[0], "created_at": f"2026-01-01T00:00:{len(rows):02d}Z"}
        rows.append(row)
        return row

    def _list(self, kind: str, query: dict[str, str], **belongs: str) -> dict[str, Any]:
        rows = [row for row in self.stub.kinds[kind] if all(row.get(key) == value for key, value in belongs.items())]
        if "filter" in query:
            [predicate] = json.loads(query["filter"])["predicates"]
            assert predicate["operation"] in ("EQUALS", 1)
            wanted = predicate.get("string_value") or predicate["stringValue"]
            rows = [row for row in rows if row[predicate["key"]] == wanted]
        if query.get("sort_by") == "created_at desc":
            rows = rows[::-1]
        begin = int(query.get("page_token") or 0)
        key = kind.replace("recurring_runs", "recurringRuns")
        page: dict[str, Any] = {key: rows[begin : begin + PAGE]} if rows else {}
        if begin + PAGE < len(rows):
            page["next_page_token"] = str(begin + PAGE)
        return page

    def _error(self, status: int, said: str) -> None:
        self._answer(status, json.dumps({"error": said, "code": 13, "message": said, "details": []}).encode())

    def _answer(self, status: int, data: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass
