"""What a stage was given, as one number: equal digests mean that its work is already done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from rfdetr_core.config.run import RunConfig


def section_digest(config: RunConfig, parts: Iterable[str]) -> str:
    """SHA-256, in hexadecimal, over dotted parts of a configuration: sections or single fields.

    The order of the parts, and naming one twice, makes no difference. The digest covers names and values, so it
    changes when a default does, or when a section gains a field.

    Raises:
        KeyError: there is no such part.
    """
    values = config.as_dict()
    chosen = {part: _part(values, part) for part in parts}
    canonical = json.dumps(chosen, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _part(values: dict[str, Any], path: str) -> Any:
    found: Any = values
    for name in path.split("."):
        if not isinstance(found, dict) or name not in found:
            raise KeyError(f"the configuration has no {path}")
        found = found[name]
    return found
