"""The stage contract of DESIGN section 4, with bodies made for the purpose."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from components.runtime import Stage, StageContext, run_stage
from rfdetr_core.errors import DatasetError, PublicationError, StorageUnavailableError
from rfdetr_core.publication import MANIFEST
from rfdetr_core.storage.local import LocalLocation

FIRST = Stage(name="validate_dataset", folder="dataset", summary="First.", reads=("dataset",), resolves_config=True)
SECOND = Stage(name="train", folder="train", summary="Second.", reads=("train",), after=("dataset",))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "root" / "runs" / "r1"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("name: shapes\ndataset: {uri: /data}\n")
    return path


def writes(name: str, text: str) -> Callable[[StageContext], None]:
    def body(context: StageContext) -> None:
        (context.output / name).write_text(text)

    return body


def fails(error: BaseException) -> Callable[[StageContext], None]:
    def body(context: StageContext) -> None:
        (context.output / "half.txt").write_text("never to be seen")
        raise error

    return body


def must_not_run(context: StageContext) -> None:
    raise AssertionError("the stage ran although its work is done")


def first(run: Path, config: Path, body: Callable[[StageContext], None], *more: str) -> int:
    return run_stage(FIRST, body, ["--run-uri", str(run), "--config", str(config), *more])


def second(run: Path, body: Callable[[StageContext], None], *more: str) -> int:
    return run_stage(SECOND, body, ["--run-uri", str(run), *more])


def status(run: Path, stage: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run / "status" / f"{stage}.json").read_text())
    return loaded


def test_success_publishes_status_and_log(run: Path, config: Path) -> None:
    assert first(run, config, writes("a.txt", "A")) == 0
    assert (run / "dataset" / "a.txt").read_text() == "A"
    manifest = json.loads((run / "dataset" / MANIFEST).read_text())
    assert list(manifest["files"]) == ["a.txt"]
    found = status(run, "validate_dataset")
    assert (found["state"], found["exit_code"]) == ("succeeded", 0)
    assert found["inputs"] == manifest["inputs"]
    assert found["hardware"]["cpus"] >= 1
    assert "published" in (run / "logs" / "validate_dataset.log").read_text()


def test_the_first_stage_stores_the_resolved_config_and_later_ones_read_it(
    run: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    assert first(run, config, writes("a.txt", "A"), "--overrides", '{"train": {"epochs": 3}}') == 0
    assert "epochs: 3" in (run / "config.yaml").read_text()
    assert "epochs: 3" in capsys.readouterr().out

    def body(context: StageContext) -> None:
        seen.append(context.config.train.epochs)
        (context.output / "w.txt").write_text("W")

    assert second(run, body, "--config", str(tmp_path / "other.yaml")) == 0
    assert seen == [3]
    assert "read by the first stage only" in capsys.readouterr().out


def test_the_same_command_twice_does_the_work_once(run: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert first(run, config, writes("a.txt", "A")) == 0
    assert first(run, config, must_not_run) == 0
    assert "already done" in capsys.readouterr().out
    assert status(run, "validate_dataset")["state"] == "already done"


def test_force_does_it_again(run: Path, config: Path) -> None:
    assert first(run, config, writes("a.txt", "A")) == 0
    assert first(run, config, writes("b.txt", "B"), "--force") == 0
    assert {p.name for p in (run / "dataset").iterdir()} == {"b.txt", MANIFEST}


def test_a_changed_section_runs_the_stage_that_reads_it_again_and_no_other(run: Path, config: Path) -> None:
    assert first(run, config, writes("a.txt", "A")) == 0
    assert second(run, writes("w.txt", "1")) == 0
    assert first(run, config, must_not_run, "--overrides", '{"train": {"epochs": 7}}') == 0
    assert second(run, writes("w.txt", "2")) == 0
    assert (run / "train" / "w.txt").read_text() == "2"


def test_a_changed_result_runs_the_stages_after_it_again(run: Path, config: Path) -> None:
    assert first(run, config, writes("a.txt", "A")) == 0
    assert second(run, writes("w.txt", "1")) == 0
    assert first(run, config, writes("a.txt", "another"), "--force") == 0
    assert second(run, writes("w.txt", "2")) == 0
    assert (run / "train" / "w.txt").read_text() == "2"


@pytest.mark.parametrize(
    ("error", "code", "name"),
    [
        (DatasetError("bad labels", hint="mend them"), 2, "DatasetError"),
        (StorageUnavailableError("store away", hint="try again"), 75, "StorageUnavailableError"),
        (ZeroDivisionError("division by zero"), 70, "ZeroDivisionError"),
        (KeyboardInterrupt(), 130, "Terminated"),
    ],
)
def test_failures_name_cause_and_remedy_and_publish_nothing(
    run: Path, config: Path, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, name: str
) -> None:
    assert first(run, config, fails(error)) == code
    assert not (run / "dataset").exists()
    found = status(run, "validate_dataset")
    assert (found["exit_code"], found["error"]["class"]) == (code, name)
    assert found["error"]["message"] and found["error"]["hint"]
    assert "Traceback" not in capsys.readouterr().out


def test_debug_shows_the_traceback_and_the_log_file_always_has_it(
    run: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert first(run, config, fails(ZeroDivisionError("x"))) == 70
    assert "Traceback" not in capsys.readouterr().out
    assert "Traceback" in (run / "logs" / "validate_dataset.log").read_text()
    assert first(run, config, fails(ZeroDivisionError("x")), "--debug") == 70
    assert "Traceback" in capsys.readouterr().out


def test_a_failure_leaves_the_last_publication_of_a_forced_stage_unpublished(run: Path, config: Path) -> None:
    assert first(run, config, writes("a.txt", "A")) == 0
    assert first(run, config, fails(DatasetError("bad")), "--force") == 2
    assert not (run / "dataset" / MANIFEST).exists()
    assert second(run, must_not_run) == 2
    assert status(run, "train")["error"]["class"] == PublicationError.__name__


def test_within_one_attempt_a_known_failure_is_not_repeated(
    run: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RFDETR_ATTEMPT", "workflow-1")
    assert first(run, config, fails(DatasetError("bad labels"))) == 2
    assert first(run, config, must_not_run) == 2
    assert "bad labels" in status(run, "validate_dataset")["error"]["message"]
    monkeypatch.setenv("RFDETR_ATTEMPT", "workflow-2")
    assert first(run, config, writes("a.txt", "A")) == 0


def test_a_transient_failure_is_tried_again_within_the_attempt(
    run: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RFDETR_ATTEMPT", "workflow-1")
    assert first(run, config, fails(StorageUnavailableError("away"))) == 75
    assert first(run, config, writes("a.txt", "A")) == 0


@pytest.mark.parametrize("uri", ["runs/r1", "root/runs/Upper", "root/runs/", "root/r1", "/runs/-x", "s3:/b/runs/r1"])
def test_a_run_uri_that_is_none_is_refused(uri: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_stage(FIRST, must_not_run, ["--run-uri", uri, "--config", str(config)]) == 2
    assert "ERROR" in capsys.readouterr().out


def test_a_first_stage_without_config_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_stage(FIRST, must_not_run, ["--run-uri", str(run)]) == 2
    assert "--config is missing (give the run's YAML, a path or an s3:// URI)" in capsys.readouterr().out


def test_a_later_stage_without_the_first_says_what_is_missing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert second(run, must_not_run) == 2
    assert "config.yaml" in capsys.readouterr().out


def test_a_file_altered_after_publication_is_refused(run: Path, config: Path) -> None:
    assert first(run, config, writes("dataset.json", "{}")) == 0
    (run / "dataset" / "dataset.json").write_text("[]")

    def body(context: StageContext) -> None:
        context.read_result("dataset", "dataset.json")

    assert second(run, body) == 2
    assert "dataset.json" in status(run, "train")["error"]["message"]


def test_the_scratch_folder_is_gone_afterwards(run: Path, config: Path) -> None:
    places = []

    def body(context: StageContext) -> None:
        places.append(context.work)
        (context.output / "a.txt").write_text("A")

    assert first(run, config, body) == 0
    assert not places[0].exists()


SLEEPER = """
import sys, time
from components.runtime import Stage, run_stage
STAGE = Stage(name="validate_dataset", folder="dataset", summary="x", reads=("dataset",), resolves_config=True)
def body(context):
    context.stop.deferred = {deferred}
    (context.output / "a.txt").write_text("A")
    print("started", flush=True)
    end = time.monotonic() + 30
    while not context.stop.requested and time.monotonic() < end:
        time.sleep(0.02)
    print("safe point", flush=True)
    from rfdetr_core.errors import Terminated
    raise Terminated("stopped at a safe point")
