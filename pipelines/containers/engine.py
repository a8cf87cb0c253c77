"""The engine that runs stages on this machine: docker, or a `podman system service` for as long as a run lasts.

Both speak docker's API, which is what kfp's DockerRunner uses.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.images import built_images, image
from pipelines.bound import bound_to_parent
from pipelines.containers.tool import Tool, container_tool
from rfdetr_core.config import RunConfig
from rfdetr_core.errors import ConfigError, UserError
from rfdetr_core.storage import location

START_SECONDS = 20.0
LABEL = "rfdetr.attempt"


@dataclass(frozen=True)
class Containers:
    """How `run --in-containers` runs a stage.

    Args:
        cpus: cores of each container; all of the machine's by default.
        memory: memory of each container, such as 8g; as much as there is by default.
        gpus: give all GPUs to the stages that compute.
        mounts: files and folders of this machine that stages read, mounted read-only under the same path.
        webhook: name of the environment variable that notify gets, for it holds the webhook's address.
    """

    cpus: float | None = None
    memory: str | None = None
    gpus: bool = False
    mounts: tuple[Path, ...] = ()
    webhook: str | None = None


@dataclass(frozen=True)
class Engine:
    """A running engine."""

    tool: Tool
    environment: Mapping[str, str] = field(default_factory=dict)  # reaches it: DOCKER_HOST

    def images(self) -> dict[str, str]:
        """How the engine calls each stage's image.

        Raises:
            UserError: one of them is not on this machine.
        """
        names = {stage: self.tool.local_name(name) for stage, name in built_images().items()}
        missing = [name for name in names.values() if not self.tool.has(name)]
        if missing:
            raise UserError(f"no image {missing[0]} on this machine", hint="make images builds them all")
        return names

    def remove(self, attempt: str) -> None:
        """Remove what an attempt left running."""
        listed = self.tool.run("ps", "--all", "--quiet", "--filter", f"label={LABEL}={attempt}").split()
        if listed:
            self.tool.run("rm", "--force", "--volumes", *listed)


@contextlib.contextmanager
def container_engine() -> Iterator[Engine]:
    """An engine for as long as the block lasts.

    Raises:
        UserError: neither docker nor podman works here.
    """
    with container_tool(("docker", "podman")) as tool:
        if tool.kind == "docker":
            yield Engine(tool)
            return
        with tempfile.TemporaryDirectory(prefix="rfdetr-podman-") as folder, _podman_service(tool, Path(folder)) as url:
            yield Engine(tool, {"DOCKER_HOST": url})


@contextlib.contextmanager
def _podman_service(tool: Tool, folder: Path) -> Iterator[str]:
    socket, log = folder / "socket", folder / "service.log"
    url = f"unix://{socket}"
    with log.open("wb") as output:
        # In a session of its own: Ctrl-C reaches the pipeline, which has still to stop its containers.
        service = subprocess.Popen(
            bound_to_parent(["podman", "system", "service", "--time", "0", url]),
            env={**os.environ, **tool.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not socket.exists():
            if service.poll() is not None or time.monotonic() > deadline:
                lines = log.read_text(errors="replace").strip().splitlines() or ["nothing"]
                raise UserError(f"podman system service did not start; its last words: {lines[-1]}")
            time.sleep(0.05)
        yield url
    finally:
        service.terminate()
        try:
            service.wait(10.0)
        except subprocess.TimeoutExpired:
            service.kill()
            service.wait()


def local_inputs(config_uri: str, config: RunConfig) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """What of this machine a run reads: the overrides that name it absolutely, and the paths to mount.

    Raises:
        ConfigError: a path that does not exist.
    """
    named: tuple[tuple[str, str, str | None], ...] = (
        ("dataset", "uri", config.dataset.uri),
        ("model", "pretrain_weights", config.model.pretrain_weights),
        ("train", "resume", config.train.resume),
    )
    overrides: dict[str, Any] = {}
    paths = [location(config_uri).local_path]
    for section, key, uri in named:
        path = location(uri).local_path if uri else None
        if path is not None:
            if not path.exists():
                raise ConfigError(f"{section}.{key}: {path}: no such file or folder", hint="check the path")
            overrides[section] = {key: str(path)}
            paths.append(path)
    return overrides, tuple(path for path in paths if path is not None)


def stage_settings(
    options: Containers, images: Mapping[str, str], environment: Mapping[str, str], attempt: str
) -> dict[str, Any]:
    """What runner.py needs to know, as JSON for the worker process: no secrets, `ps` shows it."""
    mounts = list(options.mounts)
    bundle = environment.get("AWS_CA_BUNDLE")
    if bundle and Path(bundle).is_file():
        mounts.append(Path(bundle))
    return {
        "images": {image(stage): [stage, name] for stage, name in images.items()},
        "mounts": [str(path) for path in mounts],
        "cpus": options.cpus,
        "memory": options.memory,
        "gpus": options.gpus,
        "webhook": options.webhook,
        "attempt": attempt,
    }


def container_exits(path: Path) -> dict[str, dict[str, Any]]:
    """How the containers of a run ended, as runner.py wrote it: stage -> exit code, and whether memory ran out."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {row["stage"]: row for row in rows}
