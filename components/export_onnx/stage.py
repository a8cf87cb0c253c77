"""export_onnx: the trained weights as ONNX, with the proof that ONNX Runtime computes the same."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

from components.runtime import Stage, StageContext, run_stage
from rfdetr_core.registry import CHECKPOINT

STAGE = Stage(
    name="export_onnx",
    folder="export",
    summary="Export the trained weights to ONNX and prove that they compute the same.",
    reads=("export", "train.eval_max_dets"),
    after=("dataset", "train", "evaluate"),
)

log = logging.getLogger("stage.export_onnx")


def body(context: StageContext) -> None:
    """Write model.onnx, parity.json, latency.json, and the weights as model.safetensors with model.json."""
    from rfdetr_core.data.prepared import PreparedDataset
    from rfdetr_core.export.latency import measure_latency
    from rfdetr_core.export.onnx import export_onnx
    from rfdetr_core.export.parity import check_ap, check_parity, split_samples
    from rfdetr_core.models.safetensors import write_portable
    from rfdetr_core.training.checkpoint import load_trained

    settings = context.config.export
    trained = load_trained(context.fetch_file("train", f"checkpoints/{CHECKPOINT}"))
    metrics = context.read_result("evaluate", "metrics.json")
    dataset = PreparedDataset(context.prepared_dataset())
    path = context.output / "model.onnx"
    export_onnx(trained, path, settings, facts=_facts(context, metrics, dataset.digest))
    split = dataset.split(metrics["split"])  # the one that was evaluated
    samples = split_samples(split, settings.parity_images, trained.config.num_channels)
    if len(samples) < settings.parity_images:
        log.warning("%s has %d images only: all of them are compared", metrics["split"], len(samples))
    parity = check_parity(trained, path, samples, settings)
    parity.ap = check_ap(trained, path, split, dataset.class_map, settings, max_dets=context.config.train.eval_max_dets)
    latency = measure_latency(trained, path)
    fastest = min(row["milliseconds"] for row in latency["rows"] if row["runtime"] == "onnxruntime")
    log.info(
        "model.onnx %.1f MB, opset %d, %s; differs from PyTorch by at most %.1e (logits), %.1e (boxes) on %d images, "
        "%.5f AP on %d; %.1f ms per image",
        path.stat().st_size / 1e6,
        settings.opset,
        settings.precision,
        parity.logits,
        parity.boxes,
        parity.images,
        parity.ap["difference"],
        len(split),
        fastest,
    )
    write_portable(trained, context.output)
    for name, content in (("parity.json", parity.to_json()), ("latency.json", latency)):
        (context.output / name).write_text(json.dumps(content, indent=2) + "\n")


def _facts(context: StageContext, metrics: dict[str, Any], dataset_digest: str) -> dict[str, Any]:
    """What evaluation and run add to the file's metadata: the thresholds of the best F1, and where it comes from."""
    candidate = metrics["candidate"]
    per_class = {name: row["f1_threshold"] for name, row in candidate["per_class"].items() if row["f1_threshold"] >= 0}
    return {
        "threshold": candidate["f1_threshold"],
        "class_thresholds": per_class,
        "dataset_digest": dataset_digest,
        "test_digest": metrics["test_digest"],
        "run": context.run.name,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_stage(STAGE, body, argv)


if __name__ == "__main__":
    sys.exit(main())