sys.exit(run_stage(STAGE, body, sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("signum", "code", "state"), [(signal.SIGTERM, 143, "preempted"), (signal.SIGINT, 130, "interrupted")]
)
@pytest.mark.parametrize(("deferred", "safe_point"), [(False, False), (True, True)])
def test_a_signal_ends_at_once_or_at_a_safe_point(
    run: Path, config: Path, deferred: bool, safe_point: bool, signum: int, code: int, state: str
) -> None:
    command = [sys.executable, "-c", SLEEPER.format(deferred=deferred), "--run-uri", str(run), "--config", str(config)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ})
    assert child.stdout is not None
    for line in child.stdout:
        if line == "started\n":
            break
    started = time.monotonic()
    child.send_signal(signum)
    rest, _ = child.communicate(timeout=20)
    assert child.returncode == code
    assert time.monotonic() - started < 10
    assert ("safe point\n" in rest.splitlines(keepends=True)) is safe_point
    assert status(run, "validate_dataset")["state"] == state
    assert not (run / "dataset").exists()


@pytest.mark.parametrize(("body", "code"), [(writes("a.txt", "A"), 0), (fails(DatasetError("no boxes")), 2)])
def test_sigterm_does_not_keep_a_stage_from_telling_how_it_ended(
    run: Path, config: Path, monkeypatch: pytest.MonkeyPatch, body: Callable[[StageContext], None], code: int
) -> None:
    store_log = LocalLocation.upload_file

    def upload_file(self: LocalLocation, path: Path, *more: Any) -> Any:
        if self.name.endswith(".log"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        return store_log(self, path, *more)

    monkeypatch.setattr(LocalLocation, "upload_file", upload_file)
    assert first(run, config, body) == code
    assert status(run, "validate_dataset")["exit_code"] == code


def test_sigterm_is_no_broken_file(run: Path, config: Path) -> None:
    """Who reads images takes any `Exception` of a decoder for a damaged file; a signal may come within."""

    def body(context: StageContext) -> None:
        with suppress(Exception):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    assert first(run, config, body) == 143
    assert status(run, "validate_dataset")["state"] == "preempted"
