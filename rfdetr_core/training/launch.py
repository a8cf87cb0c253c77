"""A training on several devices: starts a process for each, relays what they say, and takes over how they end.

On several machines (see `nodes`) each does this for its own devices: the ranks of all of them train together, and the
parent on the first machine, where the main rank is, publishes.

What parent and ranks have in common is a folder beside the checkpoints:

    job.json             what to train; weights.pth, if it begins with some
    stop                 there once a stop is asked for
    log-<rank>.jsonl     what a rank says, for the parent to say
    published/<n>/<name> checkpoint files in the order in which they became whole, for the parent to publish
    outcome-<rank>.json  how a rank ended, unless it died without a word
    failures.json        see `torchrun`
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from rfdetr_core import errors, hardware
from rfdetr_core.config import ModelConfig, TrainConfig
from rfdetr_core.data.annotations import ClassMap
from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.errors import ExitError, RFDETRError, Terminated, TransientError
from rfdetr_core.models.weight_file import WeightFile
from rfdetr_core.storage.local import local_errors
from rfdetr_core.training import checkpoint
from rfdetr_core.training.distributed import threads_per_rank
from rfdetr_core.training.nodes import Nodes
from rfdetr_core.training.state import Publish, TrainingJob, TrainingResult
from rfdetr_core.training.torchrun import FAILURES

FOLDER = ".ranks"
JOB, WEIGHTS, STOP, PUBLISHED = "job.json", "weights.pth", "stop", "published"
POLL_SECONDS = 0.1
ENDING_SECONDS = 45.0  # torchrun gives a rank 30 s between SIGTERM and SIGKILL

log = logging.getLogger(__name__)


def train_on_several(
    job: TrainingJob,
    devices: Sequence[int],
    *,
    nodes: Nodes,
    publish: Publish,
    stop_requested: Callable[[], bool],
) -> TrainingResult:
    """Train with one process per device, and those of the other nodes; the arguments and errors of `loop.train`.

    Raises:
        TransientError: a rank was killed; the message names it, and the same call continues. Or another node was lost.
        RFDETRError: a rank met what no one foresaw; the log has its traceback.
    """
    folder = job.checkpoints / (FOLDER if nodes.is_first else f"{FOLDER}-{nodes.rank}")  # nodes may share the disk
    with local_errors("write", folder):
        job.checkpoints.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
        folder.mkdir()
        _describe(job, folder)
    try:
        _run(folder, len(devices), nodes, job.inputs, publish, stop_requested)
        return _outcome(folder, nodes.count * len(devices), nodes, stopping=stop_requested())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _describe(job: TrainingJob, folder: Path) -> None:
    """Write job.json, and the start weights: fetched here, once, and only if a training begins."""
    found = checkpoint.newest_whole(job.checkpoints)
    begins = found is None or found[1].get("inputs") != job.inputs
    del found
    resume = job.resume() if begins and job.resume is not None else None
    if begins and resume is None and job.start_weights is not None:
        weights = job.start_weights()
        content = {part.name: getattr(weights, part.name) for part in fields(weights)}
        torch.save({**content, "path": str(weights.path)}, folder / WEIGHTS)
    document = {
        "model": job.model.model_dump(mode="json"),
        "train": job.train.model_dump(mode="json"),
        "dataset": str(job.dataset.folder.absolute()),
        "classes": job.dataset.class_map.to_json(),  # train.class_names may have renamed them
        "checkpoints": str(job.checkpoints.absolute()),
        "output": str(job.output.absolute()),
        "batch_size": job.batch_size,
        "grad_accum_steps": job.grad_accum_steps,
        "inputs": job.inputs,
        "resume": None if resume is None else str(resume.absolute()),
        "predicted_peak_bytes": job.predicted_peak_bytes,
    }
    (folder / JOB).write_text(json.dumps(document, indent=2) + "\n")


def read_job(folder: Path) -> TrainingJob:
    """The job that `train_on_several` describes to its ranks."""
    document = json.loads((folder / JOB).read_bytes())
    weights, resume = folder / WEIGHTS, document["resume"]
    dataset = PreparedDataset(Path(document["dataset"]))
    dataset.class_map = ClassMap.from_json(document["classes"])
    return TrainingJob(
        model=ModelConfig.model_validate(document["model"]),
        train=TrainConfig.model_validate(document["train"]),
        dataset=dataset,
        checkpoints=Path(document["checkpoints"]),
        output=Path(document["output"]),
        batch_size=document["batch_size"],
        grad_accum_steps=document["grad_accum_steps"],
        inputs=document["inputs"],
        start_weights=(lambda: _read_weights(weights)) if weights.exists() else None,
        resume=None if resume is None else lambda: Path(resume),
        predicted_peak_bytes=document["predicted_peak_bytes"],
    )


def _read_weights(path: Path) -> WeightFile:
    content = torch.load(path, map_location="cpu", weights_only=True)
    return WeightFile(**{**content, "path": Path(content["path"])})


def _run(
    folder: Path, ranks: int, nodes: Nodes, run: str, publish: Publish, stop_requested: Callable[[], bool]
) -> None:
    """Start this node's ranks and wait until the last one has ended, whatever comes."""
    relay = _Relay(folder, publish)
    command = [sys.executable, "-m", "rfdetr_core.training.torchrun", str(ranks), str(folder.absolute())]
    if nodes.count > 1:
        log.info("node %d of %d meets the others at %s:%d", nodes.rank, nodes.count, nodes.address, nodes.port)
        command += [str(nodes.count), str(nodes.rank), nodes.address, str(nodes.port), run]
    with (folder / "torchrun.log").open("wb") as said:
        # Standard output is where the ranks put progress bars; torchrun's own traceback would only hide their errors.
        # A session of its own keeps Ctrl-C from them: it is for us, who ask them to stop.
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=2,
            stderr=said,
            env=_environment(ranks, nodes),
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                relay.pass_on()
                if stop_requested():
                    (folder / STOP).touch()
                time.sleep(POLL_SECONDS)
            relay.pass_on()
        finally:
            _end(process)


