"""Which container image each stage runs in."""

from __future__ import annotations

import json
import os
from pathlib import Path

from rfdetr_core import __version__
from rfdetr_core.errors import UserError

STAGES = ("validate_dataset", "probe_batch_size", "train", "evaluate", "export_onnx", "promote")
DIGESTS = Path(__file__).parents[1] / "images" / "digests.json"
PINNED = "RFDETR_IMAGE_DIGESTS"
"""Names a file that `make push` wrote: images are then named by digest. Read when a component is imported."""


def image(stage: str) -> str:
    """The image of a stage, such as rfdetr-pipeline/train:0.1.0, or by digest where the environment asks for that."""
    if path := os.environ.get(PINNED):
        return pinned_images(Path(path))[stage]
    return f"rfdetr-pipeline/{stage.replace('_', '-')}:{__version__}"


def pinned_images(path: Path = DIGESTS) -> dict[str, str]:
    """The image of every stage by digest, as pushed.

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
    missing = [s for s in STAGES if not (isinstance(found, dict) and "@sha256:" in str(found.get(s)))]
    if missing:
        raise UserError(f"{path}: has no digest of {', '.join(missing)}", hint=hint)
    return {stage: str(found[stage]) for stage in STAGES}
