"""promote: put the model into the registry and, if the gate lets it through, make it the champion.

The only change to anything shared is one conditional write of champion.json, after everything it points to is
published. It reads and compares; nothing is evaluated here.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from components.runtime import Stage, StageContext, run_stage
from rfdetr_core.model_card import model_card
from rfdetr_core.promotion import Check, Evidence, Verdict, comparable, decide
from rfdetr_core.provenance import build_provenance
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
VERSION_FILES = (
    ("export", "model.onnx"),
    ("export", "model.safetensors"),
    ("export", "model.json"),
    ("export", "parity.json"),
    ("export", "latency.json"),
    ("train", f"checkpoints/{CHECKPOINT}"),
    ("evaluate", "metrics.json"),
    ("evaluate", "report.html"),
)
"""What a version takes over from the run: folder and file."""

log = logging.getLogger("stage.promote")


def body(context: StageContext) -> None:
    """Write decision.json and <run>/provenance.json; publish the version and move the pointer if it is won."""
    gate, registry = context.config.promote, Registry(context.root, context.config.name)
    metrics = context.read_result("evaluate", "metrics.json")
    champion = registry.champion()
    run_id = context.run.name
    won_before = champion is not None and champion.version == run_id  # and died before it could say so
    verdict, guarded = _again() if won_before else _decide(context, registry, champion, metrics)
    provenance = _provenance(context, metrics, champion)
    if verdict.outcome != "refuse":
        _publish_version(context, registry, provenance, metrics, verdict, champion=won_before)
    if verdict.outcome == "promote" and not won_before:
        registry.move(champion, run_id, metrics=metrics["candidate"], test_digest=metrics["test_digest"], by="gate")
    log.info("%s: %s%s", verdict.outcome, verdict.reason, "" if guarded else " (unguarded store)")
    decision = {
        **verdict.to_json(),
        "metric": gate.metric,
        "candidate": metrics["candidate"].get(gate.metric),
        "champion": champion.version if champion else None,
        "guarded": guarded,
        "version": registry.version(run_id).uri if verdict.outcome != "refuse" else None,
    }
    context.facts |= {"outcome": verdict.outcome}
    (context.run / "provenance.json").write_json(provenance)
    (context.output / "decision.json").write_text(json.dumps(decision, indent=2) + "\n")


def _again() -> tuple[Verdict, bool]:
    return Verdict("promote", (Check("champion", "gain", True, "this run is the champion already"),)), True


def _decide(
    context: StageContext, registry: Registry, champion: Champion | None, metrics: dict[str, Any]
) -> tuple[Verdict, bool]:
    """The gate's verdict, and whether the store guards the pointer; not asked where nothing will be written."""
    gate = context.config.promote
    other, comparison = comparable(champion, metrics, gate)
    onnx = read_manifest(context.run / "export")
    evidence = Evidence(
        candidate=metrics["candidate"],
        champion=other,
        comparison=comparison,
        parity=context.read_result("export", "parity.json"),
        latency=context.read_result("export", "latency.json"),
        size_bytes=onnx.files["model.onnx"].size if onnx else 0,
    )
    verdict = decide(evidence, gate)
    if verdict.outcome != "promote":
        return verdict, True
    permit = "set promote.allow_unguarded_store: true"
    return verdict, registry.require_guard(allow_unguarded=gate.allow_unguarded_store, permit=permit)


def _publish_version(
    context: StageContext,
    registry: Registry,
    provenance: dict[str, Any],
    metrics: dict[str, Any],
    verdict: Verdict,
    *,
    champion: bool,
) -> None:
    """<root>/models/<name>/versions/<run-id>/: the model and all that speaks for it.

    The version of the `champion` is never published anew: whoever reads it must always find it whole.
    """
    target = registry.version(context.run.name)
    inputs = "+".join(manifest_digest(context.run / place) for place in ("evaluate", "export"))
    manifest = read_manifest(target)
    if manifest is not None and manifest.inputs == inputs:
        return
    if manifest is not None and champion:
        log.warning("%s is in use and stays as it was promoted; what is new belongs into a new run", target.uri)
        return
    folder = context.work / "version"
    folder.mkdir()
    for place, name in VERSION_FILES:
        source = context.fetch_file(place, name)
        shutil.copyfile(source, folder / source.name)
    (folder / "config.yaml").write_bytes((context.run / "config.yaml").read_bytes())
    (folder / "provenance.json").write_bytes(encode_json(provenance))
    card = model_card(
        registry.name,
        provenance=provenance,
        metrics=metrics,
        parity=context.read_result("export", "parity.json"),
        latency=context.read_result("export", "latency.json"),
        verdict=verdict,
    )
    (folder / "README.md").write_text(card)
    publish(folder, target, inputs=inputs)
    log.info("registered %s", target.uri)


def _provenance(context: StageContext, metrics: dict[str, Any], champion: Champion | None) -> dict[str, Any]:
    return build_provenance(
        context.run,
        context.config,
        dataset=context.read_result("dataset", "dataset.json"),
        seed=context.read_result("train", "result.json")["seed"],
        metrics=metrics,
        champion=champion.version if champion else None,
        folders=STAGE.after,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_stage(STAGE, body, argv)


if __name__ == "__main__":
    sys.exit(main())
