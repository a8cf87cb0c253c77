"""The parity gate on whole variants, with the reference weights: 32 pictures, at batch 1 and 4."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rfdetr_core.config import ExportConfig
from rfdetr_core.data.sample import draw_image
from rfdetr_core.export.onnx import export_onnx
from rfdetr_core.export.parity import Sample, check_parity
from rfdetr_core.models.weights import TrainedModel
from tests.models import golden

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


def pictures(count: int) -> list[Sample]:
    """Drawn ones, as JPEG files."""
    found = []
    for seed in range(count):
        file = io.BytesIO()
        draw_image(np.random.default_rng(seed), 480, 6)[0].crop((0, 0, 480, 360)).save(file, "JPEG", quality=90)
        found.append(Sample(f"{seed}.jpg", file.getvalue(), Image.open(file).convert("RGB")))
    return found


@pytest.mark.parametrize("variant", ["nano", "small", "medium"])
def test_a_whole_variant(variant: str, tmp_path: Path) -> None:
    module = golden.build(variant=variant).eval()
    names = tuple(f"class {number}" for number in range(module.config.num_classes))
    trained = TrainedModel(module, module.config, names, "regular", 0, "")
    export_onnx(trained, tmp_path / "model.onnx", ExportConfig())
    parity = check_parity(trained, tmp_path / "model.onnx", pictures(32), ExportConfig())
    print(variant, parity)  # noqa: T201
    assert parity.passed and (parity.images, parity.batch_sizes) == (32, (1, 4))
    assert parity.logits < 1e-3 and parity.boxes < 1e-4
