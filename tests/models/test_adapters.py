"""Low-rank adapters merge into the weights that they change; nothing of them is left out silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rfdetr_core.errors import CheckpointError
from rfdetr_core.models.adapters import merge_adapters, merged_weight

LAYER = "encoder.encoder.layer.0.attention.attention.query"
WRAPPED = f"backbone.0.encoder.base_model.model.{LAYER}"
PLAIN = f"backbone.0.encoder.{LAYER}"
OUT, IN = 6, 5


def adapter(*, dora: bool = True, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """One layer with its adapter, as rfdetr 1.11.2 names its parts."""
    torch.manual_seed(0)
    parts = {
        "base_layer.weight": torch.randn(OUT, IN),
        "base_layer.bias": torch.randn(OUT),
        "lora_A.default.weight": torch.randn(16, IN),
        "lora_B.default.weight": torch.randn(OUT, 16),
    }
    if dora:
        parts["lora_magnitude_vector.default.weight"] = torch.rand(OUT) + 0.5
    return {f"{WRAPPED}.{name}": value.to(dtype) for name, value in parts.items()}


def layer_output(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """What the layer with its adapter computes, row by row: the slow reference."""
    weight, bias, down, up, *magnitude = state.values()
    rows = []
    for row in range(OUT):
        direction = weight[row] + sum(up[row, rank] * down[rank] for rank in range(16))
        if magnitude:
            direction = direction * magnitude[0][row] / direction.square().sum().sqrt()
        rows.append(x @ direction + bias[row])
    return torch.stack(rows, dim=-1)


@pytest.mark.parametrize("dora", [True, False])
def test_the_merged_layer_computes_the_same(dora: bool) -> None:
    state, x = adapter(dora=dora), torch.randn(7, IN)
    merged, count = merge_adapters(state, Path("w.pth"))
    assert (merged.keys(), count) == ({f"{PLAIN}.weight", f"{PLAIN}.bias"}, 1)
    found = F.linear(x, merged[f"{PLAIN}.weight"], merged[f"{PLAIN}.bias"])
    torch.testing.assert_close(found, layer_output(state, x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, F.linear(x, *list(state.values())[:2]), atol=0.1)


def test_an_adapter_that_has_learned_nothing_changes_nothing() -> None:
    """As DoRA begins: B is zero, and the magnitude that of the rows."""
    weight = torch.randn(OUT, IN)
    merged = merged_weight(weight, torch.randn(16, IN), torch.zeros(OUT, 16), weight.norm(dim=1))
    torch.testing.assert_close(merged, weight)


def test_half_precision_is_merged_in_single() -> None:
    state = adapter(dtype=torch.float16)
    merged, _ = merge_adapters(state, Path("w.pth"))
    exact, _ = merge_adapters({key: value.float() for key, value in state.items()}, Path("w.pth"))
    assert torch.equal(merged[f"{PLAIN}.weight"], exact[f"{PLAIN}.weight"].half())


def test_without_any_the_weights_stay_the_files() -> None:
    state = {f"{PLAIN}.weight": torch.ones(OUT, IN), "class_embed.bias": torch.ones(3)}
    merged, count = merge_adapters(state, Path("w.pth"))
    assert count == 0 and merged.keys() == state.keys()
    assert all(merged[key] is value for key, value in state.items())


def changed(name: str, value: Any) -> dict[str, Tensor]:
    """With another part of that name, or without it."""
    state = {key: part for key, part in adapter().items() if key != f"{WRAPPED}.{name}"}
    return state if value is None else {**state, f"{WRAPPED}.{name}": value}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (changed("lora_A.default.weight", None), r"the adapter of backbone\.\S+\.query is not whole"),
        (changed("lora_B.default.weight", None), "is not whole"),
        (changed("base_layer.weight", None), "is not whole"),
        ({f"{WRAPPED}.base_layer.weight": torch.ones(OUT, IN)}, "is not whole"),
        (changed("base_layer.weight", torch.ones(OUT)), "is not whole"),
        (changed("lora_A.default.weight", torch.ones(8, IN)), r"lora_A of \S+ is 8 x 5, and 16 x 5 is known"),
        (changed("lora_B.default.weight", torch.ones(OUT, 8)), r"lora_B of \S+ is 6 x 8, and 6 x 16 is known"),
        (changed("lora_magnitude_vector.default.weight", torch.ones(IN)), r"_vector of \S+ is 5, and 6 is known"),
        ({key: value * (value.shape[0] != OUT) for key, value in adapter().items()}, "not finite once its adapter is"),
        (changed("lora_A.second.weight", torch.ones(16, IN)), r"lora_A\.second\.weight is no part of an adapter"),
        ({f"backbone.0.encoder.base_model.{LAYER}.weight": torch.ones(1)}, "is no part of an adapter that is known"),
        ({**adapter(), f"{PLAIN}.weight": torch.ones(OUT, IN)}, r"query\.weight is no part of an adapter"),
    ],
)
def test_an_adapter_that_cannot_be_merged(state: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"w\.pth: holds LoRA adapters that cannot be merged: .*{message}"):
        merge_adapters(state, Path("w.pth"))
