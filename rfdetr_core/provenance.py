"""provenance.json: what made a model, in digests; enough to make it again, or to see why it cannot be (DESIGN 1)."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from rfdetr_core import __version__, hardware
from rfdetr_core.config import RunConfig
from rfdetr_core.errors import MissingObjectError
from rfdetr_core.publication import manifest_digest, read_manifest
from rfdetr_core.revision import code_revision
from rfdetr_core.storage import Location

SCHEMA_VERSION = 1


def build_provenance(
    run: Location,
    config: RunConfig,
    *,
    dataset: Mapping[str, Any],
    seed: int | None,
    metrics: Mapping[str, Any],
    champion: str | None,
    folders: tuple[str, ...],
) -> dict[str, Any]:
    """The content of provenance.json.

    Args:
        run: the run, whose status files tell times, images, versions and hardware of each stage.
        dataset: the run's dataset.json.
        seed: of the training.
        metrics: the content of metrics.json.
        champion: the version that this one was compared with.
        folders: the run's publications, each of which is named by its digest and those of its files.
    """
    statuses = {}
    for info in (run / "status").list_files():
        if info.name.endswith(".json"):
            statuses[info.name.removesuffix(".json")] = (run / "status" / info.name).read_json()
    candidate = metrics["candidate"]
    return {
        "schema_version": SCHEMA_VERSION,
        "run": run.name,
        "run_uri": run.uri,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {key: candidate.get(key) for key in ("weights_sha256", "source", "epoch")},
        "parent": {"pretrain_weights": _pretrain_weights(run, config), "champion": champion},
        "dataset": {key: dataset.get(key) for key in ("digest", "source", "location", "splits")},
        "classes": dataset.get("classes"),
        "test": {key: metrics.get(key) for key in ("split", "images", "test_digest")},
        "config": config.as_dict(),
        "seed": seed,
        "code": {"version": __version__, "revision": code_revision()},
        "publications": {folder: _publication(run / folder) for folder in folders},
        "stages": {name: _stage(status) for name, status in sorted(statuses.items())},
        "decided_on": hardware.describe(),
    }


def _stage(status: Mapping[str, Any]) -> dict[str, Any]:
    """Of a status file, what made the stage's result; the stage that writes this has no end yet."""
    keys = ("started", "finished", "seconds", "image", "revision", "versions", "hardware")
    return {key: status.get(key) for key in keys}


def _publication(target: Location) -> dict[str, Any]:
    manifest = read_manifest(target)
    files = {name: file.sha256 for name, file in manifest.files.items()} if manifest else {}
    return {"digest": manifest_digest(target), "files": files}


def _pretrain_weights(run: Location, config: RunConfig) -> Any:
    """What training started from: the file's own facts as the first stage found them, or None for random weights."""
    if config.model.pretrain_weights is None:
        return None
    try:
        return (run / "dataset" / "weights.json").read_json()
    except MissingObjectError:
        return {"uri": config.model.pretrain_weights}
