"""Views, boxes and pixels on their way to the network."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from rfdetr_core.data.transforms import (
    CROP_MAX,
    CROP_MIN,
    CROP_SHORT_SIDES,
    MEAN,
    STD,
    View,
    draw_view,
    normalise,
    preprocess,
    resample,
    to_square,
    view_boxes,
    whole_pixels,
)
from tests.data.helpers import picture
from tests.models.golden import arrays

# ---- the one pre-processing -------------------------------------------------------------------------------


def resize_without_antialias(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.float64]:
    """The reference package's inference resize, (H, W, 3) to (3, h, w): bilinear at half-pixel centres, in floats."""

    def taps(size: int, out: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        centres = np.clip((np.arange(out) + 0.5) * size / out - 0.5, 0, None)
        low = np.minimum(centres.astype(np.int64), size - 1)
        return low, np.minimum(low + 1, size - 1), centres - low

    pixels = image.astype(np.float64) / 255
    top, bottom, down = taps(image.shape[0], height)
    left, right, across = taps(image.shape[1], width)
    rows = pixels[top] * (1 - down)[:, None, None] + pixels[bottom] * down[:, None, None]
    resized = rows[:, left] * (1 - across)[:, None] + rows[:, right] * across[:, None]
    return resized.transpose(2, 0, 1)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 32), (20, 48)])
def test_the_reference_numbers_are_those_of_a_resize_without_antialias(height: int, width: int) -> None:
    stored = arrays("units")
    resized = resize_without_antialias(stored["pre.image_hwc_uint8"], height, width)
    assert resized == pytest.approx(stored[f"pre.resized_{height}x{width}"], abs=5e-6)  # its taps are float32
    normalised = (resized - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    assert normalised == pytest.approx(stored[f"pre.normalized_{height}x{width}"], abs=3e-5)


def test_ours_is_the_reference_where_the_image_grows_and_antialiased_where_it_shrinks() -> None:
    """DESIGN section 5 chose Pillow's filter: the same numbers up to the rounding to 8 bits, unless pixels merge."""
    stored = arrays("units")
    image = Image.fromarray(stored["pre.image_hwc_uint8"])
    step = 1 / 255 / min(STD)  # one of 256 levels, normalised
    grown = preprocess(image, 64)[0].numpy() - stored["pre.normalized_64x64"]
    assert np.abs(grown).max() < 1.01 * step
    shrunk = preprocess(image, 32)[0].numpy() - stored["pre.normalized_32x32"]
    assert np.abs(shrunk).max() > 10 * step
    antialiased = tv.resize(torch.from_numpy(stored["pre.image_hwc_uint8"]).permute(2, 0, 1), [32, 32], antialias=True)
    assert (preprocess(image, 32) - normalise(antialiased[None])).abs().max() < 1.01 * step


def test_normalise_is_torchvision_s_formula() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat(2, 3, 1, 1)  # every level in every channel
    expected = tv.normalize(tv.to_dtype(pixels, torch.float32, scale=True), list(MEAN), list(STD))
    found = normalise(pixels)
    assert found.dtype == torch.float32 and found.shape == (2, 3, 1, 256)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (MEAN, STD) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_to_square_is_pillow_s_resize() -> None:
    image = picture(70, 50)
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))
    assert np.array_equal(to_square(image, 32), expected)


@pytest.mark.parametrize("size", [(32, 32), (96, 64), (20, 90), (30, 25)])
def test_the_fast_resize_of_training_is_pillow_s_within_one_level(size: tuple[int, int]) -> None:
    image = picture(70, 50)
    pixels = np.array(image)

    def differences(view: View) -> int:
        box = (view.left, view.top, view.left + view.width, view.top + view.height)
        expected = np.asarray(image.crop([int(v) for v in box]).resize(size, Image.Resampling.BILINEAR)).astype(int)
        return int(np.abs(resample(pixels, size, view) - (expected[:, ::-1] if view.flip else expected)).max())

    for flip in (False, True):
        assert differences(View(0, 0, 70, 50, flip=flip)) <= 1
        assert differences(View(10, 20, 30, 25, flip=flip)) <= 1  # 30 x 25 to itself: no resampling at all


