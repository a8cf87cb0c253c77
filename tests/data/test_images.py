"""Decoding: every kind of file to upright RGB pixels."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from rfdetr_core.data.images import decode_image, orientation_of
from tests.data.helpers import (
    STORED_BY,
    annotation,
    document,
    encoded,
    image_row,
    picture,
    validated,
    write_dataset,
    write_split,
)

ORIENTATION = 0x0112


def exif(orientation: Any) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """Pillow's own turning, the reference."""
    carrier = Image.open(io.BytesIO(encoded(image, exif=exif(orientation))))
    return ImageOps.exif_transpose(carrier)


def stored(upright: Image.Image, orientation: int, kind: str) -> bytes:
    """A file that shows `upright` to whoever respects its EXIF orientation."""
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    held = turned(upright, STORED_BY[orientation])
    return encoded(held, kind, exif=exif(orientation), **options)


def marked() -> tuple[Image.Image, tuple[int, int, int, int]]:
    """A black 80 x 48 image and a red box in it, x, y, w, h, that no turn or mirror leaves in place."""
    image = Image.new("RGB", (80, 48))
    image.paste((255, 0, 0), (8, 8, 40, 16))
    return image, (8, 8, 32, 8)


def red_box(image: Image.Image) -> tuple[int, ...]:
    """x, y, w, h of the red pixels."""
    pixels = np.asarray(image).astype(int)
    rows, columns = np.nonzero((pixels[..., 0] > 128) & (pixels[..., 1] < 100))
    return tuple(int(v) for v in (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_drawn_on_the_displayed_frame_land_on_their_pixels(tmp_path: Path, kind: str, orientation: int) -> None:
    upright, box = marked()
    name = f"a.{kind.lower()}"
    write_dataset(tmp_path, document([image_row(1, name, 80, 48)], [annotation(bbox=box)]))
    (tmp_path / "train" / name).write_bytes(stored(upright, orientation, kind))
    _, splits, report = validated(tmp_path)
    table, file = splits["train"].table, splits["train"].files[0]
    assert (table.widths[0], table.heights[0]) == (file.width, file.height) == (80, 48)
    assert "size-differs" not in report.findings
    image = decode_image(file.path.read_bytes(), file.orientation)
    assert (image.mode, image.size) == ("RGB", (80, 48))
    assert red_box(image) == box
    # Pillow turns a TIFF upright by itself, so nothing is left to apply.
    noted = "exif-orientation" in report.findings
    assert noted == (orientation != 1 and kind != "TIFF") == (file.orientation != 1)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_drawn_on_the_stored_frame_stay_on_it(tmp_path: Path, orientation: int) -> None:
    """An annotation tool that knows nothing of EXIF declares the stored size and draws on it."""
    as_stored, box = marked()
    write_dataset(tmp_path, document([image_row(1, "a.jpg", 80, 48)], [annotation(bbox=box)]))
    data = encoded(as_stored, "JPEG", quality=95, subsampling=0, exif=exif(orientation))
    (tmp_path / "train" / "a.jpg").write_bytes(data)
    _, splits, report = validated(tmp_path)
    file = splits["train"].files[0]
    assert (file.orientation, file.exif_orientation) == (1, orientation)
    assert (file.width, file.height) == (80, 48)
    assert red_box(decode_image(data, file.orientation)) == box
    assert report.findings["exif-ignored"].rows == [f"train/a.jpg: {orientation}"]
    assert report.findings["exif-ignored"].severity == "warning"
    assert "exif-orientation" not in report.findings and "size-differs" not in report.findings


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("at_least", [None, 30])
def test_turning_is_that_of_pillow(orientation: int, at_least: int | None) -> None:
    image = picture(61, 40, seed=3)
    found = decode_image(encoded(image), orientation, at_least=at_least)
    assert np.array_equal(np.asarray(found), np.asarray(turned(image, orientation)))


AS_TEXT = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\x006\0\0\0\0\0\0\0"
"""An EXIF block whose orientation is the text "6"."""


@pytest.mark.parametrize("tags", [exif(0), exif(9), exif(65535), AS_TEXT], ids=["0", "9", "65535", "text"])
def test_an_orientation_that_is_none_means_upright(tags: Any) -> None:
    image = Image.open(io.BytesIO(encoded(picture(), "JPEG", exif=tags)))
    image.load()
    assert orientation_of(image) == 1


def sixteen_bits(kind: str) -> bytes:
    return encoded(Image.fromarray(np.array([[0, 255, 256, 0x8000, 0xFFFF]], dtype=np.uint16)), kind)


def palette(transparency: bytes | int | None) -> bytes:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    return encoded(image, **({} if transparency is None else {"transparency": transparency}))


PRIMARIES = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
MODES: dict[str, tuple[bytes, list[list[int]]]] = {
    "RGB": (encoded(Image.new("RGB", (1, 1), (1, 2, 3))), [[1, 2, 3]]),
    "grayscale": (encoded(Image.new("L", (1, 1), 77)), [[77, 77, 77]]),
    "grayscale JPEG": (encoded(Image.new("L", (1, 1), 77), "JPEG"), [[77, 77, 77]]),
    "bilevel": (encoded(Image.new("1", (1, 1), 1)), [[255, 255, 255]]),
    "RGBA": (encoded(Image.new("RGBA", (1, 1), (1, 2, 3, 0))), [[1, 2, 3]]),
    "LA": (encoded(Image.new("LA", (1, 1), (9, 0))), [[9, 9, 9]]),
    "palette": (palette(None), PRIMARIES),
    "palette with a transparent colour": (palette(1), PRIMARIES),
    "palette with alpha": (palette(b"\x00\x80\xff"), PRIMARIES),
    "16-bit PNG": (sixteen_bits("PNG"), [[v, v, v] for v in (0, 0, 1, 128, 255)]),
    "16-bit TIFF": (sixteen_bits("TIFF"), [[v, v, v] for v in (0, 0, 1, 128, 255)]),
    "CMYK JPEG": (encoded(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "JPEG", quality=100), [[255, 0, 0]]),
    "GIF": (encoded(Image.new("RGB", (1, 1), (255, 0, 0)), "GIF"), [[255, 0, 0]]),
}


CONVERTED = {
    "RGBA": {"alpha-image"},
    "LA": {"alpha-image"},
    "palette": {"palette-image"},
    "palette with alpha": {"palette-image", "alpha-image"},
    "palette with a transparent colour": {"palette-image", "alpha-image"},
    "16-bit PNG": {"deep-image"},
    "16-bit TIFF": {"deep-image"},
    "CMYK JPEG": {"cmyk-image"},
    "GIF": {"palette-image"},
}
"""What is said of a mode; of the others nothing is."""


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    data, expected = MODES[mode]
    image = decode_image(data, 1)
    assert image.mode == "RGB"
    assert np.asarray(image)[0].tolist() == expected
    width = len(expected)  # validation lets it pass, and says how it is converted
    write_dataset(tmp_path, document([image_row(1, "a.png", width, 1)], [annotation(bbox=(0, 0, 1, 1))]))
    (tmp_path / "train" / "a.png").write_bytes(data)
    _, _, report = validated(tmp_path)
    said = {code for code in report.findings if code.endswith("-image")}
    assert said == CONVERTED.get(mode, set())
    assert set(report.findings) - said <= {"class-absent", "extension-differs"}


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_range_are_refused(mode: str, tmp_path: Path) -> None:
    data = encoded(Image.new(mode, (4, 4), 3), "TIFF")
    with pytest.raises(ValueError, match=f"pixels of mode {mode} have no fixed range"):
        decode_image(data, 1)


@pytest.mark.parametrize("orientation", [1, 6])
@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 300), height=st.integers(1, 300), at_least=st.integers(1, 80))
def test_a_scaled_decode_is_never_smaller_than_asked(orientation: int, width: int, height: int, at_least: int) -> None:
    data = encoded(Image.new("RGB", (width, height)), "JPEG")
    whole, scaled = (decode_image(data, orientation, at_least=limit) for limit in (None, at_least))
    assert whole.size == ((width, height) if orientation == 1 else (height, width))
    if min(width, height) >= at_least:
        assert min(scaled.size) >= at_least
    else:
        assert scaled.size == whole.size
    # ... and no larger than need be: the next step down, 1/8 at most, would be too small
    if min(scaled.size) > 2 * at_least and whole.size != scaled.size:
        assert whole.width > 4 * scaled.width


