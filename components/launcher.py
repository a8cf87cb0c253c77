"""The body of every KFP component: start the stage as a child process, end as it ends, show what it made."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any


def launch(
    stage: str,
    run_uri: str,
    job_id: str,
    *,
    config: str = "",
    overrides: Mapping[str, Any] | None = None,
    gpu_count: str = "",
) -> str:
    """Run `python -m components.<stage>.stage`; returns the run URI if it succeeds, else exits with its code.

    Args:
        run_uri: `<root>/runs/<run-id>`; with nothing after the last slash the KFP job id is the run id, so that
            a retry of the same job continues and a clone of it is a new run.
        config, overrides, gpu_count: for the first stage.
    """
    run_uri = run_uri_of(run_uri, job_id)
    arguments = []
    if config:
        arguments = ["--config", config, "--overrides", json.dumps(dict(overrides or {})), "--gpu-count", gpu_count]
    with _started(stage, run_uri, job_id, arguments) as child:

        def forward(signum: int, frame: FrameType | None) -> None:
            child.send_signal(signum)

        signal.signal(signal.SIGTERM, forward)
        code = child.wait()
    if code != 0:
        sys.exit(code if code > 0 else 128 - code)
    return run_uri


def launch_notify(
    run_uri: str, job_id: str, config: str, overrides: Mapping[str, Any], state: str, error: str, summary_path: str
) -> None:
    """Run notify, and take its summary for the UI; whatever goes wrong is printed and fails nothing."""
    run_uri = run_uri_of(run_uri, job_id)
    arguments = ["--state", state, "--error", error, "--config", config, "--overrides", json.dumps(dict(overrides))]
    with _started("notify", run_uri, job_id, arguments) as child:
        child.wait()
    try:
        copy_file(run_uri, "summary.md", summary_path)
    except Exception as problem:
        print(f"notify: no summary to show: {problem}", file=sys.stderr)  # noqa: T201


def run_uri_of(run_uri: str, job_id: str) -> str:
    """The run URI, where the KFP job id stands for an empty run id."""
    return run_uri + job_id if run_uri.endswith("/") else run_uri


def _started(stage: str, run_uri: str, job_id: str, arguments: list[str]) -> subprocess.Popen[bytes]:
    # On a cluster the job is the attempt: its retries must not repeat what only a person can mend.
    environment = {**os.environ, "RFDETR_ATTEMPT": os.environ.get("RFDETR_ATTEMPT") or job_id}
    command = [sys.executable, "-m", f"components.{stage}.stage", "--run-uri", run_uri, *arguments]
    return subprocess.Popen(command, env=environment)


def read_json(run_uri: str, name: str) -> Any:
    """A JSON file of the run, for the artifacts that the UI shows."""
    from rfdetr_core.storage import location

    return (location(run_uri) / name).read_json()


def copy_file(run_uri: str, name: str, path: str) -> None:
    """A file of the run as the content of an artifact."""
    from pathlib import Path

    from rfdetr_core.storage import location

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    (location(run_uri) / name).download_file(target)
