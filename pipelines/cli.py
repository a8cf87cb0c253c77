"""rfdetr-pipeline: run the retraining DAG on this machine or on a cluster."""

from __future__ import annotations

import json
import sys
import warnings
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from pipelines.argo_cli import argo
from pipelines.cluster_cli import register
from pipelines.containers.engine import Containers, local_inputs
from pipelines.local import RunOutcome, new_run_id, run_locally
from pipelines.models_cli import models
from rfdetr_core.config import VARIANTS, RunConfig, load_run_config, merge, parse_assignments, parse_overrides
from rfdetr_core.errors import CheckpointError, ConfigError, ExitError
from rfdetr_core.pretrained import fetch_weights, store_weights
from rfdetr_core.storage import location

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
weights = typer.Typer(no_args_is_help=True, help="Pretrained weights in the store.")
app.add_typer(weights, name="weights")
app.add_typer(models, name="models")
app.add_typer(argo, name="argo")
register(app)
console = Console(highlight=False)

CONFIG = typer.Option("--config", help="YAML of the run: a path or an s3:// URI.")
SET = typer.Option("--set", help="Override one field, such as train.epochs=3; may be repeated.")
OVERRIDES = typer.Option("--overrides", help='Override by a JSON object, such as \'{"train": {"epochs": 3}}\'.')
ROOT = typer.Option(
    "--root", envvar="RFDETR_ROOT", help="Store: s3://bucket/prefix or a folder. [default: an S3 server over ./runs]"
)
RUN_ID = typer.Option("--run-id", help="Name of the run; the same name again continues it. [default: the time]")
IN_CONTAINERS = typer.Option("--in-containers", help="Run every stage in its own image, as a cluster does.")
CPUS = typer.Option("--cpus", min=0.1, help="Cores of each container; with --in-containers.")
MEMORY = typer.Option("--memory", help="Memory of each container, such as 8g; with --in-containers.")
GPUS = typer.Option("--gpus", help="Give all GPUs to the stages that compute; with --in-containers.")
DEBUG = typer.Option("--debug", help="Show tracebacks, and all that kfp says.")


@app.command()
def run(
    config: Annotated[str, CONFIG],
    assignments: Annotated[list[str] | None, SET] = None,
    overrides: Annotated[str, OVERRIDES] = "{}",
    root: Annotated[str | None, ROOT] = None,
    run_id: Annotated[str, RUN_ID] = "",
    in_containers: Annotated[bool, IN_CONTAINERS] = False,
    cpus: Annotated[float | None, CPUS] = None,
    memory: Annotated[str | None, MEMORY] = None,
    gpus: Annotated[bool, GPUS] = False,
    debug: Annotated[bool, DEBUG] = False,
) -> None:
    """Run the whole DAG on this machine, every stage in a process of its own, or in a container.

    Exit code: that of the stage that failed, 2 for what you must change, 75 for what is worth another try.
    """
    changed = merge(parse_overrides(overrides), parse_assignments(assignments or []))
    resolved = load_run_config(config, changed)  # what can be known to be wrong is said before anything starts
    if resolved.train.num_nodes > 1:
        raise ConfigError(
            f"train.num_nodes: {resolved.train.num_nodes}, and this is one machine",
            hint="submit to a cluster with the profile multi-node",
        )
    config_uri = _absolute(config)
    if root is None:
        _refuse_foreign_store(config_uri, resolved.dataset.uri)
    containers = None
    if in_containers:
        paths, mounts = local_inputs(config_uri, resolved)
        changed = merge(changed, paths)
        webhook = resolved.notify.webhook_secret_env
        containers = Containers(cpus=cpus, memory=memory, gpus=gpus, mounts=mounts, webhook=webhook)
    elif cpus or memory or gpus:
        raise ConfigError("--cpus, --memory and --gpus are for containers", hint="give --in-containers as well")
    run_id = run_id or new_run_id()
    try:
        outcome = run_locally(config_uri, changed, run_id=run_id, root=root, verbose=debug, containers=containers)
    except KeyboardInterrupt:
        print(f"stopped; run the same command with --run-id {run_id} to continue", file=sys.stderr)
        raise typer.Exit(130) from None
    _show(outcome, resolved)
    raise typer.Exit(outcome.exit_code)


