"""A Kubernetes API server that keeps objects in memory, answers as the real one does, and records what it was asked."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

Json = dict[str, Any]


@dataclass
class KubernetesStub:
    """Objects by (kind in plural, name); `on_create` and `on_read` may change what is there, as controllers do."""

    url: str = ""
    objects: dict[tuple[str, str], Json] = field(default_factory=dict)
    logs: dict[str, list[str]] = field(default_factory=dict)  # pod → lines with time stamps
    calls: list[tuple[str, str]] = field(default_factory=list)  # method, path with query
    bodies: list[Json] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    refuse: Callable[[str, str], int] = lambda method, kind: 0  # a status other than 0 is the answer
    allows: Callable[[str, str], bool] = lambda verb, kind: True
    on_create: Callable[[str, Json], None] = lambda kind, body: None
    on_read: Callable[[str, Json], None] = lambda kind, body: None

    def answer(self, method: str, target: str, body: Json | None) -> tuple[int, Any]:
        """Status and content of one call."""
        parts, query = urlsplit(target), parse_qs(urlsplit(target).query)
        if parts.path.endswith("/selfsubjectaccessreviews"):
            asked = body["spec"]["resourceAttributes"]  # type: ignore[index]
            return 201, {**body, "status": {"allowed": self.allows(asked["verb"], asked["resource"])}}  # type: ignore[dict-item]
        _, _, rest = parts.path.partition("/namespaces/")
        namespace, *more = rest.split("/")
        kind, *names = more or ("namespaces", namespace)
        if status := self.refuse(method, kind):
            return status, {"kind": "Status", "message": f"{kind} is forbidden or the like", "code": status}
        if method == "POST":
            name = body["metadata"].get("name") or body["metadata"]["generateName"] + "x7k2p"  # type: ignore[index]
            if (kind, name) in self.objects:
                return 409, {"kind": "Status", "message": f'{kind} "{name}" already exists', "code": 409}
            if "dryRun" in query:
                return 201, body
            made = {
                **body,
                "metadata": {
                    **body["metadata"],
                    "name": name,
                    "creationTimestamp": "2026-11-26T00:00:00Z",
                    "resourceVersion": "1",
                },
            }  # type: ignore[index,dict-item]
            self.objects[kind, name] = made
            self.on_create(kind, made)
            return 201, made
        if not names:
            wanted = dict(pair.split("=") for pair in query.get("labelSelector", [""])[0].split(",") if pair)
            items = [
                found
                for (of, _), found in self.objects.items()
                if of == kind and wanted.items() <= found["metadata"].get("labels", {}).items()
            ]
            return 200, {"kind": "List", "items": items}
        found = self.objects.get((kind, names[0]))
        if names[1:] == ["log"]:
            if names[0] not in self.logs:
                return 400, {"kind": "Status", "message": "container is waiting to start", "code": 400}
            since = query.get("sinceTime", [""])[0]
            return 200, "".join(line + "\n" for line in self.logs[names[0]] if line[:19] >= since[:19])
        if found is None:
            return 404, {"kind": "Status", "message": f'{kind} "{names[0]}" not found', "code": 404}
        if method == "DELETE":
            self.objects.pop((kind, names[0]))
        elif method == "PUT":
            self.objects[kind, names[0]] = found = body  # type: ignore[assignment]
        else:
            self.on_read(kind, found)
        return 200, found

    def called(self, method: str, kind: str) -> int:
        """How often."""
        return sum(m == method and f"/{kind}" in urlsplit(path).path for m, path in self.calls)


@contextmanager
def kubernetes_stub() -> Iterator[KubernetesStub]:
    """Serve on a free port of the loopback interface while the block lasts."""
    stub = KubernetesStub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            """Say nothing."""

        def _answer(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.loads(content) if content else None
            stub.calls.append((self.command, self.path))
            stub.tokens.add(self.headers.get("Authorization", ""))
            if body is not None:
                stub.bodies.append(body)
            status, answer = stub.answer(self.command, self.path, body)
            data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815 (http.server calls them so)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
