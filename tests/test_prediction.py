"""What predict takes: every kind of picture either works, or is refused in one line."""

from __future__ import annotations

import importlib.util
import io
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rfdetr_core.data.sample import draw_image
from rfdetr_core.errors import ConfigError, DatasetError, UserError
from rfdetr_core.models.detector import RFDETR
from rfdetr_core.models.weights import TrainedModel
from rfdetr_core.prediction import Prediction, predict_pictures
from tests.models.golden import fill_w1
from tests.training import tiny

NAMES = ("ant", "bee", "fly")


def detector(**fields: Any) -> TrainedModel:
    module = RFDETR(tiny.model_config(**fields))
    fill_w1(module)
    return TrainedModel(module.eval(), module.config, NAMES, "ema", 0, "0" * 64)


@pytest.fixture(scope="module")
def trained() -> TrainedModel:
    return detector()


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return draw_image(np.random.default_rng(5), 96, 3)[0].convert("RGB").resize((90, 60))


def found(trained: TrainedModel, picture: Any) -> Prediction:
    return predict_pictures(trained, [picture], 0.0)[0]


def assert_same(a: Prediction, b: Prediction) -> None:
    assert len(a) == len(b) > 3
    np.testing.assert_array_equal(a.class_ids, b.class_ids)
    np.testing.assert_allclose(a.scores, b.scores, atol=1e-6)
    np.testing.assert_allclose(a.boxes, b.boxes, atol=1e-3)


def refusal(trained: TrainedModel, picture: Any, kind: type[UserError]) -> str:
    with pytest.raises(kind) as caught:
        found(trained, picture)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600
    assert caught.value.hint
    return text


class TestForms:
    """The same picture in every form gives the same detections."""

    def test_an_array(self, trained: TrainedModel, image: Image.Image) -> None:
        assert_same(found(trained, np.asarray(image)), found(trained, image))

    def test_an_array_that_is_a_mirrored_view(self, trained: TrainedModel, image: Image.Image) -> None:
        bgr = np.asarray(image)[..., ::-1]
        assert not bgr.flags.c_contiguous
        assert_same(found(trained, bgr[..., ::-1]), found(trained, image))
        assert not np.allclose(found(trained, bgr).scores[:3], found(trained, image).scores[:3])  # RGB is meant

    def test_an_array_of_grey(self, trained: TrainedModel, image: Image.Image) -> None:
        grey = image.convert("L")
        assert_same(found(trained, np.asarray(grey)), found(trained, grey))
        assert_same(found(trained, np.asarray(grey)[..., None]), found(trained, grey))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    def test_a_tensor(self, trained: TrainedModel, image: Image.Image, dtype: torch.dtype) -> None:
        tensor = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).to(dtype) / 255
        assert_same(found(trained, tensor.requires_grad_()), found(trained, image))

    def test_several_forms_in_one_call(self, trained: TrainedModel, image: Image.Image, tmp_path: Path) -> None:
        image.save(tmp_path / "a.png")
        mixed = [image, np.asarray(image), tmp_path / "a.png", str(tmp_path / "a.png")]
        results = predict_pictures(trained, mixed, 0.0)
        assert len(results) == 4
        for result in results[1:]:
            assert_same(result, results[0])

    def test_a_single_pixel(self, trained: TrainedModel) -> None:
        for picture in (Image.new("RGB", (1, 1), (9, 9, 9)), np.zeros((1, 1, 3), np.uint8), torch.zeros(3, 1, 1)):
            result = found(trained, picture)
            assert len(result) > 3
            assert ((result.boxes >= 0) & (result.boxes <= 1)).all()


