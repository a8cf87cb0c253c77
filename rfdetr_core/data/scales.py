"""Which square sizes training sees (model spec 13.2, training spec 3.2)."""

from __future__ import annotations

from rfdetr_core.config import ModelSection, TrainConfig

# Random resize-crop of the published recipe (training spec 3.3): the shorter side becomes one of these.
CROP_SHORT_SIDES = (400, 500, 600)


def training_scales(resolution: int, block: int, *, multi_scale: bool, expanded: bool) -> list[int]:
    """Sides in pixels, ascending: (resolution // block + k) x block, at least two blocks.

    k runs over -5..5 (`expanded`) or -3..4; without `multi_scale` the only size is the resolution.
    """
    if not multi_scale:
        return [resolution]
    base = resolution // block
    steps = range(-5, 6) if expanded else range(-3, 5)
    return [(base + k) * block for k in steps if base + k >= 2]


def configured_scales(model: ModelSection, train: TrainConfig) -> list[int]:
    """The sides that a configuration trains on, in pixels, ascending."""
    return training_scales(
        model.resolution, model.block, multi_scale=train.multi_scale != "off", expanded=train.expanded_scales
    )


def largest_useful_short_side(model: ModelSection, train: TrainConfig) -> int | None:
    """Pixels of the shorter side beyond which training sees nothing more of an image (DESIGN section 5).

    None for a detector of four channels: an image that is reduced to it becomes a JPEG, which has three.
    """
    if model.num_channels > 3:
        return None
    return max(*configured_scales(model, train), *CROP_SHORT_SIDES)
