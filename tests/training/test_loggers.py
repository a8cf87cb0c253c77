"""TensorBoard, W&B and MLflow through their own packages: what they hold afterwards, and that none ends a training."""

from __future__ import annotations

import base64
import contextlib
import csv
import importlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from rfdetr_core.config.train import TrainConfig
from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.errors import Terminated, TrainingError
from rfdetr_core.training.loggers import Loggers, open_loggers
from rfdetr_core.training.loop import train
from tests.training import tiny
from tests.training.wandb_server import KEY, WandbServer, offline_records

PARAMETERS: dict[str, Any] = {
    "train": {"lr": 2e-4, "epochs": 3, "resume": None, "aug_config": {}, "lr_drop": [1, 2]},
    "dataset": {"uri": "s3://me:hunter2@store/data", "api_key": "hunter3"},
}
FLAT = {"train.lr": 2e-4, "train.epochs": 3, "train.resume": None, "train.aug_config": "{}", "train.lr_drop": "[1, 2]"}
ROWS: list[dict[str, Any]] = [
    {"epoch": 0, "step": 4, "train/loss": 17.25, "note": "text", "flag": True, "val/AP/rare": None},
    {"epoch": 1, "step": 9, "train/loss": 3.0, "val/mAP_50_95": 0.5, "val/AP/a, b": 0.25, "val/AP/none": float("nan")},
    {"epoch": 2, "step": 14, "train/loss": 2.5, "val/mAP_50_95": 0.625, "val/AP/a, b": 0.75},
]
NUMBERS: dict[str, list[tuple[int, float]]] = {
    "epoch": [(4, 0), (9, 1), (14, 2)],
    "train/loss": [(4, 17.25), (9, 3.0), (14, 2.5)],
    "val/mAP_50_95": [(9, 0.5), (14, 0.625)],
    "val/AP/a, b": [(9, 0.25), (14, 0.75)],
}
SECONDS = 60.0
"""Far more than what an absent server costs, 2 or 5 s here, and far less than its package would wait by itself."""


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No tracker of whoever runs the tests is written to, and W&B reads its variables anew."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    home = tmp_path_factory.mktemp("home")
    for name, folder in {
        "HOME": "",
        "NETRC": "netrc",
        "WANDB_CONFIG_DIR": "config",
        "WANDB_CACHE_DIR": "cache",
    }.items():
        monkeypatch.setenv(name, str(home / folder))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield
    if wandb := sys.modules.get("wandb"):
        with contextlib.suppress(ConnectionError):
            wandb.teardown()


@pytest.fixture(scope="session")
def mlflow_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One for all tests: making its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/shared.db"


def config(**values: Any) -> TrainConfig:
    return TrainConfig(**{"tensorboard": False, **values})


def opened(
    folder: Path, train: TrainConfig, *, known: int = 0, runs: dict[str, str] | None = None, **more: Any
) -> Loggers:
    parameters = {**PARAMETERS, **more}
    return open_loggers(train, folder, parameters=parameters, history=ROWS[:known], runs={} if runs is None else runs)


def training(
    folder: Path, train: TrainConfig, *, known: int = 0, to: int = 3, runs: dict[str, str] | None = None
) -> None:
    with opened(folder, train, known=known, runs=runs) as loggers:
        for row in ROWS[known:to]:
            loggers.log(row)


# --- TensorBoard


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


@pytest.mark.parameter("tensorboard")
def test_event_files_hold_the_rows(tmp_path: Path) -> None:
    training(tmp_path, config(tensorboard=True))
    assert events(tmp_path) == NUMBERS
    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]
    (file,) = (tmp_path / "tensorboard").iterdir()
    content = file.read_bytes()
    assert b"train.lr: 0.0002" in content
    assert b"s3://***@store/data" in content and b"hunter" not in content


