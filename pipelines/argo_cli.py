"""rfdetr-pipeline argo: the DAG on Argo Workflows alone, without Kubeflow Pipelines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from components.images import DIGESTS, built_images, pinned_images
from components.stages import CONTAINERS
from pipelines.platform import Profile, load_profile
from pipelines.pods import refuse_nodes_without_trainjob
from rfdetr_core.config import load_run_config, merge, parse_assignments, parse_overrides
from rfdetr_core.errors import ConfigError
from rfdetr_core.storage import location

argo = typer.Typer(no_args_is_help=True, help="The DAG on Argo Workflows alone, without Kubeflow Pipelines.")
console = Console(highlight=False)

PROFILE = typer.Option("--profile", help="cpu, single-gpu, multi-gpu, multi-node, spot-gpu, or the path of a file.")
NAMESPACE = typer.Option("--namespace", help="Namespace of the cluster.")
PINNED = typer.Option("--pinned", help="Name images by the digests that make push wrote.")
DIGESTS_FILE = typer.Option("--digests", help="The file that make push wrote.")
CRON = typer.Option("--cron", help="Also a schedule: minute, hour, day, month, day of the week; five fields.")
TIMEZONE = typer.Option("--timezone", help="In which the cron counts, such as Europe/Berlin.")
DEBUG = typer.Option("--debug", help="Show tracebacks.")


@argo.command("compile")
def compile_resources(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write it.")] = Path("workflow.yaml"),
    profile: Annotated[str, PROFILE] = "single-gpu",
    namespace: Annotated[str, NAMESPACE] = "rfdetr",
    pinned: Annotated[bool, PINNED] = False,
    digests: Annotated[Path, DIGESTS_FILE] = DIGESTS,
    cron: Annotated[str | None, CRON] = None,
    timezone: Annotated[str, TIMEZONE] = "Etc/UTC",
    root: Annotated[str | None, typer.Option("--root", help="For the schedule: where everything lies.")] = None,
    config: Annotated[str | None, typer.Option("--config", help="For the schedule: the run's YAML.")] = None,
    debug: Annotated[bool, DEBUG] = False,
) -> None:
    """Write the WorkflowTemplate, and with --cron the CronWorkflow, as YAML; the same bytes every time."""
    wanted, images = load_profile(profile), pinned_images(digests) if pinned else built_images()
    from pipelines.argo import as_yaml, cron_workflow, workflow_template

    resources: list[Any] = [workflow_template(wanted, images, namespace=namespace)]
    arguments = {name: value for name, value in (("root", root), ("config", config)) if value is not None}
    if cron is not None:
        resources.append(cron_workflow(cron=cron, timezone=timezone, namespace=namespace, arguments=arguments))
    elif arguments:
        raise ConfigError("--root and --config are for a schedule", hint="give --cron as well")
    _lint(resources)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(as_yaml(*resources))
    console.print(f"wrote {output}", soft_wrap=True)


@argo.command("submit")
def submit(
    config: Annotated[str, typer.Option("--config", help="YAML of the run, an s3:// URI.")],
    root: Annotated[str, typer.Option("--root", envvar="RFDETR_ROOT", help="Store: s3://bucket/prefix.")],
    assignments: Annotated[list[str] | None, typer.Option("--set", help="Override one field; may be repeated.")] = None,
    overrides: Annotated[str, typer.Option("--overrides", help="Override by a JSON object.")] = "{}",
    run_id: Annotated[str, typer.Option("--run-id", help="Name of the run. [default: the time]")] = "",
    profile: Annotated[str, PROFILE] = "single-gpu",
    namespace: Annotated[str | None, NAMESPACE] = None,
    context: Annotated[str | None, typer.Option("--context", help="Context of the kubeconfig.")] = None,
    digests: Annotated[Path, DIGESTS_FILE] = DIGESTS,
    cron: Annotated[str | None, CRON] = None,
    timezone: Annotated[str, TIMEZONE] = "Etc/UTC",
    debug: Annotated[bool, DEBUG] = False,
) -> None:
    """Bring the WorkflowTemplate into the cluster and start a run; with --cron set a schedule instead.

    Images are named by digest (make push). All that can be known to be wrong is said before anything is created. The
    same command with the same --run-id starts one run only, and after one that failed continues it.
    """
    wanted, images = load_profile(profile), pinned_images(digests)
    changed = merge(parse_overrides(overrides), parse_assignments(assignments or []))
    for name, uri in (("--config", config), ("--root", root)):
        if location(uri).local_path is not None:
            raise ConfigError(f"{name}: {uri}: a cluster does not see this machine", hint="give an s3:// URI")
    refuse_nodes_without_trainjob(load_run_config(config, changed), wanted)
    if cron is not None and run_id:
        raise ConfigError("--run-id does not go with --cron: every run of a schedule is a new one")
    from pipelines.argo import EXECUTOR, account, cron_workflow, workflow_template
    from pipelines.argo_submit import ArgoCluster
    from pipelines.local import new_run_id

    cluster = ArgoCluster(context=context, namespace=namespace)
    template = workflow_template(wanted, images, namespace=cluster.namespace)
    arguments = {"root": root, "config": config, "overrides": json.dumps(changed)}
    schedules = []
    if cron is not None:
        schedules = [cron_workflow(cron=cron, timezone=timezone, namespace=cluster.namespace, arguments=arguments)]
    _lint([template, *schedules])
    unseen = cluster.check(
        kinds=("workflowtemplates", "cronworkflows" if schedules else "workflows"),
        accounts=(EXECUTOR, *map(account, CONTAINERS.values())),
        secrets=secrets_of(wanted),
    )
    if unseen:
        console.print(f"not looked at, for want of rights: {', '.join(unseen)}", soft_wrap=True, markup=False)
    console.print(f"WorkflowTemplate {template.metadata.name}: {cluster.apply('workflowtemplates', template)}")
    if schedules:
        done = cluster.apply("cronworkflows", schedules[0])
        console.print(f"CronWorkflow {schedules[0].metadata.name}: {done}; {cron} {timezone}", markup=False)
        return
    run_uri = f"{root.rstrip('/')}/runs/{run_id or new_run_id()}"
    name, state = cluster.start(run_uri, {**arguments, "run_id": run_uri.rpartition("/")[2]})
    console.print(f"workflow {name} {state}", markup=False)
    console.print(f"results: {run_uri}", soft_wrap=True, markup=False)
    console.print(f"follow:  kubectl -n {cluster.namespace} get workflow {name} -w", soft_wrap=True, markup=False)


def secrets_of(profile: Profile) -> set[str]:
    """Every Secret without which a pod does not start."""
    names = {row.secret for stage in CONTAINERS for row in profile.secrets(stage) if not row.optional}
    return names | {*profile.image_pull_secrets, *([profile.s3.ca_secret] if profile.s3.ca_secret else [])}


def _lint(resources: Sequence[Any]) -> None:
    from pipelines.argo import EXECUTOR, account, as_document
    from pipelines.argo_lint import lint

    known = {EXECUTOR, *map(account, CONTAINERS.values())}
    problems = lint([as_document(resource) for resource in resources], accounts=known)
    if problems:
        raise ConfigError("; ".join(problems))