@weights.command("put")
def put_weights(
    file: Annotated[str, typer.Argument(help="A path, the name of a published file, an https:// or s3:// address.")],
    root: Annotated[str | None, typer.Option("--root", envvar="RFDETR_ROOT", help="Store: s3://bucket/prefix.")] = None,
    debug: Annotated[bool, DEBUG] = False,  # main reads it
) -> None:
    """Check a weight file and bring it into the store once, for stages without internet."""
    if root is None:
        raise ConfigError("no store to put the weights into", hint="give --root s3://bucket/prefix, or set RFDETR_ROOT")
    from rfdetr_core.models.weight_file import read_weight_file, refuse_other_kinds, variant_of  # torch takes seconds

    target = location(root)
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        path = fetch_weights(file)
        content = read_weight_file(path)
    refuse_other_kinds(content)
    variant = variant_of(content)
    if variant is not None and variant not in VARIANTS:
        raise CheckpointError(f"{path}: holds weights of the kind {variant}", hint=f"known are {', '.join(VARIANTS)}")
    place, sent = store_weights(path, content.md5, target)
    size = f"{path.stat().st_size / 1e6:.1f} MB"
    names = f": {', '.join(content.class_names)}" if content.class_names else ", without names"
    lines = [
        f"put {path.name} ({size}) into the store" if sent else f"{path.name} ({size}) is in the store already",
        f"model.pretrain_weights: {place.uri}",
        f"variant: {variant or 'unknown: set model.variant yourself'}",
        f"classes: {content.num_classes}{names}",
        *(f"note: {note}" for note in (*(str(remark.message) for remark in remarks), *content.notes)),
    ]
    if content.stubs:
        lines.append(f"note: unknown classes in its metadata, never loaded: {', '.join(content.stubs)}")
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)


def _refuse_foreign_store(*uris: str) -> None:
    """The server that is started for a run knows nothing of the user's own S3."""
    for uri in uris:
        if location(uri).local_path is None:
            raise ConfigError(
                f"{uri} is in S3, and without --root the run uses a store of its own",
                hint="give --root s3://bucket/prefix in the same store, or a local copy",
            )


def _absolute(uri: str) -> str:
    """Stages may run in another folder: a path becomes absolute, a URI stays."""
    place = location(uri)
    return str(place.local_path) if place.local_path is not None else place.uri


def _show(outcome: RunOutcome, config: RunConfig) -> None:
    settings = ", ".join(f"{name} {json.dumps(value)}" for name, value in _settings(config))
    time = Column("time", justify="right")
    table = Table("stage", "outcome", time, "result", title=f"run {outcome.run_uri}", title_justify="left")
    for stage in outcome.stages:
        seconds = "" if stage.seconds is None else f"{stage.seconds:.1f} s"
        colour = {"succeeded": "green", "already done": "green", "not started": "dim"}.get(stage.state, "red")
        table.add_row(stage.stage, f"[{colour}]{stage.state}[/]", seconds, stage.result, style=None)
    console.print(table, soft_wrap=True)
    console.print(f"set: {settings or 'nothing, all defaults'}", soft_wrap=True, markup=False)
    for line in _results(outcome):
        console.print(line, soft_wrap=True, markup=False)
    for stage in outcome.stages:
        if stage.error:
            console.print(f"[red]{stage.stage}[/] failed with exit code {stage.exit_code}:", end=" ")
            console.print(stage.error, soft_wrap=True, markup=False)
    console.print(f"{'done' if outcome.exit_code == 0 else 'failed'} in {outcome.seconds:.1f} s")


def _settings(config: RunConfig) -> list[tuple[str, Any]]:
    """Every field that differs from its default, dotted."""
    defaults = RunConfig.parse(
        {"name": config.name, "dataset": {"uri": config.dataset.uri}, "model": {"variant": config.model.variant}}
    )
    before, now = defaults.as_dict(), config.as_dict()
    rows: list[tuple[str, Any]] = [
        ("name", config.name),
        ("dataset.uri", config.dataset.uri),
        ("model.variant", config.model.variant),
    ]
    for section, fields in now.items():
        if isinstance(fields, dict):
            rows += [(f"{section}.{k}", v) for k, v in fields.items() if v != before[section][k]]
    return rows


def _results(outcome: RunOutcome) -> list[str]:
    """The numbers one looks for first, where the run is a local folder."""
    if outcome.folder is None or outcome.exit_code != 0:
        return []
    metrics = json.loads((outcome.folder / "evaluate" / "metrics.json").read_text())
    decision = json.loads((outcome.folder / "promote" / "decision.json").read_text())
    candidate = metrics["candidate"]
    return [
        f"{metrics['split']}: mAP {candidate['map']:.3f}, mAP50 {candidate['map50']:.3f}",
        f"promotion: {decision['outcome']} ({decision['reason']}){'' if decision['guarded'] else ', unguarded store'}",
        f"report: {outcome.folder / 'evaluate' / 'report.html'}",
        f"model: {outcome.folder / 'export' / 'model.onnx'}",
    ]


def main() -> None:
    """Entry point: one line for what a user can mend, and the right exit code."""
    debug = "--debug" in sys.argv
    try:
        app()
    except ExitError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
