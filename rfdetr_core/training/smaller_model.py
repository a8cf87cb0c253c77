"""What to change where a training step of one image does not fit: the first of the changes that helps."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rfdetr_core.config import ModelConfig

BY_SIZE = ("large", "base", "medium", "small", "nano", "pico")


def smallest_change(model: ModelConfig, fits: Callable[[ModelConfig], bool]) -> str:
    """Advice: what keeps most of the model comes first, and only what was seen to fit is said to.

    Args:
        fits: whether a step of one image of this model fits.
    """
    for text, changed in _changes(model):
        if fits(changed):
            return f"{text} fits"
    return "no smaller model fits either: use a device with more memory, or one that nobody else uses"


def _changes(model: ModelConfig) -> Iterator[tuple[str, ModelConfig]]:
    given = model.model_dump(exclude={"gradient_checkpointing", "resolution", "requested_resolution"})
    if given["positional_encoding_size"] == model.resolution // model.patch_size:
        del given["positional_encoding_size"]  # it follows the resolution
    saved = {"gradient_checkpointing": True}
    if not model.gradient_checkpointing:
        yield "model.gradient_checkpointing: true", model.model_copy(update=saved)
    for share in (0.75, 0.5):
        side = int(share * model.resolution) // model.block * model.block
        if 2 * model.block <= side < model.resolution:
            text = f"model.resolution: {side} with model.gradient_checkpointing: true"
            yield text, ModelConfig.parse({**given, **saved, "resolution": side})
    place = BY_SIZE.index(model.variant) if model.variant in BY_SIZE else 0
    for variant in BY_SIZE[place + 1 :]:
        kept = {"variant": variant, "num_classes": model.num_classes, "num_channels": model.num_channels}
        text = f"model.variant: {variant} with model.gradient_checkpointing: true"
        yield text, ModelConfig.parse({**kept, **saved})
