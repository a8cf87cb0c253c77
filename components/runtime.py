"""What all stages have in common: arguments, "already done", status, log, publishing, exit codes (DESIGN section 4).

A stage is a row of facts (`Stage`) and a body that takes a `StageContext`; everything else happens here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from rfdetr_core import __version__, hardware
from rfdetr_core.config import (
    ModelConfig,
    RunConfig,
    dump_yaml,
    load_run_config,
    merge,
    parse_overrides,
    section_digest,
)
from rfdetr_core.errors import ConfigError, ExitError, RFDETRError, Terminated, UserError
from rfdetr_core.publication import fetch, manifest_digest, publish, read_manifest, seal, unpublish
from rfdetr_core.revision import code_revision, installed_versions
from rfdetr_core.storage import FileDigest, Location, location

RUN_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
INTERRUPTED = 130  # Ctrl-C, as shells number it

log = logging.getLogger("stage")


@dataclass(frozen=True)
class Stage:
    """The facts of a stage.

    `reads`: dotted sections of the configuration that its result depends on; `after`: folders of the run whose
    publications it reads. Both make up its `inputs` digest.
    """

    name: str
    folder: str
    summary: str
    reads: tuple[str, ...]
    after: tuple[str, ...] = ()
    resolves_config: bool = False


@dataclass
class StageContext:
    """What a body works with."""

    stage: Stage
    config: RunConfig
    root: Location
    run: Location
    work: Path  # local scratch folder, gone afterwards
    output: Path  # local folder that becomes <run>/<folder>/
    inputs: str
    attempt: str
    stop: StopFlag
    facts: dict[str, Any] = field(default_factory=dict)  # goes into the status file
    uploaded: dict[str, FileDigest] = field(default_factory=dict)  # files the body put into `target()` itself
    published_elsewhere: bool = False  # another process publishes, or has published, what this stage stands for

    def target(self) -> Location:
        """Where the stage's result is published."""
        return self.run / self.stage.folder

    def read_result(self, folder: str, name: str) -> Any:
        """A JSON file of an earlier stage, verified against its manifest."""
        local = fetch(self.run / folder, self.work / "in" / folder, names=[name])
        return json.loads((local / name).read_bytes())

    def fetch_file(self, folder: str, name: str) -> Path:
        """A file of an earlier stage as a local path, verified against its manifest."""
        return fetch(self.run / folder, self.work / "in" / folder, names=[name]) / name

    def detector(self, classes: int) -> ModelConfig:
        """The architecture for a dataset of so many classes."""
        model = self.config.model.for_dataset(classes)
        if model.num_classes != classes:
            log.warning(
                "model.num_classes is %d, the dataset has %d: the head keeps the spare ones", model.num_classes, classes
            )
        return model

    def prepared_dataset(self) -> Path:
        """The prepared dataset as a local folder; downloaded once per machine where a cache folder is given."""
        place = str(self.read_result("dataset", "dataset.json")["location"])
        cache = os.environ.get("RFDETR_CACHE")
        return fetch(self.root / place, (Path(cache) if cache else self.work) / place, reuse=True)