@pytest.mark.parameter("tensorboard")
def test_a_row_can_be_seen_before_the_training_ends(tmp_path: Path) -> None:
    loggers = opened(tmp_path, config(tensorboard=True))
    loggers.log(ROWS[0])
    assert events(tmp_path)["train/loss"] == [(4, 17.25)]
    loggers.close("finished")


@pytest.mark.parameter("tensorboard", "resume")
@pytest.mark.parametrize("fresh", [False, True])
def test_event_files_of_a_resumed_training_hold_each_step_once(tmp_path: Path, fresh: bool) -> None:
    training(tmp_path / "a", config(tensorboard=True), to=2)  # the second row came after the last checkpoint
    folder = tmp_path / ("b" if fresh else "a")
    training(folder, config(tensorboard=True), known=1)
    assert events(folder) == NUMBERS


def test_nothing_is_written_where_nothing_is_asked_for(tmp_path: Path) -> None:
    runs: dict[str, str] = {}
    training(tmp_path, config(tensorboard=False, wandb=False, mlflow=False, project="p", run="r"), runs=runs)
    assert list(tmp_path.iterdir()) == [] and runs == {}


@pytest.mark.slow
def test_no_package_is_imported_before_it_is_used_and_tensorflow_never(tmp_path: Path) -> None:
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('TensorFlow was imported')\n")
    program = (
        "import sys; from pathlib import Path\n"
        "from rfdetr_core.config.train import TrainConfig\n"
        "from rfdetr_core.training.loggers import open_loggers\n"
        "loaded = {'torch', 'tensorboard', 'wandb', 'mlflow', 'sqlalchemy'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "row = {'epoch': 0, 'step': 4, 'train/loss': 1.0}\n"
        "with open_loggers(TrainConfig(), Path('out'), parameters={}, history=[row], runs={}) as loggers:\n"
        "    loggers.log(row)\n"
        "assert 'tensorboard' in sys.modules and not {'wandb', 'mlflow', 'tensorflow'} & set(sys.modules)\n"
    )
    path = f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")


# --- Weights & Biases


