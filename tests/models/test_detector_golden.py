"""The detector against the reference numbers: outputs, tokens chosen, intermediates, architecture flags."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import Tensor, nn

from rfdetr_core.models.detector import RFDETR, pad_images
from rfdetr_core.models.postprocess import postprocess
from tests.models import golden

PADDED = [(1237, (3, 128, 96)), (1238, (3, 100, 128))]


@contextmanager
def captured(module: nn.Module) -> Iterator[list[Any]]:
    """Collect what `module` returns."""
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


def run(model: RFDETR, images: Tensor | list[Tensor], mode: str) -> tuple[dict[str, Any], Any]:
    """Outputs with every head, and the two-stage selection."""
    model.train(mode == "train")
    with torch.no_grad(), captured(model.transformer) as seen:
        outputs = model(images, with_aux=True)
    return outputs, seen[0][2]


def assert_outputs(outputs: dict[str, Any], case: str, mode: str, **tolerances: float) -> None:
    logits, boxes = tolerances.get("logits", 1e-4), tolerances.get("boxes", 2e-5)
    parts = {"": outputs, "enc.": outputs.get("enc_outputs")}
    parts |= {f"aux{i}.": layer for i, layer in enumerate(outputs["aux_outputs"])}
    data = golden.arrays(case)
    stored = {key.removesuffix("pred_boxes") for key in data if key.startswith(mode) and key.endswith("pred_boxes")}
    assert stored == {f"{mode}.{prefix}" for prefix, part in parts.items() if part is not None}
    for prefix, part in parts.items():
        if part is not None:
            assert_allclose(part["pred_logits"], data[f"{mode}.{prefix}pred_logits"], rtol=0, atol=logits)
            assert_allclose(part["pred_boxes"], data[f"{mode}.{prefix}pred_boxes"], rtol=0, atol=boxes)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(
    ("case", "image"),
    [
        ("tiny", golden.TINY_IMAGE),
        ("tiny_rect", (1235, (2, 3, 96, 160))),  # positional table resized to another aspect ratio
        ("tiny_fewtokens", (1239, (2, 3, 64, 64))),  # 16 tokens for 20 queries
    ],
)
def test_outputs_and_selected_tokens(case: str, image: Any, mode: str) -> None:
    outputs, selection = run(golden.shared_tiny(), golden.gauss(*image), mode)
    assert_outputs(outputs, case, mode)
    expected = golden.arrays(case)[f"{mode}.topk_indices"]
    assert_array_equal(selection.indices.squeeze(0) if mode == "eval" else selection.indices, expected)


def test_outputs_at_a_larger_size() -> None:
    outputs, _ = run(golden.shared_tiny(), golden.gauss(1236, (1, 3, 192, 192)), "eval")
    assert_outputs(outputs, "tiny_up192", "eval")


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("as_list", [True, False])
def test_outputs_of_padded_images(mode: str, as_list: bool) -> None:
    images = [golden.gauss(*image) for image in PADDED]
    model = golden.shared_tiny()
    if as_list:
        outputs, _ = run(model, images, mode)
    else:
        batch, mask = pad_images(images)
        with torch.no_grad():
            outputs = model.train(mode == "train")(batch, mask, with_aux=True)
    assert_outputs(outputs, "tiny_padded", mode)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_outputs_in_float64(mode: str) -> None:
    outputs, _ = run(golden.build(torch.float64), golden.gauss(*golden.TINY_IMAGE).double(), mode)
    assert_outputs(outputs, "tiny_float64", mode, logits=1e-9, boxes=1e-9)


def test_intermediates() -> None:
    model, data = golden.shared_tiny(), golden.arrays("tiny")
    vit, projector = model.backbone[0].encoder.encoder, model.backbone[0].projector
    layers = model.transformer.decoder.layers
    with (
        captured(vit.embeddings) as tokens,
        captured(vit) as maps,
        captured(projector) as projected,
        captured(model.transformer.decoder.ref_point_head) as positions,
        captured(model.transformer) as transformed,
        captured(layers[0]) as first,
        captured(layers[1].cross_attn) as crossed,
        captured(layers[2].self_attn) as attended,
    ):
        run(model, golden.gauss(*golden.TINY_IMAGE), "eval")
    pairs = {
        "embeddings": tokens[0],
        "projector0": projected[0][0].permute(0, 3, 1, 2),
        "query_pos": positions[0],
        "refpoints_in": transformed[0][1][0],
        "dec0.out": first[0],
        "dec1.cross_attn": crossed[0],
        "dec2.self_attn": attended[0],
    }
    pairs |= {f"backbone_feature{i}.b0_every8ch": m[0, :, :, ::8].permute(2, 0, 1) for i, m in enumerate(maps[0])}
    for name, value in pairs.items():
        assert_allclose(value, data[f"eval.tap.{name}"], rtol=0, atol=1e-4, err_msg=name)
    assert len(positions) == 1, "query positions are computed once when references are refined once"


def test_postprocessing() -> None:
    data = golden.arrays("tiny")
    logits, boxes, sizes = (
        torch.from_numpy(data[f"eval.{name}"]) for name in ("pred_logits", "pred_boxes", "target_sizes")
    )
    for i, detections in enumerate(postprocess(logits, boxes, sizes, 25)):
        assert_allclose(detections["scores"], data[f"eval.post{i}.scores"], rtol=0, atol=1e-6)
        assert_array_equal(detections["labels"], data[f"eval.post{i}.labels"])
        assert_allclose(detections["boxes"], data[f"eval.post{i}.boxes"], rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("case", "mode"),
    # The reference has no training numbers for batch norm.
    [
        (c, mode)
        for c in golden.VARIANTS
        for mode in ("eval", "train")
        if (c, mode) != ("var_batchnorm_projector", "train")
    ],
)
def test_architecture_flags(case: str, mode: str) -> None:
    side = 112 if case == "var_base_indexes" else 128
    outputs, _ = run(golden.build(**golden.VARIANTS[case]), golden.gauss(1248, (2, 3, side, side)), mode)
    assert_outputs(outputs, case, mode)


@pytest.mark.long
@pytest.mark.parametrize("variant", ["nano", "small", "medium", "base", "large", "large-deprecated"])
def test_full_size(variant: str) -> None:
    name = variant.replace("-", "_")
    data, seed = golden.arrays(f"full_{name}_eval"), golden.scalars("full")[name]["image_seed"]
    model = golden.build(variant=variant)
    side = model.config.resolution
    outputs, selection = run(model, golden.gauss(seed, (1, 3, side, side)), "eval")
    assert_allclose(outputs["pred_logits"], data["eval.pred_logits"], rtol=0, atol=1e-4)
    assert_allclose(outputs["pred_boxes"], data["eval.pred_boxes"], rtol=0, atol=2e-5)
    assert_array_equal(selection.indices[0], data["eval.topk_indices"])
    layer = outputs["aux_outputs"][0]
    assert_allclose(layer["pred_logits"][:, ::10], data["eval.aux0.pred_logits.every10th"], rtol=0, atol=1e-4)
    assert_allclose(outputs["enc_outputs"]["pred_boxes"], data["eval.enc.pred_boxes"], rtol=0, atol=2e-5)
    sizes = torch.from_numpy(data["eval.target_sizes"])
    (detections,) = postprocess(outputs["pred_logits"], outputs["pred_boxes"], sizes, 300)
    assert_allclose(detections["scores"], data["eval.post0.scores"], rtol=0, atol=1e-4)
    assert np.mean(detections["labels"].numpy() == data["eval.post0.labels"]) > 0.98  # neighbours may swap


@pytest.mark.long
def test_full_size_padded() -> None:
    images = [golden.gauss(601, (3, 384, 288)), golden.gauss(602, (3, 300, 384))]
    outputs, _ = run(golden.build(variant="nano"), images, "eval")
    data = golden.arrays("full_nano_padded_eval")
    assert_allclose(outputs["pred_boxes"], data["eval.pred_boxes"], rtol=0, atol=2e-5)
