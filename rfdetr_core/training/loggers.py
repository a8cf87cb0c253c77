"""Training's numbers in TensorBoard, Weights & Biases and MLflow: each optional, none able to stop or delay a training.

The packages come with the extra `loggers` and are imported by `open_loggers` only, each where its field is true. A
tracker that is missing, refuses or does not answer costs one UserWarning and seconds; it is silent afterwards, and
metrics.jsonl holds every row all the same.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import numbers
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Literal, Protocol, Self, TypeVar
from urllib.parse import unquote

from rfdetr_core.config.problems import redact
from rfdetr_core.config.train import TrainConfig
from rfdetr_core.errors import Terminated

__all__ = ["Loggers", "Status", "open_loggers"]

Status = Literal["finished", "failed", "killed"]
T = TypeVar("T")

EVENTS = "tensorboard"
"""The folder of the event files, in the output folder."""
MLFLOW_FILE = "mlflow.db"
"""MLflow's store in the output folder, where MLFLOW_TRACKING_URI names no other."""
EXPERIMENT = "rfdetr"
"""The experiment in MLflow of a training without train.project."""

WANDB_START_SECONDS = 20.0
# A pod that is preempted has 20 s in all. Rows are sent while training runs, so little is left for the end.
WANDB_FINISH_SECONDS = 10.0
MLFLOW_SETTINGS = {
    # Its own defaults are 120 s and 7 retries: a server that is away would cost a quarter of an hour.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it prints the server's password along
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
MLFLOW_LAST_SETTINGS = {**MLFLOW_SETTINGS, "MLFLOW_HTTP_REQUEST_TIMEOUT": "3", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}

PARAMETERS_PER_CALL = 100
PARAMETER_LENGTH = 500
METRICS_PER_CALL = 1000
NAME_LENGTH = 250  # this and the three above: what MLflow servers accept

_SECRET_NAME = re.compile(
    r"(^|[._])(\w*password|\w*secret|token|\w*_token|api_?key|\w*access_?key|credentials?)$", re.I
)

log = logging.getLogger(__name__)


class _Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, status: Status) -> None: ...


class Loggers:
    """The trackers of one training that work; used as a context, it tells them how the training ended."""

    def __init__(self, trackers: Mapping[str, _Tracker]) -> None:
        self._trackers = dict(trackers)

    def log(self, row: Mapping[str, Any]) -> None:
        """One row as in metrics.jsonl: its finite numbers at `row["step"]`; everything else in it is left out."""
        step, values = int(row["step"]), _values(row)
        for field, tracker in list(self._trackers.items()):
            del self._trackers[field]
            with _harmless(field):
                tracker.log(step, values)
                self._trackers[field] = tracker  # who failed is out

    def close(self, status: Status) -> None:
        """Send what is left and say how the training ended; a second call does nothing."""
        while self._trackers:
            field, tracker = self._trackers.popitem()
            with _harmless(field):
                tracker.close(status)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stopped = isinstance(error, Terminated | KeyboardInterrupt)
        self.close("finished" if error is None else "killed" if stopped else "failed")


def open_loggers(
    train: TrainConfig,
    folder: Path,
    *,
    parameters: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    runs: dict[str, str],
) -> Loggers:
    """Open the trackers that `train` asks for (training spec section 8), complete up to the last row of `history`.

    Args:
        folder: the output folder; event files are in its `tensorboard/`, W&B's files in its `wandb/`.
        parameters: the resolved configuration, nested; logged under dotted names, without secrets.
        history: the rows that a resumed training knows. TensorBoard's event file is written anew from them, since the
            folder may be a fresh one; W&B and MLflow get those that they lack.
        runs: the ids of the runs that a resumed training continues, by "wandb" and "mlflow"; those in use are put in.

    Returns:
        The trackers that answered; for each other one there was a UserWarning that names the field and the reason.
    """
    flat = _flatten(parameters)
    makers: dict[str, Callable[[], _Tracker]] = {
        "tensorboard": lambda: _TensorBoard(folder, flat, history),
        "wandb": lambda: _Wandb(train, folder, flat, history, runs),
        "mlflow": lambda: _Mlflow(train, folder, flat, history, runs),
    }
    trackers: dict[str, _Tracker] = {}
    for field, make in makers.items():
        if getattr(train, field):
            with _harmless(field):
                trackers[field] = make()
    return Loggers(trackers)