def test_a_scaled_decode_really_saves() -> None:
    data = encoded(picture(640, 480), "JPEG")
    assert [decode_image(data, 1, at_least=n).size for n in (480, 241, 240, 120, 60, 8)] == [
        (640, 480), (640, 480), (320, 240), (160, 120), (80, 60), (80, 60),
    ]  # fmt: skip


@pytest.mark.parametrize(("bbox", "code"), [((2, 2, 60, 20), "exif-ignored"), ((2, 2, 20, 60), "exif-orientation")])
def test_boxes_decide_the_frame_where_no_size_is_listed(
    tmp_path: Path, bbox: tuple[int, int, int, int], code: str
) -> None:
    """Stored 64 x 48 and to be shown as 48 x 64: a wide box fits the one, a tall box the other."""
    row = {"id": 1, "file_name": "a.jpg"}
    write_dataset(tmp_path, document([image_row(1, "a.jpg")], [annotation(bbox=bbox)]))
    write_split(tmp_path, "train", document([row], [annotation(bbox=bbox)]), draw=False)
    picture().save(tmp_path / "train" / "a.jpg", exif=exif(6))
    _, splits, report = validated(tmp_path)
    assert report.findings[code].rows == ["train/a.jpg: 6"]
    table = splits["train"].table
    assert (table.widths[0], table.heights[0]) == ((64, 48) if code == "exif-ignored" else (48, 64))
    assert table.boxes[0].tolist() == [bbox[0], bbox[1], bbox[0] + bbox[2], bbox[1] + bbox[3]]
