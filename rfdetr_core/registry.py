"""The model registry: versions of a model, and the pointer to its champion (DESIGN sections 1 and 7).

<root>/models/<name>/versions/<run-id>/   a publication: model.onnx, checkpoint, metrics, provenance
<root>/models/<name>/champion.json        {"version", "metrics", "test_digest", "promoted"}
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from rfdetr_core.errors import MissingObjectError, PublicationError
from rfdetr_core.storage import Location

CHECKPOINT = "checkpoint_best_total.pth"
RUN_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")  # DESIGN section 1


@dataclass(frozen=True)
class Champion:
    """The pointer as it was read; `revision` is what a conditional write must still find."""

    version: str
    metrics: dict[str, Any]
    test_digest: str
    revision: str


@dataclass(frozen=True)
class Registry:
    """One model's place in the registry."""

    root: Location
    name: str

    @property
    def base(self) -> Location:
        """<root>/models/<name>."""
        return self.root / "models" / self.name

    @property
    def pointer(self) -> Location:
        """champion.json."""
        return self.base / "champion.json"

    def version(self, run_id: str) -> Location:
        """Where the version that a run made lies."""
        return self.base / "versions" / run_id

    def champion(self) -> Champion | None:
        """The champion, or None if no version was ever promoted.

        Raises:
            PublicationError: the pointer exists and is not one of ours.
        """
        try:
            data, revision = self.pointer.read_versioned()
        except MissingObjectError:
            return None
        try:
            document = json.loads(data)
            version = document["version"]
            if not isinstance(version, str) or not RUN_ID.fullmatch(version):
                raise ValueError(f"version {version!r} is no run id")
            return Champion(version, dict(document["metrics"]), str(document["test_digest"]), revision)
        except (ValueError, KeyError, TypeError) as error:
            raise PublicationError(
                f"{self.pointer.uri}: not a champion pointer: {error}", hint="restore it from an earlier version"
            ) from error
