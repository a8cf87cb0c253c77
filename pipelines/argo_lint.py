"""What a schema does not see in Argo's resources, and `argo lint` or the controller would say too late.

References that lead nowhere, cycles, arguments that nobody gives, volumes that are not there, a cron that means
something else; and our own rules: what may be retried, who a container is, images by digest.
"""

from __future__ import annotations

import graphlib
import json
import re
import zoneinfo
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from pipelines.argo import RETRIED
from pipelines.cron import parse_cron
from rfdetr_core.errors import ConfigError

Json = dict[str, Any]

_TAG = re.compile(r"\{\{(.*?)\}\}")


def lint(documents: Sequence[Json], *, accounts: Collection[str] | None = None) -> list[str]:
    """Everything wrong in these resources, a line each; those of one installation together.

    Args:
        accounts: service accounts that exist, if that is known.
    """
    templates = {d["metadata"]["name"]: d for d in documents if d["kind"] == "WorkflowTemplate"}
    found = []
    for document in documents:
        spec, name = document["spec"], f"{document['kind']} {document['metadata']['name']}"
        if document["kind"] == "CronWorkflow":
            problems = [*_schedule(spec), *_arguments_for(spec["workflowSpec"], templates)]
        elif "workflowTemplateRef" in spec:
            problems = list(_arguments_for(spec, templates))
        else:
            problems = [*_workflow(spec), *_accounts(spec, accounts)]
        found += [f"{name}: {problem}" for problem in problems]
    return found


def _parameters(section: Json | None) -> dict[str, Json]:
    return {row["name"]: row for row in ((section or {}).get("parameters") or ())}


def _without_value(section: Json | None) -> set[str]:
    return {name for name, row in _parameters(section).items() if "value" not in row and "default" not in row}


def _arguments_for(spec: Json, templates: Mapping[str, Json]) -> Iterator[str]:
    """Of a workflow that refers to a template: whether it is there, and has all that it needs."""
    name = spec.get("workflowTemplateRef", {}).get("name")
    if name not in templates:
        yield f"workflowTemplateRef: there is no WorkflowTemplate {name}"
        return
    wanted = templates[name]["spec"].get("arguments")
    given = set(_parameters(spec.get("arguments")))
    for missing in sorted(_without_value(wanted) - given):
        yield f"argument {missing} is not given, and {name} has no default for it"
    for unknown in sorted(given - set(_parameters(wanted))):
        yield f"argument {unknown} is none of {name}'s"


def _schedule(spec: Json) -> Iterator[str]:
    for cron in spec.get("schedules") or ("",):
        problem = cron_problem(cron)
        if problem:
            yield f"schedule {cron!r}: {problem}"
    zone = spec.get("timezone")
    if not zone:
        yield "timezone is missing: the controller's own would count"
    elif zone not in zoneinfo.available_timezones():
        yield f"timezone {zone} is none of the tz database"
    if spec.get("concurrencyPolicy") not in ("Allow", "Forbid", "Replace"):
        yield f"concurrencyPolicy {spec.get('concurrencyPolicy')}: must be Allow, Forbid or Replace"


def cron_problem(text: str) -> str:
    """Why this is no cron of five fields (minute, hour, day, month, day of the week); empty if it is one."""
    count = len(text.split())
    if count != 5:
        return f"{count} fields, not five: minute, hour, day, month, day of the week (no seconds, as KFP has)"
    try:
        parse_cron(f"0 {text}")
    except ConfigError as error:
        return error.message.removeprefix("--cron: ")
    return ""


def _workflow(spec: Json) -> Iterator[str]:
    names = [template["name"] for template in spec.get("templates", ())]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"two templates are called {name}"
    templates = {template["name"]: template for template in spec.get("templates", ())}
    for field in ("entrypoint", "onExit"):
        if spec.get(field) not in templates:
            yield f"{field} {spec.get(field)}: no such template"
    known = set(_parameters(spec.get("arguments")))
    for name, template in templates.items():
        for problem in (
            *_references(template, known),
            *(_tasks(template["dag"], templates) if "dag" in template else _container(template, spec)),
        ):
            yield f"template {name}: {problem}"


