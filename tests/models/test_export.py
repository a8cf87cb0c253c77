"""The export form of the detector, through ONNX and onnxruntime."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnxruntime
import pytest
import torch
from numpy.testing import assert_allclose

from rfdetr_core.errors import ConfigError
from rfdetr_core.models.detector import RFDETR, prepare_for_export
from tests.models import golden


@pytest.fixture(scope="module")
def model() -> RFDETR:
    """With half the blocks of nano: it is traced in half the time."""
    return golden.build(variant="pico", **golden.TINY)


@pytest.fixture(scope="module", params=[(128, 128), (96, 160)])
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: RFDETR
) -> tuple[Path, tuple[int, int]]:
    height, width = request.param
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    with warnings.catch_warnings():
        # torch announces its new exporter; a tracer warning would mean a baked-in batch size, and stays an error.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            prepare_for_export(model, height, width),
            (torch.zeros(2, 3, height, width),),
            path,
            dynamo=False,
            opset_version=17,
            input_names=["input"],
            output_names=["dets", "labels"],
            dynamic_axes={name: {0: "batch"} for name in ("input", "dets", "labels")},
        )
    return path, (height, width)


@pytest.mark.parametrize("batch", [1, 3])
def test_onnxruntime_agrees(model: RFDETR, exported: tuple[Path, tuple[int, int]], batch: int) -> None:
    path, (height, width) = exported
    images = golden.gauss(77, (batch, 3, height, width))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    dets, labels = session.run(["dets", "labels"], {"input": images.numpy()})
    with torch.no_grad():
        expected = model.eval()(images)
    assert_allclose(dets, expected["pred_boxes"], rtol=0, atol=1e-4)
    assert_allclose(labels, expected["pred_logits"], rtol=0, atol=1e-4)


def test_the_model_itself_is_left_alone() -> None:
    model = golden.shared_tiny().train()
    exported = prepare_for_export(model, 96, 160)
    assert model.training and not exported.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in exported.parameters())
    assert model.backbone[0].encoder.encoder.embeddings.position_embeddings.shape[1] == 1 + 8 * 8
    with torch.no_grad():
        boxes, logits = exported(golden.gauss(1235, (2, 3, 96, 160)))
    data = golden.arrays("tiny_rect")
    assert_allclose(boxes, data["eval.pred_boxes"], rtol=0, atol=2e-5)
    assert_allclose(logits, data["eval.pred_logits"], rtol=0, atol=1e-4)


def test_export_sizes_must_fit_patches_and_windows() -> None:
    with pytest.raises(ConfigError, match="100x128 is not a multiple of 32"):
        prepare_for_export(golden.shared_tiny(), 100, 128)
