"""Runs that are on the cluster: wait for one, show its logs, cancel it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from components.notify.summary import details, headline, markdown, summarise
from components.stages import CONTAINERS, DAG
from pipelines.cluster_checks import pod_log
from pipelines.kfp_api import KfpApi, NotLoggedInError
from pipelines.submit import ACTIVE, Say
from rfdetr_core.errors import ExitError, MissingObjectError, RFDETRError, TransientError, UserError
from rfdetr_core.storage import Location, location

CANCELLED, KILLED = 143, 137
FIRST_POLL_SECONDS = 2.0
PATIENCE_SECONDS = 900.0  # with an API that does not answer while a run goes on


class StillRunningError(RFDETRError):
    """Waiting took too long; the run goes on. As timeout(1) ends: 75 may be the code of a stage."""

    exit_code = 124


@dataclass(frozen=True)
class Ended:
    """How a run ended; `exit_code` is that of the stage that failed."""

    state: str
    exit_code: int
    summary: dict[str, Any] | None

    def lines(self) -> list[str]:
        """For people."""
        if self.summary is None:
            return [f"the run ended as {self.state}; its status files could not be read"]
        return [headline(self.summary), *details(self.summary)]

    def markdown(self) -> str:
        """For a comment in CI."""
        return markdown(self.summary) if self.summary is not None else "\n".join(self.lines()) + "\n"


def find_run(api: KfpApi, name: str) -> Any:
    """A run by KFP's id or by the name that submit gave it: the newest of that name.

    Raises:
        UserError: there is none.
    """
    with api.errors(f"look for the run {name}"):
        if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", name):
            return api.client.get_run(name)
        found = api.named(api.client.list_runs, "runs", name, sort_by="created_at desc", namespace=api.namespace)
    if not found:
        raise UserError(f"no run {name}", hint="give the name that submit printed, or KFP's id of the run")
    return found[0]


def wait(
    api: KfpApi,
    kfp_run_id: str,
    *,
    timeout: float | None = None,
    poll: float = 15.0,
    say: Say = print,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Ended:
    """Wait until a run has ended, whichever way; says when a task changes its state.

    Args:
        timeout: seconds; None: for as long as it takes.
        poll: seconds between two looks; the first ones follow sooner.

    Raises:
        StillRunningError: the timeout is over, and the run goes on.
        TransientError: the API has not answered for a quarter of an hour.
        UserError: there is no such run, or the credentials are refused also when they are read anew.
    """
    begun, answered, pause, told = clock(), clock(), min(FIRST_POLL_SECONDS, poll), dict[str, str]()
    fresh = False  # whether the credentials were just read anew
    while True:
        try:
            with api.errors(f"look at the run {kfp_run_id}"):
                run = api.client.get_run(kfp_run_id)
            answered, fresh = clock(), False
            for line in _news(run, told):
                say(line)
            if str(run.state) not in ACTIVE:
                return _ended(run)
        except NotLoggedInError:
            if fresh:
                raise
            api.reconnect()
            fresh = True
            continue
        except TransientError:
            if clock() - answered > PATIENCE_SECONDS:
                raise
        if timeout is not None and clock() - begun + pause > timeout:
            raise StillRunningError(
                f"{kfp_run_id} has not ended after {timeout / 60:.0f} minutes, and goes on",
                hint=f"rfdetr-pipeline wait {kfp_run_id} waits on",
            )
        sleep(pause)
        pause = min(pause * 1.5, poll)


def cancel(api: KfpApi, run: Any) -> bool:
    """Stop a run; what it has stored stays, and the same run id continues. False if it has ended already."""
    if str(run.state) not in ACTIVE:
        return False
    with api.errors(f"cancel the run {run.display_name}"):
        api.client.terminate_run(run.run_id)
    return True


def logs(run: Any, stages: list[str], namespace: str, say: Say) -> None:
    """Print what stages logged: from the store what has ended, from its pod what runs.

    Raises:
        UserError: no stage of the run has logged anything yet.
    """
    place = _place(run)
    shown = 0
    for stage in stages:
        text = _stored_log(place, stage, str(run.run_id)) if place is not None else None
        if text is None:
            text = pod_log(namespace, str(run.run_id), CONTAINERS[stage].target)
        if text is None:
            continue
        shown += 1
        for line in text.splitlines():
            say(line)
    if not shown:
        raise UserError(f"no logs of {run.display_name} yet", hint="its pods may not have begun: kubectl get pods")


def _news(run: Any, told: dict[str, str]) -> list[str]:
    """A line for every task whose state is another one than it was."""
    titles = {facts.target: facts.title for facts in CONTAINERS.values()}
    lines = []
    for task in (run.run_details and run.run_details.task_details) or ():
        name, state = str(task.display_name), str(task.state or "")
        if name in titles and state and told.get(name) != state:
            told[name] = state
            lines.append(f"{titles[name]}: {state.lower()}")
    return lines


def _ended(run: Any) -> Ended:
    state, summary = str(run.state), None
    place = _place(run)
    if place is not None:
        reason = str(run.error.message) if run.error and run.error.message else ""
        try:
            summary = summarise(place, attempt=str(run.run_id), state=state, error=reason)
        except ExitError:
            summary = None  # how it ended is known all the same
    if state == "SUCCEEDED":
        return Ended(state, 0, summary)
    if state == "CANCELED":
        return Ended(state, CANCELLED, summary)
    return Ended(state, _code(summary), summary)


def _code(summary: dict[str, Any] | None) -> int:
    """Of the stage that failed; 2 where none could say so: an image, a quota or a node is for a person to mend."""
    failed = (
        next((row for row in summary["stages"] if row["stage"] == summary["failed_stage"]), None) if summary else None
    )
    if failed is None:
        return UserError.exit_code
    return KILLED if failed["state"] == "killed" else int(failed["exit_code"] or UserError.exit_code)


def _place(run: Any) -> Location | None:
    """Where a run writes, from its parameters; None if they do not tell, as for a run that is not ours."""
    parameters = (run.runtime_config and run.runtime_config.parameters) or {}
    root = parameters.get("root")
    if not root:
        return None
    return location(str(root)) / "runs" / str(parameters.get("run_id") or run.run_id)


def _stored_log(place: Location, stage: str, attempt: str) -> str | None:
    try:
        status = (place / "status" / f"{stage}.json").read_json()
        if status.get("attempt") != attempt or status["state"] == "running":
            return None
        return (place / "logs" / f"{stage}.log").read_text()
    except MissingObjectError:
        return None


def stage_names(chosen: str | None) -> list[str]:
    """The stages whose logs are wanted.

    Raises:
        UserError: there is no such stage.
    """
    if chosen is None:
        return [*(facts.name for facts in DAG), "notify"]
    name = chosen.replace("-", "_")
    if name not in CONTAINERS:
        raise UserError(f"--stage: no stage {chosen}", hint=f"one of {', '.join(CONTAINERS)}")
    return [name]