class StopFlag:
    """SIGTERM and Ctrl-C: at once as an exception, or noted for a body that ends at a safe point by itself.

    The second Ctrl-C does not wait for that point.
    """

    def __init__(self) -> None:
        self.requested = False
        self.deferred = False
        self.interrupted = False  # by a person at the terminal

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler."""
        again, self.requested = self.interrupted, True
        if signum == signal.SIGINT:
            self.interrupted = True
            if again or not self.deferred:
                raise KeyboardInterrupt
            log.warning("stopping at the next safe point; Ctrl-C once more stops at once")
        elif not self.deferred:
            raise Terminated("stopped by SIGTERM", hint="run the same command again")


def run_stage(
    stage: Stage,
    body: Callable[[StageContext], None],
    argv: Sequence[str] | None = None,
    *,
    outdated: Callable[[StageContext], str | None] = lambda _: None,
) -> int:
    """Run one stage; returns its exit code (DESIGN section 4). Never raises for what a user can mend.

    `outdated` says why a result that is there, of the same inputs, does not stand any longer; None if it does.
    """
    arguments = _parser(stage).parse_args(argv)
    work = Path(tempfile.mkdtemp(prefix=f"rfdetr-{stage.name}-"))
    log_file = work / "stage.log"
    stop = StopFlag()
    before = {number: signal.signal(number, stop.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    status = StageStatus(stage)
    run: Location | None = None
    try:
        with stage_logging(stage, log_file):
            try:
                place, root = locate_run(arguments.run_uri)
                status.begin(place)
                run = place  # the store answers: from here on every outcome is written to it
                state = _execute(stage, body, outdated, arguments, run, root, work, stop, status)
                stop.deferred = True  # how it ended stands; a signal from here on must not keep it from being told
                status.end(0, state)
            except ExitError as error:
                stop.deferred = True
                _report(error, debug=arguments.debug)
                stopped_by_hand = isinstance(error, Terminated) and stop.interrupted
                status.end(INTERRUPTED if stopped_by_hand else error.exit_code, error=error)
            except KeyboardInterrupt:
                stop.deferred = True
                interrupted = Terminated("stopped by Ctrl-C", hint="run the same command again")
                _report(interrupted, debug=False)
                status.end(INTERRUPTED, error=interrupted)
            except Exception as error:  # a defect of ours must still leave a status and a log
                stop.deferred = True
                _report(error, debug=arguments.debug)
                status.end(RFDETRError.exit_code, error=error)
        if run is not None:
            status.write_log(run, log_file)
            status.write(run)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        for number, handler in before.items():
            signal.signal(number, handler)
    return status.exit_code


def _execute(
    stage: Stage,
    body: Callable[[StageContext], None],
    outdated: Callable[[StageContext], str | None],
    arguments: argparse.Namespace,
    run: Location,
    root: Location,
    work: Path,
    stop: StopFlag,
    status: StageStatus,
) -> str:
    """The stage proper; returns the state that its status tells."""
    hardware_threads()
    config = _config(stage, arguments, run)
    target = run / stage.folder
    inputs = _inputs_digest(stage, config, run)
    status.facts["inputs"] = inputs
    if arguments.force:
        unpublish(target)  # first: a reader must not meet a manifest without its files
        target.delete_tree()
    output = work / "out"
    output.mkdir()
    context = StageContext(
        stage=stage,
        config=config,
        root=root,
        run=run,
        work=work,
        output=output,
        inputs=inputs,
        attempt=status.attempt,
        stop=stop,
        facts=status.facts,
    )
    manifest = read_manifest(target)
    if manifest is not None and manifest.inputs == inputs:
        reason = outdated(context)
        if reason is None:
            log.info("already done: %s", target.uri)
            return "already done"
        log.info("once more: %s", reason)
    _refuse_known_failure(status.previous, inputs, status.attempt)
    body(context)
    if context.published_elsewhere:
        return "succeeded"
    if context.uploaded:
        seal(target, inputs=inputs, extra=_made_by(), known={**target.upload_tree(output), **context.uploaded})
    else:
        publish(output, target, inputs=inputs, extra=_made_by())
    log.info("published %s", target.uri)
    return "succeeded"


def hardware_threads() -> None:
    """Numeric libraries read these when they load: as many threads as the cgroup has cores, and little spinning.

    Idle threads that sleep at once halve the speed of small steps (17 instead of 35 images/s of the smallest variant
    on two cores); threads that spin for long take the cores from whatever else runs. A short spin costs 5 %.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(hardware.cpu_count()))
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")


def _parser(stage: Stage) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m components.{stage.name}.stage", description=stage.summary)
    parser.add_argument("--run-uri", required=True, help="<root>/runs/<run-id>: a folder or s3://bucket/prefix/runs/id")
    parser.add_argument("--config", default="", help="YAML of the run, a path or an s3:// URI; read by the first stage")
    parser.add_argument("--overrides", default="", help="JSON object merged over the YAML; read by the first stage")
    parser.add_argument("--gpu-count", default="", help="GPUs of a pod that trains, for train.devices; likewise")
    parser.add_argument("--force", action="store_true", help="run again although the result is there")
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error")
    return parser


def locate_run(run_uri: str) -> tuple[Location, Location]:
    """The run, and the root it belongs to."""
    base, _, run_id = run_uri.rstrip("/").rpartition("/")
    root_uri, _, runs = base.rpartition("/")
    if runs != "runs" or not root_uri or not RUN_ID.fullmatch(run_id):
        raise ConfigError(
            f"--run-uri: {run_uri!r} is not <root>/runs/<run-id>",
            hint="for example s3://bucket/detector/runs/2026-11-22; a run id has a-z, 0-9 and -, at most 63",
        )
    root = location(root_uri)
    return root / "runs" / run_id, root


def _config(stage: Stage, arguments: argparse.Namespace, run: Location) -> RunConfig:
    if not stage.resolves_config:
        if arguments.config or arguments.overrides:
            log.warning("--config and --overrides are read by the first stage only: using %s/config.yaml", run.uri)
        return load_run_config((run / "config.yaml").uri)
    if not arguments.config:
        raise ConfigError("--config is missing", hint="give the run's YAML, a path or an s3:// URI")
    changed = parse_overrides(arguments.overrides or "{}")
    if arguments.gpu_count:  # unless the overrides say otherwise: GPUs that are paid for and idle are what nobody means
        if not arguments.gpu_count.isdecimal():
            raise ConfigError(f"--gpu-count: {arguments.gpu_count!r} is no number", hint="give one, such as 4")
        changed = merge({"train": {"devices": int(arguments.gpu_count)}}, changed)
    config = load_run_config(arguments.config, changed)
    text = dump_yaml(config)
    (run / "config.yaml").write_bytes(text.encode())
    log.info("resolved configuration:\n%s", text.rstrip())
    return config


