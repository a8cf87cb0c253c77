"""Augmentations by name: boxes follow their pixels, the same seed gives the same pixels, nothing is ignored."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rfdetr_core.config import TrainConfig
from rfdetr_core.config.augment import (
    AERIAL,
    AGGRESSIVE,
    CONSERVATIVE,
    CONTAINERS,
    INDUSTRIAL,
    TRANSFORMS,
    parse_augmentations,
)
from rfdetr_core.data.augment import augment, homography, hull
from rfdetr_core.data.loading import Draw, EvalImages, TrainImages
from rfdetr_core.data.prepared import PreparedSplit
from rfdetr_core.errors import ConfigError
from tests.data.helpers import grid_dataset, prepared

PRESETS = {"CONSERVATIVE": CONSERVATIVE, "AGGRESSIVE": AGGRESSIVE, "AERIAL": AERIAL, "INDUSTRIAL": INDUSTRIAL}
MOVES = ("Rotate", "Affine", "ShiftScaleRotate", "Perspective")
Pixels = NDArray[np.uint8]


def run(config: Any, pixels: Pixels, boxes: Any, seed: int = 0) -> tuple[Pixels, NDArray[np.float64], list[int]]:
    """Augment once; boxes are x1, y1, x2, y2 in pixels on both sides."""
    height, width = pixels.shape[:2]
    extent = np.array([width, height] * 2)
    x1, y1, x2, y2 = (np.array(boxes, dtype=np.float64).reshape(-1, 4) / extent).T
    unit = np.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], axis=1).astype(np.float32)
    found, moved, rows = augment(pixels, unit, parse_augmentations(config), np.random.default_rng(seed))
    assert found.shape == pixels.shape and found.dtype == np.uint8 and moved.dtype == np.float32
    centre, half = moved[:, :2].astype(float), moved[:, 2:].astype(float) / 2
    return found, np.concatenate([centre - half, centre + half], axis=1) * extent, rows.tolist()


def noise(height: int = 48, width: int = 64, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def always(name: str, **values: Any) -> dict[str, Any]:
    return {name: {"p": 1.0, **values}}


def something(name: str, p: float | None = 1.0) -> dict[str, Any]:
    """The transform with its defaults; Affine's are no change at all."""
    values: dict[str, Any] = {"rotate": [5, 25]} if name == "Affine" else {}
    return {name: values if p is None else {"p": p, **values}}


# ---- every transform --------------------------------------------------------------------------------------


@pytest.mark.parameter("aug_config")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_changes_pixels_and_says_nothing_of_images_it_spares(name: str) -> None:
    pixels = noise()
    changed, *_ = run(something(name), pixels, [[5, 5, 30, 30]], seed=3)
    assert not np.array_equal(changed, pixels)
    spared, boxes, rows = run(something(name, 0.0), pixels, [[5, 5, 30, 30]], seed=3)
    assert np.array_equal(spared, pixels) and rows == [0] and boxes[0] == pytest.approx([5, 5, 30, 30], abs=1e-4)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_half_of_the_images_are_transformed_unless_p_says_otherwise(name: str) -> None:
    pixels = noise(16, 16)
    for p, low, high in ((None, 70, 130), (0.1, 5, 40)):
        changed = sum(not np.array_equal(run(something(name, p), pixels, [], seed)[0], pixels) for seed in range(200))
        assert low < changed < high


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_same_seed_gives_the_same_pixels(name: str) -> None:
    pixels = noise()
    one, other = (run(something(name), pixels, [[5, 5, 30, 30]], seed=4) for _ in range(2))
    assert np.array_equal(one[0], other[0]) and np.array_equal(one[1], other[1])
    if TRANSFORMS[name]:  # with something to draw
        assert len({run(something(name), pixels, [], seed)[0].tobytes() for seed in range(12)}) > 2


@pytest.mark.parametrize("name", [n for n in TRANSFORMS if n not in (*MOVES, "HorizontalFlip", "VerticalFlip")])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_colours_leave_boxes_alone(name: str, seed: int) -> None:
    given_boxes = [[5, 5, 30, 30], [0, 0, 64, 48]]
    _, boxes, rows = run(always(name), noise(seed=seed), given_boxes, seed)
    assert rows == [0, 1] and boxes == pytest.approx(np.array(given_boxes), abs=1e-4)


# ---- boxes follow their pixels ----------------------------------------------------------------------------

