"""The one entry to a cluster, for people, schedules and CI: checks everything, then creates what is not there yet.

Doing the same twice creates nothing twice: the version of the pipeline is named by its content, the run by what it is
made of, and both are looked for before they are created.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from components.images import is_pinned
from components.runtime import RUN_ID
from pipelines.changes import look_for_changes
from pipelines.cluster_checks import check_cluster
from pipelines.compiled import CompiledPipeline, compile_for
from pipelines.cron import Cron
from pipelines.kfp_api import ExistsError, KfpApi
from pipelines.platform import Profile
from pipelines.pods import refuse_nodes_without_trainjob
from rfdetr_core.config import RunConfig, load_run_config, merge
from rfdetr_core.errors import ConfigError, TransientError, UserError
from rfdetr_core.storage import location

PIPELINE = "rfdetr-retrain"
ACTIVE = ("RUNTIME_STATE_UNSPECIFIED", "PENDING", "RUNNING", "PAUSED", "CANCELING")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What somebody wants to run.

    Args:
        config: YAML of the run, a path or an s3:// URI.
        overrides: merged over it.
        root: the store, an s3:// prefix.
        images: stage → image.
        run_id: name of the run; empty: made of what the run is made of.
        gpu_type, gpu_count: None: as the profile says.
        unpinned: allow images that are named by a tag.
    """

    config: str
    overrides: Mapping[str, Any]
    root: str
    profile: Profile
    images: Mapping[str, str]
    run_id: str = ""
    gpu_type: str | None = None
    gpu_count: int | None = None
    experiment: str = ""
    choices: bool = False
    unpinned: bool = False


@dataclass(frozen=True)
class Prepared:
    """A request that was checked; nothing is created yet."""

    request: Request
    config: RunConfig
    pipeline: CompiledPipeline
    parameters: dict[str, Any]
    upload: bytes | None = field(default=None, repr=False)  # a config that is still on this machine only

    @property
    def experiment(self) -> str:
        """Runs of one model stand together in the UI."""
        return self.request.experiment or self.config.name

    @property
    def version(self) -> str:
        """Name of the pipeline's version: equal content, equal name."""
        return self.pipeline.version


@dataclass(frozen=True)
class Submitted:
    """A run that is on the cluster."""

    kfp_run_id: str
    run_id: str
    run_uri: str
    created: bool
    state: str


def prepare(request: Request) -> Prepared:
    """Check all that can be known here.

    Raises:
        ConfigError: the config, the store, the profile or the GPUs are not legal.
        UserError: an image is not named by its digest.
    """
    if request.run_id and not RUN_ID.fullmatch(request.run_id):
        hint = "a-z, 0-9 and -, at most 63, such as nightly-7"
        raise ConfigError(f"--run-id: {request.run_id!r} is not allowed", hint=hint)
    if location(request.root).local_path is not None:
        raise ConfigError(f"--root: {request.root} is a folder of this machine", hint="give s3://bucket/prefix")
    loose = [name for name, image in request.images.items() if not is_pinned(image)]
    if loose and not request.unpinned:
        raise UserError(
            f"images without a digest: {', '.join(loose)}; what runs could change under the same name",
            hint="make push REGISTRY=... writes images/digests.json; or say --unpinned",
        )
    gpus = _gpu_inputs(request)
    overrides = _with_devices(request.overrides, gpus)
    config = load_run_config(request.config, overrides)
    _refuse_local_paths(config)
    refuse_nodes_without_trainjob(config, request.profile)
    pipeline = compile_for(request.profile, request.images, choices=request.choices)
    root = location(request.root).uri
    place, upload = location(request.config), None
    if place.local_path is not None:
        upload = place.read_bytes()
        place = location(root) / "configs" / f"{config.name}-{hashlib.sha256(upload).hexdigest()[:12]}.yaml"
    parameters = {"root": root, "config": place.uri, "overrides": dict(request.overrides), **gpus}
    return Prepared(request, config, pipeline, {**parameters, "run_id": request.run_id}, upload)


def submit(prepared: Prepared, api: KfpApi, *, if_changed: bool = False, say: Say = print) -> Submitted | None:
    """Start the run, or find the one that was started already; None if `if_changed` finds nothing new.

    Raises:
        UserError: the API refuses, or something that the profile names is missing.
        TransientError: it does not answer.
    """
    _look_at_cluster(prepared, api, say)
    if if_changed:
        overrides = _with_devices(prepared.request.overrides, prepared.parameters)
        store, request = location(prepared.request.root), prepared.request
        change = look_for_changes(store, prepared.config.name, request.config, overrides)
        say(change.reason)
        if not change.needed:
            return None
        if not request.run_id:
            prepared = _named(prepared, change.run_id)
    experiment = _experiment(api, prepared.experiment)
    again = not prepared.parameters["run_id"]
    prepared = _named(prepared, _identity(prepared)) if again else prepared
    found = _runs(api, experiment, prepared)
    number = 1
    while again and found and found[0].state == "SUCCEEDED":
        # Nobody named the run, and the last one of the same content is over: this is meant to be another one.
        number += 1
        prepared = _named(prepared, f"{_identity(prepared)}-{number}")
        found = _runs(api, experiment, prepared)
    if found and found[0].state in (*ACTIVE, "SUCCEEDED"):
        return _submitted(prepared, found[0], created=False)
    reference = _version(api, prepared, say)
    return _submitted(prepared, _create_run(api, experiment, reference, prepared), created=True)


