"""What happens to the pixels of an image on their way into a prepared dataset: decoded once, reduced if large."""

from __future__ import annotations

import hashlib
import io
from typing import NamedTuple

from PIL import Image

from rfdetr_core.data.images import decode_image, to_rgb
from rfdetr_core.data.survey import ImageFile, Problem, image_formats, problem_of
from rfdetr_core.errors import DatasetError

JPEG_QUALITY, JPEG_SUBSAMPLING = 92, 0
"""Colour at full size: halved once more, it alone would lose as much as the photo's own JPEG did (1.2 levels of 255 as
the network sees it; so it is 0.6, at the same number of bytes as 95 with halved colour)."""
RESAMPLING = Image.Resampling.HAMMING
"""As sharp as bicubic where a picture shrinks, at the cost of bilinear: 6.4 ms instead of 10.0 from 1280 x 960 to
800 x 600, where decoding takes 3.8 and encoding 1.6 (one core)."""


class Encoded(NamedTuple):
    """An image as it goes into a shard; width and height in pixels as displayed."""

    data: bytes
    width: int
    height: int
    orientation: int
    sha256: str


def encode(file: ImageFile, short_side: int | None) -> Encoded | Problem:
    """The bytes to store: those of the file, or a smaller JPEG where its shorter side exceeds `short_side` pixels.

    Pixels are decoded either way, so that what cannot be decoded is found here and not in training.

    Raises:
        DatasetError: the file is no longer the one that was surveyed.
    """
    data = read_unchanged(file)
    try:
        if short_side is not None and min(file.width, file.height) > short_side:
            return _reduced(data, file, short_side)
        decode_for_check(data)
    except Exception as error:  # Pillow's decoders let a broken file raise whatever it leads them to
        return problem_of(error)
    return Encoded(data, file.width, file.height, file.orientation, file.sha256)


def check_pixels(file: ImageFile) -> Problem | None:
    """Why the pixels cannot be decoded, if they cannot."""
    try:
        decode_for_check(read_unchanged(file))
    except DatasetError:
        raise
    except Exception as error:  # as in `encode`
        return problem_of(error)
    return None


def decode_for_check(data: bytes) -> None:
    """Walk through all of a file. A scaled decode does so too: what is cut or broken shows at half the cost."""
    with Image.open(io.BytesIO(data), formats=image_formats()) as image:
        image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()
        to_rgb(image)


def read_unchanged(file: ImageFile) -> bytes:
    """The bytes that were surveyed: the digest, which names the dataset, was taken from them."""
    try:
        data = file.path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{file.path}: cannot be read any more: {error.strerror}", hint="run again") from error
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise DatasetError(f"{file.path}: changed since it was validated", hint="run again when nobody writes to it")
    return data


def _reduced(data: bytes, file: ImageFile, short_side: int) -> Encoded:
    """Shrunk so that its shorter side is `short_side` pixels; upright afterwards."""
    scale = short_side / min(file.width, file.height)
    size = (round(file.width * scale), round(file.height * scale))
    image = decode_image(data, file.orientation, at_least=2 * short_side)
    buffer = io.BytesIO()
    image.resize(size, RESAMPLING).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=JPEG_SUBSAMPLING)
    small = buffer.getvalue()
    return Encoded(small, *size, 1, hashlib.sha256(small).hexdigest())
