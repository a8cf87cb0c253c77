"""Components on their own, against stored reference cases."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rfdetr_core.models.deformable_attention import DeformableAttention
from rfdetr_core.models.projector import Projector
from rfdetr_core.models.vit import Embeddings, resize_table
from tests.models import golden_units
from tests.models.golden_check import breaches
from tests.models.golden_report import computed

TRAINING = ("matcher.", "criterion.")
"""Cases of tests/training."""


@pytest.mark.parametrize("case", [name for name in golden_units.CASES if not name.startswith(TRAINING)])
def test_reference_numbers(case: str) -> None:
    assert not breaches(computed(case))


def test_sampling_offsets_start_as_rays_alone() -> None:
    attention = DeformableAttention(256, heads=16, levels=1, points=2)
    assert not attention.sampling_offsets.weight.any()
    assert not attention.attention_weights.weight.any()
    assert not attention.attention_weights.bias.any()


@pytest.mark.parametrize("case", [[2.0, 1.0, 0.5], [1.0, 0.5], [4.0, 0.25], [0.5, 0.25]])
@pytest.mark.parametrize("grid", [(6, 8), (5, 7)])
def test_the_projector_tells_the_shapes_of_its_maps(case: list[float], grid: tuple[int, int]) -> None:
    projector = Projector([8, 8], 8, case, layer_norm=True)
    outputs = projector([torch.zeros(1, *grid, 8)] * 2)
    assert [tuple(out.shape[1:3]) for out in outputs] == projector.shapes(grid)
    assert len(outputs) == len(case)


@pytest.mark.parametrize("factors", [[0.25], [0.25, 1.0], [3.0]])
def test_other_factors_are_refused(factors: list[float]) -> None:
    with pytest.raises(ValueError, match=r"use 4, 2, 1 or 0\.5, and 0\.25 only after another one"):
        Projector([8], 8, factors, layer_norm=True)


def test_gradients_reach_the_positional_table_through_its_resize() -> None:
    embeddings = Embeddings(channels=3, width=6, patch_size=4, num_windows=1, table_side=5, registers=0)
    assert embeddings.positions((5, 5)) is embeddings.position_embeddings
    embeddings.positions((8, 8)).sum().backward()
    table = embeddings.position_embeddings
    assert isinstance(table, nn.Parameter)
    assert table.grad is not None
    assert table.grad[:, 1:].sum().item() == pytest.approx(6 * 64, rel=1e-4)


@pytest.mark.parametrize(("held", "wanted"), [((5, 5), (8, 8)), ((8, 8), (3, 12)), ((6, 6), (6, 4))])
def test_the_gradient_of_the_resize_is_torch_s_own(held: tuple[int, int], wanted: tuple[int, int]) -> None:
    torch.manual_seed(0)
    table = torch.randn(1, 1 + held[0] * held[1], 6, requires_grad=True)
    cotangent = torch.randn(1, 1 + wanted[0] * wanted[1], 6)
    patches = table[:, 1:].reshape(1, *held, 6).permute(0, 3, 1, 2)
    resized = F.interpolate(patches, size=wanted, mode="bicubic", align_corners=False, antialias=True)
    expected = torch.cat([table[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)
    found = resize_table(table, held, wanted)
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(result, table, cotangent)[0] for result in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)
