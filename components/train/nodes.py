"""Training on several nodes: creates the run's TrainJob, or finds it, tells what its pods say, and ends as it ends.

The pods run `components.train.node`; the first of them publishes. This process only waits, so killing it costs
nothing: the next try finds the TrainJob and goes on waiting. Stopped by a person, it deletes the TrainJob; so does
notify at the end of the run, whose label it bears, since an orchestrator may leave this process no time for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from components.cluster import AlreadyThere, Cluster
from components.runtime import StageContext
from components.train.trainjob import CONTAINER, INPUTS, RUN_LABEL, TRAINJOBS, NodeSettings, run_key, train_job
from rfdetr_core import errors
from rfdetr_core.errors import ExitError, RFDETRError, Terminated, TransientError, UserError
from rfdetr_core.publication import read_manifest
from rfdetr_core.storage import Location

POLL_SECONDS = 5.0
AWAY_SECONDS = 600.0
"""How long the API may not answer: a control plane that is upgraded is away for minutes."""
STUCK_SECONDS = 300.0
"""How long a pod may wait for what does not come by itself: a Secret, or an image that is not there."""
GOING_SECONDS = 300.0
"""How long a deleted TrainJob may take to be gone."""

STUCK = ("CreateContainerConfigError", "InvalidImageName", "ErrImagePull", "ImagePullBackOff", "CreateContainerError")
PODS = "api/v1/pods"

log = logging.getLogger("stage.train")


def train_on_nodes(context: StageContext, settings: NodeSettings, cluster: Cluster) -> None:
    """Let the TrainJob train, and publish.

    Raises:
        ExitError: what the nodes failed with; of several, what a person must mend comes first.
    """
    train, run = context.config.train, context.run
    job = train_job(
        settings,
        run_uri=run.uri,
        nodes=train.num_nodes,
        devices=train.devices,
        inputs=context.inputs,
        attempt=context.attempt,
    )
    name = job["metadata"]["name"]
    watch = _Watch(cluster, name)
    keep = False
    try:
        created = _create_or_find(watch, job)
        ended = _follow(watch)
        if ended["type"] == "Failed":
            raise _failure(watch, run, context.inputs, train.num_nodes, created, ended)
        keep = True
    except _AwayError:
        keep = True  # nothing can be deleted now, and the next try finds it
        raise
    finally:
        context.stop.deferred = True  # a second signal must not keep it from that
        if not keep:
            _delete(cluster, name)
    manifest = read_manifest(context.target())
    if manifest is None or manifest.inputs != context.inputs:
        raise TransientError(f"TrainJob {name} is complete, and {context.target().uri} is not published")
    context.published_elsewhere = True


def delete_train_jobs(run_uri: str, cluster: Cluster) -> list[str]:
    """Delete what is left of a run's TrainJobs; returns their names."""
    names = [job["metadata"]["name"] for job in cluster.select(TRAINJOBS, {RUN_LABEL: run_key(run_uri)})]
    for name in names:
        cluster.delete(TRAINJOBS, name)
    return names


class _AwayError(TransientError):
    """The API has not answered for long."""


