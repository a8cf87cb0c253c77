"""Which container image each stage runs in."""

from __future__ import annotations

import json
import re
from pathlib import Path

from components.stages import CONTAINERS
from rfdetr_core import __version__
from rfdetr_core.errors import UserError

DIGESTS = Path(__file__).parents[1] / "images" / "digests.json"


def image(stage: str) -> str:
    """The image of a stage as it is built, such as rfdetr-pipeline/train:0.1.0."""
    return f"rfdetr-pipeline/{CONTAINERS[stage].target}:{__version__}"


def built_images() -> dict[str, str]:
    """The image of every container as it is built: by a tag, which a registry may point elsewhere tomorrow."""
    return {name: image(name) for name in CONTAINERS}


def pinned_images(path: Path = DIGESTS) -> dict[str, str]:
    """The image of every container by digest, as pushed.

    Raises:
        UserError: no such file, or one that does not name every stage.
    """
    hint = "make push REGISTRY=... writes it"
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", hint=hint) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}", hint=hint) from error
    missing = [name for name in CONTAINERS if not (isinstance(found, dict) and is_pinned(str(found.get(name))))]
    if missing:
        raise UserError(f"{path}: has no digest of {', '.join(missing)}", hint=hint)
    return {name: str(found[name]) for name in CONTAINERS}


def is_pinned(name: str) -> bool:
    """Whether an image is named by its digest."""
    return re.fullmatch(r"[^\s@]+@sha256:[0-9a-f]{64}", name) is not None
