"""Kills promote at every write that it makes, one after the other, and looks at what is left each time.

A program of its own: it forks, which a process with other threads should not.

    python -m tests.components.kill_promote FOLDER
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.promote import stage as promote
from rfdetr_core.publication import fetch
from rfdetr_core.registry import Registry
from rfdetr_core.revision import code_revision, installed_versions
from rfdetr_core.storage import local, location
from tests.components.finished_run import NAME, candidate, finished_run


def main(folder: Path) -> None:
    """Print how many writes there were, how often the old and the new champion were found."""
    code_revision()  # asked for once: every child inherits the answer
    installed_versions()
    before = folder / "before"
    root = location(str(before))
    finished_run(root, "old", folder / "work", score=0.4)
    assert in_child(before, "old", None) == 0
    finished_run(root, "new", folder / "work", score=0.6, champion={"version": "old", **candidate(0.4)})
    left = {"old": 0, "new": 0}
    writes = 0
    while True:
        writes += 1
        store = folder / "store"
        shutil.copytree(before, store)
        ended = in_child(store, "new", writes)
        left[whole_champion(store)] += 1
        assert in_child(store, "new", None) == 0, f"killed at write {writes}, it does not go on"
        assert whole_champion(store) == "new"
        shutil.rmtree(store)
        if ended == 0:
            break
        assert ended == -signal.SIGKILL, ended
    print(writes - 1, left["old"], left["new"])  # noqa: T201


def in_child(store: Path, run_id: str, deadly: int | None) -> int:
    """Promote a run in a child that dies at this write; its exit code, or minus the signal."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if deadly is not None:
            die_at(deadly)
        os._exit(promote.main(["--run-uri", str(store / "runs" / run_id)]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(deadly: int) -> None:
    """Die in the middle of that write: its bytes are there, under a temporary name."""
    whole, count = local.atomic_file, 0

    @contextmanager
    def torn(path: Path, *, durable: bool) -> Iterator[Any]:
        nonlocal count
        count += 1
        dies = count == deadly
        with whole(path, durable=durable) as file:
            yield file
            if dies:
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)

    local.atomic_file = torn  # type: ignore[assignment]


def whole_champion(store: Path) -> str:
    """The champion's version, every file of which is held against its manifest."""
    registry = Registry(location(str(store)), NAME)
    champion = registry.champion()
    assert champion is not None
    place = registry.version(champion.version)
    folder = fetch(place, store, progress=False)
    assert (folder / "model.onnx").read_bytes() == b"onnx of " + champion.version.encode()
    return champion.version


if __name__ == "__main__":
    main(Path(sys.argv[1]))
