"""Which input sizes are legal: multiples of patch x windows; the seed's multiples of 14 are rounded up."""

from __future__ import annotations

SEED_STEP = 14
"""The seed document asks for multiples of 14, whatever the variant."""


def legal_resolution(requested: int, block: int) -> int | None:
    """The side in pixels that is used for a requested one, or None if there is none.

    A positive multiple of `block` stays; another positive multiple of 14 is rounded up to the next multiple
    of `block` (DESIGN section 3).
    """
    if requested < 1 or (requested % block and requested % SEED_STEP):
        return None
    return -(-requested // block) * block


def nearest_resolutions(requested: int, block: int) -> tuple[int, ...]:
    """The two multiples of `block` around a size, ascending; below the first one, that one alone."""
    below = requested // block * block
    return (below, below + block) if below > 0 else (block,)
