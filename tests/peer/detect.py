"""Run by the reference package's Python: detections of weight files in images, as JSON.

Usage: detect.py TASKS RESULTS, where TASKS is a JSON list of {"how": a class of rfdetr, or "from_checkpoint";
"weights": path; "images": paths}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import rfdetr
from PIL import Image


def detect(task: dict[str, Any]) -> dict[str, Any]:
    if task["how"] == "from_checkpoint":
        model = rfdetr.RFDETRNano.from_checkpoint(task["weights"])
    else:
        model = getattr(rfdetr, task["how"])(pretrain_weights=task["weights"], device="cpu")
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


if __name__ == "__main__":
    tasks = json.loads(Path(sys.argv[1]).read_bytes())
    Path(sys.argv[2]).write_text(json.dumps([detect(task) for task in tasks]))