def offline_runs(folder: Path) -> list[tuple[Any, list[dict[str, Any]], int]]:
    """Run record, rows and exit code of each offline run of the folder, oldest first."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # its own process writes the files, and takes a moment longer than `finish`
    found = []
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        run, rows, code = None, [], -1
        for data in offline_records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            match record.WhichOneof("record_type"):
                case "run":
                    run = record.run
                case "history":
                    items = record.history.item
                    row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
                    rows.append({key: row[key] for key in row if key not in ("_timestamp", "_runtime")})
                case "exit":
                    code = record.exit.exit_code
        found.append((run, rows, code))
    return found


def until_the_next_second() -> None:
    """W&B names folders by the second."""
    time.sleep(1.02 - time.time() % 1.0)


def wandb_rows(first: int = 0, last: int = 3) -> list[dict[str, Any]]:
    steps = [row["step"] for row in ROWS[first:last]]
    return [{"_step": s} | {name: v for name, points in NUMBERS.items() for at, v in points if at == s} for s in steps]


@pytest.mark.slow
@pytest.mark.parameter("wandb", "project", "run")
def test_an_offline_run_holds_names_parameters_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    runs: dict[str, str] = {}
    training(tmp_path, config(wandb=True, project="shapes", run="third try"), runs=runs)
    ((run, rows, code),) = offline_runs(tmp_path)
    assert (run.project, run.display_name, run.run_id, code) == ("shapes", "third try", runs["wandb"], 0)
    assert rows == wandb_rows()
    parameters = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert FLAT.items() <= parameters.items()
    assert not any("hunter" in str(value) for value in parameters.values())


@pytest.mark.parameter("project", "run")
def test_wandb_chooses_the_names_that_are_not_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    training(tmp_path, config(wandb=True))
    ((run, _, _),) = offline_runs(tmp_path)
    assert run.display_name == "" and run.project != ""  # the server names it


@pytest.mark.parameter("wandb", "resume")
@pytest.mark.parametrize("fresh", [False, True])
def test_offline_a_resumed_run_logs_what_the_folder_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: bool
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    runs: dict[str, str] = {}
    training(tmp_path / "a", config(wandb=True), to=1, runs=runs)
    first = dict(runs)
    until_the_next_second()
    training(tmp_path / ("b" if fresh else "a"), config(wandb=True), known=1, runs=runs)
    assert runs == first
    parts = offline_runs(tmp_path / ("b" if fresh else "a"))
    assert {run.run_id for run, _, _ in parts} == {runs["wandb"]}
    assert [rows for _, rows, _ in parts] == ([wandb_rows()] if fresh else [wandb_rows(0, 1), wandb_rows(1)])


@pytest.mark.parameter("wandb", "project", "run")
def test_a_server_gets_names_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        training(tmp_path, config(wandb=True, project="shapes", run="third try"))
        assert (server.created["project"], server.created["displayName"]) == ("shapes", "third try")
        assert sorted(server.rows, key=lambda row: row["_step"]) == wandb_rows()
        assert (server.exit_code, server.preempted) == (0, False)


@pytest.mark.parameter("wandb", "resume")
@pytest.mark.parametrize(("last_step", "sent"), [(4, (1, 3)), (9, (2, 3))])
def test_a_server_gets_of_a_resumed_run_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_step: int, sent: tuple[int, int]
) -> None:
    """Two rows are in the checkpoint; the server has one (the other was lost on the way), or both."""
    runs = {"wandb": "known"}
    with WandbServer(last_step=last_step) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        training(tmp_path, config(wandb=True, project="shapes"), known=2, runs=runs)
        assert server.created["name"] == "known" and runs == {"wandb": "known"}
        assert server.rows == wandb_rows(*sent)


@pytest.mark.parameter("wandb", "resume")
def test_a_row_that_the_server_has_is_not_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process before was killed between a row and the checkpoint that knows it."""
    with WandbServer(last_step=9) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        training(tmp_path, config(wandb=True), known=1, runs={"wandb": "known"})
        assert server.rows == wandb_rows(2)


@pytest.mark.parametrize(
    ("error", "code"), [(TrainingError("x"), 1), (Terminated("x"), 143), (KeyboardInterrupt(), 143)]
)
def test_wandb_is_told_how_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        with pytest.raises(type(error)), opened(tmp_path, config(wandb=True)) as loggers:
            loggers.log(ROWS[0])
            raise error
        assert (server.exit_code, server.preempted, server.rows) == (code, code == 143, wandb_rows(0, 1))


@pytest.mark.slow
@pytest.mark.parameter("wandb")
def test_a_wandb_server_that_goes_away_costs_seconds_and_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rfdetr_core.training.loggers.WANDB_FINISH_SECONDS", 2.0)
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        loggers = opened(tmp_path, config(wandb=True))
        server.go_away()
        loggers.log(ROWS[0])
        started = time.monotonic()
        with pytest.warns(UserWarning, match=r"^train\.wandb: TimeoutError: .*; training goes on without it$"):
            loggers.close("killed")
        assert time.monotonic() - started < SECONDS


@pytest.mark.slow
@pytest.mark.parameter("wandb")
def test_wandb_without_a_login_warns_and_asks_nobody(tmp_path: Path) -> None:
    """In a process at a terminal, where its package would ask for a key."""
    program = (
        "import sys; from pathlib import Path\n"
        "from rfdetr_core.config.train import TrainConfig\n"
        "from rfdetr_core.training.loggers import open_loggers\n"
        "assert sys.stdin.isatty() and sys.stderr.isatty()\n"
        "train = TrainConfig(tensorboard=False, wandb=True)\n"
        "with open_loggers(train, Path('out'), parameters={}, history=[], runs={}): pass\n"
    )
    ours, theirs = os.openpty()
    path = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # what a terminal says when its last user has gone
        while data := os.read(ours, 4096):
            said += data
    os.close(ours)
    assert process.wait(timeout=60) == 0
    assert b"train.wandb: W&B is not logged in (set WANDB_API_KEY, or WANDB_MODE=offline)" in said


