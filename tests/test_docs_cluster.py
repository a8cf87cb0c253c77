"""The pages about clusters: every command has the options it is shown with, every message is one that we say."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
import typer
from botocore.session import get_session
from botocore.validate import ParamValidator

from pipelines.cli import app
from pipelines.platform import StageProfile, load_profile, profile_names

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "docs" / f"{name}.md" for name in ("cluster", "ci", "sizing", "troubleshooting", "running", "storage")]


def commands() -> list[str]:
    """Every shown call of rfdetr-pipeline."""
    found = []
    for page in PAGES:
        for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            if kind:
                continue
            joined = block.replace("\\\n", " ")
            found += [line for line in joined.splitlines() if line.startswith(".venv/bin/rfdetr-pipeline ")]
    return found


@pytest.mark.parametrize("line", commands())
def test_a_shown_command_is_one(line: str) -> None:
    """Parsed as typer parses it, and not carried out."""
    _, name, *arguments = shlex.split(line)
    group = typer.main.get_command(app)
    command = group.commands[name]  # type: ignore[attr-defined]
    parent = group.make_context("rfdetr-pipeline", [], resilient_parsing=True)
    assert command.make_context(name, arguments, parent=parent).args == []


def test_the_commands_of_a_cluster_are_shown() -> None:
    shown = {line.split()[1] for line in commands()}
    assert {"compile", "submit", "wait", "logs", "cancel", "schedule", "unschedule", "gc"} <= shown


def test_the_shown_profile_is_legal(tmp_path: Path) -> None:
    [text] = re.findall(r"```yaml\n# ours.yaml\n(.*?)```", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL)
    (tmp_path / "ours.yaml").write_text(text)
    profile = load_profile(str(tmp_path / "ours.yaml"))
    assert profile.stage("train").memory == "96Gi" and profile.s3.secret == "s3-credentials"


def test_every_profile_and_every_field_of_a_stage_is_told() -> None:
    page = (ROOT / "docs" / "cluster.md").read_text()
    for name in (*profile_names(), *StageProfile.model_fields):
        assert f"`{name}`" in page, name


def sayings() -> list[str]:
    """All texts in our source, with … for what is filled in."""
    found = []
    for package in ("rfdetr_core", "components", "pipelines"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    parts = [str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values]
                    found.append("".join(parts))
    return found


def test_every_message_of_the_page_is_one_that_we_say() -> None:
    said = sayings()
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    rows = re.findall(r"^\| `([^|]+?)` \|", page.partition("## In the UI")[0], re.MULTILINE)
    messages = [message for row in rows for message in row.split("`, `")]
    assert len(messages) >= 25
    for message in messages:
        for part in message.split("…"):  # a message may be put together from several
            assert any(part in text for text in said), message


def test_the_lifecycle_example_is_one_that_s3_takes() -> None:
    rules = json.loads((ROOT / "examples" / "s3-lifecycle.json").read_text())
    shape = get_session().get_service_model("s3").operation_model("PutBucketLifecycleConfiguration").input_shape
    report = ParamValidator().validate({"Bucket": "b", "LifecycleConfiguration": rules}, shape)
    assert not report.has_errors(), report.generate_report()
    assert not [rule for rule in rules["Rules"] if "Expiration" in rule]  # nothing that is current ever goes by age
