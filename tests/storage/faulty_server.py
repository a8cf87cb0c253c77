"""An HTTP server on the loopback interface that answers as it is told: the ways in which a store fails."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[[BaseHTTPRequestHandler], None]


def ok(body: bytes, **headers: str) -> Answer:
    """A whole object."""
    return _send(200, body, len(body), {"ETag": '"etag"', **headers})


def cut_off(body: bytes, size: int) -> Answer:
    """An object of `size` bytes of which only `body` arrives."""
    return _send(200, body, size, {"ETag": '"etag"'})


def error(status: int, code: str) -> Answer:
    """An S3 error."""
    # A store in another region names it, and botocore goes there.
    where = {"x-amz-bucket-region": "eu-west-1"} if status == 301 else {}
    text = f"<Error><Code>{code}</Code><Message>private words of the store</Message></Error>".encode()
    return _send(status, text, len(text), {"Content-Type": "application/xml", **where})


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    """The connection closes without an answer."""
    handler.close_connection = True


def _send(status: int, body: bytes, size: int, headers: dict[str, str]) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(size), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)
        handler.close_connection = len(body) != size

    return answer


@dataclass
class FaultyServer:
    """`answers` are given in turn, the last one for ever; `requests` are what was asked."""

    endpoint: str
    answers: Sequence[Answer] = ()
    requests: list[str] = field(default_factory=list)


@contextmanager
def faulty_server(context: ssl.SSLContext | None = None) -> Iterator[FaultyServer]:
    """Runs until the block ends; with a context it speaks TLS."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with lock:
                number = min(len(state.requests), len(state.answers) - 1)
                state.requests.append(f"{self.command} {self.path}")
            state.answers[number](self)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """A client that goes away is what some tests are about."""

    server = Server(("127.0.0.1", 0), Handler)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    scheme = "https" if context else "http"
    state = FaultyServer(f"{scheme}://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
