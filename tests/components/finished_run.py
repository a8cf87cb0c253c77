"""A run whose first five stages are done, with made-up small files: what promote reads, without any torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rfdetr_core.config import RunConfig, dump_yaml
from rfdetr_core.publication import publish
from rfdetr_core.registry import CHECKPOINT
from rfdetr_core.storage import Location, encode_json

NAME = "cells"


def candidate(score: float, **more: Any) -> dict[str, Any]:
    """A row of metrics.json."""
    return {
        **dict.fromkeys(("map", "map50", "map75", "mar", "f1"), score),
        "f1_threshold": 0.4,
        "max_dets": 100,
        "per_class": {"cell": {"boxes": 9, "ap": score, "ap50": score, "ar": score, "f1": score, "f1_threshold": 0.4}},
        "classes": ["cell"],
        "source": "ema",
        "epoch": 3,
        "weights_sha256": "77" * 32,
        "variant": "pico",
        "resolution": 64,
        "parameters": 4_000_000,
        **more,
    }


def finished_run(
    root: Location,
    run_id: str,
    work: Path,
    *,
    score: float,
    champion: dict[str, Any] | None = None,
    test_digest: str = "abc",
    **gate: Any,
) -> Location:
    """Publish such a run; `champion` is the row of the one that evaluate measured."""
    run = root / "runs" / run_id
    config = RunConfig.parse({"name": NAME, "dataset": {"uri": "s3://data/cells"}, "promote": gate})
    (run / "config.yaml").write_bytes(dump_yaml(config).encode())
    (run / "status/train.json").write_json(
        {"image": "registry/train@sha256:1", "started": "2030-01-01T00:00:00+00:00", "hardware": {"cpus": 2}}
    )
    classes = [{"label": 0, "category_id": 1, "source_id": 4, "name": "cell"}]
    metrics = {
        "split": "test",
        "images": 12,
        "test_digest": test_digest,
        "candidate": candidate(score),
        "champion": champion,
        "comparison": None,
    }
    dataset = {"digest": "d1", "source": "s3://data/cells", "location": "datasets/d1", "classes": classes}
    dataset["splits"] = {"train": {"images": 90, "boxes": 300}, "test": {"images": 12, "boxes": 40}}
    rows = [{"runtime": "onnxruntime", "device": "cpu", "threads": 2, "milliseconds": 5.0}]
    files: dict[str, dict[str, bytes]] = {
        "dataset": {"dataset.json": encode_json(dataset)},
        "train": {"result.json": b'{"seed": 7}', f"checkpoints/{CHECKPOINT}": b"weights of " + run_id.encode()},
        "evaluate": {"metrics.json": json.dumps(metrics).encode(), "report.html": b"<html>"},
        "export": {
            "model.onnx": b"onnx of " + run_id.encode(),
            "model.safetensors": b"tensors",
            "model.json": b"{}",
            "parity.json": b'{"passed": true, "logits": 1e-6, "boxes": 1e-7, "images": 32}',
            "latency.json": encode_json({"rows": rows}),
        },
    }
    for folder, content in files.items():
        for name, data in content.items():
            path = work / run_id / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        publish(work / run_id / folder, run / folder, inputs="made up", progress=False)
    return run
