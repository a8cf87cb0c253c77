"""From encoded bytes to upright pixels: the one decoder of validation, training and evaluation.

A picture becomes RGB, or what else a detector takes: `MODES`.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

# EXIF orientations that exchange width and height, and those whose turning reverses the displayed x or y.
SWAPS_AXES = frozenset({5, 6, 7, 8})
REVERSES_X = frozenset({2, 3, 6, 7})
REVERSES_Y = frozenset({3, 4, 7, 8})

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""How image files are read for a detector of so many channels, by Pillow's name; there are no others."""

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes, orientation: int, *, channels: int = 3, at_least: int | None = None) -> Image.Image:
    """Decode to RGB, or to another number of channels, upright.

    `orientation` is the EXIF orientation that the index holds (1: as stored). With `at_least`, a JPEG may be
    decoded at 1/2, 1/4 or 1/8 of its size as long as both sides stay that many pixels long: for training only.
    """
    image: Image.Image = Image.open(io.BytesIO(data))
    if at_least is not None:
        image.draft("RGB", (at_least, at_least))
    image.load()
    return _turned(to_channels(image, channels), orientation)


def why_unreadable(error: Exception, data: bytes) -> str:
    """One line on what decoding raised, for people."""
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels (a decompression bomb?)"
    if isinstance(error, UnidentifiedImageError):
        return "no image format that Pillow knows" if data else "empty file"
    return " ".join(str(error).split()) or type(error).__name__


def upright(image: Image.Image, channels: int = 3) -> Image.Image:
    """The picture in so many channels as it is displayed: its own EXIF orientation is applied.

    Raises:
        ValueError: pixels without a fixed range (32-bit integers, floats), or a mode that has no RGB.
        OSError: the file behind it is torn; a broken file may make Pillow raise other things as well.
    """
    image.load()
    orientation = orientation_of(image)
    return _turned(to_channels(image, channels), orientation)


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def to_rgb(image: Image.Image) -> Image.Image:
    """`to_channels` for three."""
    return to_channels(image, 3)


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """1 (grey), 3 (RGB) or 4 (RGBA) channels of 8 bits; of 16 bits the upper 8 are kept.

    Transparency is dropped where it has no channel, and where a picture has none, the fourth is 255.

    Raises:
        ValueError: pixels without a fixed range (32-bit integers, floats).
    """
    mode = MODES[channels]
    if image.mode == mode:
        return image
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255: almost every 16-bit picture would be white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no fixed range: save it with 8 or 16 bits")
    elif image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # straight to RGB, Pillow warns of transparent palette entries
    elif image.mode in ("La", "RGBa"):
        image = image.convert(image.mode[:-1] + "A")  # Pillow knows no other way out of premultiplied colours
    return image.convert(mode)


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, that is still to be applied to a loaded image.

    To be asked after loading: Pillow turns a TIFF upright as it loads it, and then nothing is left to apply.
    """
    orientation = image.getexif().get(_EXIF_ORIENTATION)
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1
