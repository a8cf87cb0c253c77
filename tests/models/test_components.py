"""Components on their own, against stored reference cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import Tensor

from rfdetr_core.models.boxes import cxcywh_to_xyxy, iou_and_giou
from rfdetr_core.models.decoder import Memory, sine_embedding
from rfdetr_core.models.deformable_attention import DeformableAttention
from rfdetr_core.models.postprocess import postprocess
from rfdetr_core.models.projector import Projector
from rfdetr_core.models.transformer import anchors
from rfdetr_core.models.vit import Embeddings, WindowedViT
from tests.models import golden

SHAPES = [(6, 5), (3, 4)]


def unit(name: str) -> Tensor:
    return torch.from_numpy(golden.arrays("units")[name]).clone()


@pytest.mark.parametrize("case", ["ref4", "ref4_mask"])
def test_deformable_attention_and_its_gradients(case: str) -> None:
    attention = DeformableAttention(32, heads=4, levels=2, points=3)
    golden.fill_w1(attention, "unit.msdeform.")
    query, memory = unit("msdeform.query").requires_grad_(), unit("msdeform.value_input").requires_grad_()
    references = unit("msdeform.ref4").requires_grad_()
    mask = unit("msdeform.mask") if case == "ref4_mask" else None
    out = attention(query, references, memory, SHAPES, mask)
    assert_allclose(out.detach(), unit(f"msdeform.{case}.out"), rtol=0, atol=1e-5)
    out.backward(unit("msdeform.cotangent"))
    for name, tensor in [("query", query), ("ref", references), ("value_input", memory)]:
        assert tensor.grad is not None
        assert_allclose(tensor.grad, unit(f"msdeform.{case}.grad_{name}"), rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(("width", "heads", "levels", "points"), [(256, 16, 1, 2), (384, 24, 2, 4)])
def test_sampling_offsets_start_as_rays(width: int, heads: int, levels: int, points: int) -> None:
    attention = DeformableAttention(width, heads=heads, levels=levels, points=points)
    stored = unit(f"msdeform.init_offsets_bias_{width}_{heads}h_{levels}l_{points}p")
    assert_allclose(attention.sampling_offsets.bias.detach(), stored, rtol=0, atol=1e-6)
    assert not attention.sampling_offsets.weight.any()


@pytest.mark.parametrize(
    ("case", "factors", "layer_norm"), [("p3p4p5", [2.0, 1.0, 0.5], True), ("bn", [1.0, 0.5], False)]
)
def test_projector(case: str, factors: list[float], layer_norm: bool) -> None:
    projector = Projector([24, 24], 16, factors, layer_norm=layer_norm).eval()
    keys = golden.scalars("units")[f"projector.{case}"]["keys"]
    assert {key: list(value.shape) for key, value in projector.state_dict().items()} == keys
    golden.fill_w1(projector, f"unit.projector.{case}.")
    maps = [golden.gauss(seed, (2, 24, 6, 8)).permute(0, 2, 3, 1) for seed in (10, 11)]
    outputs = projector(maps)
    assert [tuple(out.shape[1:3]) for out in outputs] == projector.shapes((6, 8))
    for i, out in enumerate(outputs):
        stored = unit(f"projector.{case}.out{i}")
        assert_allclose(out.detach().permute(0, 3, 1, 2), stored, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["reg3_w2", "reg0_w2", "reg3_w1"])
@pytest.mark.parametrize(("image", "seed", "grid"), [("sq", 20, (8, 8)), ("rect16x40", 21, (4, 10))])
def test_encoder(case: str, image: str, seed: int, grid: tuple[int, int]) -> None:
    spec = golden.scalars("units")[f"backbone.{case}"]
    vit = WindowedViT(
        width=spec["hidden"],
        depth=spec["layers"],
        heads=spec["heads"],
        patch_size=spec["patch"],
        num_windows=spec["num_windows"],
        table_side=spec["image_size"] // spec["patch"],
        outputs_after_blocks=spec["outputs_after_blocks"],
        windowed_blocks=spec["window_blocks"],
        registers=spec["registers"],
    )
    assert {key: list(value.shape) for key, value in vit.state_dict().items()} == spec["keys"]
    golden.fill_w1(vit, spec["weight_prefix"])
    stored = [unit(f"backbone.{case}.{image}.stage{i}") for i in range(3)]
    pixels = golden.gauss(seed, (len(stored[0]), 3, 4 * grid[0], 4 * grid[1]))
    for out, expected in zip(vit(pixels, grid), stored, strict=True):
        assert_allclose(out.detach().permute(0, 3, 1, 2), expected, rtol=0, atol=2e-5)


def test_sine_embedding() -> None:
    for per_coordinate in (8, 128):
        out = sine_embedding(unit("sine.pos4"), 2 * per_coordinate)
        assert_allclose(out, unit(f"sine.embed4_dim{per_coordinate}"), rtol=0, atol=1e-5)


def memory_of(shapes: list[tuple[int, int]], mask: Tensor | None) -> Memory:
    return Memory(torch.zeros(1, sum(h * w for h, w in shapes), 8), shapes, mask, None)


def test_anchors_of_a_padded_batch() -> None:
    boxes, usable = anchors(memory_of([(4, 6), (2, 3)], unit("proposals.mask")))
    assert_allclose(boxes.masked_fill(~usable[..., None], 0.0), unit("proposals.unsigmoid0.boxes"), rtol=0, atol=1e-7)


def test_cells_at_the_edge_of_a_fine_level_are_not_proposed() -> None:
    _, usable = anchors(memory_of([(80, 80)], None))
    assert_array_equal(usable.view(80, 80), unit("proposals.80x80.valid").bool())


@pytest.mark.parametrize("side", [3, 7, 8])
def test_positional_table_is_resized(side: int) -> None:
    embeddings = Embeddings(channels=3, width=6, patch_size=4, num_windows=1, table_side=5, registers=0)
    with torch.no_grad():
        embeddings.position_embeddings.copy_(unit("pe.in_5x5"))
    resized = embeddings.positions((side, side))
    assert_allclose(resized.detach(), unit(f"pe.out_{side}x{side}"), rtol=0, atol=1e-5)
    assert embeddings.positions((5, 5)) is embeddings.position_embeddings
    resized.sum().backward()
    gradient = embeddings.position_embeddings.grad
    assert gradient is not None
    assert gradient[:, 1:].sum().item() == pytest.approx(6 * side * side, rel=1e-4)


def test_box_arithmetic() -> None:
    a, b = cxcywh_to_xyxy(unit("box.a_cxcywh")), cxcywh_to_xyxy(unit("box.b_cxcywh"))
    iou, giou = iou_and_giou(a[:, None], b)
    assert_allclose(a, unit("box.a_xyxy"), rtol=0, atol=1e-6)
    assert_allclose(iou, unit("box.iou"), rtol=0, atol=1e-6)
    assert_allclose(giou, unit("box.giou"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_select", [15, 300])
def test_postprocessing_keeps_the_order_of_ties(num_select: int) -> None:
    arguments: list[Any] = [unit(f"post.{name}") for name in ("logits", "boxes", "target_sizes")]
    for i, detections in enumerate(postprocess(*arguments, num_select)):
        prefix = f"post.n{num_select}.img{i}"
        assert_array_equal(detections["labels"], unit(f"{prefix}.labels"))
        assert_allclose(detections["scores"], unit(f"{prefix}.scores"), rtol=0, atol=1e-6)
        assert_allclose(detections["boxes"], unit(f"{prefix}.boxes"), rtol=0, atol=1e-3)
