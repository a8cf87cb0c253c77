"""Runs one stage in a container, as a cluster would; takes the place of a function of kfp that loses exit codes.

kfp 2.17.0's DockerRunner lets the engine remove a container as soon as it ends and takes one that is gone for a success
(upstream issue 13332); it also keeps an image's ENTRYPOINT, which Kubernetes' `command` replaces.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import docker
from docker.types import DeviceRequest, Mount

from components.stages import CONTAINERS

UID = 10001
CANNOT_RUN = 125  # as docker and podman say themselves
# What a container is told of this process's environment: how to reach the store and the trackers.
_PREFIXES = ("AWS_", "WANDB_", "MLFLOW_")
_NAMES = ("RFDETR_ATTEMPT", "RFDETR_S3_ADDRESSING_STYLE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_PATHS = ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_WEB_IDENTITY_TOKEN_FILE")
# What a stage makes for the UI belongs to uid 10001 of the container; this way whoever ran it can remove it.
ENTRYPOINT = ["/bin/sh", "-c", 'umask 0; exec "$@"', "--"]

# kfp's shell is process 1 and hears no SIGTERM; the stage does.
TELL_STAGE_TO_STOP = """
import os, pathlib, signal
told = 0
for folder in pathlib.Path("/proc").glob("[0-9]*"):
    try:
        words = (folder / "cmdline").read_bytes().split(b"\\0")
    except OSError:
        continue
    if any(word.startswith(b"components.") and word.endswith(b".stage") for word in words[:4]):
        os.kill(int(folder.name), signal.SIGTERM)
        told += 1
raise SystemExit(0 if told else 1)
"""


def container_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that a stage in a container gets; no paths of this machine."""
    return {
        name: value
        for name, value in environment.items()
        if (name.startswith(_PREFIXES) or name.upper() in _NAMES) and name not in _PATHS
    }


class ContainerRunner:
    """`docker_task_handler.run_docker_container = ContainerRunner(settings, exits)`.

    Args:
        settings: from engine.stage_settings.
        exits: a file that gets a JSON line for every container that ended.
    """

    def __init__(self, settings: Mapping[str, Any], exits: Path) -> None:
        self._settings, self._exits = settings, exits
        self._running: str | None = None
        self._stopping = False

    def __call__(
        self,
        client: Any,
        image: str,
        command: Sequence[str],
        volumes: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
        **ignored: Any,
    ) -> int:
        """Run it to its end and print what it prints; its exit code."""
        stage, name = self._settings["images"][image]
        end: dict[str, Any] = {"stage": stage, "exit_code": CANNOT_RUN, "out_of_memory": False, "error": ""}
        container = None
        try:
            options = self._options(client, stage, name, command, volumes, environment or {})
            container = client.containers.create(**options)
            container.start()
            self._running = container.id
            if self._stopping:
                self._stop(client)
            self._follow(container)
            end["exit_code"] = int(container.wait()["StatusCode"])
            container.reload()
            end["out_of_memory"] = bool(container.attrs["State"].get("OOMKilled"))
        except docker.errors.DockerException as error:
            end["error"] = " ".join(str(error).split())
            print(f"{stage}: {end['error']}", flush=True)  # noqa: T201
        finally:
            self._running = None
            if container is not None:
                container.remove(force=True, v=True)
        with self._exits.open("a") as file:
            file.write(json.dumps(end) + "\n")
        return int(end["exit_code"])

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler: the running stage gets a SIGTERM, and its container ends with it."""
        self._stopping = True
        if self._running is not None:
            client = docker.from_env()  # another one: this one is in the middle of something
            try:
                self._stop(client)
            finally:
                client.close()

    def _stop(self, client: Any) -> None:
        with contextlib.suppress(docker.errors.APIError):  # it has just ended
            container = client.containers.get(self._running)
            told, _ = container.exec_run(["python", "-c", TELL_STAGE_TO_STOP], user=str(UID))
            if told != 0:
                container.kill()

    def _follow(self, container: Any) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        with contextlib.suppress(docker.errors.APIError):  # the exit code counts, not what it said
            for piece in container.logs(stream=True, follow=True):
                print(decoder.decode(piece), end="", flush=True)  # noqa: T201

    def _options(
        self,
        client: Any,
        stage: str,
        image: str,
        command: Sequence[str],
        volumes: Mapping[str, Any],
        environment: Mapping[str, str],
    ) -> dict[str, Any]:
        settings = self._settings
        selinux = any("selinux" in option for option in client.info().get("SecurityOptions") or ())
        suffix = ",z" if selinux else ""
        own = {path: how for path, how in volumes.items() if how["bind"] == path}  # the artifacts; kfp's workspace not
        read_only = {path: {"bind": path, "mode": f"ro{suffix}"} for path in settings["mounts"]}
        options: dict[str, Any] = {
            "image": image,
            "entrypoint": ENTRYPOINT,
            "command": list(command),
            "environment": {
                **container_environment(os.environ),
                **self._webhook(stage),
                **environment,
                "RFDETR_IMAGE": self._identity(client, image),
            },
            "labels": {"rfdetr.attempt": settings["attempt"], "rfdetr.stage": stage},
            "user": f"{UID}:{UID}",
            "read_only": True,
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges"],
            "network_mode": "host",
            "tmpfs": {"/tmp": "rw,exec,nosuid,nodev,mode=1777,size=2g"},  # exec: compiled kernels are loaded from there
            "mounts": [Mount(target="/work", source=None, type="volume")],
            "volumes": {**read_only, **own},
            "shm_size": "2g",
        }
        if settings["cpus"]:
            options["nano_cpus"] = int(settings["cpus"] * 1e9)
        if settings["memory"]:
            options["mem_limit"] = options["memswap_limit"] = settings["memory"]
        if settings["gpus"] and CONTAINERS[stage].gpu:
            options["device_requests"] = [DeviceRequest(count=-1, capabilities=[["gpu"]])]
        return options

    def _webhook(self, stage: str) -> dict[str, str]:
        """Its address is a secret, which only the stage that uses it is told."""
        name = self._settings["webhook"]
        return {name: os.environ[name]} if stage == "notify" and name is not None and name in os.environ else {}

    def _identity(self, client: Any, image: str) -> str:
        """What status files and provenance record."""
        return f"{image} ({client.images.get(image).id})"
