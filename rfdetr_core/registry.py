"""The model registry: versions of a model, and the pointer to its champion (DESIGN sections 1 and 7).

<root>/models/<name>/versions/<run-id>/   a publication: model.onnx, weights, metrics, provenance, model card, ...
<root>/models/<name>/champion.json        {"version", "metrics", "test_digest", "promoted", "by", "history"}

A version never changes once it is published; the pointer is the only thing that two runs may both write, and it is
written on condition that it still is what was read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rfdetr_core.errors import (
    ChampionChangedError,
    ConfigError,
    MissingObjectError,
    PublicationError,
    StorageAccessError,
    VersionConflict,
)
from rfdetr_core.publication import Manifest, read_manifest
from rfdetr_core.storage import Location, encode_json

CHECKPOINT = "checkpoint_best_total.pth"
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")  # of a model, and of a run: DESIGN section 1
RUN_ID = NAME

GATE = "gate"
"""Who moved the pointer, where no person did."""


@dataclass(frozen=True)
class Champion:
    """The pointer as it was read; `revision` is what a conditional write must still find."""

    version: str
    metrics: dict[str, Any]
    test_digest: str
    revision: str
    promoted: str = ""
    by: str = GATE
    history: tuple[dict[str, str], ...] = ()
    """The champions before this one, oldest first: version, promoted, by."""


@dataclass(frozen=True)
class Registry:
    """One model's place in the registry."""

    root: Location
    name: str

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ConfigError(f"{self.name!r} is no name of a model", hint="a-z, 0-9 and -, at most 63, such as cells")

    @property
    def base(self) -> Location:
        """<root>/models/<name>."""
        return self.root / "models" / self.name

    @property
    def pointer(self) -> Location:
        """champion.json."""
        return self.base / "champion.json"

    def version(self, run_id: str) -> Location:
        """Where the version that a run made lies.

        Raises:
            ConfigError: not the name of a run.
        """
        if not RUN_ID.fullmatch(run_id):
            raise ConfigError(f"{run_id!r} is no version", hint="a version is a run id: a-z, 0-9 and -, at most 63")
        return self.base / "versions" / run_id

    def versions(self) -> list[str]:
        """Every published version, by name."""
        found = {name for info in (self.base / "versions").list_files() for name in [info.name.partition("/")[0]]}
        return sorted(name for name in found if RUN_ID.fullmatch(name) and self._manifest(name) is not None)

    def manifest(self, run_id: str) -> Manifest:
        """What a version holds; every file is there, and of its size.

        Raises:
            ConfigError: there is no such version; the known ones are named.
            PublicationError: a file of it is gone or of another size.
        """
        manifest = self._manifest(run_id)
        if manifest is None:
            known = ", ".join(self.versions()[-5:]) or "none"
            raise ConfigError(f"{self.name} has no version {run_id}", hint=f"versions: {known}")
        sizes = {info.name: info.size for info in self.version(run_id).list_files()}
        for name, file in manifest.files.items():
            if sizes.get(name) != file.size:
                what = "is gone" if name not in sizes else f"has {sizes[name]} bytes, and {file.size} were published"
                raise PublicationError(
                    f"{(self.version(run_id) / name).uri} {what}",
                    hint=f"run promote of run {run_id} again with --force, or promote another version",
                )
        return manifest

    def _manifest(self, run_id: str) -> Manifest | None:
        return read_manifest(self.version(run_id))

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
            return Champion(
                version,
                dict(document["metrics"]),
                str(document["test_digest"]),
                revision,
                promoted=str(document.get("promoted", "")),
                by=str(document.get("by", GATE)),
                history=tuple(dict(row) for row in document.get("history", ())),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise PublicationError(
                f"{self.pointer.uri}: not a champion pointer: {error}", hint="restore it from an earlier version"
            ) from error

    def move(
        self,
        before: Champion | None,
        version: str,
        *,
        metrics: Mapping[str, Any],
        test_digest: str,
        by: str,
        history: tuple[dict[str, str], ...] | None = None,
    ) -> None:
        """Make a published version the champion, if `before` still is; one conditional write.

        Args:
            metrics, test_digest: of the version, as its own evaluation measured them.
            by: the gate, or the person.
            history: the champions before it; by default those before `before`, and that one.

        Raises:
            ChampionChangedError: another one came first.
        """
        if history is None:
            row = () if before is None else ({"version": before.version, "promoted": before.promoted, "by": before.by},)
            history = (*(before.history if before else ()), *row)
        pointer = {
            "version": version,
            "metrics": dict(metrics),
            "test_digest": test_digest,
            "promoted": datetime.now(UTC).isoformat(timespec="microseconds"),
            "by": by,
            "history": list(history),
        }
        try:
            self.pointer.write_if(encode_json(pointer), before.revision if before else None)
        except VersionConflict as error:
            raise ChampionChangedError(
                "another run promoted while this one decided",
                hint="run promote again; it says if the run has to be measured beside that one first",
            ) from error

    def require_guard(self, *, allow_unguarded: bool, permit: str) -> bool:
        """Whether the store honours conditional writes, found out by trying.

        Args:
            allow_unguarded: go on without; the answer is then False.
            permit: how a person allows it, for the message.

        Raises:
            StorageAccessError: it does not, and nobody allowed it; or nothing can be written there.
        """
        if self.base.conditional_writes_work():
            return True
        if not allow_unguarded:
            raise StorageAccessError(
                f"{self.base.uri}: this store ignores conditional writes, so two runs could overwrite each other",
                hint=f"use another store, or {permit} if only one run promotes at a time",
            )
        return False


def model_names(root: Location) -> list[str]:
    """Every model that the registry below `root` has something of."""
    names = {info.name.partition("/")[0] for info in (root / "models").list_files()}
    return sorted(name for name in names if NAME.fullmatch(name))
