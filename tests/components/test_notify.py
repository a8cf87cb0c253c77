"""notify: one summary of all status files, to a real web server, and never an end that fails a run."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from components.notify import webhook
from components.notify.stage import main
from components.notify.summary import SLACK_TEXT, markdown, slack, summarise
from components.stages import DAG, STAGES
from rfdetr_core.errors import ConfigError, TransientError, UserError
from rfdetr_core.storage import location

ATTEMPT = "workflow-7"


class Hook(BaseHTTPRequestHandler):
    """Takes what is posted; answers one status after the other, the last one for ever."""

    statuses: list[int]
    bodies: list[Any]

    def do_POST(self) -> None:
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        raise AssertionError("a redirected POST became a GET")

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hook() -> Iterator[tuple[str, type[Hook]]]:
    handler = type("Handler", (Hook,), {"statuses": [200], "bodies": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/services/hunter2", handler
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RFDETR_ATTEMPT", ATTEMPT)
    monkeypatch.setattr(webhook, "WAITS", (0.0, 0.0))
    return tmp_path / "root" / "runs" / "r1"


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def config(run: Path, **notify: Any) -> None:
    write(run / "config.yaml", {"name": "shapes", "dataset": {"uri": "/data"}, "notify": notify})


def ended(run: Path, stage: str, state: str = "succeeded", attempt: str = ATTEMPT, **more: Any) -> None:
    code = {"succeeded": 0, "already done": 0, "failed": 2, "running": None}[state]
    write(
        run / "status" / f"{stage}.json",
        {"state": state, "exit_code": code, "attempt": attempt, "seconds": 1.5, **more},
    )


def all_done(run: Path, outcome: str = "promote", champion: dict[str, float] | None = None) -> None:
    for stage in STAGES:
        ended(run, stage)
    scores = {"map": 0.5, "map50": 0.75, "mar": 0.6, "f1": 0.7}
    write(run / "evaluate" / "metrics.json", {"candidate": scores, "champion": champion})
    write(run / "promote" / "decision.json", {"outcome": outcome, "reason": "map 0.5 & <more>", "version": "v1"})


def failed(run: Path) -> None:
    ended(run, "validate_dataset")
    ended(run, "probe_batch_size", "failed", error={"message": "no GPU_1 here", "hint": "ask for <one>"})


def notify(run: Path, *more: str) -> dict[str, Any]:
    """Run it; its own status."""
    assert main(["--run-uri", str(run), *more]) == 0
    status: dict[str, Any] = json.loads((run / "status" / "notify.json").read_text())
    assert (run / "logs" / "notify.log").exists()
    return status


def test_a_success(run: Path, hook: tuple[str, type[Hook]], monkeypatch: pytest.MonkeyPatch) -> None:
    url, handler = hook
    monkeypatch.setenv("HOOK", f"{url}\n")  # a Secret made from a file ends in a newline
    config(run, webhook_secret_env="HOOK")
    all_done(run, champion={"map": 0.4, "map50": 0.7})
    status = notify(run, "--state", "SUCCEEDED")
    assert (status["state"], status["told"]) == ("succeeded", "the webhook in HOOK, as json")
    [body] = handler.bodies
    assert body == json.loads((run / "summary.json").read_text())
    assert (body["state"], body["failed_stage"], body["error"]) == ("succeeded", None, None)
    assert [row["stage"] for row in body["stages"]] == list(STAGES)
    assert body["scores"] == {"map": 0.5, "map50": 0.75, "f1": 0.7}
    assert body["champion_scores"] == {"map": 0.4, "map50": 0.7}
    assert body["promotion"] == {"outcome": "promote", "reason": "map 0.5 & <more>", "version": "v1"}


def test_a_failure_names_stage_cause_and_remedy(
    run: Path, hook: tuple[str, type[Hook]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, handler = hook
    monkeypatch.setenv("HOOK", url)
    config(run, webhook_secret_env="HOOK", format="slack")
    failed(run)
    notify(run, "--state", "FAILED", "--error", "what the orchestrator says")
    [body] = handler.bodies
    assert body["text"] == "r1 failed in probe_batch_size"
    [block] = body["blocks"]
    assert block["type"] == "section" and block["text"]["type"] == "mrkdwn"
    assert block["text"]["text"].splitlines() == [
        ":x: *r1 failed in probe_batch_size*",
        "no GPU_1 here",
        "ask for &lt;one&gt;",
        str(run),
    ]


def test_the_summary_for_the_ui_is_markdown_of_no_other_meaning(run: Path) -> None:
    config(run)
    failed(run)
    status = notify(run)
    assert status["told"] == "nobody: notify.webhook_secret_env is null"
    text = (run / "summary.md").read_text()
    assert text.startswith("# r1 failed in probe\\_batch\\_size\n\nno GPU\\_1 here\n\nask for \\<one\\>\n")
    assert "| probe_batch_size | failed | 2 s |" in text and "| train | not started |  |" in text


def test_what_an_earlier_attempt_left_is_not_of_this_one(run: Path) -> None:
    all_done(run)
    ended(run, "train", "failed", attempt="workflow-6")
    found = summarise(location(str(run)), attempt=ATTEMPT, state="FAILED", error="ImagePullBackOff\n  of train")
    assert found["stages"][2]["state"] == "not started" and found["failed_stage"] is None
    assert (found["state"], found["error"]) == ("failed", "ImagePullBackOff of train")
    assert summarise(location(str(run)), attempt="", state="")["failed_stage"] == "train"


def test_a_stage_that_was_killed_could_not_say_so(run: Path) -> None:
    ended(run, "validate_dataset", "running")
    found = summarise(location(str(run)), attempt=ATTEMPT, state="FAILED")
    assert (found["failed_stage"], found["stages"][0]["state"]) == ("validate_dataset", "killed")
    assert "out of memory" in found["error"]


@pytest.mark.parametrize(
    ("told", "done", "state"),
    [
        ("SUCCEEDED", True, "succeeded"),
        ("Succeeded", True, "succeeded"),  # Argo
        ("", True, "succeeded"),
        ("SUCCEEDED", False, "failed"),  # a stage that left no status did not succeed
        ("FAILED", True, "failed"),  # what KFP does around a stage may fail
        ("Error", False, "failed"),
        ("CANCELLED", False, "cancelled"),
        ("", False, "failed"),
    ],
)
def test_how_a_run_ended(run: Path, told: str, done: bool, state: str) -> None:
    if done:
        all_done(run)
    found = summarise(location(str(run)), attempt=ATTEMPT, state=told)
    assert found["state"] == state
    assert (found["error"] is None) == (state == "succeeded")


def test_a_long_error_is_cut_to_what_slack_takes(run: Path) -> None:
    ended(run, "train", "failed", error={"message": "x" * 5000, "hint": ""})
    found = summarise(location(str(run)), attempt=ATTEMPT)
    assert len(slack(found)["blocks"][0]["text"]["text"]) == SLACK_TEXT
    assert "x" * 5000 in markdown(found)


def test_a_config_that_could_not_be_resolved_still_names_the_webhook(
    run: Path, hook: tuple[str, type[Hook]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url, handler = hook
    monkeypatch.setenv("HOOK", url)
    (tmp_path / "c.yaml").write_text("name: x\ntrain: {epoch: 3}\nnotify: {webhook_secret_env: NONE}\n")
    ended(run, "validate_dataset", "failed", error={"message": "train.epoch: unknown field", "hint": ""})
    notify(run, "--config", str(tmp_path / "c.yaml"), "--overrides", '{"notify": {"webhook_secret_env": "HOOK"}}')
    assert handler.bodies[0]["error"] == "train.epoch: unknown field"


def test_a_webhook_that_stumbles_is_tried_again(run: Path, hook: tuple[str, type[Hook]]) -> None:
    url, handler = hook
    handler.statuses[:] = [503, 429, 200]
    waits: list[float] = []
    webhook.post(url, {"a": 1}, sleep=waits.append)
    assert handler.bodies == [{"a": 1}] * 3 and len(waits) == 2


@pytest.mark.parametrize(
    ("status", "error", "words", "tries"),
    [
        (404, UserError, "the webhook answered 404", 1),
        (302, UserError, "the webhook answered 302", 1),
        (500, TransientError, "the webhook answered 500, three times", 3),
    ],
)
def test_a_webhook_that_refuses(
    run: Path, hook: tuple[str, type[Hook]], status: int, error: type[Exception], words: str, tries: int
) -> None:
    url, handler = hook
    handler.statuses[:] = [status]
    with pytest.raises(error, match=words) as caught:
        webhook.post(url, {})
    assert len(handler.bodies) == tries and "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["", "hooks.example/x", "ftp://hooks.example", "http://", "http://a b/c", "http://a:x/"]
)
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(ConfigError, match="is no http"):
        webhook.post(url, {})


@pytest.mark.parametrize(
    ("settings", "secret", "words"),
    [
        ({"webhook_secret_env": "HOOK"}, None, "the environment variable HOOK of notify.webhook_secret_env is not set"),
        ({"webhook_secret_env": "HOOK"}, "http://127.0.0.1:9/hunter2", "could not be reached"),
        ({"webhook_secret_env": "HOOK"}, "hunter2", "is no http(s) URL"),
        ({"webhook": "hunter2"}, None, "config.yaml: notify.webhook: unknown field"),
    ],
)
def test_nothing_that_goes_wrong_fails_the_run_or_tells_the_secret(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    secret: str | None,
    words: str,
) -> None:
    monkeypatch.delenv("HOOK", raising=False)
    if secret:
        monkeypatch.setenv("HOOK", secret)
    config(run, **settings)
    all_done(run)
    status = notify(run)
    assert status["state"] == "failed" and words in status["error"]["message"]
    assert (run / "summary.json").exists()
    assert "nobody was told" in (said := capsys.readouterr().out) and "hunter2" not in said
    assert "hunter2" not in (run / "logs" / "notify.log").read_text()


def test_a_store_that_is_away_fails_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--run-uri", "nowhere"]) == 0
    assert "nobody was told: --run-uri: 'nowhere' is not <root>/runs/<run-id>" in capsys.readouterr().out


def test_slacks_own_address_is_told_by_its_host() -> None:
    assert webhook.is_slack("https://hooks.slack.com/services/T/B/x")
    assert not webhook.is_slack("https://example.com/hooks.slack.com")


def test_the_table_of_stages_agrees_with_their_programs() -> None:
    from importlib import import_module

    for facts in DAG:
        stage = import_module(f"components.{facts.name}.stage").STAGE
        assert (stage.name, stage.folder) == (facts.name, facts.folder)
