"""wait, logs and cancel: each ends with the right code, in the right time, with the right words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from components.stages import DAG
from pipelines import kfp_api
from pipelines.following import wait
from pipelines.kfp_api import Connection, KfpApi, NotLoggedInError
from rfdetr_core.errors import TransientError, UserError
from rfdetr_core.storage import Location
from tests.pipelines.kfp_stub import Stub
from tests.pipelines.test_submit import Command, command, s3_root, s3_server, stub

__all__ = ["command", "s3_root", "s3_server", "stub"]


@pytest.fixture
def started(command: Command, stub: Stub, s3_root: Location) -> Location:
    """A run r1 that KFP knows; where it writes."""
    assert command("submit", "--run-id", "r1")[0] == 0
    stub.calls.clear()
    return s3_root / "runs" / "r1"


def stage_ended(run: Location, stub: Stub, name: str, **status: Any) -> None:
    """What a stage leaves that ended in this run's attempt."""
    said = {"state": "succeeded", "exit_code": 0, "attempt": stub.kinds["runs"][0]["run_id"], "seconds": 1.0, **status}
    (run / "status" / f"{name}.json").write_json(said)


def waited(command: Command, *more: str) -> tuple[int, str]:
    return command("wait", "r1", "--poll", "0.1", *more)


def task(name: str, state: str) -> dict[str, str]:
    return {"display_name": name, "state": state, "task_id": name}


def test_success(command: Command, stub: Stub, started: Location, tmp_path: Path) -> None:
    for facts in DAG:
        stage_ended(started, stub, facts.name)
    scores = {"map": 0.5, "map50": 0.75}
    (started / "evaluate" / "metrics.json").write_json({"candidate": scores, "champion": None})
    decision = {"outcome": "promote", "reason": "map 0.5000; there is no champion yet", "version": "v"}
    (started / "promote" / "decision.json").write_json(decision)
    stub.kinds["runs"][0]["run_details"] = {"task_details": [task("train", "RUNNING"), task("root", "RUNNING")]}
    stub.states = ["PENDING", "RUNNING", "RUNNING", "SUCCEEDED"]
    code, output = waited(command, "--summary", "summary.md")
    assert code == 0, output
    assert output.splitlines() == [
        "Train: running",
        "r1 promoted a new champion",
        "map 0.5000; there is no champion yet",
        "candidate: map 0.500, map50 0.750",
        f"report: {started.uri}/evaluate/report.html",
        started.uri,
    ]
    assert (tmp_path / "summary.md").read_text().startswith("# r1 promoted a new champion\n")
    assert len([call for call in stub.calls if "/runs/" in call.path]) == 4


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        ({"state": "failed", "exit_code": 2, "error": {"message": "no boxes", "hint": "add some"}}, 2, "no boxes"),
        ({"state": "failed", "exit_code": 70, "error": {"message": "oops", "hint": ""}}, 70, "oops"),
        ({"state": "preempted", "exit_code": 143, "error": {"message": "stopped", "hint": ""}}, 143, "stopped"),
        ({"state": "running", "exit_code": None}, 137, "killed: it could not say why"),
    ],
)
def test_a_failure_has_the_code_of_its_stage(
    command: Command, stub: Stub, started: Location, status: dict[str, Any], code: int, words: str
) -> None:
    stage_ended(started, stub, "validate_dataset", **status)
    stub.states = ["RUNNING", "FAILED"]
    ended, output = waited(command)
    assert ended == code, output
    assert "r1 failed in validate_dataset" in output and words in output


def test_a_failure_before_any_stage_could_speak(command: Command, stub: Stub, started: Location) -> None:
    stage_ended(started, stub, "train", attempt="an earlier one", state="failed", exit_code=70)
    stub.kinds["runs"][0]["error"] = {"message": "ImagePullBackOff: registry.example/train"}
    stub.states = ["FAILED"]
    code, output = waited(command)
    assert code == 2
    assert "r1 failed\nImagePullBackOff: registry.example/train\n" in output


def test_a_cancelled_run_ends_the_waiting(command: Command, stub: Stub, started: Location) -> None:
    """kfp's own waiting never does."""
    stub.states = ["RUNNING", "CANCELING", "CANCELED"]
    code, output = waited(command)
    assert code == 143
    assert "r1 cancelled" in output