# --- MLflow


def mlflow_run(uri: str, run_id: str) -> tuple[Any, Any, dict[str, list[tuple[int, float]]]]:
    """Experiment, run, and every point of each metric by step."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    run = client.get_run(run_id)
    points = {
        name: sorted((point.step, point.value) for point in client.get_metric_history(run_id, name))
        for name in run.data.metrics
    }
    return client.get_experiment(run.info.experiment_id), run, points


def mlflow_numbers() -> dict[str, list[tuple[int, float]]]:
    return {name.replace(",", "_"): points for name, points in NUMBERS.items()}


@pytest.mark.slow
@pytest.mark.parameter("mlflow", "project", "run")
def test_without_a_server_mlflow_writes_into_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs: dict[str, str] = {}
    training(tmp_path / "out", config(mlflow=True, project="shapes", run="third try"), runs=runs)
    experiment, run, points = mlflow_run(f"sqlite:///{tmp_path}/out/mlflow.db", runs["mlflow"])
    assert (experiment.name, run.info.run_name, run.info.status) == ("shapes", "third try", "FINISHED")
    assert experiment.artifact_location == (tmp_path / "out" / "mlartifacts").as_uri()
    assert points == mlflow_numbers()
    assert {name: str(value) for name, value in FLAT.items()}.items() <= run.data.params.items()
    assert run.data.params["dataset.uri"] == "s3://***@store/data" and "dataset.api_key" not in run.data.params
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parameter("mlflow", "project", "run")
def test_the_store_of_the_environment_and_default_names(
    tmp_path: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    runs: dict[str, str] = {}
    training(tmp_path / "out", config(mlflow=True), runs=runs)
    experiment, run, points = mlflow_run(mlflow_store, runs["mlflow"])
    assert experiment.name == "rfdetr" and run.info.run_name
    assert points == mlflow_numbers()
    assert not (tmp_path / "out").exists()
    assert [name for name in os.environ if name.startswith("MLFLOW_")] == ["MLFLOW_TRACKING_URI"]


@pytest.mark.slow
@pytest.mark.parameter("mlflow", "resume")
@pytest.mark.parametrize(("logged", "known"), [(1, 1), (2, 1), (1, 2)])
def test_mlflow_continues_the_run_and_has_each_step_once(
    tmp_path: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch, logged: int, known: int
) -> None:
    """As many rows there as in the checkpoint; one more (killed before the next checkpoint); one less (it was away)."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    runs: dict[str, str] = {}
    with pytest.raises(Terminated), opened(tmp_path, config(mlflow=True), runs=runs, budget=1) as loggers:
        for row in ROWS[:logged]:
            loggers.log(row)
        raise Terminated("preempted")
    first = dict(runs)
    assert mlflow_run(mlflow_store, runs["mlflow"])[1].info.status == "KILLED"
    with opened(tmp_path, config(mlflow=True), known=known, runs=runs, budget=2) as loggers:
        for row in ROWS[known:]:
            loggers.log(row)
    _, run, points = mlflow_run(mlflow_store, runs["mlflow"])
    assert runs == first and run.info.status == "FINISHED"
    assert points == mlflow_numbers()
    assert run.data.params["budget"] == "1"  # MLflow changes no parameter


