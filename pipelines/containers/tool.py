"""The container tool of this machine: docker, podman or buildah, whichever is found and works.

Podman and buildah get settings of their own where the defaults cannot work: as root without systemd, or where this
process may not raise its limits, as in most virtual machines and CI runners.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rfdetr_core.errors import TransientError, UserError

KINDS = ("docker", "podman", "buildah")
MAX_PROCESSES = 32768  # podman lowers its own limit to the kernel's smallest pid_max, and may not raise it again
PODMAN_WANTS_FILES = 1048576
CA_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt")
REFUSALS = re.compile(r"unauthorized|denied|forbidden|authentication required|\b40[13]\b", re.IGNORECASE)
LOOPBACK = re.compile(r"(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?")


@dataclass(frozen=True)
class Tool:
    """One of the three, and the environment that it needs."""

    kind: str
    environment: Mapping[str, str] = field(default_factory=dict)

    def local_name(self, image: str) -> str:
        """How it calls an image that was built here; one that is named by digest came from a registry."""
        return image if self.kind == "docker" or "@" in image else f"localhost/{image}"

    def run(self, *arguments: str, log: Path | None = None, stdin: str = "") -> str:
        """Run it; its standard output.

        Args:
            log: where both its outputs go, instead of being returned.

        Raises:
            ToolError: it failed; the message is its last line.
        """
        command, environment = [self.kind, *arguments], {**os.environ, "DOCKER_BUILDKIT": "1", **self.environment}
        if log is None:
            done = subprocess.run(command, env=environment, input=stdin, capture_output=True, text=True, check=False)
            said, output = done.stderr, done.stdout
        else:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("w") as file:
                done = subprocess.run(
                    command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, text=True, check=False
                )
            said, output = log.read_text(errors="replace"), ""
        if done.returncode != 0:
            raise ToolError(self.kind, said)
        return output

    def build(self, target: str, image: str, options: Sequence[str], *, context: Path, log: Path) -> None:
        """Build one target of images/Containerfile."""
        how = {"docker": ("build",), "podman": ("build", "--layers"), "buildah": ("build", "--layers")}[self.kind]
        form = () if self.kind == "docker" else ("--format", "docker")
        where = ("--file", str(context / "images" / "Containerfile"), "--target", target, "--network", "host")
        self.run(*how, *form, *where, *options, "--tag", self.local_name(image), str(context), log=log)

    def has(self, image: str) -> bool:
        """Whether the image is on this machine."""
        try:
            self.describe(image)
        except ToolError:
            return False
        return True

    def describe(self, image: str) -> Any:
        """What `inspect` says; of the keys, Id and RootFS.Layers are the same for all three."""
        if self.kind == "buildah":
            said = json.loads(self.run("inspect", "--type", "image", image))
            return {"Id": said["FromImageID"], "RootFS": {"Layers": said["OCIv1"]["rootfs"]["diff_ids"]}}
        return json.loads(self.run("image", "inspect", image))[0]

    def size(self, image: str) -> int:
        """Bytes of all its layers, unpacked."""
        if self.kind != "buildah":
            return int(self.describe(image)["Size"])
        identity = str(self.describe(image)["Id"])
        rows = json.loads(self.run("images", "--json", "--no-trunc"))
        return next(parse_size(row["size"]) for row in rows if row["id"].removeprefix("sha256:") == identity)

    def python(self, image: str, program: str) -> str:
        """What a Python program prints in a container of the image, as a stage would run, without network."""
        if self.kind != "buildah":
            isolation = ("--network=none", "--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges")
            return self.run("run", "--rm", "--interactive", *isolation, image, "python", "-", stdin=program)
        container = self.run("from", image).strip()
        try:
            return self.run("run", container, "--", "python", "-c", program)
        finally:
            self.run("rm", container)

    def push(self, image: str, target: str) -> str:
        """Send it to a registry; the digest it has there."""
        if self.kind == "docker":
            self.run("tag", image, target)
            self.run("push", "--quiet", target)
            repository = target.rpartition(":")[0]
            digests = self.describe(target)["RepoDigests"]
            return next(str(d).partition("@")[2] for d in digests if d.startswith(f"{repository}@"))
        plain = ("--tls-verify=false",) if LOOPBACK.match(target) else ()  # as docker does by itself
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "digest"
            self.run("push", "--quiet", *plain, "--digestfile", str(file), image, f"docker://{target}")
            return file.read_text().strip()


class ToolError(UserError):
    """The tool failed. `said` is all it had to say."""

    def __init__(self, kind: str, said: str) -> None:
        lines = [line.strip() for line in said.splitlines() if line.strip()] or ["it said nothing"]
        telling = [line for line in lines if "error" in line.lower()] or lines
        super().__init__(f"{kind}: {telling[-1][:500]}")
        self.said = said

    @property
    def disk_full(self) -> bool:
        """Whether the disk was full."""
        return "no space left on device" in self.said.lower()

    @property
    def refused(self) -> bool:
        """Whether a registry wanted other credentials."""
        return REFUSALS.search(self.said) is not None


@contextlib.contextmanager
def container_tool(kinds: Sequence[str] = KINDS) -> Iterator[Tool]:
    """The first of the tools that is installed and works; CONTAINER_TOOL names one of them.

    Raises:
        UserError: none does.
    """
    wanted = os.environ.get("CONTAINER_TOOL", "")
    if wanted and wanted not in kinds:
        raise UserError(f"CONTAINER_TOOL: {wanted!r} cannot be used here", hint=f"one of {', '.join(kinds)}")
    reasons = []
    with podman_settings() as settings:
        for kind in [wanted] if wanted else kinds:
            if shutil.which(kind) is None:
                reasons.append(f"{kind} is not installed")
                continue
            tool = Tool(kind, {} if kind == "docker" else settings)
            try:
                tool.run("info")
            except ToolError as error:
                reasons.append(f"{kind} does not work: {error.message.partition(': ')[2]}")
                continue
            yield tool
            return
        raise UserError(f"no container tool: {'; '.join(reasons)}", hint=f"install one of {', '.join(kinds)}")


@contextlib.contextmanager
def podman_settings() -> Iterator[dict[str, str]]:
    """CONTAINERS_CONF for podman and buildah where their defaults cannot work here; nothing where they can."""
    text = _podman_settings()
    if "CONTAINERS_CONF" in os.environ or not text:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="rfdetr-containers-") as folder:
        path = Path(folder) / "containers.conf"
        path.write_text(text)
        yield {"CONTAINERS_CONF": str(path)}


def _podman_settings() -> str:
    systemd = Path("/run/systemd/system").exists()
    files, processes = (resource.getrlimit(which)[1] for which in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
    limited = 0 <= files < PODMAN_WANTS_FILES
    if os.geteuid() != 0 or (systemd and not limited):
        return ""
    # Podman asks for a million open files, which a process without CAP_SYS_RESOURCE is refused.
    files = min(files, PODMAN_WANTS_FILES) if files >= 0 else PODMAN_WANTS_FILES
    processes = min(processes, MAX_PROCESSES) if processes >= 0 else MAX_PROCESSES
    lines = [
        "[containers]",
        f'default_ulimits = ["nofile={files}:{files}", "nproc={processes}:{processes}"]',
        *([] if systemd else ['log_driver = "k8s-file"']),
        "[engine]",
        *([] if systemd else ['cgroup_manager = "cgroupfs"', 'events_logger = "file"']),
        # crun changes limits in another order and is refused where runc is not.
        *(['runtime = "runc"'] if shutil.which("runc") else []),
    ]
    return "\n".join(lines) + "\n"


def ca_bundle() -> Path | None:
    """The certificates this machine trusts: the package index may have one that only they know."""
    candidates = [os.environ.get("PIP_CERT"), os.environ.get("SSL_CERT_FILE"), *CA_BUNDLES]
    return next((Path(path) for path in candidates if path and Path(path).is_file()), None)


def parse_size(text: str) -> int:
    """Bytes of a size as buildah prints it, such as "319 MB"."""
    units = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
    number, _, unit = text.strip().partition(" ")
    return round(float(number) * units[unit.upper()])


def unreachable(error: ToolError, registry: str) -> UserError | TransientError:
    """A failed push or pull, in one line."""
    reason = error.message.partition(": ")[2]
    if error.refused:
        return UserError(f"{registry} refused: {reason}", hint="log in with the container tool, and check the name")
    return TransientError(f"{registry} could not be reached: {reason}", hint="check the name and the network")
