"""promote: put the model into the registry and, if the gate lets it through, make it the champion.

The only change to anything shared is one conditional write of champion.json, after everything it points to is
published.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from components.runtime import Stage, StageContext, run_stage
from rfdetr_core import __version__, hardware
from rfdetr_core.errors import ChampionChangedError, StorageAccessError, VersionConflict
from rfdetr_core.promotion import Verdict, decide
from rfdetr_core.publication import manifest_digest, publish, read_manifest
from rfdetr_core.registry import CHECKPOINT, Champion, Registry
from rfdetr_core.storage import encode_json

STAGE = Stage(
    name="promote",
    folder="promote",
    summary="Decide whether the trained model becomes the champion.",
    reads=("name", "promote"),
    after=("dataset", "train", "evaluate", "export"),
)

log = logging.getLogger("stage.promote")


def body(context: StageContext) -> None:
    """Write decision.json and <run>/provenance.json; publish the version and move the pointer if it is won."""
    gate, registry = context.config.promote, Registry(context.root, context.config.name)
    metrics = context.read_result("evaluate", "metrics.json")
    champion = registry.champion()
    run_id = context.run.name
    if champion is not None and champion.version == run_id:
        # This very run won before and died before it could say so.
        verdict, guarded = Verdict("promote", "this run is the champion already"), True
    else:
        verdict = decide(metrics["candidate"], _comparable(champion, metrics), gate)
        guarded = _is_guarded(context, registry, verdict)
    provenance = _provenance(context)
    if verdict.outcome != "refuse":
        _publish_version(context, registry, provenance, metrics)
    if verdict.outcome == "promote" and (champion is None or champion.version != run_id):
        _move_pointer(registry, champion, run_id, metrics)
    log.info("%s: %s%s", verdict.outcome, verdict.reason, "" if guarded else " (unguarded store)")
    decision = {
        "outcome": verdict.outcome,
        "reason": verdict.reason,
        "metric": gate.metric,
        "candidate": metrics["candidate"][gate.metric],
        "champion": champion.version if champion else None,
        "guarded": guarded,
        "version": registry.version(run_id).uri if verdict.outcome != "refuse" else None,
    }
    context.facts |= {"outcome": verdict.outcome}
    (context.run / "provenance.json").write_json(provenance)
    (context.output / "decision.json").write_text(json.dumps(decision, indent=2) + "\n")


def _comparable(champion: Champion | None, metrics: dict[str, Any]) -> dict[str, Any] | None:
    """The champion's numbers on the candidate's split.

    Raises:
        ChampionChangedError: the pointer names another version than the one that was evaluated, and that one's
            recorded numbers are of another split.
    """
    if champion is None:
        return None
    evaluated: dict[str, Any] | None = metrics["champion"]
    if evaluated is not None and evaluated["version"] == champion.version:
        return evaluated
    if champion.test_digest == metrics["test_digest"]:
        return {"version": champion.version, **champion.metrics}
    raise ChampionChangedError(
        f"champion changed to {champion.version} since the evaluation", hint="run evaluate again with --force"
    )


def _is_guarded(context: StageContext, registry: Registry, verdict: Verdict) -> bool:
    """Whether the store honours conditional writes; without them promotion needs the config's word for it."""
    if verdict.outcome != "promote":
        return True
    if registry.base.conditional_writes_work():
        return True
    if not context.config.promote.allow_unguarded_store:
        raise StorageAccessError(
            f"{registry.base.uri}: this store ignores conditional writes, so two runs could overwrite each other",
            hint="use another store, or set promote.allow_unguarded_store: true if only one run promotes at a time",
        )
    return False


def _publish_version(
    context: StageContext, registry: Registry, provenance: dict[str, Any], metrics: dict[str, Any]
) -> None:
    """<root>/models/<name>/versions/<run-id>/: the model and all that speaks for it."""
    target = registry.version(context.run.name)
    inputs = manifest_digest(context.run / "export")
    manifest = read_manifest(target)
    if manifest is not None and manifest.inputs == inputs:
        return
    folder = context.work / "version"
    folder.mkdir()
    for place, name in (("export", "model.onnx"), ("export", "parity.json"), ("train", f"checkpoints/{CHECKPOINT}")):
        source = context.fetch_file(place, name)
        shutil.copyfile(source, folder / source.name)
    (folder / "metrics.json").write_bytes(encode_json(metrics))
    (folder / "provenance.json").write_bytes(encode_json(provenance))
    publish(folder, target, inputs=inputs)
    log.info("registered %s", target.uri)


def _move_pointer(registry: Registry, champion: Champion | None, run_id: str, metrics: dict[str, Any]) -> None:
    pointer = {
        "version": run_id,
        "metrics": metrics["candidate"],
        "test_digest": metrics["test_digest"],
        "promoted": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        registry.pointer.write_if(encode_json(pointer), champion.revision if champion else None)
    except VersionConflict as error:
        raise ChampionChangedError(
            "another run promoted while this one decided", hint="run promote again; evaluate first if it asks for it"
        ) from error


def _provenance(context: StageContext) -> dict[str, Any]:
    """What made this model, in digests: enough to make it again, or to see why it cannot be."""
    dataset = context.read_result("dataset", "dataset.json")
    statuses = {info.name: (context.run / "status" / info.name).read_json() for info in _statuses(context)}
    return {
        "run": context.run.name,
        "dataset": {"digest": dataset["digest"], "source": dataset["source"]},
        "config": context.config.as_dict(),
        "publications": {folder: manifest_digest(context.run / folder) for folder in STAGE.after},
        "code": __version__,
        "images": {name.removesuffix(".json"): status.get("image", "") for name, status in statuses.items()},
        "seed": context.read_result("train", "result.json")["seed"],
        "hardware": {name.removesuffix(".json"): status.get("hardware") for name, status in statuses.items()},
        "decided_on": hardware.describe(),
    }


def _statuses(context: StageContext) -> list[Any]:
    return [info for info in (context.run / "status").list_files() if info.name.endswith(".json")]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_stage(STAGE, body, argv)


if __name__ == "__main__":
    sys.exit(main())
