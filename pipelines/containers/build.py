"""Builds every image, checks that none has grown too large, and lists what is in each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from components.images import image
from components.stages import CONTAINERS
from pipelines.containers.sbom import LIST_PACKAGES, cyclonedx
from pipelines.containers.tool import Tool, ToolError, ca_bundle, unreachable
from rfdetr_core import __version__
from rfdetr_core.errors import UserError
from rfdetr_core.revision import code_revision

ROOT = Path(__file__).parents[2]
DEFAULT_BASE = "docker.io/library/python:3.11-slim-bookworm"
MB = 1_000_000
LIMITS = {facts.name: (300 if facts.torch else 350) * MB for facts in CONTAINERS.values()}
"""Bytes of an image over what it stands on: the base image for the slim ones, the torch image for the others."""


@dataclass(frozen=True)
class Built:
    """One image."""

    stage: str
    image: str
    seconds: float
    size: int
    over: int  # bytes over what it stands on

    def line(self) -> str:
        """For people."""
        below, limit = "torch" if CONTAINERS[self.stage].torch else "the base", LIMITS[self.stage] / MB
        sizes = f"{self.size / MB:.0f} MB, {self.over / MB:.0f} MB over {below} ({limit:.0f} at most)"
        return f"{self.image}: {self.seconds:.1f} s, {sizes}"


def build_images(
    tool: Tool,
    *,
    base: str = DEFAULT_BASE,
    out: Path = ROOT / "build",
    stages: tuple[str, ...] = tuple(CONTAINERS),
    say: Callable[[str], None] = print,
) -> None:
    """Build all targets; `say` gets a line for each, and `out` logs and bills of materials.

    Raises:
        UserError: no such base image, a full disk, a step that failed, or an image over its limit.
    """
    _need_base(tool, base)
    made = []
    for stage in stages:
        made.append(build_image(tool, stage, base=base, out=out))
        say(made[-1].line())
    too_large = [f"{b.stage} is {b.over / MB:.0f} MB, {LIMITS[b.stage] / MB:.0f} at most" for b in made if _exceeds(b)]
    if too_large:
        raise UserError(
            f"images over their size: {'; '.join(too_large)}", hint="take something out, or raise the limit in build.py"
        )


def build_image(tool: Tool, stage: str, *, base: str, out: Path) -> Built:
    """Build the image of one stage, after the one it stands on, and its bill of materials."""
    started = time.monotonic()
    below = _torch(tool, base, out) if CONTAINERS[stage].torch else base
    name = tool.local_name(image(stage))
    _build(tool, CONTAINERS[stage].target, image(stage), base, out)
    described = tool.describe(name)
    layers, lower = described["RootFS"]["Layers"], tool.describe(below)["RootFS"]["Layers"]
    if layers[: len(lower)] != lower:
        raise UserError(f"{name} does not share the layers of {below}", hint="build with the same tool and base image")
    size = tool.size(name)
    built = Built(stage, name, time.monotonic() - started, size, size - tool.size(below))
    _write_sbom(tool, built, str(described["Id"]), out)
    return built


def _exceeds(built: Built) -> bool:
    return built.over > LIMITS[built.stage]


def _torch(tool: Tool, base: str, out: Path) -> str:
    """The shared lower part of the torch images, with a tag of its own so that nobody prunes it away."""
    name = f"rfdetr-pipeline/torch:{__version__}"
    _build(tool, "torch", name, base, out)
    return tool.local_name(name)


def _build(tool: Tool, target: str, name: str, base: str, out: Path) -> None:
    certificates = ca_bundle()
    options = ["--build-arg", f"BASE_IMAGE={base}", "--build-arg", f"REVISION={code_revision() or ''}"]
    options += ["--secret", f"id=ca,src={certificates}"] if certificates else []
    labels = {"version": __version__, "revision": code_revision()}
    options += [f"--label=org.opencontainers.image.{key}={value}" for key, value in labels.items() if value]
    log = out / "images" / f"{target}.log"
    try:
        tool.build(target, name, options, context=ROOT, log=log)
    except ToolError as error:
        if error.disk_full:
            raise UserError(
                f"the disk is full: {target} could not be built (all images take 9 GB)",
                hint=f"make room where {tool.kind} stores images; see {log}",
            ) from error
        raise UserError(f"{target} could not be built: {error.message}", hint=f"see {log}") from error


def _need_base(tool: Tool, base: str) -> None:
    """Pulled here and not by the build, so that what is missing can be named."""
    if tool.has(base):
        return
    try:
        if not base.startswith("localhost/"):
            tool.run("pull", "--quiet", base)
            return
        reason = "it is not on this machine"
    except ToolError as error:
        if error.disk_full:
            raise UserError(f"the disk is full: {base} could not be pulled", hint="make room, and try again") from error
        reason = unreachable(error, "its registry").message
    raise UserError(
        f"no base image {base}: {reason}",
        hint="name another with BASE_IMAGE=..., or make one from Debian's packages: images/bootstrap-base.sh",
    )


def _write_sbom(tool: Tool, built: Built, identity: str, out: Path) -> None:
    path = out / "sbom" / f"{CONTAINERS[built.stage].target}.cdx.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    document = cyclonedx(image(built.stage), identity, tool.python(built.image, LIST_PACKAGES))
    path.write_text(json.dumps(document, indent=2) + "\n")
