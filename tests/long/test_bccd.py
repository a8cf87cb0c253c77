"""The DAG on real images: the blood cells of BCCD, by the documented command (`make test-long`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rfdetr_core.data.prepared import PreparedDataset

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
BCCD = Path(os.environ.get("RFDETR_BCCD", ROOT.parent / "shared" / "data" / "bccd"))


@pytest.mark.skipif(not (BCCD / "coco").is_dir(), reason=f"the blood cells are not at {BCCD}; set RFDETR_BCCD")
@pytest.mark.timeout(900)
def test_the_promoted_model_finds_blood_cells(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines", "run", "--config", str(ROOT / "examples" / "bccd.yaml")]
    done = subprocess.run(
        [*command, "--set", f"dataset.uri={BCCD / 'coco'}", "--run-id", "bccd"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    root = tmp_path / "runs" / "s3" / "rfdetr"
    run = root / "runs" / "bccd"
    metrics = json.loads((run / "evaluate" / "metrics.json").read_text())
    assert metrics["images"] == 36
    assert metrics["candidate"]["per_class"]["RBC"]["ap50"] > 0.3
    report = json.loads((run / "dataset" / "report.json").read_text())
    assert {name: s["images"] for name, s in report["splits"].items()} == {"train": 255, "valid": 73, "test": 36}

    # The promoted ONNX, alone: what a consumer does with a test image.
    import onnxruntime

    version = root / "models" / "blood-cells" / "versions" / "bccd" / "model.onnx"
    session = onnxruntime.InferenceSession(str(version), providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    (height, width), names = json.loads(metadata["resolution"]), json.loads(metadata["class_names"])
    dataset = PreparedDataset(root / json.loads((run / "dataset" / "dataset.json").read_text())["location"])
    split = dataset.split("test")
    image = split.decode(0)
    pixels = np.asarray(image.resize((width, height), 2), dtype=np.float32).transpose(2, 0, 1)[None] / 255
    mean, std = (np.array(json.loads(metadata[k]), dtype=np.float32).reshape(3, 1, 1) for k in ("mean", "std"))
    dets, labels = session.run(["dets", "labels"], {"input": (pixels - mean) / std})
    cells = 1 / (1 + np.exp(-labels[0, :, names.index("RBC")]))
    best = dets[0, cells.argmax()] * np.array([image.width, image.height] * 2)
    truth = split.table.boxes[split.table.rows(0)]
    centre_inside = (truth[:, :2] < best[:2]).all(axis=1) & (best[:2] < truth[:, 2:]).all(axis=1)
    assert centre_inside.any(), "the most certain red blood cell lies on no annotated cell"
