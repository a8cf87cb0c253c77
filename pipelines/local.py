"""Runs the DAG on this machine: kfp.local in a process group of its own, over a real S3 server or any store.

Traps of kfp.local that are guarded here: it deletes its workspace (we give it a scratch folder of ours), leaks
temporary folders (they lie in that scratch folder, removed at the end), takes an s3:// pipeline root for a folder
name (it always gets a local one), loses exit codes (they are read from the run's status files), and does not end
its children when it is told to end (the whole process group is).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from components.runtime import RUN_ID
from components.stages import CONTAINERS, DAG
from pipelines.containers.engine import Containers, container_engine, container_exits, stage_settings
from pipelines.s3_server import LocalS3Server
from rfdetr_core.errors import ConfigError, RFDETRError
from rfdetr_core.storage import Location, location

RUNS = Path("runs")
BUCKET = "rfdetr"
KILLED = 137
GRACE_SECONDS = 60.0  # a stage that is told to stop may finish its optimizer step and store a checkpoint


@dataclass(frozen=True)
class StageOutcome:
    """One row of what a run did, read from its status file."""

    stage: str
    state: str
    seconds: float | None
    exit_code: int | None
    error: str
    result: str  # where it lies, for people: a local path where there is one


@dataclass(frozen=True)
class RunOutcome:
    """How a local run ended."""

    run_uri: str
    folder: Path | None  # the run as a local folder
    exit_code: int
    stages: tuple[StageOutcome, ...]
    seconds: float


def new_run_id() -> str:
    """Sorted by time, and unlike any other."""
    return f"run-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def run_locally(
    config: str,
    overrides: Mapping[str, Any],
    *,
    run_id: str,
    root: str | None = None,
    runs: Path = RUNS,
    verbose: bool = False,
    containers: Containers | None = None,
) -> RunOutcome:
    """Run the whole DAG; returns when it has ended, whichever way.

    Args:
        root: the store, an s3:// prefix or a folder; by default an S3 server is started over `runs`/s3.
        runs: everything this leaves on the machine lies below this folder.
        verbose: print kfp's own words too; they are in runs/kfp/<run-id>/kfp.log in any case.
        containers: run every stage in its own image, this way; by default stages are processes.

    Raises:
        ConfigError: a run id that is none, or a store that containers do not reach.
        UserError: no container engine, or no image of a stage.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after all that was started has ended.
    """
    if not RUN_ID.fullmatch(run_id):
        raise ConfigError(f"--run-id: {run_id!r} is not allowed", hint="a-z, 0-9 and -, at most 63, such as nightly-7")
    runs.mkdir(parents=True, exist_ok=True)
    if containers and root is not None and location(root).local_path is not None:
        raise ConfigError(
            f"--root: {root} is a folder, which containers do not share", hint="give an s3:// prefix, or no --root"
        )
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(container_engine()) if containers else None
        images = engine.images() if engine else {}
        base, environment, folder = stack.enter_context(_store(root, runs))
        run_uri = f"{base}/runs/{run_id}"
        attempt, begun = secrets.token_hex(8), datetime.now(UTC)
        environment = {
            **os.environ,
            **environment,
            "RFDETR_ATTEMPT": attempt,
            "RFDETR_CACHE": str((runs / "cache").absolute()),
        }
        request: dict[str, Any] = {
            "arguments": {"root": base, "config": config, "overrides": dict(overrides), "run_id": run_id},
            "containers": None,
        }
        workplace = runs / "kfp" / run_id
        exits = workplace / f"containers-{attempt}.jsonl"
        if engine and containers:
            stack.callback(engine.remove, attempt)  # what a worker that was killed could not
            environment |= engine.environment
            settings = stage_settings(containers, images, environment, attempt)
            request["containers"] = {**settings, "exits": str(exits.absolute())}
        code = _run_worker(request, environment, workplace, verbose=verbose)
        with _environment(environment):
            left = folder / run_id if folder else None
            stages = _outcomes(location(run_uri), left, attempt, begun, container_exits(exits))
    failed = [stage for stage in stages if stage.exit_code not in (0, None)]
    exit_code = failed[0].exit_code if failed else code and RFDETRError.exit_code
    return RunOutcome(
        run_uri, folder / run_id if folder else None, int(exit_code or 0), stages, time.monotonic() - started
    )


@contextlib.contextmanager
def _store(root: str | None, runs: Path) -> Iterator[tuple[str, dict[str, str], Path | None]]:
    """The root URI, the environment that reaches it, and the local folder of its runs if there is one."""
    if root is not None:
        store = location(root)
        path = store.local_path
        yield store.uri if path is None else str(path), {}, path / "runs" if path else None
        return
    with LocalS3Server(runs / "s3", bucket=BUCKET) as environment:
        yield f"s3://{BUCKET}", environment, (runs / "s3" / BUCKET / "runs")


def _run_worker(request: dict[str, Any], environment: dict[str, str], workplace: Path, *, verbose: bool) -> int:
    """Run pipelines.worker in a process group of its own; end the whole group on Ctrl-C and SIGTERM."""
    workplace.mkdir(parents=True, exist_ok=True)
    pipeline_root = workplace
    if request["containers"]:
        # Stages write here as another user; nobody else on this machine can pass the folder above.
        workplace.chmod(0o700)
        pipeline_root = workplace / "artifacts"
        pipeline_root.mkdir(exist_ok=True)
        pipeline_root.chmod(0o777)
    with tempfile.TemporaryDirectory(prefix="rfdetr-kfp-", ignore_cleanup_errors=True) as scratch:
        workspace = Path(scratch) / "workspace"
        workspace.mkdir()
        request = {**request, "pipeline_root": str(pipeline_root.absolute()), "workspace_root": str(workspace)}
        worker = subprocess.Popen(
            [sys.executable, "-m", "pipelines.worker", json.dumps(request)],
            env={**environment, "TMPDIR": scratch, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        previous = signal.signal(signal.SIGTERM, _interrupt)
        try:
            assert worker.stdout is not None
            with (workplace / "kfp.log").open("w") as log:
                for line in worker.stdout:
                    log.write(line)
                    if verbose or _is_for_people(line):
                        print(line.removeprefix("    "), end="", flush=True)  # noqa: T201
            return worker.wait()
        except KeyboardInterrupt:
            print("stopping: waiting for the running stage to end ...", file=sys.stderr)  # noqa: T201
            raise
        finally:
            _end_group(worker)
            signal.signal(signal.SIGTERM, previous)


def _is_for_people(line: str) -> bool:
    """A line that a stage logged; kfp's own words between them are in kfp.log."""
    return re.match(rf"\s*\d\d:\d\d:\d\d ({'|'.join(CONTAINERS)}) [A-Z]+ ", line) is not None


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _end_group(worker: subprocess.Popen[str]) -> None:
    """End what is left of the worker's process group: SIGTERM, some time, SIGKILL. Nothing, if it has ended."""
    for signum, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(worker.pid, signum)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            worker.poll()  # reaps it: a zombie still counts as a member of its group
            try:
                os.killpg(worker.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """os.environ with these values, for a while: our own storage client reads it too."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _outcomes(
    run: Location, folder: Path | None, attempt: str, begun: datetime, exits: Mapping[str, Mapping[str, Any]]
) -> tuple[StageOutcome, ...]:
    """What each stage of this attempt left; a stage that this attempt did not reach is "not started".

    A stage that was killed could not say so: it is "running", since this attempt began.

    Args:
        exits: how containers ended, of stages that ran in one.
    """
    rows = []
    for stage, name in ((facts.name, facts.folder) for facts in DAG):
        place = run / "status" / f"{stage}.json"
        status = place.read_json() if place.exists() else {}
        ended = exits.get(stage, {})
        result = str(folder / name if folder else f"{run.uri}/{name}")
        code = ended.get("exit_code") or None
        killed = status.get("state") == "running" and status["started"] >= begun.isoformat(timespec="seconds")
        if killed:
            reason = "out of memory" if ended.get("out_of_memory") else "it could not say why, perhaps out of memory"
            text = f"killed: {reason} (the same command with this --run-id continues)"
            rows.append(StageOutcome(stage, "killed", None, KILLED, text, result))
        elif status.get("attempt") == attempt and (code is None or status.get("exit_code") != 0):
            error = status.get("error") or {}
            text = error.get("message", "") + (f" ({error['hint']})" if error.get("hint") else "")
            row = (status["state"], status.get("seconds"), status.get("exit_code"), text, result)
            rows.append(StageOutcome(stage, *row))
        elif code is not None:
            when = "after the stage was done" if status.get("attempt") == attempt else "and left no status"
            text = ended.get("error") or f"its container ended with exit code {code} {when}"
            rows.append(StageOutcome(stage, "failed", None, code, text, ""))
        else:
            rows.append(StageOutcome(stage, "not started", None, None, "", ""))
    return tuple(rows)