def _environment(ranks: int, nodes: Nodes) -> dict[str, str]:
    alone = nodes.count == 1 and Path("/sys/class/net/lo").exists()
    local = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if alone else {}
    return {**local, **os.environ, "OMP_NUM_THREADS": str(threads_per_rank(ranks, hardware.cpu_count()))}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Leave no process behind: each ends by itself when its standard input ends."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(ENDING_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class _Relay:
    """Says what the ranks say, and publishes what the main one has written."""

    def __init__(self, folder: Path, publish: Publish) -> None:
        self._folder, self._publish = folder, publish
        self._read: dict[int, int] = {}  # bytes of each rank's log
        self._warned: set[str] = set()

    def pass_on(self) -> None:
        """Everything new since the last call."""
        for rank in _ranks(self._folder, "log-*.jsonl"):
            self._say(rank)
        for entry in sorted((self._folder / PUBLISHED).glob("[0-9]*")):
            for path in entry.iterdir():
                self._publish(path)
            shutil.rmtree(entry)

    def _say(self, rank: int) -> None:
        begin = self._read.get(rank, 0)
        with (self._folder / f"log-{rank}.jsonl").open("rb") as file:
            file.seek(begin)
            *lines, _ = file.read().split(b"\n")  # the last one is not whole yet, or empty
        self._read[rank] = begin + sum(len(line) + 1 for line in lines)
        for line in lines:
            record = json.loads(line)
            text = record["message"]
            if rank:  # of what all say, the main rank's is enough
                if text in self._warned:
                    continue
                text = f"rank {rank}: {text}"
            elif record["level"] >= logging.WARNING:
                self._warned.add(text)
            logging.getLogger(record["name"]).log(record["level"], "%s", text)


