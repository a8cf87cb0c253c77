"""The sides that training sees."""

from __future__ import annotations

from typing import Any

import pytest

from rfdetr_core.config import ModelConfig
from rfdetr_core.data.scales import training_scales
from tests.models.golden import scalars

STORED: dict[str, dict[str, Any]] = scalars("units")["multi_scale"]


@pytest.mark.parametrize("name", sorted({"nano", "small", "medium", "base", "large"} & set(STORED)))
@pytest.mark.parametrize("expanded", [True, False])
@pytest.mark.parameter("expanded_scales", "multi_scale", "resolution")
def test_the_reference_lists(name: str, expanded: bool) -> None:
    model = ModelConfig.parse({"variant": name})
    found = training_scales(model.resolution, model.block, multi_scale=True, expanded=expanded)
    assert found == STORED[name]["expanded" if expanded else "plain"]
    assert training_scales(model.resolution, model.block, multi_scale=False, expanded=expanded) == [model.resolution]


def test_sides_below_two_blocks_are_left_out() -> None:
    assert training_scales(64, 32, multi_scale=True, expanded=True) == [64, 96, 128, 160, 192, 224]
    assert training_scales(32, 32, multi_scale=True, expanded=False) == [64, 96, 128, 160]


def test_a_resolution_between_blocks_counts_from_the_block_below() -> None:
    assert training_scales(400, 32, multi_scale=True, expanded=True)[5] == 384
