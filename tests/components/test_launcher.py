"""What a KFP component hands to its stage."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from components import launcher


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A stage that writes down its arguments and its attempt, and ends with STAGE_CODE."""
    package = tmp_path / "components" / "told"
    package.mkdir(parents=True)
    (package / "stage.py").write_text(
        "import json, os, sys\n"
        f"open({str(tmp_path / 'said.json')!r}, 'w').write(json.dumps([sys.argv[1:], os.environ['RFDETR_ATTEMPT']]))\n"
        "sys.exit(int(os.environ.get('STAGE_CODE', 0)))\n"
    )
    start = launcher.subprocess.Popen
    program = str(package / "stage.py")
    monkeypatch.setattr(
        launcher.subprocess, "Popen", lambda words, env: start([sys.executable, program, *words[3:]], env=env)
    )
    monkeypatch.delenv("RFDETR_ATTEMPT", raising=False)
    return tmp_path / "said.json"


def said(command: Path) -> dict[str, Any]:
    arguments, attempt = json.loads(command.read_text())
    return {**dict(zip(arguments[::2], arguments[1::2], strict=True)), "attempt": attempt}


def test_an_empty_run_id_is_the_jobs(command: Path) -> None:
    assert launcher.launch("train", "s3://b/runs/", "job-1") == "s3://b/runs/job-1"
    assert said(command) == {"--run-uri": "s3://b/runs/job-1", "attempt": "job-1"}
    assert launcher.launch("train", "s3://b/runs/r1", "job-1") == "s3://b/runs/r1"


@pytest.mark.parametrize("gpu_count", ["", "4"])
def test_the_first_stage_hears_of_the_gpus_of_the_pod_that_trains(command: Path, gpu_count: str) -> None:
    launcher.launch("validate_dataset", "r/runs/a", "j", config="c", overrides={"a": 1}, gpu_count=gpu_count)
    told = said(command)
    assert (told["--config"], told["--overrides"], told["--gpu-count"]) == ("c", '{"a": 1}', gpu_count)


def test_a_stage_that_fails_ends_the_component_with_its_code(command: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGE_CODE", "75")
    with pytest.raises(SystemExit) as ended:
        launcher.launch("train", "r/runs/a", "j")
    assert ended.value.code == 75


def test_notify_fails_nothing(command: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any) -> None:
    monkeypatch.setenv("STAGE_CODE", "70")
    run = tmp_path / "runs" / "a"
    launcher.launch_notify(str(run), "j", "c", {"a": 1}, "FAILED", "why", str(tmp_path / "summary"))
    assert "notify: no summary to show: " in capfd.readouterr().err
    told = said(command)
    assert (told["--state"], told["--error"], told["--config"], told["--overrides"]) == (
        "FAILED",
        "why",
        "c",
        '{"a": 1}',
    )
    run.mkdir(parents=True)
    (run / "summary.md").write_text("# done\n")
    launcher.launch_notify(str(run), "j", "c", {}, "SUCCEEDED", "", str(tmp_path / "ui" / "summary"))
    assert (tmp_path / "ui" / "summary").read_text() == "# done\n"
