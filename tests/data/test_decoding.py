"""The decoder of training gives the pixels of the decoder of everything else."""

from __future__ import annotations

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rfdetr_core.data import decoding
from rfdetr_core.data.decoding import decode_for_training
from rfdetr_core.data.images import decode_image
from tests.data.helpers import encoded, picture


def smooth(width: int, height: int) -> Image.Image:
    return picture(12, 9).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("at_least", [10, 20, 40, 500])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}], ids=["420", "444", "progressive"])
def test_jpeg_pixels_are_pillow_s(orientation: int, at_least: int, options: dict[str, int]) -> None:
    data = encoded(smooth(123, 86), "JPEG", quality=90, **options)
    found = decode_for_training(data, orientation, at_least=at_least)
    expected = np.asarray(decode_image(data, orientation, at_least=at_least))
    assert np.array_equal(found, expected)
    assert found.flags.c_contiguous and found.flags.writeable  # torch warns of anything else


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 300), height=st.integers(1, 300), at_least=st.integers(1, 80))
def test_reductions_are_pillow_s(width: int, height: int, at_least: int) -> None:
    data = encoded(Image.new("RGB", (width, height)), "JPEG")
    found = decode_for_training(data, 1, at_least=at_least)
    assert found.shape[1::-1] == decode_image(data, 1, at_least=at_least).size


@pytest.mark.parametrize("kind", ["PNG", "CMYK", "gray", "Pillow is more patient"])
def test_what_is_no_plain_jpeg_is_decoded_all_the_same(kind: str) -> None:
    image = smooth(64, 48)
    data = {
        "PNG": lambda: encoded(image),
        "CMYK": lambda: encoded(image.convert("CMYK"), "JPEG"),
        "gray": lambda: encoded(image.convert("L"), "JPEG"),
        "Pillow is more patient": lambda: encoded(image, "JPEG").replace(b"\xff\xdb", b"\xff\x00\xff\xdb", 1),
    }[kind]()
    assert np.array_equal(decode_for_training(data, 1, at_least=24), np.asarray(decode_image(data, 1, at_least=24)))


def test_plain_files_never_see_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "decode_image", None)
    assert decode_for_training(encoded(smooth(64, 48), "JPEG"), 1, at_least=24).shape == (24, 32, 3)


@pytest.mark.parametrize("cut", [0, 100, 1500])
def test_torn_files_are_refused_in_pillow_s_words(cut: int) -> None:
    data = encoded(picture(64, 48), "JPEG")[:cut]
    with pytest.raises(ValueError):
        simplejpeg.decode_jpeg(data)
    with pytest.raises(OSError):
        decode_for_training(data, 1, at_least=1)
