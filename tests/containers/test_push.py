"""make push to a real registry's protocol, on the loopback interface: digests are those of what arrived."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from components.images import image, pinned_images
from pipelines.containers.engine import Engine
from pipelines.containers.push import push_images
from rfdetr_core.errors import TransientError, UserError

pytestmark = [pytest.mark.containers, pytest.mark.timeout(300)]


class Registry(BaseHTTPRequestHandler):
    """As much of a registry as a push needs. Blobs are counted, not kept."""

    protocol_version = "HTTP/1.1"
    refusing = False
    blobs: set[str]
    manifests: dict[str, bytes]

    def do_HEAD(self) -> None:
        known = self.path.rpartition("/")[2] in self.blobs
        self._answer(200 if known else 404)

    def do_GET(self) -> None:
        self._answer(401 if self.refusing else 200)

    def do_POST(self) -> None:
        self._body()
        self._answer(403 if self.refusing else 202, Location=f"{self.path.partition('?')[0].rstrip('/')}/1")

    def do_PATCH(self) -> None:
        digest = hashlib.sha256(self._body()).hexdigest()
        self._answer(202, Location=f"{self.path}?got=sha256:{digest}")

    def do_PUT(self) -> None:
        body = self._body()
        if "/manifests/" in self.path:
            digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
            self.manifests[self.path] = body
            self._answer(201, **{"Docker-Content-Digest": digest})
            return
        address = self.path.replace("%3A", ":")
        [claimed], [got] = (re.findall(rf"[?&]{name}=(sha256:[0-9a-f]+)", address) for name in ("digest", "got"))
        assert got == claimed
        self.blobs.add(claimed)
        self._answer(201)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, code: int, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def registry() -> Iterator[tuple[str, type[Registry]]]:
    handler = type("Handler", (Registry,), {"blobs": set(), "manifests": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}/team", handler
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_digest_is_that_of_the_manifest(
    engine: Engine, registry: tuple[str, type[Registry]], tmp_path: Path
) -> None:
    if engine.tool.kind == "docker":
        pytest.skip("docker's daemon wants more of a registry than this one has; podman does not")
    name, handler = registry
    said: list[str] = []
    push_images(engine.tool, name, path=tmp_path / "digests.json", stages=("promote",), say=said.append)
    repository, _, tag = image("promote").rpartition(":")
    manifest = handler.manifests[f"/v2/team/{repository}/manifests/{tag}"]
    digest = f"sha256:{hashlib.sha256(manifest).hexdigest()}"
    pinned = json.loads((tmp_path / "digests.json").read_text())
    assert pinned == {"promote": f"{name}/{repository}@{digest}"}
    assert said[0] == f"pushed {pinned['promote']}"
    described = json.loads(manifest)
    assert {part["digest"] for part in [described["config"], *described["layers"]]} <= handler.blobs
    with pytest.raises(UserError, match="has no digest of validate_dataset"):
        pinned_images(tmp_path / "digests.json")


def test_a_registry_that_refuses(engine: Engine, registry: tuple[str, type[Registry]], tmp_path: Path) -> None:
    name, handler = registry
    handler.refusing = True
    with pytest.raises(UserError, match=rf"^{name} refused: ") as caught:
        push_images(engine.tool, name, path=tmp_path / "digests.json", stages=("promote",))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "digests.json").exists()


def test_a_registry_that_is_not_there(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(TransientError, match=r"^127\.0\.0\.1:9/team could not be reached: "):
        push_images(engine.tool, "127.0.0.1:9/team", path=tmp_path / "digests.json", stages=("promote",))
