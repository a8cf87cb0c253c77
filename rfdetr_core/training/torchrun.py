"""Starts the ranks with torchrun's launcher, waits for them, and writes down which of them failed first.

    python -m rfdetr_core.training.torchrun RANKS FOLDER [NODES NODE_RANK ADDRESS PORT RUN]

On several machines (see `nodes`) each runs one of these, with RANKS processes of its own; the first listens at
ADDRESS:PORT for the others, and RUN is the same for all that belong together.

A process of its own: the launcher takes over the signal handlers, which in a stage belong to the stage.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

FAILURES = "failures.json"
"""In FOLDER, if a rank failed: rank, process id and exit code of those that failed by themselves; a signal is negative.

The ranks that are ended because of them are not among them.
"""

LOOPBACK = "127.0.0.1"

MEETING_SECONDS = 1800.0
"""How long a node waits for the others to be there: pods of one job may have to pull the image, one after the other."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run until all ranks have ended; 1 if one of them failed, and then the others are ended within 30 s."""
    count, folder, *others = sys.argv[1:] if argv is None else argv
    end_with_parent()
    common: dict[str, Any] = {
        "nproc_per_node": int(count),
        "max_restarts": 0,
        "logs_specs": DefaultLogsSpecs(log_dir=str(Path(folder) / "torchrun")),
    }
    config = _several_nodes(common, *others) if others else _one_node(common)
    try:
        elastic_launch(config, sys.executable)("-m", "rfdetr_core.training.rank", folder)
    except ChildFailedError as error:
        failures = [{"rank": rank, "pid": f.pid, "exit_code": f.exitcode} for rank, f in error.failures.items()]
        (Path(folder) / FAILURES).write_text(json.dumps(failures))
        return 1
    return 0


def _one_node(common: dict[str, Any]) -> LaunchConfig:
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{LOOPBACK}:0",  # any free port
        local_addr=LOOPBACK,  # a pod's own name need not resolve
        **common,
    )


def _several_nodes(common: dict[str, Any], nodes: str, rank: str, address: str, port: str, run: str) -> LaunchConfig:
    """The static rendezvous: the first node is the first one, not whichever comes first, since it publishes."""
    return LaunchConfig(
        min_nodes=int(nodes),
        max_nodes=int(nodes),
        run_id=run,
        rdzv_backend="static",
        rdzv_endpoint=f"{address}:{port}",
        rdzv_configs={"rank": int(rank), "timeout": int(MEETING_SECONDS)},
        **common,
    )


def end_with_parent() -> None:
    """End this process when the one that started it is gone: then its end of our standard input is closed."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