class _TensorBoard:
    """Event files, one folder per training."""

    def __init__(self, folder: Path, parameters: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
        importlib.import_module("tensorboard")
        # A module of this name is tensorboard's own switch for its stub: it imports TensorFlow, where that is
        # installed, only to write files.
        switch = "tensorboard.compat.notf"
        sys.modules.setdefault(switch, ModuleType(switch))
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter

        for old in (folder / EVENTS).glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = writer(str(folder / EVENTS))
        self._writer.add_text("parameters", "\n".join(f"    {name}: {value}" for name, value in parameters.items()))
        for row in history:
            self.log(int(row["step"]), _values(row))
        self._writer.flush()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a killed process leaves no row behind

    def close(self, status: Status) -> None:
        self._writer.close()


class _Wandb:
    """A run in Weights & Biases; WANDB_MODE, WANDB_ENTITY and the like are read by its package."""

    def __init__(
        self,
        train: TrainConfig,
        folder: Path,
        parameters: Mapping[str, Any],
        history: Sequence[Mapping[str, Any]],
        runs: dict[str, str],
    ) -> None:
        wandb = importlib.import_module("wandb")
        folder.mkdir(parents=True, exist_ok=True)
        known = runs.get("wandb")
        here = known is not None and any((folder / "wandb").glob(f"*run-*-{known}"))
        mode = wandb.setup().settings.mode
        # Asked first, and without a prompt: at a terminal `init` would wait for somebody to type a key.
        if mode not in ("offline", "dryrun", "disabled") and not wandb.login(prompt=False, verify=False):
            raise _UnusableError("W&B is not logged in (set WANDB_API_KEY, or WANDB_MODE=offline)")
        self._run = wandb.init(
            project=train.project,
            name=train.run,
            id=known,
            resume="allow",
            dir=str(folder),
            config=dict(parameters),
            allow_val_change=True,
            settings=wandb.Settings(
                init_timeout=WANDB_START_SECONDS,
                finish_timeout=WANDB_FINISH_SECONDS,
                finish_timeout_raises=True,
                silent=True,
                console="off",  # the console is the progress bar's
                disable_git=True,
                disable_code=True,
            ),
        )
        runs["wandb"] = self._run.id
        # A server knows how far the run is. Without one, the files of the earlier part do, if they are still here.
        offline_steps = int(history[-1]["step"]) + 1 if here and history else 0
        self._next = offline_steps if self._run.offline else int(self._run.starting_step)
        for row in history:
            self.log(int(row["step"]), _values(row))
        if not self._run.offline:
            log.info("W&B run %s", redact(str(self._run.url)))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self._next:
            self._run.log(dict(values), step=step)

    def close(self, status: Status) -> None:
        if status == "killed":
            self._run.mark_preempting()
        self._run.finish(exit_code={"finished": 0, "failed": 1, "killed": 143}[status])


class _Mlflow:
    """A run in MLflow, through its client: the process' own experiment and active run stay as they are."""

    def __init__(
        self,
        train: TrainConfig,
        folder: Path,
        parameters: Mapping[str, Any],
        history: Sequence[Mapping[str, Any]],
        runs: dict[str, str],
    ) -> None:
        with _environment(MLFLOW_SETTINGS):
            self._mlflow = importlib.import_module("mlflow")
            given = os.environ.get("MLFLOW_TRACKING_URI")
            if not given:
                folder.mkdir(parents=True, exist_ok=True)
            own = f"sqlite:///{folder.absolute() / MLFLOW_FILE}"
            self._client = self._mlflow.MlflowClient(tracking_uri=given or own)
            run = self._known(runs.get("mlflow"))
            if run is None:
                # MLflow's default would be a folder beside whatever the working directory is.
                artifacts = None if given else (folder.absolute() / "mlartifacts").as_uri()
                experiment = self._experiment(train.project or EXPERIMENT, artifacts)
                run = self._client.create_run(experiment, run_name=train.run)
            else:
                self._client.update_run(run.info.run_id, status="RUNNING")
            self._id: str = run.info.run_id
            log.info("MLflow run %s (%s) at %s", run.info.run_name, self._id, redact(given or own))
            runs["mlflow"] = self._id
            self._log_parameters(parameters, known=run.data.params)
            points = self._client.get_metric_history(self._id, "epoch") if run.data.metrics else []
        self._logged = {(point.step, point.value) for point in points}
        for row in history:
            self.log(int(row["step"]), _values(row))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        mark = (step, values.get("epoch"))
        if mark in self._logged:  # by the process that was killed before its next checkpoint
            return
        now, metric = int(time.time() * 1000), self._mlflow.entities.Metric
        # The epoch comes last: it marks a row that is there as a whole.
        ordered = sorted(values.items(), key=lambda item: item[0] == "epoch")
        points = [metric(name, value, now, step) for name, value in _mlflow_names(ordered).items()]
        with _environment(MLFLOW_SETTINGS):
            for first in range(0, len(points), METRICS_PER_CALL):
                self._client.log_batch(self._id, metrics=points[first : first + METRICS_PER_CALL])

    def close(self, status: Status) -> None:
        with _environment(MLFLOW_LAST_SETTINGS if status == "killed" else MLFLOW_SETTINGS):
            self._client.set_terminated(self._id, status=status.upper())

    def _known(self, run_id: str | None) -> Any:
        """The run of that id; None if this store does not have it (any more)."""
        if run_id is None:
            return None
        try:
            run = self._client.get_run(run_id)
        except self._mlflow.MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return run if run.info.lifecycle_stage == "active" else None

    def _experiment(self, name: str, artifacts: str | None) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name, artifact_location=artifacts))
            except self._mlflow.MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self._client.get_experiment_by_name(name)  # another training was faster by a moment
        return str(found.experiment_id)

    def _log_parameters(self, parameters: Mapping[str, Any], known: Mapping[str, str]) -> None:
        """Those that the run lacks: MLflow does not change one that is there."""
        texts = {name: str(value) for name, value in _mlflow_names(parameters.items()).items() if name not in known}
        pairs = [self._mlflow.entities.Param(name, _shorten(text)) for name, text in texts.items()]
        for first in range(0, len(pairs), PARAMETERS_PER_CALL):
            self._client.log_batch(self._id, params=pairs[first : first + PARAMETERS_PER_CALL])


