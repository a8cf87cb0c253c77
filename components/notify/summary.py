"""One summary of a run from the status files of its stages, and its forms: JSON, Markdown, Slack."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from components.stages import DAG
from rfdetr_core.errors import MissingObjectError
from rfdetr_core.storage import Location

SCORES = ("map", "map50", "f1")
GOOD = ("succeeded", "already done")
SLACK_TEXT = 2900  # characters; Slack takes 3000 in a section


def summarise(run: Location, *, attempt: str, state: str = "", error: str = "") -> dict[str, Any]:
    """What a run did.

    Args:
        attempt: of the orchestrator; what a stage left in an earlier attempt is not of this one. Empty: all is.
        state: how the orchestrator says that the run ended, such as SUCCEEDED; empty: the stages tell.
        error: what it says of the failure, for a stage that could not say so itself.

    Raises:
        StorageAccessError, StorageUnavailableError: see `Location`.
    """
    stages = [_row(run, facts.name, attempt) for facts in DAG]
    done = all(row["state"] in GOOD for row in stages)
    ended = _state(state, done)
    failed = next((row for row in stages if row["state"] not in (*GOOD, "not started")), None)
    summary: dict[str, Any] = {
        "run": run.name,
        "run_uri": run.uri,
        "state": ended,
        "stages": stages,
        "failed_stage": failed["stage"] if failed else None,
        "error": None if ended == "succeeded" else _reason(failed, error),
        "hint": failed["hint"] if failed else None,
        "promotion": None,
        "scores": None,
        "champion_scores": None,
    }
    if _reached(stages, "evaluate"):
        metrics = (run / "evaluate" / "metrics.json").read_json()
        for key, role in (("scores", "candidate"), ("champion_scores", "champion")):
            summary[key] = (
                {name: metrics[role][name] for name in SCORES if name in metrics[role]} if metrics[role] else None
            )
        summary["report"] = (run / "evaluate" / "report.html").uri
    if _reached(stages, "promote"):
        decision = (run / "promote" / "decision.json").read_json()
        summary["promotion"] = {key: decision[key] for key in ("outcome", "reason", "version")}
    return summary


def headline(summary: Mapping[str, Any]) -> str:
    """The first line, for people."""
    if summary["state"] != "succeeded":
        where = f" in {summary['failed_stage']}" if summary["failed_stage"] else ""
        return f"{summary['run']} {summary['state']}{where}"
    promotion = summary["promotion"]
    if promotion is None:
        return f"{summary['run']} succeeded"
    told = {"promote": "promoted a new champion", "keep": "kept the champion", "refuse": "refused the candidate"}
    return f"{summary['run']} {told[promotion['outcome']]}"


def details(summary: Mapping[str, Any]) -> list[str]:
    """The lines below it."""
    lines = []
    if summary["state"] != "succeeded":
        lines += [str(summary[key]) for key in ("error", "hint") if summary[key]]
    if summary["promotion"]:
        lines.append(str(summary["promotion"]["reason"]))
    for key, who in (("scores", "candidate"), ("champion_scores", "champion")):
        if summary[key]:
            lines.append(f"{who}: " + ", ".join(f"{name} {value:.3f}" for name, value in summary[key].items()))
    if "report" in summary:
        lines.append(f"report: {summary['report']}")
    return [*lines, str(summary["run_uri"])]


def markdown(summary: Mapping[str, Any]) -> str:
    """For the pipeline's UI."""
    rows = ["| stage | outcome | time |", "|---|---|---:|"]
    for row in summary["stages"]:
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f} s"
        rows.append(f"| {row['stage']} | {row['state']} | {seconds} |")
    said = "\n\n".join(_plain(line) for line in details(summary))
    return f"# {_plain(headline(summary))}\n\n{said}\n\n" + "\n".join(rows) + "\n"


def slack(summary: Mapping[str, Any]) -> dict[str, Any]:
    """An incoming webhook's body, as Slack and those that follow it (Mattermost, Rocket.Chat, Zulip) take it."""
    mark = {"succeeded": ":white_check_mark:", "cancelled": ":black_square_for_stop:"}.get(summary["state"], ":x:")
    title = f"{mark} *{_escaped(headline(summary))}*"
    text = "\n".join([title, *(_escaped(line) for line in details(summary))])[:SLACK_TEXT]
    return {"text": headline(summary), "blocks": [{"type": "section", "text": {"type": "mrkdwn", "text": text}}]}


def _row(run: Location, stage: str, attempt: str) -> dict[str, Any]:
    row: dict[str, Any] = {"stage": stage, "state": "not started", "exit_code": None, "seconds": None}
    row |= {"error": None, "hint": None}
    try:
        status = (run / "status" / f"{stage}.json").read_json()
    except MissingObjectError:
        return row
    if attempt and status.get("attempt") != attempt:
        return row
    if status["state"] == "running":  # nobody runs beside the end: it could not say how it ended
        return {**row, "state": "killed", "error": "killed: it could not say why, perhaps out of memory or of its node"}
    told = status.get("error") or {}
    found = {key: status.get(key) for key in ("state", "exit_code", "seconds")}
    return {**row, **found, "error": told.get("message"), "hint": told.get("hint") or None}


def _reason(failed: dict[str, Any] | None, told: str) -> str:
    if failed is not None and failed["error"]:
        return str(failed["error"])
    return " ".join(told.split())[:500] or "a stage ended, or could not begin, without a word: see its pod's events"


def _reached(stages: list[dict[str, Any]], stage: str) -> bool:
    return any(row["stage"] == stage and row["state"] in GOOD for row in stages)


def _state(told: str, done: bool) -> str:
    words = {"succeeded": "succeeded", "cancel": "cancelled", "terminat": "cancelled"}
    for beginning, word in words.items():
        if told.lower().startswith(beginning):
            return word if word != "succeeded" or done else "failed"
    return "succeeded" if done and not told else "failed"


def _plain(text: str) -> str:
    """Text that Markdown takes for nothing else."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", text)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
