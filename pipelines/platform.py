"""Profiles: what each stage asks of a cluster, as YAML in pipelines/profiles/, and their application to KFP tasks.

    profile = load_profile("single-gpu")        # or a path of one's own, which may say `extends: single-gpu`
    apply(profile, "train", task, gpu_type, gpu_count)

A profile says nothing of what a stage computes, and a stage sees nothing of it but its limits. The Argo templates are
made from the same profiles. What KFP cannot set has no field here: ephemeral storage is bounded by the size of the
scratch volume and by the namespace's LimitRange, priority class and service accounts per stage exist in the Argo
templates only.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from components.stages import CONTAINERS, StageFacts
from rfdetr_core.config import merge
from rfdetr_core.config.base import Bool, Config, Float, Int, Text, Uri
from rfdetr_core.config.problems import Problem, broken_rule, not_allowed, refusal
from rfdetr_core.config.yaml_text import read_yaml
from rfdetr_core.errors import ConfigError

PROFILES = Path(__file__).parent / "profiles"
SCRATCH = "/work"
"""Where stages keep datasets and checkpoints while they work; TMPDIR of the images."""
CACHES = "/tmp"
SHM = "/dev/shm"
CA_FOLDER = "/etc/rfdetr/ca"

_BYTES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def quantity_bytes(text: str) -> int:
    """Bytes of a Kubernetes quantity of memory, such as 16Gi."""
    match = re.fullmatch(r"([0-9]+)([A-Za-z]*)", text)
    if match is None or match[2] not in _BYTES:
        raise ValueError(f"{text!r} is no quantity of memory")
    return int(match[1]) * _BYTES[match[2]]


def _cpu(value: str) -> str:
    # KFP takes no more than this of Kubernetes' quantities.
    if not re.fullmatch(r"[1-9][0-9]*(\.[0-9]+)?|0\.[0-9]*[1-9][0-9]*|[1-9][0-9]*m", value):
        raise broken_rule("cpu", "must be a number of cores as text, such as 4, 0.5 or 500m", "4")
    return value


def _memory(value: str) -> str:
    if not re.fullmatch(r"[1-9][0-9]*(M|G|T|Mi|Gi|Ti)", value):
        raise broken_rule("memory", "must be a size such as 16Gi or 512Mi", "16Gi")
    return value


_DNS_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_DNS_NAME = rf"{_DNS_LABEL}(\.{_DNS_LABEL})*"
_QUALIFIED = rf"({_DNS_NAME}/)?[A-Za-z0-9]([A-Za-z0-9._-]{{0,61}}[A-Za-z0-9])?"
_LABEL_VALUE = r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?"


def _object_name(value: str) -> str:
    if len(value) > 253 or not re.fullmatch(_DNS_NAME, value):
        raise broken_rule("object_name", "must be the name of a Kubernetes object: a-z, 0-9, - and .")
    return value


def _qualified(value: str) -> str:
    if not re.fullmatch(_QUALIFIED, value):
        raise broken_rule("qualified", "must be a name such as nvidia.com/gpu")
    return value


def _resource(value: str) -> str:
    if not re.fullmatch(rf"{_DNS_NAME}/[A-Za-z0-9]([A-Za-z0-9._-]{{0,61}}[A-Za-z0-9])?", value):
        raise broken_rule("resource", "must be a resource that nodes offer, with its vendor", "nvidia.com/gpu")
    return value


def _label_value(value: str) -> str:
    if not re.fullmatch(_LABEL_VALUE, value):
        raise broken_rule("label", "must be up to 63 of letters, digits, -, _ and . (numbers and booleans in quotes)")
    return value


def _environment_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
        raise broken_rule("environment", "must be the name of an environment variable")
    return value


Cpu = Annotated[Text, AfterValidator(_cpu)]
Memory = Annotated[Text, AfterValidator(_memory)]
ObjectName = Annotated[Text, AfterValidator(_object_name)]
Qualified = Annotated[Text, AfterValidator(_qualified)]
Resource = Annotated[Text, AfterValidator(_resource)]
LabelValue = Annotated[str, AfterValidator(_label_value)]
EnvironmentName = Annotated[Text, AfterValidator(_environment_name)]


class Toleration(Config):
    """As in a pod: which taints of nodes do not keep the stage away."""

    key: Qualified | None = None
    operator: Literal["Equal", "Exists"] = "Equal"
    value: LabelValue | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """All effects, if null."""
    seconds: Int | None = Field(default=None, ge=0)
    """How long a NoExecute taint is tolerated; null: for ever."""

    @model_validator(mode="after")
    def _as_kubernetes_wants_it(self) -> Self:
        if self.operator == "Exists" and self.value is not None:
            raise refusal([Problem("value", "does not go with operator Exists; leave it out")])
        if self.operator == "Equal" and self.key is None:
            raise refusal([Problem("key", "required with operator Equal; without a key the operator is Exists")])
        if self.seconds is not None and self.effect != "NoExecute":
            raise refusal([Problem("seconds", "goes with effect NoExecute only")])
        return self


class NodeRequirement(Config):
    """One condition on a node's labels."""

    key: Qualified
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"] = "In"
    values: tuple[LabelValue, ...] = ()

    @model_validator(mode="after")
    def _as_kubernetes_wants_it(self) -> Self:
        wanted = {"Exists": "none", "DoesNotExist": "none", "Gt": "one", "Lt": "one"}.get(self.operator, "some")
        right = {"none": not self.values, "one": len(self.values) == 1, "some": bool(self.values)}[wanted]
        if not right:
            raise refusal([Problem("values", f"operator {self.operator} takes {wanted}")])
        return self