def test_preprocess_is_resize_then_normalise() -> None:
    image = picture(70, 50)
    resized = torch.from_numpy(np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)).copy())
    found = preprocess(image, 32)
    assert found.shape == (1, 3, 32, 32)
    assert torch.equal(found, normalise(resized.permute(2, 0, 1)[None]))


# ---- boxes ------------------------------------------------------------------------------------------------


def corners(boxes: NDArray[Any]) -> NDArray[np.float64]:
    """cx, cy, w, h to x1, y1, x2, y2."""
    centre, half = boxes[:, :2].astype(np.float64), boxes[:, 2:].astype(np.float64) / 2
    return np.concatenate([centre - half, centre + half], axis=1)


def test_boxes_are_clipped_and_empty_ones_go() -> None:
    boxes = np.array(
        [
            [0, 0, 100, 50],  # around the window
            [30, 20, 50, 30],  # inside
            [0, 0, 20, 50],  # ends where the window begins
            [60, 10, 90, 20],  # begins where it ends
            [59, 10, 90, 20],  # one pixel in
        ],
        dtype=np.float64,
    )
    found, kept = view_boxes(boxes, View(20, 10, 40, 40, flip=False))
    assert kept.tolist() == [0, 1, 4]
    assert found.dtype == np.float32
    assert corners(found) == pytest.approx(
        np.array([[0, 0, 1, 1], [0.25, 0.25, 0.75, 0.5], [0.975, 0, 1, 0.25]]), abs=1e-6
    )


def test_no_boxes_are_an_empty_array() -> None:
    found, kept = view_boxes(np.empty((0, 4)), View(0, 0, 10, 10, flip=True))
    assert found.shape == (0, 4) and found.dtype == np.float32 and kept.shape == (0,)


@given(
    x=st.floats(0, 80), y=st.floats(0, 40), w=st.floats(1, 60), h=st.floats(1, 30),
    left=st.floats(0, 50), top=st.floats(0, 20),
)  # fmt: skip
def test_a_flip_mirrors_exactly(x: float, y: float, w: float, h: float, left: float, top: float) -> None:
    """x1' = W - x2 and x2' = W - x1, in pixels of the view (training spec 12, item 46)."""
    view = View(left, top, 50.0, 30.0, flip=False)
    boxes = np.array([[x, y, x + w, y + h]])
    plain, kept = view_boxes(boxes, view)
    mirrored, kept_mirrored = view_boxes(boxes, view._replace(flip=True))
    assert kept.tolist() == kept_mirrored.tolist()
    x1, y1, x2, y2 = (corners(plain) * 50).T
    expected = np.stack([50 - x2, y1, 50 - x1, y2], axis=1)
    assert corners(mirrored) * 50 == pytest.approx(expected, abs=1e-5)
    assert (plain[:, 2:] == pytest.approx(mirrored[:, 2:], abs=1e-6)) and np.array_equal(plain[:, 1], mirrored[:, 1])


# ---- drawing views ----------------------------------------------------------------------------------------


def views(count: int, width: int, height: int, **options: bool) -> list[View]:
    rng = np.random.default_rng(11)
    return [draw_view(rng, width, height, **options) for _ in range(count)]


def is_whole(view: View, width: int, height: int) -> bool:
    return view[:4] == (0.0, 0.0, width, height)


def test_about_half_of_1000_draws_are_flipped_by_default_and_none_without() -> None:
    flips = sum(view.flip for view in views(1000, 64, 48, scale_jitter=True, flip=True))
    assert 440 < flips < 560  # four standard deviations
    assert not any(view.flip for view in views(1000, 64, 48, scale_jitter=True, flip=False))


def test_about_half_of_the_draws_are_crops_and_none_without_jitter() -> None:
    crops = sum(not is_whole(view, 640, 480) for view in views(1000, 640, 480, scale_jitter=True, flip=True))
    assert 440 < crops < 560
    plain = views(1000, 640, 480, scale_jitter=False, flip=True)
    assert all(is_whole(view, 640, 480) for view in plain) and any(view.flip for view in plain)