class _Watch:
    """What of a TrainJob was seen and told, with patience for an API that is away for a while."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster, self.name = cluster, name
        self._answered = time.monotonic()
        self._deaf = False  # their logs cannot be read
        self._told: dict[str, str] = {}  # pod → time stamp of the last line that was told
        self._waiting: dict[str, tuple[str, float]] = {}  # pod → why it waits, since when

    def ask(self, call: Callable[[], Any]) -> Any:
        """The answer of a call, which is made again while the API is away.

        Raises:
            _AwayError: for too long.
        """
        while True:
            try:
                answer = call()
            except TransientError as error:
                if time.monotonic() - self._answered > AWAY_SECONDS:
                    raise _AwayError(
                        error.message, hint="the TrainJob goes on; the next try waits for it again"
                    ) from error
                log.warning("%s; asking again", error)
                time.sleep(POLL_SECONDS)
            else:
                self._answered = time.monotonic()
                return answer

    def job(self) -> dict[str, Any] | None:
        """The TrainJob as it is now."""
        found: dict[str, Any] | None = self.ask(lambda: self.cluster.read(TRAINJOBS, self.name))
        return found

    def pods(self) -> list[dict[str, Any]]:
        """Its pods, in the order of the nodes."""
        labels = {"jobset.sigs.k8s.io/jobset-name": self.name}
        return sorted(self.ask(lambda: self.cluster.select(PODS, labels)), key=_node)

    def tell(self) -> None:
        """Say what the pods have written since the last time, and why one does not start.

        Raises:
            UserError: a pod waits for what does not come by itself.
        """
        for pod in self.pods():
            self._tell_waiting(pod)
            if pod.get("status", {}).get("phase") not in (None, "Pending"):
                self._tell_log(pod)

    def _tell_log(self, pod: dict[str, Any]) -> None:
        name = pod["metadata"]["name"]
        last = self._told.get(name, "")
        since = f"{last[:19]}Z" if last else ""
        try:
            lines = self.ask(lambda: self.cluster.log(name, container=CONTAINER, since=since))
        except UserError as error:  # training goes on unseen
            if not self._deaf:
                log.warning("the nodes' logs cannot be read: %s", error)
            self._deaf = True
            return
        for line in lines:
            stamp, _, text = line.partition(" ")
            if stamp > last:
                log.info("node %s: %s", _node(pod), text)
                self._told[name] = stamp

    def _tell_waiting(self, pod: dict[str, Any]) -> None:
        name, why = pod["metadata"]["name"], _why_it_waits(pod)
        before, since = self._waiting.get(name, ("", time.monotonic()))
        if why != before:
            since = time.monotonic() if not before else since
            self._waiting[name] = (why, since)
            if why:
                log.warning("node %s waits: %s", _node(pod), why)
        if why.startswith(STUCK) and time.monotonic() - since > STUCK_SECONDS:
            raise UserError(f"node {_node(pod)} cannot start: {why}", hint="mend it, then start the run again")


def _node(pod: dict[str, Any]) -> int:
    labels = pod["metadata"].get("labels", {})
    return int(labels.get("batch.kubernetes.io/job-completion-index", 0))


def _why_it_waits(pod: dict[str, Any]) -> str:
    """Why a pod has not started, as the scheduler or the node says; empty if it has, or nobody knows."""
    status = pod.get("status", {})
    for container in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
        waiting = container.get("state", {}).get("waiting", {})
        if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
            return f"{waiting['reason']}: {waiting.get('message', '')}".rstrip(": ")
    for condition in status.get("conditions", ()):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return str(condition.get("message") or condition.get("reason", ""))
    return ""


def _create_or_find(watch: _Watch, job: dict[str, Any]) -> str:
    """Create the TrainJob, or go on with that of an earlier try; returns when it was created.

    One that has ended, trains something else or is being deleted makes room first: had it ended well, its result would
    be published, and this stage would not be here.
    """
    cluster, name = watch.cluster, watch.name
    watch.pods()  # whoever may not see them is told so before anything is created
    deadline = time.monotonic() + GOING_SECONDS
    while True:
        try:
            made = watch.ask(lambda: cluster.create(TRAINJOBS, job))
        except AlreadyThere:
            found = watch.job()
        else:
            log.info("created TrainJob %s in namespace %s", name, cluster.namespace)
            return str(made["metadata"]["creationTimestamp"])
        if found is None:
            continue
        metadata, ended = found["metadata"], _ended(found)
        same = metadata.get("annotations", {}).get(INPUTS) == job["metadata"]["annotations"][INPUTS]
        if same and ended is None and not metadata.get("deletionTimestamp"):
            log.info("TrainJob %s is there already, from an earlier try: waiting for it", name)
            return str(metadata["creationTimestamp"])
        if not metadata.get("deletionTimestamp"):
            log.info("TrainJob %s %s: deleting it", name, "has ended" if same else "trains something else")
            watch.ask(lambda: cluster.delete(TRAINJOBS, name))
        if time.monotonic() > deadline:
            raise TransientError(f"TrainJob {name} was deleted and does not go", hint="see its finalizers and pods")
        time.sleep(POLL_SECONDS)


def _follow(watch: _Watch) -> dict[str, Any]:
    """Tell what happens until the TrainJob has ended; its last condition."""
    suspended = False
    while True:
        job = watch.job()
        if job is None or job["metadata"].get("deletionTimestamp"):
            raise TransientError(f"TrainJob {watch.name} was deleted while it trained")
        watch.tell()
        ended = _ended(job)
        if ended is not None:
            return ended
        now = any(row["type"] == "Suspended" and row["status"] == "True" for row in _conditions(job))
        if now and not suspended:
            log.warning("TrainJob %s is suspended: a queue holds it back, or a person", watch.name)
        suspended = now
        time.sleep(POLL_SECONDS)


def _conditions(job: dict[str, Any]) -> list[dict[str, Any]]:
    return list(job.get("status", {}).get("conditions", ()))


def _ended(job: dict[str, Any]) -> dict[str, Any] | None:
    """The condition that says that it is over."""
    over = [row for row in _conditions(job) if row["type"] in ("Complete", "Failed") and row["status"] == "True"]
    return over[0] if over else None


def _failure(watch: _Watch, run: Location, inputs: str, nodes: int, created: str, ended: dict[str, Any]) -> ExitError:
    """Why it failed: what a node says in its status file, else how its container ended, else what Trainer says."""
    told = [error for node in range(nodes) if (error := _told_by(run, node, inputs, created)) is not None]
    told.sort(key=lambda error: isinstance(error, (TransientError, Terminated)))
    if told and not isinstance(told[0], (TransientError, Terminated)):
        return told[0]
    if ended.get("reason") == "DeadlineExceeded":
        return UserError(
            f"TrainJob {watch.name} took longer than the profile allows: {ended.get('message', '')}",
            hint="raise stages.train.timeout_seconds; the same run id continues from the last checkpoint",
        )
    for pod in watch.pods():
        for container in pod.get("status", {}).get("containerStatuses", ()):
            how = container.get("state", {}).get("terminated") or {}
            if how.get("reason") == "OOMKilled":
                return TransientError(
                    f"node {_node(pod)} of {nodes} ran out of memory",
                    hint="give it more, or lower train.num_workers; it continues from the last checkpoint",
                )
    if told:
        return told[0] if isinstance(told[0], TransientError) else TransientError(str(told[0]))
    what = f"TrainJob {watch.name} failed: {ended.get('reason', '')}: {ended.get('message', '')}"
    return TransientError(what.rstrip(": "), hint=f"kubectl describe trainjob {watch.name}")


def _told_by(run: Location, node: int, inputs: str, created: str) -> ExitError | None:
    """The error in a node's status file; None if it has none of this TrainJob."""
    place = run / "status" / f"train-node-{node}.json"
    status = place.read_json() if place.exists() else {}
    error = status.get("error")
    # Both are UTC; one ends in Z, the other in +00:00.
    if not error or status.get("inputs") != inputs or status["started"][:19] < created[:19]:
        return None
    kind = getattr(errors, error["class"], RFDETRError)
    known = kind if isinstance(kind, type) and issubclass(kind, ExitError) else RFDETRError
    return known(f"node {node}: {error['message']}", hint=error["hint"])


def _delete(cluster: Cluster, name: str) -> None:
    """Leave no pods behind; that it fails must not hide why."""
    try:
        cluster.delete(TRAINJOBS, name)
        log.info("deleted TrainJob %s", name)
    except RFDETRError as error:
        log.warning("TrainJob %s could not be deleted: %s", name, error)
