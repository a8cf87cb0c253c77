"""Commands around a cluster: compile the pipeline for one, submit it, schedule it, follow it, clean up."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from components.images import DIGESTS, built_images, pinned_images
from pipelines.cron import parse_cron
from pipelines.kfp_api import Connection, KfpApi
from pipelines.platform import Profile, load_profile
from rfdetr_core.config import merge, parse_assignments, parse_overrides
from rfdetr_core.errors import ConfigError
from rfdetr_core.storage import location

POLL_SECONDS = 15.0
console = Console(highlight=False)

PROFILE = typer.Option("--profile", help="cpu, single-gpu, multi-gpu, multi-node, spot-gpu, or a path of yours.")
PINNED = typer.Option("--pinned", help="Name images by the digests that make push wrote.")
DIGESTS_FILE = typer.Option("--digests", help="The file that make push wrote.")
CHOICES = typer.Option("--choices", help="Offer GPU types and counts as choices in the UI (KFP 2.16 or later).")
RESOURCES = typer.Option(
    "--resources",
    help="Write a Pipeline and a PipelineVersion for kubectl, in this namespace (KFP in native mode).",
)
CONFIG = typer.Option("--config", help="YAML of the run: a path or an s3:// URI.")
SET = typer.Option("--set", help="Override one field, such as train.epochs=3; may be repeated.")
OVERRIDES = typer.Option("--overrides", help='Override by a JSON object, such as \'{"train": {"epochs": 3}}\'.')
ROOT = typer.Option("--root", envvar="RFDETR_ROOT", help="Store: s3://bucket/prefix; by default the profile's.")
RUN_ID = typer.Option(
    "--run-id", help="Name of the run; the same name again continues it; by default it is named by its content."
)
HOST = typer.Option(
    "--host", envvar="KF_PIPELINES_ENDPOINT", help="Address of KFP; by default the kubeconfig leads there."
)
NAMESPACE = typer.Option(
    "--namespace", envvar="RFDETR_NAMESPACE", help="Where the run's pods are; by default kubeflow."
)
GPU_TYPE = typer.Option("--gpu-type", help="One of the profile's gpu.types.")
GPU_COUNT = typer.Option("--gpu-count", help="GPUs of the pod that trains, one of the profile's gpu.counts.")
EXPERIMENT = typer.Option("--experiment", help="Experiment of KFP; by default the config's name.")
UNPINNED = typer.Option(
    "--unpinned", help="Take images by tag, as make images names them: for a cluster on this machine."
)
IF_CHANGED = typer.Option("--if-changed", help="Only if dataset or config differ from the champion's.")
WAIT = typer.Option("--wait", help="Wait until it has ended, with the exit code of the stage that failed.")
TIMEOUT = typer.Option("--timeout", min=0.0, help="Minutes to wait at most; the run goes on.")
POLL = typer.Option("--poll", min=0.1, help="Seconds between two looks.")
SUMMARY = typer.Option("--summary", help="Write how it ended into this file, as Markdown.")
OUTPUT = typer.Option("--output", "-o", help="Write the run's names and addresses into this file, as JSON.")
RUN = typer.Argument(help="The run's name, or KFP's id of it.")
DEBUG = typer.Option("--debug", help="Show tracebacks.")


def register(app: typer.Typer) -> None:
    """Add the commands to rfdetr-pipeline."""
    for command in (submit, schedule, unschedule, wait, logs, cancel):
        app.command()(command)
    app.command("compile")(compile_pipeline)
    app.command("gc")(collect_garbage)


def compile_pipeline(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write it.")] = Path("retrain.yaml"),
    profile: Annotated[str, PROFILE] = "single-gpu",
    pinned: Annotated[bool, PINNED] = False,
    digests: Annotated[Path, DIGESTS_FILE] = DIGESTS,
    choices: Annotated[bool, CHOICES] = False,
    resources: Annotated[str | None, RESOURCES] = None,
) -> None:
    """Write the DAG as KFP IR YAML, for a cluster; the same bytes every time."""
    wanted, images = load_profile(profile), pinned_images(digests) if pinned else built_images()
    from pipelines.compiled import compile_for  # kfp takes a second

    compiled = compile_for(wanted, images, choices=choices)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(compiled.text if resources is None else compiled.resources(resources))
    console.print(f"wrote {output}")


def submit(
    config: Annotated[str, CONFIG],
    assignments: Annotated[list[str] | None, SET] = None,
    overrides: Annotated[str, OVERRIDES] = "{}",
    root: Annotated[str | None, ROOT] = None,
    profile: Annotated[str, PROFILE] = "single-gpu",
    run_id: Annotated[str, RUN_ID] = "",
    host: Annotated[str | None, HOST] = None,
    namespace: Annotated[str | None, NAMESPACE] = None,
    gpu_type: Annotated[str | None, GPU_TYPE] = None,
    gpu_count: Annotated[int | None, GPU_COUNT] = None,
    experiment: Annotated[str, EXPERIMENT] = "",
    digests: Annotated[Path, DIGESTS_FILE] = DIGESTS,
    unpinned: Annotated[bool, UNPINNED] = False,
    choices: Annotated[bool, CHOICES] = False,
    if_changed: Annotated[bool, IF_CHANGED] = False,
    follow: Annotated[bool, WAIT] = False,
    timeout: Annotated[float | None, TIMEOUT] = None,
    poll: Annotated[float | None, POLL] = None,
    summary: Annotated[Path | None, SUMMARY] = None,
    output: Annotated[Path | None, OUTPUT] = None,
    debug: Annotated[bool, DEBUG] = False,  # main reads it
) -> None:
    """Run the DAG on a cluster with Kubeflow Pipelines; the same command twice starts it once."""
    from pipelines import submit as entry

    for option, value, goes in (
        ("--timeout", timeout, follow),
        ("--poll", poll, follow),
        ("--summary", summary, follow or if_changed),
    ):
        if value is not None and not goes:
            raise ConfigError(f"{option} goes with --wait", hint="give it as well")
    request = _request(
        entry, config, assignments, overrides, root, load_profile(profile), digests=digests, unpinned=unpinned
    )
    request = replace(
        request, run_id=run_id, gpu_type=gpu_type, gpu_count=gpu_count, experiment=experiment, choices=choices
    )
    prepared = entry.prepare(request)
    api = KfpApi(Connection(host, namespace))
    done = entry.submit(prepared, api, if_changed=if_changed, say=_say)
    if done is None:
        _say("nothing to do")
        if output is not None:
            output.write_text(json.dumps({"kfp_run_id": None}) + "\n")
        if summary is not None:
            summary.write_text("# Nothing changed: no run was started\n")
        return
    link = f"{api.link}/#/runs/details/{done.kfp_run_id}"
    if output is not None:
        output.write_text(json.dumps({**asdict(done), "link": link}, indent=2) + "\n")
    _say(f"{'started' if done.created else 'found, ' + done.state.lower()}: {done.run_id}")
    _say(f"run:  {link}")
    _say(f"data: {done.run_uri}")
    if follow:
        _wait(api, done.kfp_run_id, timeout, poll or POLL_SECONDS, summary)


def schedule(
    name: Annotated[str, typer.Argument(help="Name of the schedule; one of that name is replaced.")],
    config: Annotated[str, CONFIG],
    cron: Annotated[str, typer.Option("--cron", help='Six fields, seconds first: "0 0 3 * * 1" is Mondays at 03:00.')],
    assignments: Annotated[list[str] | None, SET] = None,
    overrides: Annotated[str, OVERRIDES] = "{}",
    root: Annotated[str | None, ROOT] = None,
    profile: Annotated[str, PROFILE] = "single-gpu",
    host: Annotated[str | None, HOST] = None,
    namespace: Annotated[str | None, NAMESPACE] = None,
    gpu_type: Annotated[str | None, GPU_TYPE] = None,
    gpu_count: Annotated[int | None, GPU_COUNT] = None,
    experiment: Annotated[str, EXPERIMENT] = "",
    digests: Annotated[Path, DIGESTS_FILE] = DIGESTS,
    unpinned: Annotated[bool, UNPINNED] = False,
    choices: Annotated[bool, CHOICES] = False,
    debug: Annotated[bool, DEBUG] = False,
) -> None:
    """Run the DAG regularly. Times are those of KFP's controller: CRON_SCHEDULE_TIMEZONE, UTC unless it is set."""
    from pipelines import submit as entry

    times = parse_cron(cron)
    request = _request(
        entry, config, assignments, overrides, root, load_profile(profile), digests=digests, unpinned=unpinned
    )
    request = replace(request, gpu_type=gpu_type, gpu_count=gpu_count, experiment=experiment, choices=choices)
    prepared = entry.prepare(request)
    made = entry.schedule(prepared, KfpApi(Connection(host, namespace)), name, times, say=_say)
    _say(f"{'scheduled' if made else 'scheduled already'}: {name}, {times.text}")
    for moment in itertools.islice(times.after(datetime.now()), 3):
        _say(f"  {moment:%a %Y-%m-%d %H:%M:%S}")
    _say(
        "by the clock of KFP's controller (ml-pipeline-scheduledworkflow): CRON_SCHEDULE_TIMEZONE, UTC unless it is set"
    )


