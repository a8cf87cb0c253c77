"""What a person is told to change where nothing fits."""

from __future__ import annotations

import pytest

from rfdetr_core.config import ModelConfig
from rfdetr_core.training.smaller_model import smallest_change

SMALL = ModelConfig.parse({"variant": "small", "num_classes": 7, "num_channels": 1})


@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        (512, "model.gradient_checkpointing: true fits"),
        (400, "model.resolution: 384 with model.gradient_checkpointing: true fits"),
        (300, "model.resolution: 256 with model.gradient_checkpointing: true fits"),
        (128, "model.variant: pico with model.gradient_checkpointing: true fits"),
        (64, "no smaller model fits either: use a device with more memory, or one that nobody else uses"),
    ],
)
def test_the_first_change_that_fits_is_named(largest: int, expected: str) -> None:
    tried: list[ModelConfig] = []

    def fits(model: ModelConfig) -> bool:
        tried.append(model)
        return model.gradient_checkpointing and model.resolution <= largest

    assert smallest_change(SMALL, fits) == expected
    assert all((model.num_classes, model.num_channels) == (7, 1) for model in tried)
    assert all(model.resolution % model.block == 0 for model in tried)


def test_checkpointing_that_is_on_is_not_advised() -> None:
    model = SMALL.model_copy(update={"gradient_checkpointing": True})
    assert smallest_change(model, lambda _: True).startswith("model.resolution: 384")
