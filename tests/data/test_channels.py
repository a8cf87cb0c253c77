"""Image files for detectors of one and of four channels: read, resampled, augmented, normalised and shown as such."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rfdetr_core.config import ModelConfig, TrainConfig
from rfdetr_core.config.augment import parse_augmentations
from rfdetr_core.data.augment import augment
from rfdetr_core.data.decoding import decode_for_training
from rfdetr_core.data.images import decode_image, to_channels, upright
from rfdetr_core.data.loading import Draw, EvalImages, TrainImages, collate
from rfdetr_core.data.prepared import PreparedSplit
from rfdetr_core.data.preview import grid
from rfdetr_core.data.scales import largest_useful_short_side
from rfdetr_core.data.transforms import MEAN, STD, normalise, preprocess, to_square
from tests.data.helpers import encoded, grid_dataset, picture, prepared
from tests.data.test_augment import always, something
from tests.data.test_images import MODES

COLOURS = ["ColorJitter", "ToGray", "RandomBrightnessContrast", "GaussianBlur", "GaussNoise", "Blur", "Sharpen"]


@pytest.mark.parametrize("name", MODES)
def test_grey_is_pillow_s_of_the_rgb_and_a_fourth_channel_is_alpha(name: str) -> None:
    data, rgb = MODES[name]
    expected = Image.fromarray(np.array([rgb], dtype=np.uint8)).convert("L")
    grey = decode_image(data, 1, channels=1)
    assert grey.mode == "L" and np.array_equal(grey, expected)
    rgba = np.asarray(decode_image(data, 1, channels=4))
    assert rgba[0, :, :3].tolist() == rgb
    alpha = {"RGBA": [0], "LA": [0], "palette with a transparent colour": [255, 0, 255]}
    alpha["palette with alpha"] = [0, 128, 255]
    assert rgba[0, :, 3].tolist() == alpha.get(name, [255] * len(rgb))


@pytest.mark.parametrize("mode", ["La", "RGBa", "CMYK", "YCbCr", "HSV", "1"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_other_modes_of_pillow(mode: str, channels: int) -> None:
    image = Image.new("RGB", (2, 2), (200, 30, 90))
    through = {"La": "LA", "RGBa": "RGBA"}.get(mode, mode)
    found = np.asarray(upright(image.convert(through).convert(mode), channels)).astype(int)
    expected = np.asarray(to_channels(image.convert(through), channels)).astype(int)
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_range_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match="no fixed range"):
        to_channels(Image.new(mode, (2, 2)), 1)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_training_decodes_what_evaluation_does(channels: int, kind: str, orientation: int) -> None:
    image = picture(60, 44)
    data = encoded(image.convert("RGBA") if kind == "PNG" else image, kind)
    found = decode_for_training(data, orientation, at_least=30, channels=channels)
    expected = np.asarray(decode_image(data, orientation, channels=channels, at_least=30))
    assert found.shape == (*((60, 44) if orientation == 6 else (44, 60)), channels)
    assert np.array_equal(found, np.atleast_3d(expected))
    assert found.flags.c_contiguous and found.flags.writeable


def with_alpha(width: int, height: int) -> Image.Image:
    image = picture(width, height).convert("RGBA")
    image.putalpha(picture(width, height, seed=9).convert("L"))
    return image


def test_each_channel_is_resampled_by_itself() -> None:
    """Pillow alone would weight the colours by alpha, and lose those that are transparent."""
    image = with_alpha(70, 50)
    found = to_square(image, 32)
    assert np.array_equal(found[..., :3], to_square(image.convert("RGB"), 32))
    assert np.array_equal(found[..., 3], np.asarray(image.getchannel("A").resize((32, 32), Image.Resampling.BILINEAR)))
    for picture_ in (image, image.convert("L"), image.convert("RGB")):
        array = np.atleast_3d(np.asarray(picture_))
        assert np.array_equal(to_square(array, 32), to_square(picture_, 32))
        assert preprocess(array, 32).equal(preprocess(picture_, 32))
        assert preprocess(array, 32).shape == (1, array.shape[2], 32, 32)


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_mean_and_std_are_repeated(channels: int) -> None:
    pixels = torch.full((2, channels, 3, 5), 200, dtype=torch.uint8)
    found = normalise(pixels)
    for channel in range(channels):
        expected = (200 / 255 - MEAN[channel % 3]) / STD[channel % 3]
        assert found[:, channel].numpy() == pytest.approx(expected, abs=1e-6)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> PreparedSplit:
    """Ten PNG files with an alpha channel."""
    folder = tmp_path_factory.mktemp("channels")
    source = grid_dataset(folder / "source", 10)
    for i, path in enumerate(sorted((source / "train").glob("*.png"))):
        image = Image.open(path).convert("RGB")
        image.putalpha(picture(*image.size, seed=100 + i).convert("L"))
        image.save(path)
    return prepared(source, folder / "prepared").split("train")


@pytest.mark.parametrize("channels", [1, 4])
def test_batches_of_training_and_evaluation(split: PreparedSplit, channels: int) -> None:
    words: dict[str, Any] = {"seed": 3, "scale_jitter": False, "flip": False}
    training, evaluation = TrainImages(split, **words, channels=channels), EvalImages(split, 32, channels)
    batches = [collate([training[Draw(i, 0, 32)] for i in (4, 7)]), collate([evaluation[i] for i in (4, 7)])]
    for batch in batches:
        assert batch.pixels.shape == (2, channels, 32, 32)
        for pixels, image in zip(batch.pixels, (4, 7), strict=True):
            expected = to_square(split.decode(image, channels=channels), 32).astype(int)
            assert np.abs(pixels.permute(1, 2, 0).numpy() - expected).max() <= 1
        inputs, _ = batch.on(torch.device("cpu"))
        assert torch.equal(inputs, normalise(batch.pixels))
    if channels == 4:
        assert batches[1].pixels[:, 3].float().std() > 10
    assert grid(batches[1], ["a", "b", "c", "d", "e", "f"]).mode == "RGB"


@pytest.mark.parametrize("name", COLOURS)
def test_colours_change_as_of_rgb_and_alpha_does_not(name: str) -> None:
    entries, boxes = (
        parse_augmentations(always(name) if name in ("ToGray", "Blur") else something(name)),
        np.zeros((0, 4)),
    )
    rgba = np.array(with_alpha(64, 48))
    found = [
        augment(pixels, boxes.astype(np.float32), entries, np.random.default_rng(5))[0]
        for pixels in (rgba, rgba[..., :3], np.array(picture(64, 48).convert("L"))[..., None])
    ]
    assert np.array_equal(found[0][..., :3], found[1])
    assert np.array_equal(found[0][..., 3], rgba[..., 3])
    assert found[2].shape == (48, 64, 1)


@pytest.mark.parametrize("name", ["Rotate", "Affine", "ShiftScaleRotate", "Perspective", "HorizontalFlip"])
def test_moves_take_every_channel_along(name: str) -> None:
    values = {"fill": [30, 60, 90]} if name == "Rotate" else {}
    entries, boxes = parse_augmentations(always(name, **values)), np.zeros((0, 4), np.float32)
    grey = np.asarray(picture(64, 48).convert("L"))
    moved = [
        augment(np.stack([grey] * channels, axis=2), boxes, entries, np.random.default_rng(5))[0]
        for channels in (1, 3, 4)
    ]
    for channels, pixels in zip((1, 3, 4), moved, strict=True):
        assert pixels.shape == (48, 64, channels)
    assert np.array_equal(moved[1], moved[2][..., :3])
    if name == "Rotate":  # the corner is what lies behind the image
        assert moved[0][0, 0].tolist() == [60] and moved[2][0, 0].tolist() == [30, 60, 90, 0]
    else:
        assert np.array_equal(moved[0][..., 0], moved[1][..., 0])


def test_images_are_not_reduced_to_jpeg_where_that_would_drop_a_channel() -> None:
    for channels, expected in ((1, 600), (3, 600), (4, None)):
        assert largest_useful_short_side(ModelConfig(num_channels=channels), TrainConfig()) == expected
