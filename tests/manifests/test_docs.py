"""The commands of docs/installation.md: what needs a cluster is looked at, not run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from pipelines.argo_lint import cron_problem
from pipelines.cli import app
from pipelines.platform import load_profile

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "installation.md").read_text()
COMMANDS = [
    line.strip()
    for block in re.findall(r"^ *```\n(.*?)^ *```", PAGE, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 15 and {line.split()[0] for line in COMMANDS} <= {
        "make", "kubectl", "sed", "aws", "docker", ".venv/bin/rfdetr-pipeline"
    }  # fmt: skip


@pytest.mark.parametrize("line", [line for line in COMMANDS if "rfdetr-pipeline" in line])
def test_a_command_of_ours_has_these_options(line: str) -> None:
    _, *words = shlex.split(line)
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    options = {name: option for option in command.params for name in option.opts if name.startswith("-")}
    required = {option.opts[0] for option in command.params if option.required and option.param_type_name == "option"}
    given = dict(zip(words, [*words[1:], ""], strict=True))
    assert {word for word in words if word.startswith("-")} <= set(options)
    assert required <= set(given)
    assert load_profile(given["--profile"]) if "--profile" in given else True
    if words[0] != "weekly" and "--cron" in given:  # KFP's schedule has six fields
        assert cron_problem(given["--cron"]) == ""


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?<![\w/])(?:manifests|examples)/[\w./-]+\w", PAGE))))
def test_a_path_is_there(path: str) -> None:
    assert (ROOT / path).exists() or (ROOT / path).with_suffix("").exists()


@pytest.mark.parametrize("target", sorted({line.split()[1] for line in COMMANDS if line.startswith("make ")}))
def test_a_target_of_make_is_there(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("text", "target"), re.findall(r"\[([^]]+)\]\(([^)]+)\)", PAGE))
def test_a_link_leads_somewhere(text: str, target: str) -> None:
    page, _, heading = target.partition("#")
    if page.startswith("https://"):
        return
    content = PAGE if not page else (ROOT / "docs" / page)
    if isinstance(content, Path):
        assert content.exists(), target
        content = content.read_text() if content.is_file() else ""
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-") for line in content.splitlines()}
    assert not heading or heading in headings