def as_file(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def reopened(image: Image.Image, kind: str) -> Image.Image:
    """What a lossy format leaves of it, as RGB."""
    with Image.open(io.BytesIO(as_file(image, kind))) as stored:
        return stored.convert("RGB")


def turned(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return as_file(image.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)


class TestFiles:
    @pytest.mark.parametrize(
        ("write", "as_rgb"),
        [
            (lambda im: as_file(im.convert("L"), "PNG"), lambda im: im.convert("L").convert("RGB")),
            (lambda im: as_file(im.convert("RGBA"), "PNG"), lambda im: im),
            (lambda im: as_file(im.convert("P"), "PNG"), lambda im: im.convert("P").convert("RGB")),
            (lambda im: as_file(im.convert("CMYK"), "TIFF"), lambda im: im.convert("CMYK").convert("RGB")),
            (
                lambda im: as_file(Image.fromarray(np.asarray(im.convert("L")).astype(np.uint16) * 257), "PNG"),
                lambda im: im.convert("L").convert("RGB"),
            ),
            (turned, lambda im: im),
            (lambda im: as_file(im.convert("CMYK"), "JPEG"), lambda im: reopened(im.convert("CMYK"), "JPEG")),
        ],
        ids=["grey", "RGBA", "palette", "CMYK", "16 bits", "EXIF", "CMYK JPEG"],
    )
    def test_modes(self, trained: TrainedModel, image: Image.Image, tmp_path: Path, write: Any, as_rgb: Any) -> None:
        path = tmp_path / "picture"
        path.write_bytes(write(image))
        assert_same(found(trained, path), found(trained, as_rgb(image)))
        with Image.open(path) as picture:
            assert_same(found(trained, picture), found(trained, as_rgb(image)))

    def test_four_inks_are_the_same_colours(self, trained: TrainedModel, image: Image.Image, tmp_path: Path) -> None:
        smooth = image.resize((6, 4)).resize((90, 60))
        (tmp_path / "inks.jpg").write_bytes(as_file(smooth.convert("CMYK"), "JPEG", quality=100))
        inks, rgb = found(trained, tmp_path / "inks.jpg"), found(trained, smooth)
        np.testing.assert_allclose(inks.scores[:5], rgb.scores[:5], atol=0.02)

    @pytest.mark.parametrize("mode", ["La", "RGBa"])
    def test_colours_that_are_multiplied_by_alpha(self, trained: TrainedModel, image: Image.Image, mode: str) -> None:
        opaque = image.convert(mode[:-1] + "A")
        assert_same(found(trained, opaque.convert(mode)), found(trained, opaque))

    def test_a_jpeg_that_is_cut_off(self, trained: TrainedModel, image: Image.Image, tmp_path: Path) -> None:
        path = tmp_path / "cut.jpg"
        data = as_file(image, "JPEG")
        path.write_bytes(data[: len(data) // 2])
        assert "cut.jpg: cannot be read: " in refusal(trained, path, DatasetError)

    def test_a_text_a_folder_and_nothing(self, trained: TrainedModel, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("no picture")
        for path in (tmp_path / "notes.txt", tmp_path, tmp_path / "absent.png"):
            assert f"{path}: cannot be read: " in refusal(trained, path, DatasetError)

    @pytest.mark.parametrize("mode", ["I", "F"])
    def test_pixels_without_a_range(self, trained: TrainedModel, mode: str) -> None:
        text = refusal(trained, Image.new(mode, (4, 4)), DatasetError)
        assert f"images[0]: cannot be read: pixels of mode {mode} have no fixed range" in text


class TestRefusals:
    @pytest.mark.parametrize(
        ("array", "reason"),
        [
            (np.zeros((8, 8, 3)), r"an array (8, 8, 3) of float64 is no picture"),
            (np.zeros((8, 8, 3), np.float32), "float32 is no picture"),
            (np.zeros((8, 8, 3), np.uint16), "uint16 is no picture"),
            (np.zeros((8, 8, 3), bool), "bool is no picture"),
            (np.zeros((3, 8, 8), np.uint8), "an array (3, 8, 8) of uint8 is no picture"),
            (np.zeros((8, 8, 4), np.uint8), "an array (8, 8, 4) of uint8 is no picture"),
            (np.zeros((2, 8, 8, 3), np.uint8), "an array (2, 8, 8, 3) of uint8 is no picture"),
            (np.zeros(8, np.uint8), "an array (8,) of uint8 is no picture"),
            (torch.zeros(8, 8, 3), "a tensor (8, 8, 3) of float32 is no picture"),
            (torch.zeros(2, 3, 8, 8), "a tensor (2, 3, 8, 8) of float32 is no picture"),
            (torch.zeros(3, 8, 8, dtype=torch.uint8), "a tensor (3, 8, 8) of uint8 is no picture"),
            (3, "int is no picture"),
            (None, "NoneType is no picture"),
            (b"bytes", "bytes is no picture"),
        ],
    )
    def test_what_is_no_picture(self, trained: TrainedModel, array: Any, reason: str) -> None:
        text = refusal(trained, array, ConfigError)
        assert text.startswith("images[0]: ") and reason in text

    @pytest.mark.parametrize(
        "picture",
        [
            Image.new("RGB", (0, 0)),
            Image.new("RGB", (0, 5)),
            np.zeros((0, 8, 3), np.uint8),
            np.zeros((8, 0), np.uint8),
            torch.zeros(3, 0, 8),
        ],
        ids=["image", "image 0 x 5", "array", "grey array", "tensor"],
    )
    def test_no_pixels(self, trained: TrainedModel, picture: Any) -> None:
        text = refusal(trained, picture, DatasetError)
        assert "pixels" in text

    @pytest.mark.parametrize(
        ("value", "told"),
        [
            (float("nan"), "nan"),
            (float("inf"), "0 to inf"),
            (-0.001, "-0.001 to 0"),
            (1.01, "0 to 1.01"),
            (255.0, "255"),
        ],
    )
    def test_a_tensor_outside_its_range(self, trained: TrainedModel, value: float, told: str) -> None:
        tensor = torch.zeros(3, 8, 8)
        tensor[1, 2, 3] = value
        text = refusal(trained, tensor, DatasetError)
        assert "has values from" in text and told in text

    def test_the_place_in_the_list_is_named(self, trained: TrainedModel, image: Image.Image) -> None:
        pictures = [image] * 9 + [np.zeros((8, 8, 3))]
        with pytest.raises(ConfigError, match=r"images\[9\]: an array"):
            predict_pictures(trained, pictures, 0.5)


class TestOtherChannels:
    def test_two_more_than_rgb(self, image: Image.Image) -> None:
        """Mean and std begin again with the fourth channel; each channel is resampled as an RGB image's are."""
        trained, seen = detector(num_channels=5), []
        trained.module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        array = np.concatenate([np.asarray(image), np.asarray(image)[..., :2]], axis=2)
        from_array = found(trained, array)
        tensor = torch.from_numpy(array).permute(2, 0, 1) / 255
        assert_same(found(trained, tensor), from_array)
        assert seen[0].shape == (1, 5, 32, 32)
        assert torch.equal(seen[0][:, 3:], seen[0][:, :2])
        hooked = detector()
        hooked.module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        found(hooked, image)
        torch.testing.assert_close(seen[0][:, :3], seen[-1])

    def test_grey_arrays(self, image: Image.Image) -> None:
        trained, grey = detector(num_channels=1), np.asarray(image.convert("L"))
        assert_same(found(trained, grey), found(trained, grey[..., None]))

    @pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
    def test_files_and_pictures(self, image: Image.Image, tmp_path: Path, channels: int, mode: str) -> None:
        """Grey or RGBA, whatever they are; turned upright; the same as the array and the tensor."""
        trained = detector(num_channels=channels)
        opacity = image.convert("RGBA")
        opacity.putalpha(image.convert("L").transpose(Image.Transpose.FLIP_LEFT_RIGHT))
        for picture in (image, opacity, image.convert("L"), image.convert("P")):
            array = np.array(picture.convert(mode) if picture.mode != "P" else picture.convert("RGBA").convert(mode))
            expected = found(trained, array)
            (tmp_path / "a.png").write_bytes(as_file(picture, "PNG"))
            (tmp_path / "b.png").write_bytes(turned(picture))
            tensor = torch.from_numpy(np.atleast_3d(array)).permute(2, 0, 1) / 255
            for form in (picture, tmp_path / "a.png", tmp_path / "b.png", tensor):
                assert_same(found(trained, form), expected)
        best = [found(trained, picture).scores[0] for picture in (opacity, image)]
        assert np.isclose(*best, atol=1e-6) == (channels == 1)

    def test_files_are_refused_where_they_have_no_such_form(self, image: Image.Image, tmp_path: Path) -> None:
        image.save(tmp_path / "a.png")
        for picture in (image, tmp_path / "a.png"):
            text = refusal(detector(num_channels=5), picture, ConfigError)
            assert "are grey, RGB or RGBA, the model takes 5 channels (give an array (height, width, 5)" in text

    def test_arrays_of_another_count_are_refused(self) -> None:
        text = refusal(detector(num_channels=4), np.zeros((8, 8, 3), np.uint8), ConfigError)
        assert "give (height, width, 4) of uint8" in text


class TestResult:
    def test_slots_without_a_name_are_no_classes(self, trained: TrainedModel, image: Image.Image) -> None:
        full = found(trained, image)
        gap = TrainedModel(trained.module, trained.config, ("ant", "", "fly"), "ema", 0, "0")
        result = found(gap, image)
        kept = full.class_ids != 1
        assert 0 < kept.sum() < len(full)
        np.testing.assert_array_equal(result.scores, full.scores[kept])
        assert result.class_names == tuple(NAMES[label] for label in full.class_ids[kept])

    def test_a_name_for_the_last_column_makes_it_a_class(self, trained: TrainedModel, image: Image.Image) -> None:
        """As in weights trained on COCO: slot 90 of 91 is the toothbrush."""
        four = TrainedModel(trained.module, trained.config, (*NAMES, "wasp"), "ema", 0, "0")
        assert 3 in found(four, image).class_ids
        assert 3 not in found(trained, image).class_ids

    def test_to_supervision(self, trained: TrainedModel, image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
        """What that library's constructor takes, and the types it checks."""

        @dataclass
        class Detections:
            xyxy: np.ndarray[Any, Any]
            mask: np.ndarray[Any, Any] | None = None
            confidence: np.ndarray[Any, Any] | None = None
            class_id: np.ndarray[Any, Any] | None = None
            tracker_id: np.ndarray[Any, Any] | None = None
            data: dict[str, np.ndarray[Any, Any] | list[Any]] = field(default_factory=dict)
            metadata: dict[str, Any] = field(default_factory=dict)

        module = ModuleType("supervision")
        module.Detections = Detections  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "supervision", module)
        result = found(trained, image)
        detections = result.to_supervision()
        count = len(result)
        assert isinstance(detections, Detections) and count > 3
        assert detections.xyxy.shape == (count, 4) and detections.xyxy.dtype == np.float32
        assert detections.confidence is not None and detections.confidence.dtype == np.float32
        assert detections.class_id is not None and detections.class_id.dtype.kind == "i"
        np.testing.assert_allclose(detections.xyxy, result.boxes, rtol=1e-6)
        np.testing.assert_allclose(detections.confidence, result.scores, rtol=1e-6)
        assert detections.class_id.tolist() == result.class_ids.tolist()
        assert detections.mask is None and detections.tracker_id is None
        assert list(detections.data) == ["class_name"]
        assert tuple(detections.data["class_name"]) == result.class_names
        nothing = predict_pictures(trained, [image], 1.0)[0].to_supervision()
        assert nothing.xyxy.shape == (0, 4) and nothing.data["class_name"].shape == (0,)

    @pytest.mark.skipif(importlib.util.find_spec("supervision") is not None, reason="supervision is installed")
    def test_without_supervision_it_is_said_how_to_get_it(self, trained: TrainedModel, image: Image.Image) -> None:
        with pytest.raises(ConfigError, match=r"supervision is not installed \(pip install supervision\)"):
            found(trained, image).to_supervision()

    def test_the_real_supervision(self, trained: TrainedModel, image: Image.Image) -> None:
        pytest.importorskip("supervision", reason="supervision is not installed; tests/peer shows it all the same")
        result = found(trained, image)
        detections = result.to_supervision()
        np.testing.assert_allclose(detections.xyxy, result.boxes, rtol=1e-6)
        assert detections.class_id.tolist() == result.class_ids.tolist()
        assert tuple(detections["class_name"]) == result.class_names


@pytest.mark.parametrize("threshold", ["0.5", None, True, float("nan"), -0.1])
def test_what_is_no_threshold(trained: TrainedModel, threshold: Any) -> None:
    with pytest.raises(ConfigError, match=r"threshold: .* is not allowed"):
        predict_pictures(trained, [], threshold)