RANGES: dict[str, Any] = {
    "Rotate": always("Rotate", limit=180),
    "Affine": always("Affine", scale=[0.7, 1.4], translate_percent=[-0.2, 0.2], rotate=[-40, 40], shear=[-15, 15]),
    "Affine per axis": always("Affine", scale={"x": [0.5, 2], "y": 1}, shear={"x": 0, "y": [-30, 30]}),
    "ShiftScaleRotate": always("ShiftScaleRotate", shift_limit=0.2, scale_limit=0.3, rotate_limit=90),
    "Perspective": always("Perspective", scale=[0.05, 0.2]),
    "HorizontalFlip": always("HorizontalFlip"),
    "VerticalFlip": always("VerticalFlip"),
    "several": [always("Rotate", limit=30), always("HorizontalFlip"), always("Affine", shear=[-9, 9]), always("Blur")],
}


def lit(pixels: Pixels) -> NDArray[np.float64] | None:
    """The hull x1, y1, x2, y2 of the light pixels."""
    rows, columns = np.nonzero(pixels[..., 1] > 127)
    return None if not len(rows) else np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1.0])


@pytest.mark.parameter("aug_config")
@pytest.mark.parametrize("name", RANGES)
@given(
    seed=st.integers(0, 2**32), x=st.integers(0, 90), y=st.integers(0, 60), w=st.integers(8, 60), h=st.integers(8, 50)
)
@settings(max_examples=60, deadline=None)
def test_a_box_is_the_hull_of_its_pixels(name: str, seed: int, x: int, y: int, w: int, h: int) -> None:
    """A light rectangle on black, moved: its box lies around its pixels.

    Where the moved rectangle is not upright and partly outside, the box is the hull of its corners, clipped, and may
    be larger than what is left; it is never smaller.
    """
    width, height = 128, 96
    box = np.array([x, y, min(x + w, width), min(y + h, height)], dtype=np.float64)
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[y : y + h, x : x + w] = 255
    found, boxes, rows = run(RANGES[name], pixels, [box], seed)
    light = lit(found)
    if not rows:
        assert light is None or (light[2:] - light[:2]).min() <= 1  # at most a sliver of blended border
        return
    (moved,) = boxes
    assert (moved >= -1e-4).all() and (moved <= np.array([width, height] * 2) + 1e-4).all()
    assert (moved[2:] > moved[:2]).all()
    if light is None:  # nothing but corners was left
        return
    assert (light[:2] >= moved[:2] - 1.5).all() and (light[2:] <= moved[2:] + 1.5).all()
    inside = (moved[:2] > 1).all() and (moved[2:] < [width - 1, height - 1]).all()
    if inside and name != "several":  # the hull of a hull is larger
        slack = 4.0 if name == "Affine per axis" else 2.5  # acute corners lose a little to blending
        assert light == pytest.approx(moved, abs=slack)


