"""Uploads checkpoint files while training goes on."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from rfdetr_core.errors import TransientError
from rfdetr_core.storage import FileDigest, Location

log = logging.getLogger("stage.train")


class Uploader:
    """One background thread; of several versions of a file waiting, only the newest is sent.

    A file is hard-linked when it is handed over, so that training may replace it at once. A store that is away
    does not stop training: the next checkpoint is a new chance, and leaving the context sends what is left and
    raises if that fails.
    """

    def __init__(self, target: Location) -> None:
        self._target = target
        self.uploaded: dict[str, FileDigest] = {}  # name -> what the store has of it
        self._waiting: dict[str, Path] = {}
        self._wake = threading.Condition()
        self._closing = False
        self._staging: tempfile.TemporaryDirectory[str] | None = None
        self._thread = threading.Thread(target=self._work, name="checkpoint-upload", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        try:
            for name in list(self._waiting):
                self._send(name, self._waiting.pop(name))
        finally:
            if self._staging is not None:
                self._staging.cleanup()

    def upload(self, path: Path) -> None:
        """Send this file, under its name, soon."""
        if self._staging is None:
            # Beside the checkpoints' folder: a hard link cannot leave its file system.
            self._staging = tempfile.TemporaryDirectory(dir=path.parent.parent, prefix="upload-")
        link = Path(self._staging.name) / f"{path.name}.{os.urandom(4).hex()}"
        os.link(path, link)
        with self._wake:
            replaced = self._waiting.pop(path.name, None)
            self._waiting[path.name] = link
            self._wake.notify()
        if replaced is not None:
            replaced.unlink()

    def _work(self) -> None:
        while True:
            with self._wake:
                while not self._waiting and not self._closing:
                    self._wake.wait()
                if self._closing:
                    return
                name = next(iter(self._waiting))
                link = self._waiting.pop(name)
            try:
                self._send(name, link)
            except TransientError as error:
                log.warning("checkpoint %s could not be uploaded, training goes on: %s", name, error)

    def _send(self, name: str, link: Path) -> None:
        try:
            self.uploaded[name] = (self._target / name).upload_file(link)
        finally:
            link.unlink()