class NodeAffinity(Config):
    """Which nodes are wanted: those that meet all of `match`."""

    match: tuple[NodeRequirement, ...] = Field(min_length=1)
    weight: Int | None = Field(default=None, ge=1, le=100)
    """Preferred by so much; null: required."""


class SecretEnvironment(Config):
    """Entries of a Secret as environment variables."""

    secret: ObjectName
    entries: dict[Text, EnvironmentName] = Field(min_length=1)
    """Entry of the Secret → environment variable."""
    optional: Bool = False
    """Start also where the Secret is absent."""


class Retry(Config):
    """What happens when a stage's container fails: it continues, or returns at once with the same error."""

    limit: Int = Field(default=2, ge=0, le=100)
    """Tries after the first one."""
    wait_seconds: Int = Field(default=60, ge=1)
    """Before the second try."""
    factor: Float = Field(default=2.0, ge=1, le=10)
    """How much longer each time."""
    longest_wait_seconds: Int = Field(default=900, ge=1)


class Security(Config):
    """Who a stage is in its container. KFP itself drops all capabilities and forbids privilege escalation."""

    run_as_user: Int = Field(default=10001, ge=1)
    run_as_group: Int = Field(default=10001, ge=1)


class S3(Config):
    """How stages reach the store."""

    endpoint_url: Text | None = None
    """Of a store that is not AWS's, such as http://minio.rfdetr.svc:9000."""
    region: Text | None = None
    secret: ObjectName | None = None
    """Secret with the credentials; null: workload identity of the service account (IRSA and the like)."""
    access_key_entry: Text = "AWS_ACCESS_KEY_ID"
    """Entry of the Secret."""
    secret_key_entry: Text = "AWS_SECRET_ACCESS_KEY"
    """Entry of the Secret."""
    ca_secret: ObjectName | None = None
    """Secret with the entry ca.crt, for a store whose certificate is of one's own authority."""

    def environment(self) -> dict[str, str]:
        """What of it is not secret."""
        ca = f"{CA_FOLDER}/ca.crt" if self.ca_secret else None
        values = {"AWS_ENDPOINT_URL": self.endpoint_url, "AWS_REGION": self.region, "AWS_CA_BUNDLE": ca}
        return {name: value for name, value in values.items() if value is not None}