class _UnusableError(Exception):
    """A tracker cannot be used as things are; the text is for people, and holds no secret."""


@contextmanager
def _harmless(field: str) -> Iterator[None]:
    """Whatever fails inside becomes one UserWarning; the packages' own warnings are not passed on."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
        return
    except ModuleNotFoundError as error:
        package = (error.name or field).partition(".")[0]
        reason = f'the package {package} is missing (pip install "rfdetr-pipeline[loggers]")'
    except _UnusableError as error:
        reason = str(error)
    except Exception as error:  # whatever a tracker's package raises: it must not end a training
        reason = f"{type(error).__name__}: {_without_secrets(str(error))}".removesuffix(": ")
    warnings.warn(f"train.{field}: {reason}; training goes on without it", UserWarning, stacklevel=4)


def _without_secrets(text: str) -> str:
    """The text in one line of at most 300 characters, without any password, key or token of the environment."""
    secrets = {value for name, value in os.environ.items() if _SECRET_NAME.search(name)}
    for name in ("MLFLOW_TRACKING_URI", "WANDB_BASE_URL"):
        # As in rfdetr_core.config: up to the last @, since a password may hold one as it is.
        password = os.environ.get(name, "").rpartition("@")[0].partition("://")[2].partition(":")[2]
        secrets |= {password, unquote(password)}
    for secret in sorted(secrets - {""}, key=len, reverse=True):
        text = text.replace(secret, "***")
    return _shorten(" ".join(redact(text).split()), 300)


@contextmanager
def _environment(defaults: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for a while, where the user has set none of that name: MLflow has no other knobs."""
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _values(row: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a row but for its step, which is where they are drawn."""
    return {
        name: float(value)
        for name, value in row.items()
        if name != "step" and isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    }


def _flatten(parameters: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names and plain values: a list is JSON, an empty mapping {}; what is named like a secret is left out."""
    flat: dict[str, Any] = {}
    for key, value in parameters.items():
        name = f"{prefix}{key}"
        if _SECRET_NAME.search(name):
            continue
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{name}.")
        elif value is None or isinstance(value, bool | int | float):
            flat[name] = value
        elif isinstance(value, list | tuple | Mapping):
            flat[name] = redact(json.dumps(value, default=str))
        else:
            flat[name] = redact(str(value))
    return flat


def _mlflow_names(pairs: Iterable[tuple[str, T]]) -> dict[str, T]:
    """The same values under names that MLflow accepts; a number is added where two would become one.

    Its names are letters, digits and `_-./: `, and must be what they are as paths too; class names know no such rules.
    """
    named: dict[str, T] = {}
    for name, value in pairs:
        parts = re.sub(r"[^\w\-./ ]", "_", name).split("/")
        legal = "/".join("_" if part in ("", ".", "..") else part for part in parts)[:NAME_LENGTH]
        unique, count = legal, 1
        while unique in named:
            count += 1
            unique = f"{legal[: NAME_LENGTH - 8]} {count}"
        named[unique] = value
    return named


def _shorten(text: str, length: int = PARAMETER_LENGTH) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