@given(seed=st.integers(0, 2**32), count=st.integers(0, 12))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("name", [*PRESETS, "moves"])
def test_boxes_stay_inside_and_rows_say_whose_they_are(name: str, seed: int, count: int) -> None:
    """Boxes moved together and one by one are the same, so no row is mixed up with another."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, [60, 44], (count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(1, 30, (count, 2))], axis=1).clip(0, [64, 48] * 2)
    config = PRESETS.get(name) or [always(move) for move in MOVES]
    _, moved, rows = run(config, noise(), boxes, seed)
    assert (moved[:, :2] >= -1e-3).all() and (moved[:, 2:] <= np.array([64, 48]) + 1e-3).all()
    assert (moved[:, 2:] > moved[:, :2]).all() and rows == sorted(set(rows))
    for row in range(count):
        _, alone, kept = run(config, noise(), boxes[row], seed)
        assert bool(kept) == (row in rows)
        if kept:
            assert alone[0] == pytest.approx(moved[rows.index(row)], abs=1e-4)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (always("HorizontalFlip"), [34, 5, 54, 15]),  # x1' = W - x2, x2' = W - x1
        (always("VerticalFlip"), [10, 33, 30, 43]),
        (always("Rotate", limit=[180, 180]), [34, 33, 54, 43]),
        (always("Affine", translate_percent={"x": 0.25, "y": 0}), [26, 5, 46, 15]),
        (always("Affine", translate_percent={"x": 0, "y": -0.1875}), [10, 0, 30, 6]),  # clipped at the top
        (always("Affine", scale=2), [0, 0, 28, 6]),
        (always("Affine", scale={"x": 1, "y": 0.5}), [10, 14.5, 30, 19.5]),
        (always("ShiftScaleRotate", shift_limit=0, scale_limit=[1, 1], rotate_limit=0), [0, 0, 28, 6]),
        (always("Perspective", scale=0), [10, 5, 30, 15]),
    ],
)
def test_exact_moves(config: Any, expected: list[float]) -> None:
    pixels = np.zeros((48, 64, 3), dtype=np.uint8)
    pixels[5:15, 10:30] = 255
    found, boxes, _ = run(config, pixels, [[10, 5, 30, 15]])
    assert boxes[0] == pytest.approx(expected, abs=1e-3)
    assert lit(found) == pytest.approx(np.array(expected), abs=0.51)


def test_rotation_is_counter_clockwise_and_exact_at_right_angles() -> None:
    pixels = noise(32, 32)
    found, boxes, _ = run(always("Rotate", limit=[90, 90]), pixels, [[1, 2, 5, 12]])
    assert np.array_equal(found, np.rot90(pixels))
    assert boxes[0] == pytest.approx([2, 27, 12, 31], abs=1e-3)


def test_flips_are_exact() -> None:
    pixels = noise()
    assert np.array_equal(run(always("HorizontalFlip"), pixels, [])[0], pixels[:, ::-1])
    assert np.array_equal(run(always("VerticalFlip"), pixels, [])[0], pixels[::-1])


def test_what_is_moved_out_is_gone_with_its_row() -> None:
    boxes = [[0, 0, 10, 10], [40, 20, 60, 40], [2, 2, 12, 12]]
    config = always("Affine", translate_percent={"x": -0.5, "y": 0}, fill=[10, 20, 30])
    found, moved, rows = run(config, noise(), boxes)
    assert rows == [1] and moved[0] == pytest.approx([8, 20, 28, 40], abs=1e-3)
    assert found[5, -1].tolist() == [10, 20, 30]


def test_a_homography_takes_points_where_they_are_wanted() -> None:
    given_points = np.array([[1.0, 2.0], [60.0, 5.0], [50.0, 44.0], [4.0, 40.0]])
    wanted = np.array([[0.0, 0.0], [64.0, 0.0], [64.0, 48.0], [0.0, 48.0]])
    matrix = homography(given_points, wanted)
    moved = np.concatenate([given_points, np.ones((4, 1))], axis=1) @ matrix.T
    assert moved[:, :2] / moved[:, 2:] == pytest.approx(wanted, abs=1e-9)
    assert hull(np.array([[4.0, 2.0, 50.0, 44.0]]), np.eye(3))[0].tolist() == [4, 2, 50, 44]


# ---- colours and sharpness --------------------------------------------------------------------------------

FLAT = np.full((24, 24, 3), (40, 120, 200), dtype=np.uint8)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (always("RandomBrightnessContrast", brightness_limit=[0.1, 0.1], contrast_limit=0), (66, 146, 226)),
        (always("RandomBrightnessContrast", brightness_limit=0, contrast_limit=[0.5, 0.5]), (60, 180, 255)),
        (always("ColorJitter", brightness=[0.5, 0.5], contrast=0, saturation=0, hue=0), (20, 60, 100)),
        (always("ColorJitter", brightness=0, contrast=0, saturation=[0, 0], hue=0), (105, 105, 105)),
        (always("ColorJitter", brightness=0, contrast=0, saturation=0, hue=[0.5, 0.5]), (200, 120, 40)),
        (always("ToGray"), (105, 105, 105)),
        (always("Blur"), (40, 120, 200)),
        (always("GaussianBlur"), (40, 120, 200)),
        (always("Sharpen", alpha=0.5, lightness=1), (40, 120, 200)),
        (always("Sharpen", alpha=0.5, lightness=[0.5, 0.5]), (30, 90, 150)),
        (always("GaussNoise", std_range=[0, 0], mean_range=[0.1, 0.1]), (66, 146, 226)),
    ],
)  # fmt: skip
def test_numbers_on_a_flat_colour(config: Any, expected: tuple[int, int, int]) -> None:
    found, *_ = run(config, FLAT, [])
    assert np.abs(found.astype(int) - np.array(expected)).max() <= 1


def test_contrast_pulls_towards_gray() -> None:
    config = always("ColorJitter", brightness=0, contrast=[0, 0], saturation=0, hue=0)
    found, *_ = run(config, noise(), [])
    assert np.ptp(found.astype(int)) <= 1


def spread(pixels: Pixels) -> float:
    return float(pixels.astype(float).std())


def test_blurs_average_over_their_kernel() -> None:
    pixels = noise(96, 96)
    blurred, *_ = run(always("Blur", blur_limit=[5, 5]), pixels, [])
    assert np.abs(blurred[40, 40].astype(float) - pixels[38:43, 38:43].mean(axis=(0, 1))).max() <= 1
    for name, keyword in (("Blur", "blur_limit"), ("GaussianBlur", "sigma_limit")):
        little, much = (run(always(name, **{keyword: [n, n]}), pixels, [])[0] for n in (3, 7))
        assert spread(pixels) > 1.3 * spread(little) > 1.3 * spread(much) or name == "GaussianBlur"
    sigma = [run(always("GaussianBlur", blur_limit=[9, 9], sigma_limit=[s, s]), pixels, [])[0] for s in (0.5, 2.0)]
    assert spread(pixels) > spread(sigma[0]) > 1.3 * spread(sigma[1])
    assert spread(run(always("Sharpen"), blurred, [])[0]) > spread(blurred)


def test_a_kernel_wider_than_the_image_is_cut() -> None:
    for name in ("Blur", "GaussianBlur"):
        found, *_ = run(always(name, blur_limit=[99, 99]), noise(5, 40), [])
        assert found.shape == (5, 40, 3) and spread(found) < spread(noise(5, 40))


def test_noise_has_the_deviation_asked_for() -> None:
    flat = np.full((128, 128, 3), 128, dtype=np.uint8)
    found, *_ = run(always("GaussNoise", std_range=[0.05, 0.05]), flat, [])
    assert spread(found) == pytest.approx(0.05 * 255, rel=0.03)
    assert not np.array_equal(found[..., 0], found[..., 1])
    gray, *_ = run(always("GaussNoise", std_range=[0.05, 0.05], per_channel=False), flat, [])
    assert np.array_equal(gray[..., 0], gray[..., 1]) and np.array_equal(gray[..., 0], gray[..., 2])


def test_equalize_uses_the_whole_range() -> None:
    dull = (noise(96, 96) // 4 + 100).astype(np.uint8)
    found, *_ = run(always("Equalize"), dull, [])
    assert found.min() <= 4 and found.max() >= 251


# ---- containers -------------------------------------------------------------------------------------------


def kinds(config: Any, count: int = 300) -> list[tuple[bool, bool, bool]]:
    """Per image: mirrored in x, mirrored in y, gray."""
    pixels = noise(8, 8)
    found = []
    for seed in range(count):
        changed = run(config, pixels, [], seed)[0]
        gray = bool((changed[..., 0] == changed[..., 1]).all())
        first = run(always("ToGray"), pixels, [])[0] if gray else pixels
        for x, y in ((False, False), (True, False), (False, True), (True, True)):
            if np.array_equal(changed, first[:: -1 if y else 1, :: -1 if x else 1]):
                found.append((x, y, gray))
    assert len(found) == count
    return found


THREE = [{"HorizontalFlip": {}}, {"VerticalFlip": {}}, {"ToGray": {}}]


@pytest.mark.parameter("aug_config")
def test_one_of_applies_exactly_one_and_p_weighs() -> None:
    for config in ({"OneOf": THREE}, {"OneOf": {"transforms": THREE}}, [{"OneOf": THREE}]):
        assert {sum(kind) for kind in kinds(config, 100)} == {1}
    counts = np.sum(kinds({"OneOf": [{"HorizontalFlip": {"p": 0.9}}, {"VerticalFlip": {"p": 0.3}}]}), axis=0)
    assert 195 < counts[0] < 255 and counts[0] + counts[1] == 300
    assert sum(any(kind) for kind in kinds({"OneOf": {"transforms": THREE, "p": 0.3}})) == pytest.approx(90, abs=30)


@pytest.mark.parameter("aug_config")
def test_some_of_applies_n_different_ones() -> None:
    found = kinds({"SomeOf": {"transforms": THREE, "n": 2}}, 100)
    assert {sum(kind) for kind in found} == {2} and len(set(found)) == 3
    assert {sum(kind) for kind in kinds({"SomeOf": {"transforms": THREE}}, 30)} == {1}


@pytest.mark.parameter("aug_config")
def test_sequential_is_all_or_nothing_and_nests() -> None:
    both = {"transforms": {"HorizontalFlip": {"p": 1.0}, "VerticalFlip": {"p": 1.0}}, "p": 0.5}
    found = kinds({"Sequential": both})
    assert set(found) == {(False, False, False), (True, True, False)}
    assert found.count((True, True, False)) == pytest.approx(150, abs=40)
    nested = {"OneOf": [{"Sequential": both}, {"ToGray": {"p": 1.0}}]}
    assert set(kinds(nested)) == {(True, True, False), (False, False, True)}


def test_a_list_may_repeat_a_name_and_keeps_its_order() -> None:
    twice = [always("HorizontalFlip"), always("HorizontalFlip")]
    assert set(kinds(twice, 20)) == {(False, False, False)}
    pixels = noise()
    one, other = (run(config, pixels, [])[0] for config in ([always("Blur"), always("Equalize")],
                                                            [always("Equalize"), always("Blur")]))  # fmt: skip
    assert not np.array_equal(one, other)


# ---- what is refused (training spec 3.5) ------------------------------------------------------------------


@pytest.mark.parameter("aug_config")
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"Nope": {}}, "aug_config.Nope: unknown transform; known are HorizontalFlip, "),
        ({"rotate": {}}, "aug_config.rotate: unknown transform; did you mean Rotate?"),
        ({"HorizontalFlp": {}}, "aug_config.HorizontalFlp: unknown transform; did you mean HorizontalFlip?"),
        ({"CLAHE": {}}, "aug_config.CLAHE: is not offered; Equalize comes near"),
        ({"Rotate": {"limt": 5}}, "aug_config.Rotate.limt: unknown parameter; did you mean limit?"),
        ({"ToGray": {"limit": 5}}, "aug_config.ToGray.limit: unknown parameter; known here: p"),
        ({"Rotate": {"limit": [5, 1]}}, "aug_config.Rotate.limit: [5, 1] is not allowed: must be [low, high]"),
        ({"Rotate": {"limit": [5]}}, "aug_config.Rotate.limit: [5] is not allowed: must be [low, high]"),
        ({"Rotate": {"limit": "5"}}, 'aug_config.Rotate.limit: "5" is not allowed: must be [low, high]'),
        ({"Rotate": {"limit": True}}, "aug_config.Rotate.limit: true is not allowed"),
        ({"Rotate": {"p": 1.5}}, "aug_config.Rotate.p: 1.5 is not allowed: must be a number from 0 to 1 (use 0.5)"),
        ({"Rotate": {"fill": [1, 2]}}, "aug_config.Rotate.fill: [1, 2] is not allowed: must be a number, or three"),
        ({"Rotate": {"fill": 256}}, "aug_config.Rotate.fill: 256 is not allowed"),
        ({"Rotate": 5}, 'aug_config.Rotate: 5 is not allowed: must be a mapping of parameters (use {"p": 0.5})'),
        ({"Blur": {"blur_limit": 4}}, "aug_config.Blur.blur_limit: 4 is not allowed: must be an odd number of pixels"),
        ({"Blur": {"blur_limit": [7, 3]}}, "aug_config.Blur.blur_limit: [7, 3] is not allowed"),
        ({"Perspective": {"keep_size": False}}, "aug_config.Perspective.keep_size: false is not allowed: must be true"),
        ({"GaussNoise": {"per_channel": 1}}, "aug_config.GaussNoise.per_channel: 1 is not allowed: must be true"),
        ({"Affine": {"scale": {"x": 1}}}, 'aug_config.Affine.scale: {"x": 1} is not allowed: must be [low, high], a'),
        ({"Affine": {"scale": 0}}, "aug_config.Affine.scale: 0 is not allowed: must be [low, high] within 0.1 to 10"),
        ({"OneOf": []}, "aug_config.OneOf.transforms: must not be empty"),
        ({"OneOf": {"p": 1}}, 'aug_config.OneOf: {"p": 1} is not allowed: must be a list of transforms, or {"trans'),
        ({"OneOf": [{"Blr": {}}]}, "aug_config.OneOf.transforms[0].Blr: unknown transform; did you mean Blur?"),
        ({"OneOf": [{"Blur": {"p": 0}}]}, "aug_config.OneOf.transforms: has 0 with p above 0 to choose from, and"),
        ({"SomeOf": {"n": 4, "transforms": THREE}}, "aug_config.SomeOf.transforms: has 3 with p above 0"),
        ({"SomeOf": {"n": 0, "transforms": THREE}}, "aug_config.SomeOf.n: 0 is not allowed: must be a whole number"),
        ([{"Blur": {}, "ToGray": {}}], "aug_config.0: "),
        (["Blur"], 'aug_config.0: "Blur" is not allowed: must be a mapping of one transform to its parameters'),
    ],
)  # fmt: skip
def test_what_is_not_known_is_named(config: Any, message: str) -> None:
    for read in (lambda: TrainConfig.parse({"aug_config": config}), lambda: parse_augmentations(config)):
        with pytest.raises(ConfigError) as caught:
            read()
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)


def test_all_that_is_wrong_is_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"aug_config\.Nope: .*; aug_config\.Rotate\.p: 2 is not allowed"):
        parse_augmentations({"Nope": {}, "Rotate": {"p": 2}})


@pytest.mark.parametrize(
    "config",
    [
        {"Affine": {"scale": (0.8, 1.2)}},  # tuples, as Python code writes them
        [{"OneOf": {"transforms": THREE, "p": 0.2}}, {"Rotate": {"limit": 5}}],
        *PRESETS.values(),
    ],
)
def test_what_is_legal_stays_as_it_was_given(config: Any) -> None:
    kept = TrainConfig.parse({"aug_config": config}).aug_config
    assert kept == TrainConfig.parse({"aug_config": kept}).aug_config
    assert parse_augmentations(kept) == parse_augmentations(config) != ()


def test_every_name_of_the_vocabulary_is_implemented() -> None:
    for name in CONTAINERS:
        assert any(not np.array_equal(run({name: THREE}, noise(), [[1, 1, 5, 5]], n)[0], noise()) for n in range(9))


def test_the_documentation_has_the_presets_and_every_name() -> None:
    text = (Path(__file__).parents[2] / "docs" / "augmentation.md").read_text()
    blocks = re.findall(r"```yaml\n# ([A-Z]+)\b.*?\n(.*?)```", text, flags=re.DOTALL)
    assert {name: yaml.safe_load(block) for name, block in blocks} == PRESETS
    for name, parameters in {**TRANSFORMS, **CONTAINERS}.items():
        row = next(line for line in text.splitlines() if line.startswith("| ") and f"`{name}`" in line)
        assert all(f"`{parameter}`" in row for parameter in parameters)


# ---- in training (training spec 12, item 46) --------------------------------------------------------------


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> PreparedSplit:
    folder = tmp_path_factory.mktemp("augment")
    return prepared(grid_dataset(folder / "source", 10), folder / "prepared").split("train")


def items(split: PreparedSplit, config: Any, draws: int) -> list[Any]:
    """What training sees, as the loop asks for it."""
    images = TrainImages(split, seed=1, scale_jitter=False, flip=config is None, aug_config=config)
    return [images[Draw(i % 10, i // 10, 32)] for i in range(draws)]


@pytest.mark.parameter("aug_config")
def test_null_flips_half_empty_flips_none_and_a_name_replaces_the_flip(split: PreparedSplit) -> None:
    plain = items(split, {}, 1000)
    for config, low, high in (
        (None, 440, 560),
        ({"HorizontalFlip": {"p": 1.0}}, 1000, 1000),
        ({"Blur": {"p": 0}}, 0, 0),
    ):
        mirrored = 0
        for item, other in zip(items(split, config, 1000), plain, strict=True):
            if np.array_equal(item.pixels, other.pixels[:, ::-1]):
                mirrored += 1
                assert item.boxes == pytest.approx(
                    np.stack([1 - other.boxes[:, 0], *other.boxes[:, 1:].T], 1), abs=1e-6
                )
            else:
                assert np.array_equal(item.pixels, other.pixels)
            assert np.array_equal(item.labels, other.labels)
        assert low <= mirrored <= high
    whole = EvalImages(split, 32)
    assert all(np.array_equal(item.pixels, whole[item.image].pixels) for item in plain)


@pytest.mark.parameter("aug_config")
@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_runs_100_images_with_boxes_inside_and_labels_in_step(split: PreparedSplit, name: str) -> None:
    plain, found = items(split, {}, 100), items(split, PRESETS[name], 100)
    changed = 0
    for item, other in zip(found, plain, strict=True):
        changed += not np.array_equal(item.pixels, other.pixels)
        assert len(item.boxes) == len(item.labels) <= len(other.labels)
        low, high = item.boxes[:, :2] - item.boxes[:, 2:] / 2, item.boxes[:, :2] + item.boxes[:, 2:] / 2
        assert (low >= -1e-5).all() and (high <= 1 + 1e-5).all() and (item.boxes[:, 2:] > 0).all()
        if len(item.labels) == len(other.labels):
            assert np.array_equal(item.labels, other.labels)
    assert changed > 30
    again = items(split, PRESETS[name], 100)
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(found, again, strict=True))