def schedule(prepared: Prepared, api: KfpApi, name: str, cron: Cron, *, say: Say = print) -> bool:
    """Run it on a schedule, in the place of an older schedule of that name; False if it stands there already.

    Missed times are not made up for, and a run that lasts longer than a period keeps the next one waiting.

    Raises:
        UserError: the API refuses, or something that the profile names is missing.
        TransientError: it does not answer.
    """
    _look_at_cluster(prepared, api, say)
    experiment = _experiment(api, prepared.experiment)
    pipeline_id, version_id = _version(api, prepared, say)
    found = _schedules(api, name)
    if len(found) == 1 and _is_same(found[0], version_id, prepared.parameters, cron):
        return False
    for old in found:
        with api.errors(f"pause the schedule {name}"):
            api.client.disable_recurring_run(old.recurring_run_id)
    try:
        with api.errors(f"create the schedule {name}"):
            api.client.create_recurring_run(
                experiment_id=experiment,
                job_name=name,
                cron_expression=cron.text,
                max_concurrency=1,
                no_catchup=True,
                params=prepared.parameters,
                pipeline_id=pipeline_id,
                version_id=version_id,
                service_account=prepared.request.profile.service_account,
            )
    except BaseException:
        for old in found:  # better the old schedule than none
            api.client.enable_recurring_run(old.recurring_run_id)
        raise
    for old in found:
        with api.errors(f"remove the older schedule {name}"):
            api.client.delete_recurring_run(old.recurring_run_id)
    return True


def unschedule(api: KfpApi, name: str) -> None:
    """Remove a schedule; the runs that it started stay.

    Raises:
        UserError: there is none of that name, or the API refuses.
    """
    found = _schedules(api, name)
    if not found:
        with api.errors("list the schedules"):
            rows = api.pages(api.client.list_recurring_runs, "recurring_runs", namespace=api.namespace)
            names = sorted({row.display_name for row in rows})
        raise UserError(
            f"no schedule {name}", hint=f"there are {', '.join(names)}" if names else "there is none at all"
        )
    for old in found:
        with api.errors(f"remove the schedule {name}"):
            api.client.delete_recurring_run(old.recurring_run_id)


def _gpu_inputs(request: Request) -> dict[str, str]:
    gpu = request.profile.gpu
    if gpu is None:
        for option, value in (("--gpu-type", request.gpu_type), ("--gpu-count", request.gpu_count)):
            if value is not None:
                raise ConfigError(f"{option}: the profile {request.profile.name} has no GPU", hint="choose another one")
        return {}
    kind = request.gpu_type or gpu.type
    count = request.gpu_count or request.profile.stage("train").gpus
    if kind not in gpu.types:
        hint = f"one of {', '.join(gpu.types)}; a profile's gpu.types names them"
        raise ConfigError(f"--gpu-type: {kind!r} is not known to the profile {request.profile.name}", hint=hint)
    if count not in gpu.counts:
        hint = f"one of {', '.join(map(str, gpu.counts))}; a profile's gpu.counts names them"
        raise ConfigError(f"--gpu-count: {count} does not go with the profile {request.profile.name}", hint=hint)
    return {"gpu_type": kind, "gpu_count": str(count)}


def _with_devices(overrides: Mapping[str, Any], gpus: Mapping[str, Any]) -> dict[str, Any]:
    """As the first stage will see them (components/launcher.py)."""
    if "gpu_count" not in gpus:
        return dict(overrides)
    return merge({"train": {"devices": int(gpus["gpu_count"])}}, overrides)


def _refuse_local_paths(config: RunConfig) -> None:
    named = {
        "dataset.uri": config.dataset.uri,
        "model.pretrain_weights": config.model.pretrain_weights,
        "train.resume": config.train.resume,
    }
    for name, uri in named.items():
        if uri is not None and location(uri).local_path is not None:
            raise ConfigError(f"{name}: {uri} is on this machine, which the cluster does not see", hint="copy it to S3")


def _look_at_cluster(prepared: Prepared, api: KfpApi, say: Say) -> None:
    unseen = check_cluster(prepared.request.profile, api.pods_namespace)
    if unseen:
        say(unseen)


def _named(prepared: Prepared, run_id: str) -> Prepared:
    return replace(prepared, parameters={**prepared.parameters, "run_id": run_id})


