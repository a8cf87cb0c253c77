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

RETRY_SECONDS = 10.0

log = logging.getLogger("stage.train")


class Uploader:
    """One background thread; of several versions of a file waiting, only the newest is sent.

    A file is hard-linked when it is handed over, so that training may replace it at once. A store that is away
    does not stop training: the file waits and is tried again. Leaving the context sends what is left, and raises if
    that fails.

    Args:
        target: the folder in the store.
        last: this file is sent only while no other waits: it tells of the others. Where the store is slow, the next
            one is taken only when the one before it has arrived: else it might wait for ever.
        staging: where files wait, on the checkpoints' file system; default: beside the folder of the first one.
    """

    def __init__(self, target: Location, *, last: str, staging: Path | None = None) -> None:
        self._target, self._last, self._beside = target, last, staging
        self.uploaded: dict[str, FileDigest] = {}  # name -> what the store has of it
        self._waiting: dict[str, Path] = {}
        self._wake = threading.Condition()
        self._closing = False
        self._away = False  # the store did not answer
        self._sending = ""  # the name of the file that is on its way
        self._failure: BaseException | None = None
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
            if self._failure is None:
                while self._waiting:
                    self._send(*self._take())
        finally:
            if self._staging is not None:
                self._staging.cleanup()
        if self._failure is not None and error is None:
            raise self._failure

    def upload(self, path: Path) -> None:
        """Send this file, under its name, soon.

        Raises:
            StorageAccessError: an earlier file was refused for good; training on would lose everything.
        """
        if self._failure is not None:
            raise self._failure
        if self._staging is None:
            # Beside the checkpoints' folder: a hard link cannot leave its file system.
            self._staging = tempfile.TemporaryDirectory(dir=self._beside or path.parent.parent, prefix="upload-")
        link = Path(self._staging.name) / f"{path.name}.{os.urandom(4).hex()}"
        os.link(path, link)
        with self._wake:
            if path.name == self._last:
                self._wake.wait_for(lambda: self._away or self._failure is not None or not self._under_way(self._last))
                if self._failure is not None:
                    raise self._failure
            replaced = self._waiting.get(path.name)
            self._waiting[path.name] = link
            self._wake.notify()
        if replaced is not None:
            replaced.unlink()

    def _under_way(self, name: str) -> bool:
        return name in self._waiting or name == self._sending

    def _take(self) -> tuple[str, Path]:
        name = next((n for n in self._waiting if n != self._last), self._last)
        return name, self._waiting.pop(name)

    def _work(self) -> None:
        while True:
            with self._wake:
                while not self._waiting and not self._closing:
                    self._wake.wait()
                if self._closing:
                    return
                name, link = self._take()
                self._sending = name
            try:
                self._send(name, link)
                with self._wake:
                    self._sending, self._away = "", False
                    self._wake.notify_all()
            except TransientError as error:
                log.warning("%s could not be uploaded yet, training goes on: %s", name, error)
                with self._wake:
                    self._sending, self._away = "", True
                    self._wake.notify_all()
                    if name in self._waiting:  # a newer version came meanwhile
                        link.unlink()
                    else:
                        self._waiting[name] = link
                    if not self._closing:
                        self._wake.wait(RETRY_SECONDS)
            except Exception as error:  # raised in the training thread, by the next upload or at the end
                with self._wake:
                    self._failure = error
                    self._wake.notify_all()
                return

    def _send(self, name: str, link: Path) -> None:
        self.uploaded[name] = (self._target / name).upload_file(link)
        link.unlink()