def _references(template: Json, workflow_parameters: set[str]) -> Iterator[str]:
    """Parameters that a template names and nobody declares."""
    own = set(_parameters(template.get("inputs")))
    for tag in sorted(set(_TAG.findall(json.dumps(template)))):
        for scope, name in re.findall(r"(workflow|inputs)\.parameters\.([\w-]+)", tag):
            if name not in (own if scope == "inputs" else workflow_parameters):
                yield f"{scope} parameter {name} is not declared"


def _tasks(dag: Json, templates: Mapping[str, Json]) -> Iterator[str]:
    tasks = {task["name"]: task for task in dag["tasks"]}
    graph: dict[str, set[str]] = {}
    for name, task in tasks.items():
        words = re.sub(r"\.[A-Za-z]+|&&|\|\||[!()]", " ", task.get("depends") or "")
        graph[name] = {*words.split(), *(task.get("dependencies") or ())}
        for unknown in sorted(graph[name] - set(tasks)):
            yield f"task {name} depends on {unknown}, which is no task"
        if task.get("template") not in templates:
            yield f"task {name}: there is no template {task.get('template')}"
            continue
        inputs = templates[task["template"]].get("inputs")
        given = set(_parameters(task.get("arguments")))
        for missing in sorted(_without_value(inputs) - given):
            yield f"task {name}: parameter {missing} is not given"
        for other, output in re.findall(r"tasks\.([\w-]+)\.outputs\.parameters\.([\w-]+)", json.dumps(task)):
            of = templates.get(tasks.get(other, {}).get("template", ""), {})
            if output not in _parameters(of.get("outputs")):
                yield f"task {name}: {other} has no output {output}"
            elif other not in graph[name]:
                yield f"task {name}: uses {other} without waiting for it"
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        yield f"tasks wait for each other: {' → '.join(error.args[1])}"


def _container(template: Json, spec: Json) -> Iterator[str]:
    """Our own rules for what runs."""
    container = template.get("container")
    if container is None:
        yield "neither a DAG nor a container"
        return
    if not re.fullmatch(r"[^\s@]+(@sha256:[0-9a-f]{64}|:[\w.-]+)", container.get("image", "")) or container[
        "image"
    ].endswith(":latest"):
        yield f"image {container.get('image')}: must be named by digest, or by a tag that does not move"
    pod = {**(spec.get("securityContext") or {}), **(template.get("securityContext") or {})}
    own = container.get("securityContext") or {}
    if not (
        pod.get("runAsNonRoot")
        and (pod.get("seccompProfile") or {}).get("type") == "RuntimeDefault"
        and own.get("allowPrivilegeEscalation") is False
        and own.get("readOnlyRootFilesystem") is True
        and "ALL" in ((own.get("capabilities") or {}).get("drop") or ())
    ):
        yield "its security context is not what Pod Security restricted asks for, with a read-only root filesystem"
    volumes = {volume["name"] for volume in (*(template.get("volumes") or ()), *(spec.get("volumes") or ()))}
    for mount in container.get("volumeMounts") or ():
        if mount["name"] not in volumes:
            yield f"volume {mount['name']} is mounted and not defined"
    names = [row["name"] for row in container.get("env") or ()]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"environment variable {name} is set twice"
    yield from _retry(template.get("retryStrategy"))


def _retry(strategy: Json | None) -> Iterator[str]:
    said = re.search(r"\bin\s*\[([0-9,\s]*)\]", (strategy or {}).get("expression") or "")
    codes = sorted(int(code) for code in said[1].split(",") if code.strip()) if said else []
    if strategy is None or codes != sorted(RETRIED) or strategy.get("retryPolicy") != "Always":
        yield f"retries exit codes {codes or 'of all kinds'}: must be {', '.join(map(str, RETRIED))} and no other"


def _accounts(spec: Json, accounts: Collection[str] | None) -> Iterator[str]:
    used = {template.get("serviceAccountName", spec.get("serviceAccountName")) for template in spec["templates"]}
    used |= {spec.get("serviceAccountName"), (spec.get("executor") or {}).get("serviceAccountName")}
    if None in used:
        yield "a pod has no service account of its own"
    for name in sorted(used - {None} - set(accounts)) if accounts is not None else ():
        yield f"service account {name} does not exist"
