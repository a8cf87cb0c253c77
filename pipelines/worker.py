"""Runs the DAG with kfp.local in a process of its own: `python -m pipelines.worker '<json>'`.

A process of its own, because kfp.local waits for its children uninterruptibly, leaks temporary folders and
deletes its workspace: the parent (local.py) ends the whole process group and removes the scratch folder.
"""

from __future__ import annotations

import json
import signal
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def main() -> int:
    """Run; 0 if every task succeeded. Which one failed, and why, stands in the run's status files."""
    request = json.loads(sys.argv[1])
    # kfp wonders about images whose name does not say "python"; ours are.
    warnings.filterwarnings("ignore", message="You may be attemping to run a task", category=RuntimeWarning)
    from kfp import local

    from pipelines.retrain import pipeline

    runner = _containers(request["containers"]) if request["containers"] else local.SubprocessRunner(use_venv=False)
    local.init(
        runner,
        pipeline_root=request["pipeline_root"],
        workspace_root=request["workspace_root"],
        raise_on_error=True,
    )
    try:
        pipeline()(**request["arguments"])
    except RuntimeError as error:
        # Raised for a failed task; anything else is a defect and keeps its traceback.
        print(f"kfp: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def _containers(settings: Mapping[str, Any]) -> Any:
    """kfp's runner, with our way of running a container in the place of its own."""
    from kfp import local
    from kfp.local import docker_task_handler

    from pipelines.containers.runner import ContainerRunner

    runner = ContainerRunner(settings, Path(settings["exits"]))
    signal.signal(signal.SIGTERM, runner.handle)
    docker_task_handler.run_docker_container = runner
    return local.DockerRunner()


if __name__ == "__main__":
    sys.exit(main())
