"""export_onnx: the trained weights as ONNX, with the proof that ONNX Runtime computes the same."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence

from components.runtime import Stage, StageContext, run_stage
from rfdetr_core.registry import CHECKPOINT

STAGE = Stage(
    name="export_onnx",
    folder="export",
    summary="Export the trained weights to ONNX and prove that they compute the same.",
    reads=("export",),
    after=("dataset", "train", "evaluate"),
)

log = logging.getLogger("stage.export_onnx")


def body(context: StageContext) -> None:
    """Write model.onnx, parity.json and latency.json."""
    import numpy as np

    from rfdetr_core.data.prepared import PreparedDataset
    from rfdetr_core.export.onnx import export_onnx
    from rfdetr_core.export.parity import check_parity, measure_latency
    from rfdetr_core.training.checkpoint import load_trained

    settings = context.config.export
    trained = load_trained(context.fetch_file("train", f"checkpoints/{CHECKPOINT}"))
    path = context.output / "model.onnx"
    export_onnx(
        trained,
        path,
        opset=settings.opset,
        dynamic_batch=settings.dynamic_batch,
    )
    split = PreparedDataset(context.prepared_dataset()).split(context.config.evaluate.split)
    chosen = np.unique(np.linspace(0, len(split) - 1, settings.parity_images).round().astype(int))
    images = [split.decode(int(i), channels=trained.config.num_channels) for i in chosen]
    parity = check_parity(trained, path, images, dynamic_batch=settings.dynamic_batch, tolerance=settings.tolerance)
    latency = measure_latency(trained, path)
    log.info(
        "model.onnx %.1f MB; differs from PyTorch by at most %.1e (logits), %.1e (boxes); %.1f ms per image",
        path.stat().st_size / 1e6,
        parity.logits,
        parity.boxes,
        latency["milliseconds"]["onnxruntime"],
    )
    (context.output / "parity.json").write_text(json.dumps(parity.to_json(), indent=2) + "\n")
    (context.output / "latency.json").write_text(json.dumps(latency, indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_stage(STAGE, body, argv)


if __name__ == "__main__":
    sys.exit(main())