def recipe_of(view: View, width: int, height: int) -> tuple[int, int, int, int, int]:
    """The published recipe's numbers behind a crop: short side, and side, left, top in that frame."""
    found = []
    for short in CROP_SHORT_SIDES:
        scaled = [round(v * short / min(width, height)) for v in (width, height)]
        x, y = scaled[0] / width, scaled[1] / height
        numbers = (view.width * x, view.height * y, view.left * x, view.top * y)
        side, other, left, top = (round(v) for v in numbers)
        if side == other and numbers == pytest.approx((side, other, left, top), abs=1e-6):
            found.append((short, side, left, top, min(*scaled)))
    assert found, "no short side of the recipe gives this window"
    return found[0]


@pytest.mark.parametrize(("width", "height"), [(640, 480), (480, 640), (333, 1001), (57, 47)])
def test_crops_are_those_of_the_recipe(width: int, height: int) -> None:
    crops = [v for v in views(1500, width, height, scale_jitter=True, flip=False) if not is_whole(v, width, height)]
    shorts: Counter[int] = Counter()
    sides = set()
    for view in crops:
        short, side, left, top, smaller = recipe_of(view, width, height)
        largest = min(CROP_MAX, smaller)
        assert min(CROP_MIN, largest) <= side <= largest
        assert left >= 0 and top >= 0
        assert view.left + view.width <= width * (1 + 1e-9) and view.top + view.height <= height * (1 + 1e-9)
        shorts[short] += 1
        sides.add(side)
    assert set(shorts) == set(CROP_SHORT_SIDES)
    assert max(sides) > 580 and min(sides) < 390


@pytest.mark.parametrize(("width", "height"), [(640, 480), (301, 700)])
def test_one_resampling_gives_what_resize_crop_resize_gives(width: int, height: int) -> None:
    """The slow way, step by step as published; boxes within one pixel, pixels but for the blur of twice resampling."""
    rng = np.random.default_rng(4)
    smooth = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    boxes = np.concatenate([xy := rng.uniform(0, [width, height], (30, 2)), xy + rng.uniform(5, 200, (30, 2))], axis=1)
    boxes = np.clip(boxes, 0, [width, height] * 2)
    crops = [v for v in views(40, width, height, scale_jitter=True, flip=False) if not is_whole(v, width, height)]
    target = 128
    for view in crops:
        short, side, left, top, _ = recipe_of(view, width, height)
        scaled = [round(v * short / min(width, height)) for v in (width, height)]
        first = smooth.resize((scaled[0], scaled[1]), Image.Resampling.BILINEAR)
        second = first.crop((left, top, left + side, top + side)).resize((target, target), Image.Resampling.BILINEAR)
        whole = whole_pixels(view, smooth.size)
        difference = np.abs(resample(np.array(smooth), (target, target), whole) - np.asarray(second).astype(int))
        assert difference.mean() < 1.5 and difference.max() < 24

        moved = boxes * ([scaled[0] / width, scaled[1] / height] * 2) - [left, top] * 2
        moved = np.clip(moved, 0, side) * target / side
        expected = moved[(moved[:, 2] > moved[:, 0]) & (moved[:, 3] > moved[:, 1])]
        for window in (view, whole):
            found, _ = view_boxes(boxes, window)
            assert corners(found) * target == pytest.approx(expected, abs=1)


@settings(deadline=None)
@given(
    width=st.integers(1, 3000), height=st.integers(1, 3000), seed=st.integers(0, 2**32), side=st.sampled_from([32, 56])
)
def test_a_window_never_leaves_its_image(width: int, height: int, seed: int, side: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(5):
        view = draw_view(rng, width, height, scale_jitter=True, flip=True)
        assert view.left >= 0 and view.top >= 0 and view.width > 0 and view.height > 0
        whole = whole_pixels(view, (width, height))
        assert whole.left >= 0 and whole.left + whole.width <= width and whole.width >= 1
        assert whole.top >= 0 and whole.top + whole.height <= height and whole.height >= 1
        assert np.abs(np.subtract(whole[:4], view[:4])).max() <= 1
        if width * height < 100_000:
            pixels = np.zeros((height, width, 3), dtype=np.uint8)
            assert resample(pixels, (side, side + 1), whole).shape == (side + 1, side, 3)


def test_the_same_generator_draws_the_same_view() -> None:
    one, other = (views(50, 640, 480, scale_jitter=True, flip=True) for _ in range(2))
    assert one == other and len(set(one)) > 20
