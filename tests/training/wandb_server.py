"""A W&B server on the loopback: enough of its protocol for one run, whose rows it keeps; and a reader of its files."""

from __future__ import annotations

import gzip
import json
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KEY = "k" * 40


class WandbServer:
    """Used as a context; `url` is for WANDB_BASE_URL.

    Args:
        last_step: of the rows that the run has already; None: there is no run of that id.
    """

    def __init__(self, *, last_step: int | None = None) -> None:
        self.last_step = last_step
        self.created: dict[str, Any] = {}
        """The variables of the request that made the run: project, displayName, config, ..."""
        self.rows: list[dict[str, Any]] = []
        self.preempted = False
        self.exit_code: int | None = None
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"] or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                if self.path == "/graphql":
                    self._answer({"data": server._query(json.loads(body))})
                else:
                    if self.path.endswith("/file_stream"):
                        server._stream(json.loads(body))
                    self._answer({})

            def do_PUT(self) -> None:
                self.do_POST()

            def do_GET(self) -> None:
                self._answer({})

            def _answer(self, content: dict[str, Any]) -> None:
                data = json.dumps(content).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._open = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.go_away()

    def go_away(self) -> None:
        """From here on connections are refused."""
        if self._open:
            self._open = False
            self._http.shutdown()
            self._http.server_close()

    def _stream(self, content: dict[str, Any]) -> None:
        history = content.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
        self.rows += [
            {k: v for k, v in json.loads(line).items() if k not in ("_timestamp", "_runtime")} for line in history
        ]
        self.preempted = self.preempted or bool(content.get("preempting"))
        self.exit_code = content.get("exitcode", self.exit_code)

    def _query(self, request: dict[str, Any]) -> dict[str, Any]:
        name, variables = str(request.get("operationName")), request.get("variables") or {}
        project = {"id": "p", "name": variables.get("project") or "?", "entity": {"id": "e", "name": "team"}}
        if name == "RunResumeStatus":
            return {"model": {**project, "bucket": None if self.last_step is None else self._known_run()}}
        if name == "UpsertBucket":
            self.created = self.created or variables
            bucket = {
                "id": "b",
                "name": variables["name"],
                "displayName": variables["displayName"] or "made-up-1",
                "config": "{}",
                "project": project,
                "historyLineCount": 0,
            }
            return {"upsertBucket": {"bucket": bucket, "inserted": self.last_step is None}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/upload/{file}"} for file in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {}

    def _known_run(self) -> dict[str, Any]:
        tail = json.dumps({"_step": self.last_step, "_runtime": 3})
        return {
            "id": "b",
            "name": "known",
            "displayName": "r",
            "summaryMetrics": tail,
            "logLineCount": 0,
            "historyLineCount": 2,
            "eventsLineCount": 0,
            "historyTail": json.dumps([tail]),
            "eventsTail": "[]",
            "config": "{}",
            "tags": [],
            "wandbConfig": json.dumps({"t": 1}),
        }


def offline_records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format after seven bytes of its own, in blocks of 32 KiB."""
    data, offset, record = path.read_bytes(), 7, b""
    while offset + 7 <= len(data):
        left = 32768 - offset % 32768
        if left < 7:  # no header fits: padding
            offset += left
            continue
        length, kind = struct.unpack_from("<HB", data, offset + 4)  # after the checksum
        record += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""
