"""Run by the reference package's Python: detections of weight files in images, as JSON.

Usage: detect.py TASKS RESULTS, where TASKS is a JSON list of {"how": a class of rfdetr, or "from_checkpoint";
"weights": path; "images": paths; "threshold": number}, and where wanted {"options": arguments of the class;
"train_adapters": true for adapters that are no longer those of the beginning; "write": path of a file in the form of
its training}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import rfdetr
import torch
from PIL import Image


def detect(task: dict[str, Any]) -> dict[str, Any]:
    if task["how"] == "from_checkpoint":
        model = rfdetr.RFDETR.from_checkpoint(task["weights"])
    else:
        options = task.get("options", {})
        model = getattr(rfdetr, task["how"])(pretrain_weights=task["weights"], device="cpu", **options)
    if task.get("train_adapters"):
        train_adapters(model.model.model)
    if "write" in task:
        write(model, task["write"])
    images = [Image.open(path) for path in task["images"]]
    return {
        "class": type(model).__name__,
        "images": [
            {
                "boxes": found.xyxy.tolist(),
                "scores": found.confidence.tolist(),
                "class_ids": found.class_id.tolist(),
                "class_names": [str(name) for name in found.data["class_name"]],
            }
            for found in model.predict(images, threshold=task["threshold"])
        ],
    }


def train_adapters(network: torch.nn.Module) -> None:
    """Give every adapter values that change its layer by about as much as the layer has.

    With this seed the scores of the first 300 tokens are 1.4e-5 apart or more in the images of the test. Two that
    are closer are ranked in either order, and self-attention then changes all detections.
    """
    torch.manual_seed(17)
    with torch.no_grad():
        for name, value in network.named_parameters():
            if "lora_A" in name:
                value.uniform_(-(value.shape[1] ** -0.5), value.shape[1] ** -0.5)
            elif "lora_B" in name:
                value.normal_(std=0.3)
            elif "lora_magnitude_vector" in name:
                value.mul_(1 + 0.3 * torch.rand_like(value))


def write(model: Any, path: str) -> None:
    content = {
        "model": model.model.model.state_dict(),
        "args": {"class_names": list(model.class_names), "lr": 1e-4},
        "model_name": type(model).__name__,
        "model_config": {**model.model_config.model_dump(), "compile": True, "device": "cuda"},
        "rfdetr_version": "1.11.2",
    }
    torch.save(content, path)


if __name__ == "__main__":
    tasks = json.loads(Path(sys.argv[1]).read_bytes())
    Path(sys.argv[2]).write_text(json.dumps([detect(task) for task in tasks]))