def unschedule(
    name: Annotated[str, typer.Argument(help="Name of the schedule.")],
    host: Annotated[str | None, HOST] = None,
    namespace: Annotated[str | None, NAMESPACE] = None,
    debug: Annotated[bool, DEBUG] = False,
) -> None:
    """Remove a schedule; runs that it started stay."""
    from pipelines import submit as entry

    entry.unschedule(KfpApi(Connection(host, namespace)), name)
    _say(f"removed the schedule {name}")


def wait(
    run: Annotated[str, RUN],
    host: Annotated[str | None, HOST] = None,
    namespace: Annotated[str | None, NAMESPACE] = None,
    timeout: Annotated[float | None, TIMEOUT] = None,
    poll: Annotated[float, POLL] = POLL_SECONDS,
    summary: Annotated[Path | None, SUMMARY] = None,
    debug: Annotated[bool, DEBUG] = False,
) -> None:
    """Wait until a run has ended.

    Exit code: 0; that of the stage that failed; 143 if it was cancelled; 124 after the timeout.
    """
    from pipelines.following import find_run

    api = KfpApi(Connection(host, namespace))
    _wait(api, str(find_run(api, run).run_id), timeout, poll, summary)


def logs(
    run: Annotated[str, RUN],
    stage: Annotated[str | None, typer.Option("--stage", help="Only this stage.")] = None,
    host: Annotated[str | None, HOST] = None,
    namespace: Annotated[str | None, NAMESPACE] = None,
    debug: Annotated[bool, DEBUG] = False,
) -> None:
    """Print what the stages of a run logged."""
    from pipelines import following

    stages = following.stage_names(stage)
    api = KfpApi(Connection(host, namespace))
    following.logs(following.find_run(api, run), stages, api.pods_namespace, _say)