def _ranks(folder: Path, pattern: str) -> list[int]:
    """The ranks that left a file of this kind: of all nodes, those of this one."""
    return sorted(int(path.stem.rpartition("-")[2]) for path in folder.glob(pattern))


def _outcome(folder: Path, ranks: int, nodes: Nodes, *, stopping: bool) -> TrainingResult:
    """The result, as this node's first rank has it; or the error that says why there is none.

    Raises:
        RFDETRError: the first one that was raised on purpose; else what is known of a rank that died; else of one
            that failed. When a rank dies, the others fail for want of it; also those of other nodes.
    """
    outcomes = {rank: _read(folder / f"outcome-{rank}.json") for rank in _ranks(folder, "outcome-*.json")}
    first = outcomes[min(outcomes)] if outcomes else {}
    result = first.get("result")
    if result is not None:
        return TrainingResult(**{**result, "skipped": tuple(result["skipped"])})
    found = [(rank, outcome["error"]) for rank, outcome in outcomes.items() if "error" in outcome]
    # After all have agreed to stop, the main rank may still fail, with the last checkpoint.
    found.sort(key=lambda entry: (entry[1]["class"] == "Terminated", entry[1]["time"]))
    for _, error in found:
        if error["class"] in _OURS and (error["class"] != "Terminated" or "error" in first):
            raise _OURS[error["class"]](error["message"], hint=error["hint"])
    failures = _read(folder / FAILURES) or []
    for failure in failures:
        if failure["exit_code"] < 0:
            raise _died(failure["rank"], ranks, failure["pid"], -failure["exit_code"])
    if stopping:
        raise Terminated("stopped on request", hint="run the same command again to continue from the last checkpoint")
    if nodes.count > 1 and not failures and not found:
        raise TransientError(
            f"the {nodes.count} nodes did not meet at {nodes.address}:{nodes.port}, or one was lost: {_last(folder)}",
            hint="see what the other nodes say; the same command continues from the last checkpoint",
        )
    for rank, error in found:
        if nodes.count > 1 and _LOST.search(f"{error['class']} {error['message']}"):
            raise TransientError(
                f"rank {rank} of {ranks} lost the other nodes",
                hint="see what they say; the same command continues from the last checkpoint",
            ) from RuntimeError(error["traceback"])
        what = f"rank {rank} of {ranks}: {error['class']}: {error['message']}"
        raise RFDETRError(what) from RuntimeError(error["traceback"])
    which = f"rank {failures[0]['rank']} of {ranks}" if failures else "torchrun"
    raise RFDETRError(f"{which} failed without saying why: {_last(folder)}")


def _last(folder: Path) -> str:
    """The last line that torchrun left."""
    lines = (folder / "torchrun.log").read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "its log is empty"


_LOST = re.compile(r"gloo|NCCL|\bDist\w+Error|TCPStore|[Cc]onnection (closed|reset|refused)")
"""What torch's collectives say when a peer is gone."""

_OURS: dict[str, type[ExitError]] = {
    name: value for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, ExitError)
}


def _died(rank: int, ranks: int, pid: int, number: int) -> RFDETRError:
    name = signal.Signals(number).name
    what = f"rank {rank} of {ranks} (process {pid}) was ended by {name}; the others were stopped"
    if number in (signal.SIGKILL, signal.SIGTERM):
        return TransientError(
            what,
            hint="SIGKILL is also what a pod out of memory gets: give it more, or lower train.num_workers; "
            "the same command continues from the last checkpoint",
        )
    return RFDETRError(what)


def _read(path: Path) -> Any:
    return json.loads(path.read_bytes()) if path.exists() else {}


def write_outcome(folder: Path, rank: int, *, result: TrainingResult | None = None, error: Any = None) -> None:
    """Write how a rank ended: its result, or its error as JSON; whole or not at all."""
    content = {"result": asdict(result)} if result is not None else {"error": error}
    part = folder / f".outcome-{rank}.json"
    part.write_text(json.dumps(content))
    part.rename(folder / f"outcome-{rank}.json")