@pytest.mark.slow
@pytest.mark.parameter("mlflow", "resume")
def test_a_store_that_lacks_the_run_gets_a_whole_new_one(
    tmp_path: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    runs = {"mlflow": "0" * 32}
    training(tmp_path, config(mlflow=True), known=2, runs=runs)
    assert runs["mlflow"] != "0" * 32
    assert mlflow_run(mlflow_store, runs["mlflow"])[2] == mlflow_numbers()
    deleted = runs["mlflow"]
    MlflowClient(tracking_uri=mlflow_store).delete_run(deleted)
    training(tmp_path, config(mlflow=True), known=2, runs=runs)
    assert runs["mlflow"] != deleted
    assert mlflow_run(mlflow_store, runs["mlflow"])[2] == mlflow_numbers()


@pytest.mark.slow
def test_mlflow_takes_any_name_any_length_and_any_number_of_parameters(
    tmp_path: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    runs: dict[str, str] = {}
    names = ["a,b", "a;b", "..", "x//y", "Größe, µm", "long" * 100, "long" * 100 + "er"]
    many = {f"p{i:03d}": i for i in range(250)}
    with opened(tmp_path, config(mlflow=True), runs=runs, many=many, long="x" * 700) as loggers:
        row = {"epoch": 0, "step": 0, **{f"val/AP/{name}": i / 8 for i, name in enumerate(names)}}
        loggers.log(row | {f"val/AP/class {i}": i for i in range(1200)})
    _, run, _ = mlflow_run(mlflow_store, runs["mlflow"])
    ours = {name: value for name, value in run.data.metrics.items() if "class" not in name}
    long = "val/AP/" + "long" * 100
    assert ours == {
        "epoch": 0,
        "val/AP/a_b": 0,
        "val/AP/a_b 2": 1 / 8,
        "val/AP/_": 2 / 8,
        "val/AP/x/_/y": 3 / 8,
        "val/AP/Größe_ µm": 4 / 8,
        long[:250]: 5 / 8,
        long[:242] + " 2": 6 / 8,
    }
    assert sum("class" in name for name in run.data.metrics) == 1200
    assert [run.data.params[f"many.p{i:03d}"] for i in range(250)] == [str(i) for i in range(250)]
    assert run.data.params["long"] == "x" * 499 + "…"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "status"), [(TrainingError("x"), "FAILED"), (Terminated("x"), "KILLED"), (KeyboardInterrupt(), "KILLED")]
)
def test_mlflow_is_told_how_it_ended(
    tmp_path: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    runs: dict[str, str] = {}
    with pytest.raises(type(error)), opened(tmp_path, config(mlflow=True), runs=runs):
        assert mlflow_run(mlflow_store, runs["mlflow"])[1].info.status == "RUNNING"
        raise error
    assert mlflow_run(mlflow_store, runs["mlflow"])[1].info.status == status


@pytest.mark.slow
def test_a_tracker_that_fails_midway_warns_once_and_is_silent(
    tmp_path: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    runs: dict[str, str] = {}
    with opened(tmp_path, config(tensorboard=True, mlflow=True), runs=runs) as loggers:
        loggers.log(ROWS[0])
        MlflowClient(tracking_uri=mlflow_store).delete_run(runs["mlflow"])
        with pytest.warns(UserWarning, match=r"^train\.mlflow: MlflowException: .*training goes on") as seen:
            loggers.log(ROWS[1])
        assert len(seen) == 1
        loggers.log(ROWS[2])  # warnings are errors: nothing more is said
    assert events(tmp_path) == NUMBERS


@pytest.mark.slow
@pytest.mark.parameter("mlflow")
def test_a_server_that_is_away_costs_seconds_and_its_password_is_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    importlib.import_module("mlflow")  # seconds as well, and not what is measured

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:hun%40ter@2@127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter5")
    started = time.monotonic()
    with pytest.warns(UserWarning) as seen:
        training(tmp_path, config(mlflow=True))
    assert time.monotonic() - started < SECONDS
    (text,) = [str(warning.message) for warning in seen]
    assert text.startswith("train.mlflow: MlflowException: ") and text.endswith("training goes on without it")
    assert "127.0.0.1" in text and "\n" not in text
    assert not any(secret in text for secret in ("hun%40ter", "hun@ter", "hunter5", "@2@"))


@pytest.mark.slow
def test_two_trainings_may_make_the_experiment_at_the_same_moment(
    tmp_path: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    look = MlflowClient.get_experiment_by_name
    found: list[Any] = []

    def look_before_the_other_one_is_done(client: Any, name: str) -> Any:
        found.append(look(client, name))
        if found == [None]:
            client.create_experiment(name)
        return found[-1]

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", look_before_the_other_one_is_done)
    runs: dict[str, str] = {}
    training(tmp_path, config(mlflow=True, project="at once"), runs=runs)
    assert len(found) == 2 and mlflow_run(mlflow_store, runs["mlflow"])[0].name == "at once"


class MlflowHandler(BaseHTTPRequestHandler):
    """The answers that one run needs; `seen` gets the path, the user and the content of every request."""

    seen: ClassVar[list[tuple[str, str, dict[str, Any]]]] = []

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/api/2.0/mlflow/")
        content = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        user = base64.b64decode(self.headers.get("Authorization", "").removeprefix("Basic ")).decode()
        self.seen.append((path, user, content))
        info = {
            "run_id": "run1",
            "run_uuid": "run1",
            "run_name": "r",
            "experiment_id": "1",
            "lifecycle_stage": "active",
        }
        answers: dict[str, Any] = {
            "experiments/get-by-name": {"experiment": {"experiment_id": "1", "name": "p"}},
            "runs/create": {"run": {"info": info, "data": {}}},
            "runs/get": {"run": {"info": info, "data": {}}},
            "runs/log-batch": {},
            "runs/update": {"run_info": info},
        }
        data = json.dumps(answers.get(path, {})).encode()
        self.send_response(200 if path in answers else 404)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.mark.slow
@pytest.mark.parameter("mlflow")
def test_a_server_gets_the_rows_and_nobody_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setattr(MlflowHandler, "seen", [])
    with ThreadingHTTPServer(("127.0.0.1", 0), MlflowHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:hunter@127.0.0.1:{server.server_port}")
        training(tmp_path, config(mlflow=True), to=1)
        server.shutdown()
    requests = [request for request in MlflowHandler.seen if request[0] in ("runs/log-batch", "runs/update")]
    assert {user for _, user, _ in requests} == {"me:hunter"}
    metrics = [(m["key"], m["step"], m["value"]) for _, _, content in requests for m in content.get("metrics", [])]
    assert metrics == [("train/loss", 4, 17.25), ("epoch", 4, 0.0)]
    assert requests[-1][2]["status"] == "FINISHED"
    told = caplog.text + "".join(capfd.readouterr())
    assert f"MLflow run r (run1) at http://***@127.0.0.1:{server.server_port}" in told
    assert "hunter" not in told


# --- in a training


@pytest.mark.slow
@pytest.mark.parameter("tensorboard", "wandb", "mlflow", "project", "run", "resume")
def test_an_interrupted_training_is_one_run_with_the_numbers_of_its_metrics_file(
    dataset: PreparedDataset, tmp_path: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    monkeypatch.setenv("WANDB_MODE", "offline")
    job = tiny.job(dataset, tmp_path, tensorboard=True, wandb=True, mlflow=True, project="tiny", run=tmp_path.name)

    def rows() -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    with pytest.raises(Terminated):
        train(job, stop_requested=lambda: len(rows()) == 1)
    until_the_next_second()
    train(job)

    written = {
        (name, row["step"]): value
        for row in rows()
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float)
    }
    assert {step for _, step in written} == {4, 9}
    assert {(name, step): value for name, points in events(tmp_path).items() for step, value in points} == (
        pytest.approx(written)
    )

    client = importlib.import_module("mlflow").MlflowClient(tracking_uri=mlflow_store)
    (run,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert (run.info.run_name, run.info.status) == (tmp_path.name, "FINISHED")
    assert run.data.params["train.epochs"] == "2" and run.data.params["model.variant"] == "pico"
    _, _, points = mlflow_run(mlflow_store, run.info.run_id)
    assert {(name, step): value for name, found in points.items() for step, value in found} == pytest.approx(written)

    parts = offline_runs(tmp_path)
    assert len({run.run_id for run, _, _ in parts}) == 1
    assert [(run.project, run.display_name, code) for run, _, code in parts] == [
        ("tiny", tmp_path.name, 143),
        ("tiny", tmp_path.name, 0),
    ]
    logged = {(name, row["_step"]): row[name] for _, found, _ in parts for row in found for name in row}
    assert {key: value for key, value in logged.items() if key[0] != "_step"} == pytest.approx(written)
    assert sum(len(found) for _, found, _ in parts) == 2


TERMS = ("", "_ce", "_bbox", "_giou", "_ce_0", "_bbox_0", "_giou_0", "_ce_enc", "_bbox_enc", "_giou_enc")
METRICS = ("mAP_50_95", "mAP_50", "mAP_75", "mAR", "F1", "precision", "recall")
TAGS = {
    *(f"{split}/loss{term}" for split in ("train", "val", "test") for term in TERMS),
    *(f"{prefix}{name}" for prefix in ("val/", "test/") for name in (*METRICS, "AP/triangle")),
    *(f"val/ema_{name}" for name in METRICS),
    *("train/class_error", "train/cardinality_error", "train/lr"),
}
"""The names of training spec section 8, of a detector with two decoder layers."""


def table(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """metrics.csv: what each column holds, by step."""
    with (folder / "metrics.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    return {
        name: [(int(line["step"]), float(line[name])) for line in lines if line[name] != ""]
        for name in lines[0]
        if name != "step"
    }


@pytest.mark.parameter("tensorboard", "log_per_class_metrics", "compute_val_loss", "compute_test_loss")
def test_event_files_of_a_training_hold_the_table_by_the_names_of_the_specification(
    dataset: PreparedDataset, tmp_path: Path
) -> None:
    everything = {"run_test": True, "compute_val_loss": True, "log_per_class_metrics": True}
    train(tiny.job(dataset, tmp_path, epochs=2, tensorboard=True, **everything))
    found, written = events(tmp_path), table(tmp_path)
    assert found.keys() == written.keys()
    assert found.keys() >= TAGS
    for name, points in written.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in points]), name


@pytest.mark.parameter("tensorboard")
@pytest.mark.parametrize("wanted", [True, False])
def test_a_training_needs_no_tensorboard(
    dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed
    missing = pytest.warns(UserWarning, match="package tensorboard is missing") if wanted else contextlib.nullcontext()
    with missing:
        result = train(tiny.job(dataset, tmp_path, epochs=2, tensorboard=wanted))
    assert result.epochs == 2
    assert [epoch for _, epoch in table(tmp_path)["epoch"]] == [0, 1]
    assert not list(tmp_path.rglob("*tfevents*"))


# --- packages


@pytest.mark.parameter("tensorboard", "wandb", "mlflow")
@pytest.mark.parametrize("package", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setenv("WANDB_MODE", "offline")
    other = "wandb" if package == "tensorboard" else "tensorboard"
    with pytest.warns(UserWarning) as seen:
        training(tmp_path, config(**{package: True, other: True}))
    assert [str(warning.message) for warning in seen] == [
        f"train.{package}: the package {package} is missing "
        '(pip install "rfdetr-pipeline[loggers]"); training goes on without it'
    ]
    if other == "tensorboard":
        assert events(tmp_path) == NUMBERS
    else:
        assert [rows for _, rows, _ in offline_runs(tmp_path)] == [wandb_rows()]


def test_keys_of_the_environment_are_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracker's package may repeat whatever it was given."""
    monkeypatch.setenv("WANDB_API_KEY", "very-secret-key")
    (tmp_path / "wandb.py").write_text("raise RuntimeError('no use for\\nvery-secret-key at https://a:b@c/d?sig=e')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        training(tmp_path / "out", config(wandb=True))
    assert [str(warning.message) for warning in seen] == [
        "train.wandb: RuntimeError: no use for *** at https://***@c/d?***; training goes on without it"
    ]
