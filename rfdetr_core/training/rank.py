"""One of the processes of a training on several devices; see `launch` for what it and its parent say to each other.

python -m rfdetr_core.training.rank FOLDER          started by torchrun
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from rfdetr_core.errors import ExitError, Terminated
from rfdetr_core.training.distributed import joined
from rfdetr_core.training.launch import PUBLISHED, STOP, read_job, write_outcome
from rfdetr_core.training.loop import train
from rfdetr_core.training.state import Publish
from rfdetr_core.training.torchrun import end_with_parent


def main(argv: Sequence[str] | None = None) -> int:
    """Train as this rank; the outcome goes into the folder."""
    folder, rank = Path((sys.argv[1:] if argv is None else argv)[0]), int(os.environ["RANK"])
    os.dup2(1, 2)  # standard error is torchrun's own, see `launch`
    end_with_parent()
    _tell_parent(folder / f"log-{rank}.jsonl", logging.WARNING if rank else logging.INFO)
    try:
        with joined() as world:
            result = train(
                read_job(folder),
                publish=_publisher(folder / PUBLISHED),
                stop_requested=(folder / STOP).exists,
                world=world,
            )
        write_outcome(folder, rank, result=result)
    except Terminated as error:  # all ranks agree on it: no failure, for which torchrun would end the others
        write_outcome(folder, rank, error=_described(error))
    except Exception as error:
        write_outcome(folder, rank, error=_described(error))
        # At once: the libraries' own way out waits for ranks that wait for this one.
        os._exit(1)
    return 0


def _described(error: Exception | ExitError) -> dict[str, str | float]:
    ours = isinstance(error, ExitError)
    return {
        "class": type(error).__name__,
        "message": error.message if isinstance(error, ExitError) else " ".join(str(error).split()),
        "hint": error.hint if isinstance(error, ExitError) else "",
        "traceback": "" if ours else traceback.format_exc(),
        "time": time.time(),
    }


def _publisher(target: Path) -> Publish:
    """Hands files over as links: what is written under the same name later is another file."""
    target.mkdir(exist_ok=True)
    count = 0

    def publish(path: Path) -> None:
        nonlocal count
        count += 1
        part = target / f".{count:06d}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        os.link(path, part / path.name)
        part.rename(target / f"{count:06d}")

    return publish


class _Teller(logging.Handler):
    """Writes records as lines that the parent reads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("a", buffering=1)

    def emit(self, record: logging.LogRecord) -> None:
        """One line, whole."""
        line = {"level": record.levelno, "name": record.name, "message": record.getMessage()}
        self._file.write(json.dumps(line) + "\n")


def _tell_parent(path: Path, level: int) -> None:
    """From now on all that is logged or warned of at `level` and above goes into the file."""
    logging.captureWarnings(True)
    handler = _Teller(path)
    handler.setLevel(level)
    logging.getLogger().addHandler(handler)
    logging.getLogger("rfdetr_core").setLevel(level)


if __name__ == "__main__":
    sys.exit(main())