def _identity(prepared: Prepared) -> str:
    """A run id made of pipeline, config and inputs."""
    inputs = {name: value for name, value in prepared.parameters.items() if name != "run_id"}
    content = json.dumps([prepared.pipeline.digest, prepared.config.as_dict(), inputs], sort_keys=True)
    return f"{prepared.config.name[:46]}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def _experiment(api: KfpApi, name: str) -> str:
    def look() -> list[Any]:
        with api.errors(f"look for the experiment {name}"):
            return api.named(api.client.list_experiments, "experiments", name, namespace=api.namespace)

    found = look()
    if not found:
        try:
            with api.errors(f"create the experiment {name}"):
                return str(api.client.create_experiment(name, namespace=api.namespace).experiment_id)
        except (ExistsError, TransientError):
            found = look()  # somebody else was faster, or it arrived and only the answer was lost
            if not found:
                raise
    return str(found[0].experiment_id)


def _version(api: KfpApi, prepared: Prepared, say: Say) -> tuple[str, str]:
    """Ids of the pipeline and of its version with this content; uploaded if it is new."""
    if prepared.upload is not None:
        location(prepared.parameters["config"]).write_bytes(prepared.upload)
    pipeline_id = _pipeline(api)

    def look() -> list[Any]:
        with api.errors(f"look for the version {prepared.version}"):
            listing = api.client.list_pipeline_versions
            return api.named(listing, "pipeline_versions", prepared.version, pipeline_id=pipeline_id)

    found = look()
    if found:
        return pipeline_id, str(found[0].pipeline_version_id)
    with tempfile.TemporaryDirectory(prefix="rfdetr-submit-") as folder:
        path = Path(folder) / "retrain.yaml"
        path.write_text(prepared.pipeline.text)
        try:
            with api.errors(f"upload the version {prepared.version}"):
                made = api.client.upload_pipeline_version(str(path), prepared.version, pipeline_id=pipeline_id)
            say(f"uploaded {PIPELINE}, version {prepared.version}")
            return pipeline_id, str(made.pipeline_version_id)
        except (ExistsError, TransientError):
            found = look()
            if not found:
                raise
            return pipeline_id, str(found[0].pipeline_version_id)


def _pipeline(api: KfpApi) -> str:
    from kfp_server_api import V2beta1Pipeline

    def look() -> list[Any]:
        with api.errors(f"look for the pipeline {PIPELINE}"):
            return api.named(api.client.list_pipelines, "pipelines", PIPELINE, namespace=api.namespace)

    found = look()
    if not found:
        body = V2beta1Pipeline(display_name=PIPELINE, namespace=api.namespace)
        try:
            with api.errors(f"create the pipeline {PIPELINE}"):
                return str(api.pipelines.pipeline_service_create_pipeline(body).pipeline_id)
        except (ExistsError, TransientError):
            found = look()
            if not found:
                raise
    return str(found[0].pipeline_id)


def _runs(api: KfpApi, experiment: str, prepared: Prepared) -> list[Any]:
    """Runs of this name, the newest first."""
    name = prepared.parameters["run_id"]
    with api.errors(f"look for the run {name}"):
        return api.named(
            api.client.list_runs,
            "runs",
            name,
            experiment_id=experiment,
            sort_by="created_at desc",
            namespace=api.namespace,
        )


def _create_run(api: KfpApi, experiment: str, reference: tuple[str, str], prepared: Prepared) -> Any:
    name = prepared.parameters["run_id"]
    before = {run.run_id for run in _runs(api, experiment, prepared)}
    try:
        with api.errors(f"create the run {name}"):
            return api.client.run_pipeline(
                experiment_id=experiment,
                job_name=name,
                params=prepared.parameters,
                pipeline_id=reference[0],
                version_id=reference[1],
                service_account=prepared.request.profile.service_account,
            )
    except (ExistsError, TransientError):
        arrived = [run for run in _runs(api, experiment, prepared) if run.run_id not in before]
        if not arrived:
            raise
        return arrived[0]  # only the answer was lost


def _submitted(prepared: Prepared, run: Any, *, created: bool) -> Submitted:
    name = prepared.parameters["run_id"]
    uri = f"{prepared.parameters['root']}/runs/{name}"
    return Submitted(str(run.run_id), name, uri, created, str(run.state or "PENDING"))


def _schedules(api: KfpApi, name: str) -> list[Any]:
    with api.errors(f"look for the schedule {name}"):
        return api.named(api.client.list_recurring_runs, "recurring_runs", name, namespace=api.namespace)


def _is_same(old: Any, version_id: str, parameters: Mapping[str, Any], cron: Cron) -> bool:
    said = json.loads(json.dumps(dict(old.runtime_config.parameters or {}))) if old.runtime_config else {}
    return bool(
        old.pipeline_version_reference
        and old.pipeline_version_reference.pipeline_version_id == version_id
        and said == json.loads(json.dumps(parameters))
        and old.trigger.cron_schedule
        and old.trigger.cron_schedule.cron == cron.text
        and old.mode == "ENABLE"
        and old.no_catchup is True
        and str(old.max_concurrency) == "1"
    )