def _inputs_digest(stage: Stage, config: RunConfig, run: Location) -> str:
    """sha256 over the sections this stage reads and the publications it builds on."""
    upstream = {folder: manifest_digest(run / folder) for folder in stage.after}
    content = {"config": section_digest(config, stage.reads), "upstream": upstream}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _refuse_known_failure(previous: dict[str, Any] | None, inputs: str, attempt: str) -> None:
    """A retry by the orchestrator must not repeat what only a person can mend; a new attempt may."""
    if not previous or not attempt or previous.get("exit_code") != UserError.exit_code:
        return
    if previous.get("inputs") == inputs and previous.get("attempt") == attempt:
        error = previous.get("error") or {}
        raise UserError(
            f"failed before in this attempt: {error.get('message', 'see the log')}",
            hint=str(error.get("hint") or "mend the cause, then start the run again"),
        )


def _made_by() -> dict[str, str]:
    """Recorded with every publication, and never part of what decides whether a stage runs again."""
    return {"code": __version__, "revision": code_revision() or "", "image": os.environ.get("RFDETR_IMAGE", "")}


def _report(error: Exception | ExitError, *, debug: bool) -> None:
    if isinstance(error, ExitError):
        log.error("%s", error)
    else:
        log.error("%s: %s (a defect; please report it with the log file)", type(error).__name__, error)
    detail = "".join(traceback.format_exception(error)).rstrip()
    # The log file has every traceback, the terminal only on demand.
    log.log(logging.ERROR if debug else logging.DEBUG, "%s", detail)


@contextmanager
def stage_logging(stage: Stage, path: Path) -> Iterator[None]:
    """Our INFO and others' warnings to the terminal and to the log file, which has tracebacks as well."""
    logging.captureWarnings(True)
    root = logging.getLogger()
    formatter = logging.Formatter(f"%(asctime)s {stage.name} %(levelname)s %(message)s", "%H:%M:%S")
    console, file = logging.StreamHandler(sys.stdout), logging.FileHandler(path)
    console.setLevel(logging.INFO)
    for handler in (console, file):
        handler.setFormatter(formatter)
        root.addHandler(handler)
    logging.getLogger("rfdetr_core").setLevel(logging.INFO)
    logging.getLogger("stage").setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for handler in (console, file):
            root.removeHandler(handler)
            handler.close()


class StageStatus:
    """status/<stage>.json: always written, also on failure."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.attempt = os.environ.get("RFDETR_ATTEMPT", "")
        self._started = datetime.now(UTC)
        self.exit_code = RFDETRError.exit_code
        self.previous: dict[str, Any] | None = None
        self.facts: dict[str, Any] = {"attempt": self.attempt}
        self._outcome: dict[str, Any] = {"state": "running"}

    def begin(self, run: Location) -> None:
        """Remember how the last attempt ended, and say that this one is under way."""
        place = self._place(run)
        self.previous = place.read_json() if place.exists() else None
        place.write_json(self._content())

    def end(self, exit_code: int, state: str = "", *, error: Exception | ExitError | None = None) -> None:
        """Set the outcome; `write` stores it."""
        self.exit_code = exit_code
        stopped = "interrupted" if exit_code == INTERRUPTED else "preempted"
        ended = stopped if isinstance(error, Terminated) else "failed"
        self._outcome = {"state": state or ended, "exit_code": exit_code}
        self._outcome["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
        self._outcome["seconds"] = round((datetime.now(UTC) - self._started).total_seconds(), 3)
        if error is not None:
            message, hint = str(error), "a defect of this program: report it with the log file"
            if isinstance(error, ExitError):
                message, hint = error.message, error.hint
            self._outcome["error"] = {"class": type(error).__name__, "message": message, "hint": hint}

    def write(self, run: Location) -> None:
        """Store it; a store that is away must not hide why the stage ended."""
        try:
            self._place(run).write_json(self._content())
        except RFDETRError as error:
            print(f"{self._stage.name}: status could not be written: {error}", file=sys.stderr)  # noqa: T201

    def write_log(self, run: Location, path: Path) -> None:
        """Store the log beside it."""
        try:
            (run / "logs" / f"{self._stage.name}.log").upload_file(path)
        except RFDETRError as error:
            print(f"{self._stage.name}: log could not be stored: {error}", file=sys.stderr)  # noqa: T201

    def _place(self, run: Location) -> Location:
        return run / "status" / f"{self._stage.name}.json"

    def _content(self) -> dict[str, Any]:
        return {
            "stage": self._stage.name,
            "started": self._started.isoformat(timespec="seconds"),
            "versions": {"rfdetr_core": __version__, "python": sys.version.split()[0], **installed_versions()},
            "hardware": hardware.describe(),
            **_made_by(),
            **self.facts,
            **self._outcome,
        }
