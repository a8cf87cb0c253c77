"""Which square sizes training sees (model spec 13.2, training spec 3.2)."""

from __future__ import annotations


def training_scales(resolution: int, block: int, *, multi_scale: bool, expanded: bool) -> list[int]:
    """Sides in pixels, ascending: (resolution // block + k) x block, at least two blocks.

    k runs over -5..5 (`expanded`) or -3..4; without `multi_scale` the only size is the resolution.
    """
    if not multi_scale:
        return [resolution]
    base = resolution // block
    steps = range(-5, 6) if expanded else range(-3, 5)
    return [(base + k) * block for k in steps if base + k >= 2]