def test_waiting_has_an_end_and_the_run_goes_on(command: Command, stub: Stub, started: Location) -> None:
    stub.states = ["RUNNING"]
    code, output = waited(command, "--timeout", "0.003")
    assert code == 124
    assert "has not ended after 0 minutes, and goes on (rfdetr-pipeline wait " in output
    assert stub.changes() == []


def test_a_run_that_is_not_there(command: Command, stub: Stub) -> None:
    assert command("wait", "r9") == (
        2,
        "error: no run r9 (give the name that submit printed, or KFP's id of the run)\n",
    )
    code, output = command("wait", "00000000-0000-4000-8000-000000000000")
    assert code == 2 and "not found (404)" in output


class Clock:
    """Time that passes by sleeping only."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def __call__(self) -> float:
        return self.now


def patiently(stub: Stub, clock: Clock, **options: Any) -> Any:
    api = KfpApi(Connection(stub.host, sleep=lambda seconds: None))
    identity = stub.kinds["runs"][0]["run_id"]
    return wait(api, identity, say=lambda line: None, sleep=clock.sleep, clock=clock, **options)


def test_an_api_that_stumbles_is_waited_for(stub: Stub, started: Location) -> None:
    stub.states = ["RUNNING", "RUNNING", "SUCCEEDED"]
    stub.troubles = [("GET /runs/.*", 503)] * 9  # two looks in vain, each tried four times, and one of four
    clock = Clock()
    assert patiently(stub, clock).exit_code == 0
    assert clock.now < 60


def test_but_not_for_ever(stub: Stub, started: Location) -> None:
    stub.states = ["RUNNING"]
    stub.troubles = [("GET /runs/.*", 503)] * 1000
    clock = Clock()
    with pytest.raises(TransientError, match="answers 503"):
        patiently(stub, clock)
    assert 900 <= clock.now < 960


def test_a_token_that_expired_is_read_anew(stub: Stub, started: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.states, stub.token = ["RUNNING", "SUCCEEDED"], "first"
    monkeypatch.setenv(kfp_api.TOKEN_VARIABLE, "first")
    clock = Clock()

    def renew(seconds: float) -> None:
        clock.now += seconds
        stub.token = "second"
        monkeypatch.setenv(kfp_api.TOKEN_VARIABLE, "second")

    monkeypatch.setattr(clock, "sleep", renew)
    assert patiently(stub, clock).exit_code == 0
    stub.login_page = True  # as a session that ends shows itself behind a gateway
    with pytest.raises(NotLoggedInError, match="it sent a web page"):
        patiently(stub, clock)
    stub.login_page, stub.token = False, "third"
    with pytest.raises(NotLoggedInError, match=r"\(401\)"):
        patiently(stub, clock)


def test_cancelling(command: Command, stub: Stub, started: Location) -> None:
    stub.kinds["runs"][0]["state"] = "RUNNING"
    assert command("cancel", "r1") == (0, "cancelled r1\n")
    assert stub.changes() == [f"POST /runs/{stub.kinds['runs'][0]['run_id']}:terminate"]
    stub.kinds["runs"][0]["state"] = "CANCELED"
    assert command("cancel", "r1") == (0, "r1 has ended already: canceled\n")
    assert len(stub.changes()) == 1


def test_logs_come_from_the_store(command: Command, stub: Stub, started: Location) -> None:
    assert command("logs", "r1") == (2, "error: no logs of r1 yet (its pods may not have begun: kubectl get pods)\n")
    for name in ("validate_dataset", "train"):
        stage_ended(started, stub, name)
        (started / "logs" / f"{name}.log").write_bytes(f"said by {name}\n".encode())
    assert command("logs", "r1") == (0, "said by validate_dataset\nsaid by train\n")
    assert command("logs", "r1", "--stage", "train") == (0, "said by train\n")
    code, output = command("logs", "r1", "--stage", "trian")
    assert code == 2 and "--stage: no stage trian (one of validate_dataset, " in output


def test_a_server_that_is_gone_for_a_moment_is_a_transient_error(stub: Stub) -> None:
    api = KfpApi(Connection(stub.host, sleep=lambda seconds: None))
    stub.troubles = [("GET /runs/x", 500)] * 4
    with pytest.raises(TransientError, match="answers 500"), api.errors("look"):
        api.client.get_run("x")
    assert len([call for call in stub.calls if call.path.endswith("/runs/x")]) == 4
    stub.troubles = [("GET /runs/x", 404)]
    with pytest.raises(UserError, match="not found"), api.errors("look"):
        api.client.get_run("x")
