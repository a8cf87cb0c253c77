"""Pushes the images to a registry and writes images/digests.json, by which a compiled pipeline names them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from components.images import DIGESTS, image
from components.stages import CONTAINERS
from pipelines.containers.tool import Tool, ToolError, unreachable
from rfdetr_core.errors import UserError


def push_images(
    tool: Tool,
    registry: str,
    *,
    path: Path = DIGESTS,
    stages: tuple[str, ...] = tuple(CONTAINERS),
    say: Callable[[str], None] = print,
) -> None:
    """Push all images; the file is written when every one of them has arrived.

    Args:
        registry: where to, such as registry.example.com/team.

    Raises:
        UserError: no registry named, an image that was not built, or the registry refuses.
        TransientError: it does not answer.
    """
    registry = registry.strip("/")
    if not registry:
        raise UserError("no registry to push to", hint="make push REGISTRY=registry.example.com/team")
    missing = [stage for stage in stages if not tool.has(tool.local_name(image(stage)))]
    if missing:
        raise UserError(f"no image of {', '.join(missing)} on this machine", hint="make images builds them")
    digests = {}
    for stage in stages:
        target = f"{registry}/{image(stage)}"
        try:
            digest = tool.push(tool.local_name(image(stage)), target)
        except ToolError as error:
            raise unreachable(error, registry) from error
        digests[stage] = f"{target.rpartition(':')[0]}@{digest}"
        say(f"pushed {digests[stage]}")
    path.write_text(json.dumps(digests, indent=2, sort_keys=True) + "\n")
    say(f"wrote {path}; rfdetr-pipeline compile --pinned uses it")