class Gpu(Config):
    """The GPUs that the pipeline's inputs gpu_type and gpu_count may ask for."""

    type: Resource = "nvidia.com/gpu"
    """Default of gpu_type, for all stages that compute on a GPU."""
    types: tuple[Resource, ...] = ("nvidia.com/gpu",)
    """What gpu_type may be."""
    counts: tuple[Annotated[Int, Field(ge=1, le=64)], ...] = (1,)
    """What gpu_count may be, for train; its default is stages.train.gpus."""

    @model_validator(mode="after")
    def _default_is_a_choice(self) -> Self:
        if self.type not in self.types:
            raise refusal([not_allowed("type", self.type, "must be one of gpu.types", self.types[:1] or None)])
        return self


class StageProfile(Config):
    """What one stage asks for."""

    cpu: Cpu = "1"
    """Cores: request and limit, so that numeric libraries start as many threads as there is time for."""
    memory: Memory = "2Gi"
    """Request and limit; what lies in /dev/shm is part of it."""
    gpus: Int = Field(default=0, ge=0, le=64)
    """GPUs; those of train are the default of the input gpu_count."""
    shm: Memory = "64Mi"
    """Size of /dev/shm, a volume in memory: loading processes hand batches over through it."""
    scratch: Memory = "10Gi"
    """Limit of the node's disk that /work may take: dataset, checkpoints, weights."""
    node_selector: dict[Qualified, LabelValue] = Field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()
    affinity: tuple[NodeAffinity, ...] = ()
    environment: dict[EnvironmentName, str] = Field(default_factory=dict)
    """Never a secret: it stands in the compiled pipeline."""
    secrets: tuple[SecretEnvironment, ...] = ()
    timeout_seconds: Int = Field(default=3600, ge=60)
    """Of one try, from the start of its pod."""
    retry: Retry = Field(default_factory=Retry)
    labels: dict[Qualified, LabelValue] = Field(default_factory=dict)
    annotations: dict[Qualified, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if quantity_bytes(self.shm) >= quantity_bytes(self.memory):
            raise refusal(
                [not_allowed("shm", self.shm, f"must be less than memory {self.memory}, which it is part of")]
            )
        return self


class StageProfiles(Config):
    """A section for every container of the pipeline."""

    validate_dataset: StageProfile = Field(default_factory=StageProfile)
    probe_batch_size: StageProfile = Field(default_factory=StageProfile)
    train: StageProfile = Field(default_factory=StageProfile)
    evaluate: StageProfile = Field(default_factory=StageProfile)
    export_onnx: StageProfile = Field(default_factory=StageProfile)
    promote: StageProfile = Field(default_factory=StageProfile)
    notify: StageProfile = Field(default_factory=StageProfile)


class TrainJobProfile(Config):
    """Training by a TrainJob of Kubeflow Trainer: stages.train is then what each of its nodes gets."""

    runtime: ObjectName = "rfdetr-torch"
    """Name of the TrainingRuntime in the namespace (manifests/multi-node)."""
    cpu: Cpu = "500m"
    """Of the pod that waits for it: request and limit."""
    memory: Memory = "1Gi"


class Inputs(Config):
    """Defaults of the pipeline's inputs, so that the form in the UI is filled in."""

    root: Uri | None = None
    config: Uri | None = None


class Profile(Config):
    """One way to run the pipeline on a cluster."""

    name: Text
    """The file's name without .yaml."""
    description: Text
    """For people who choose."""
    inputs: Inputs = Field(default_factory=Inputs)
    s3: S3 = Field(default_factory=S3)
    gpu: Gpu | None = None
    """null: no GPU at all, and no inputs for them."""
    trainjob: TrainJobProfile | None = None
    """Several nodes train (train.num_nodes); null: the pod of the stage does."""
    service_account: ObjectName | None = None
    """Of the whole run on KFP; null: KFP's default."""
    image_pull_secrets: tuple[ObjectName, ...] = ()
    security: Security = Field(default_factory=Security)
    stages: StageProfiles = Field(default_factory=StageProfiles)

    def stage(self, name: str) -> StageProfile:
        """The section of a stage."""
        found: StageProfile = getattr(self.stages, name)
        return found

    def task(self, name: str) -> StageProfile:
        """What the pod of a stage's task asks for: where a TrainJob trains, that of train only waits for it."""
        wanted = self.stage(name)
        if self.trainjob is None or name != "train":
            return wanted
        return StageProfile(
            cpu=self.trainjob.cpu,
            memory=self.trainjob.memory,
            scratch="2Gi",
            environment=wanted.environment,
            secrets=wanted.secrets,
            timeout_seconds=wanted.timeout_seconds + 3600,  # the TrainJob's own time is up first
            retry=wanted.retry,
            labels=wanted.labels,
            annotations=wanted.annotations,
        )

    def environment(self, name: str, image: str) -> dict[str, str]:
        """Plain environment variables of a stage in this image, RFDETR_IMAGE among them: provenance records it."""
        return {"RFDETR_IMAGE": image, **self.s3.environment(), **self.stage(name).environment}

    def secrets(self, name: str) -> tuple[SecretEnvironment, ...]:
        """All Secrets whose entries are environment variables of a stage: the store's and its own."""
        own = self.stage(name).secrets
        if self.s3.secret is None:
            return own
        keys = {self.s3.access_key_entry: "AWS_ACCESS_KEY_ID", self.s3.secret_key_entry: "AWS_SECRET_ACCESS_KEY"}
        return (SecretEnvironment(secret=self.s3.secret, entries=keys), *own)

    @model_validator(mode="after")
    def _gpus_where_they_are_used(self) -> Self:
        problems = []
        if self.trainjob is not None and self.gpu is not None and len(self.gpu.types) > 1:
            # The TrainJob is made of the profile, before the input gpu_type is known.
            problems.append(Problem("gpu.types", "with trainjob one type only: gpu_type would not reach the nodes"))
        for facts in CONTAINERS.values():
            field, count = f"stages.{facts.name}.gpus", self.stage(facts.name).gpus
            if count and not facts.gpu:
                problems.append(not_allowed(field, count, "this stage does not compute on a GPU", 0))
            elif count and self.gpu is None:
                problems.append(not_allowed(field, count, "the section gpu is missing, which says of what type", 0))
        if self.gpu is not None and self.stage("train").gpus not in self.gpu.counts:
            count = self.stage("train").gpus
            problems.append(not_allowed("stages.train.gpus", count, "must be one of gpu.counts", self.gpu.counts[:1]))
        if problems:
            raise refusal(problems)
        return self


def profile_names() -> list[str]:
    """The profiles that come with this package."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def load_profile(name: str) -> Profile:
    """A profile of this package by its name, or one's own by its path (with a / or .yaml in it).

    A file may say `extends: <name of a profile of this package>`; what it says beside is merged over that. What stands
    in its section `defaults` is merged under every stage.

    Raises:
        ConfigError: no such profile, or one that is not legal: one line with every problem.
    """
    path = Path(name) if "/" in name or name.endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
    values = _extended(path, name)
    defaults, stages = values.pop("defaults", {}), values.pop("stages", {})
    if not isinstance(defaults, dict) or not isinstance(stages, dict):
        raise ConfigError(f"{path}: defaults and stages must be mappings")
    given = {stage: stages.get(stage, {}) for stage in CONTAINERS}
    below = {stage: merge(defaults, said) if isinstance(said, dict) else said for stage, said in given.items()}
    return Profile.parse({"name": path.stem, **values, "stages": {**stages, **below}}, source=str(path))


def _extended(path: Path, name: str) -> dict[str, Any]:
    """What a file says, merged over what it extends."""
    values = _read(path, name)
    base = values.pop("extends", None)
    if base is None:
        return values
    if base not in profile_names() or base == path.stem:
        raise ConfigError(f"{path}: extends: {_no_such_profile(str(base))}")
    return merge(_extended(PROFILES / f"{base}.yaml", str(base)), values)


def _read(path: Path, name: str) -> dict[str, Any]:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"profile {_no_such_profile(name)}") from None
    except OSError as error:
        raise ConfigError(f"profile {name}: cannot be read: {error.strerror}") from error
    values = read_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must be a mapping (description, gpu, defaults, stages, …)")
    return values


def _no_such_profile(name: str) -> str:
    names = profile_names()
    near = difflib.get_close_matches(name, names, n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    return f"{name}: no such profile ({meant}there are {', '.join(names)}; or give the path of a YAML file)"


def apply(
    profile: Profile, stage: StageFacts, task: Any, image: str, *, gpu_type: Any = None, gpu_count: Any = None
) -> None:
    """Set on a KFP task all that its profile says.

    Args:
        task: a kfp PipelineTask of this stage.
        image: what it runs in.
        gpu_type, gpu_count: the pipeline's inputs; needed where the stage has GPUs.
    """
    from kfp import kubernetes

    from pipelines.pods import trainjob_environment

    wanted = profile.task(stage.name)
    task.set_cpu_request(wanted.cpu).set_cpu_limit(wanted.cpu)
    task.set_memory_request(wanted.memory).set_memory_limit(wanted.memory)
    if wanted.gpus:
        count = gpu_count if stage.name == "train" else str(wanted.gpus)
        task.set_accelerator_type(gpu_type).set_accelerator_limit(count)
        # kfp 2.17.0 hands these two to the task and not to the group of tasks around it, unless it is told of them.
        task.register_pipeline_channels([channel for channel in (gpu_type, count) if not isinstance(channel, str)])
    retry = wanted.retry
    task.set_retry(
        retry.limit,
        backoff_duration=f"{retry.wait_seconds}s",
        backoff_factor=retry.factor,
        backoff_max_duration=f"{retry.longest_wait_seconds}s",
    )
    for name, value in {
        **profile.environment(stage.name, image),
        **trainjob_environment(profile, stage, image),
    }.items():
        task.set_env_variable(name, value)

    kubernetes.empty_dir_mount(task, "shm", SHM, medium="Memory", size_limit=wanted.shm)
    # Volumes of the node, which anyone in the pod may write: KFP sets no fsGroup, so that a claimed volume would be
    # root's. Without the second, what KFP's launcher does to a read-only root is not ours to say.
    kubernetes.empty_dir_mount(task, "scratch", SCRATCH, size_limit=wanted.scratch)
    kubernetes.empty_dir_mount(task, "caches", CACHES, size_limit="2Gi")
    kubernetes.set_security_context(
        task,
        run_as_user=profile.security.run_as_user,
        run_as_group=profile.security.run_as_group,
        run_as_non_root=True,
    )
    kubernetes.set_timeout(task, wanted.timeout_seconds)
    for key, value in wanted.node_selector.items():
        kubernetes.add_node_selector(task, key, value)
    for toleration in wanted.tolerations:
        kubernetes.add_toleration(
            task,
            key=toleration.key,
            operator=toleration.operator,
            value=toleration.value,
            effect=toleration.effect,
            toleration_seconds=toleration.seconds,
        )
    for affinity in wanted.affinity:
        rows = [{"key": r.key, "operator": r.operator, "values": list(r.values)} for r in affinity.match]
        kubernetes.add_node_affinity(task, match_expressions=rows, weight=affinity.weight)
    for secret in profile.secrets(stage.name):
        kubernetes.use_secret_as_env(task, secret.secret, dict(secret.entries), optional=secret.optional)
    if profile.s3.ca_secret is not None:
        kubernetes.use_secret_as_volume(task, profile.s3.ca_secret, CA_FOLDER)
    if profile.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(profile.image_pull_secrets))
    for key, value in {
        "app.kubernetes.io/name": "rfdetr-pipeline",
        "app.kubernetes.io/component": stage.target,
        **wanted.labels,
    }.items():
        kubernetes.add_pod_label(task, key, value)
    for key, value in wanted.annotations.items():
        kubernetes.add_pod_annotation(task, key, value)
