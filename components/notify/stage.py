"""notify: tell how a run ended, whichever way. Runs last, reads the status files, and never fails a run.

Unlike the stages before it, it makes nothing that another one reads: its exit code is 0 whatever happens, and what
kept it from telling stands in its own status file and log.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.cluster import Cluster
from components.notify.summary import details, headline, markdown, slack, summarise
from components.notify.webhook import is_slack, post
from components.runtime import Stage, StageStatus, locate_run, stage_logging
from components.train.nodes import delete_train_jobs
from components.train.trainjob import AWAITED
from rfdetr_core.config import NotifyConfig, load_run_config, merge, parse_overrides
from rfdetr_core.config.yaml_text import read_yaml
from rfdetr_core.errors import ConfigError, ExitError, MissingObjectError, RFDETRError, UserError
from rfdetr_core.storage import Location, location

STAGE = Stage(name="notify", folder="", summary="Tell how a run ended.", reads=("notify",))

log = logging.getLogger("stage.notify")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 0, except for arguments that are none."""
    arguments = _parser().parse_args(argv)
    work = Path(tempfile.mkdtemp(prefix="rfdetr-notify-"))
    status, run = StageStatus(STAGE), None
    try:
        with stage_logging(STAGE, work / "stage.log"):
            try:
                run, _ = locate_run(arguments.run_uri)
                status.facts |= end_train_jobs(run)
                status.facts |= tell(run, arguments, status.attempt)
                status.end(0, "succeeded")
            except (Exception, ExitError) as error:
                log.error("nobody was told: %s", error, exc_info=not isinstance(error, ExitError))
                status.end(error.exit_code if isinstance(error, ExitError) else RFDETRError.exit_code, error=error)
        if run is not None:
            status.write_log(run, work / "stage.log")
            status.write(run)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return 0


def end_train_jobs(run: Location) -> dict[str, Any]:
    """Delete what is left of the run's TrainJobs: a train stage that was killed had no time for it.

    What keeps it from that must not keep people from being told how the run ended.
    """
    if AWAITED not in os.environ:
        return {}
    try:
        names = delete_train_jobs(run.uri, Cluster.of_this_pod())
    except RFDETRError as error:
        log.error("the run's TrainJobs could not be looked for or deleted: %s", error)
        return {"train_jobs": f"not deleted: {error}"}
    log.info("deleted TrainJobs: %s", ", ".join(names) or "none was left")
    return {"train_jobs": names}


def tell(run: Location, arguments: argparse.Namespace, attempt: str) -> dict[str, Any]:
    """Write summary.json and summary.md below the run, then post to the webhook if there is one; facts for the status.

    Raises:
        ExitError: the store or the webhook cannot be reached, or refuses.
    """
    summary = summarise(run, attempt=attempt, state=arguments.state, error=arguments.error)
    for line in (headline(summary), *details(summary)):
        log.info("%s", line)
    (run / "summary.json").write_json(summary)
    (run / "summary.md").write_bytes(markdown(summary).encode())
    settings = notify_settings(run, arguments.config, arguments.overrides)
    name = settings.webhook_secret_env
    if name is None:
        return {"told": "nobody: notify.webhook_secret_env is null"}
    url = os.environ.get(name, "").strip()
    if not url:
        raise UserError(
            f"the environment variable {name} of notify.webhook_secret_env is not set",
            hint="give its Secret to the stage notify in the profile",
        )
    form = settings.format if settings.format != "auto" else "slack" if is_slack(url) else "json"
    post(url, slack(summary) if form == "slack" else summary)
    log.info("told the webhook")
    return {"told": f"the webhook in {name}, as {form}"}


def notify_settings(run: Location, config_uri: str, overrides: str) -> NotifyConfig:
    """The section notify of the run; of the file it was started with, where the first stage could not resolve that.

    Raises:
        ConfigError: what stands there is not legal.
    """
    try:
        return load_run_config((run / "config.yaml").uri).notify
    except MissingObjectError:
        if not config_uri:
            return NotifyConfig()
    said = read_yaml(location(config_uri).read_bytes(), config_uri)
    changed = merge(said if isinstance(said, dict) else {}, parse_overrides(overrides))
    section = changed.get("notify") or {}
    try:
        return NotifyConfig.parse(section)
    except (ConfigError, TypeError, ValueError):
        # Its value may be the secret itself, pasted into the wrong place: it is not repeated.
        raise ConfigError(
            f"{config_uri}: the section notify is not legal", hint="see what validate_dataset says"
        ) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m components.notify.stage", description=STAGE.summary)
    parser.add_argument("--run-uri", required=True, help="<root>/runs/<run-id>: a folder or s3://bucket/prefix/runs/id")
    parser.add_argument("--state", default="", help="how the orchestrator says it ended: SUCCEEDED, FAILED, CANCELLED")
    parser.add_argument("--error", default="", help="what it says of the failure")
    parser.add_argument("--config", default="", help="what the run was started with, where it could not be resolved")
    parser.add_argument("--overrides", default="", help="JSON object merged over it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