def cancel(
    run: Annotated[str, RUN],
    host: Annotated[str | None, HOST] = None,
    namespace: Annotated[str | None, NAMESPACE] = None,
    debug: Annotated[bool, DEBUG] = False,
) -> None:
    """Stop a run; submitting it again with the same --run-id continues it."""
    from pipelines import following

    api = KfpApi(Connection(host, namespace))
    found = following.find_run(api, run)
    stopped = following.cancel(api, found)
    _say(
        f"cancelled {found.display_name}"
        if stopped
        else f"{found.display_name} has ended already: {found.state.lower()}"
    )


def collect_garbage(
    keep: Annotated[int, typer.Option("--keep", help="How many of the newest runs of each model stay as they are.")],
    root: Annotated[str | None, typer.Option("--root", envvar="RFDETR_ROOT", help="The store.")] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Do it; without this it is only shown.")] = False,
    debug: Annotated[bool, DEBUG] = False,
) -> None:
    """Remove old runs, datasets that nothing uses, checkpoints of registered runs; nothing that the registry needs."""
    if root is None:
        raise ConfigError("no store to look at", hint="give --root s3://bucket/prefix, or set RFDETR_ROOT")
    from pipelines.housekeeping import carry_out, plan

    place = location(root)
    made = plan(place, keep=keep)
    for note in made.notes:
        _say(f"note: {note}")
    if delete:
        carry_out(place, made, _say)
    else:
        for removal in made.removals:
            _say(f"{removal.size / 1e6:10.1f} MB  {removal.folder}: {removal.reason}")
    done = "removed" if delete else "to remove; --delete does it"
    _say(f"{made.size / 1e9:.3f} GB in {len(made.removals)} places {done}")


def _request(
    entry: Any,
    config: str,
    assignments: list[str] | None,
    overrides: str,
    root: str | None,
    profile: Profile,
    *,
    digests: Path,
    unpinned: bool,
) -> Any:
    place = root or profile.inputs.root
    if not place:
        raise ConfigError("no store for the run", hint="give --root s3://bucket/prefix, or set RFDETR_ROOT")
    changed = merge(parse_overrides(overrides), parse_assignments(assignments or []))
    images = built_images() if unpinned else pinned_images(digests)
    return entry.Request(config, changed, place, profile, images, unpinned=unpinned)


def _wait(api: Any, kfp_run_id: str, timeout: float | None, poll: float, summary: Path | None) -> None:
    from pipelines.following import wait as wait_for

    ended = wait_for(api, kfp_run_id, timeout=None if timeout is None else timeout * 60, poll=poll, say=_say)
    for line in ended.lines():
        _say(line)
    if summary is not None:
        summary.write_text(ended.markdown())
    raise typer.Exit(ended.exit_code)


def _say(line: str) -> None:
    console.print(line, soft_wrap=True, markup=False)
