"""The Python API of the seed document: train, predict and export without any pipeline."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import rfdetr_core
from rfdetr_core import RFDETR, RFDETRNano, RFDETRPico
from rfdetr_core.api import VARIANTS
from rfdetr_core.data.loading import LoaderSettings
from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.errors import (
    CheckpointError,
    ConfigError,
    DatasetError,
    ExportError,
    MissingObjectError,
    StorageAccessError,
    UserError,
)
from rfdetr_core.evaluation.evaluate import evaluate_model
from rfdetr_core.export.consumer import open_session
from rfdetr_core.models import detector
from rfdetr_core.prediction import AT_ONCE, Prediction
from rfdetr_core.storage import Location
from rfdetr_core.training import checkpoint, folder
from rfdetr_core.training.engine import Engine
from tests.models.golden import fill_w1
from tests.s3_server import s3_root, s3_server
from tests.training import tiny

__all__ = ["s3_root", "s3_server"]

ARCHITECTURE = {name: value for name, value in tiny.MODEL.items() if name not in ("variant", "num_classes")}
SETTINGS: dict[str, Any] = {**tiny.TRAIN, "epochs": 1, "batch_size": 2, "grad_accum_steps": 1}
STILL: dict[str, Any] = {**SETTINGS, "lr": 1e-12, "lr_encoder": 1e-12}
"""A training that leaves the weights where they are."""


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.draw(tmp_path_factory.mktemp("drawn") / "coco")


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("api") / "output"


@pytest.fixture(scope="module")
def model(coco: Path, output: Path) -> Any:
    """A detector after one epoch."""
    model = RFDETRPico(**ARCHITECTURE)
    model.train(dataset_dir=coco, output_dir=output, **SETTINGS)
    return model


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published file of five classes, for the tiny architecture."""
    path = tmp_path_factory.mktemp("weights") / "five.pth"
    module = detector.RFDETR(tiny.model_config(num_classes=5))
    fill_w1(module)
    args = Namespace(class_names=["a", "b", "c", "d", "e"], num_queries=8, group_detr=2)
    torch.save({"model": module.state_dict(), "args": args}, path)
    return path


def pictures(coco: Path) -> list[Path]:
    return sorted((coco / "valid").glob("*.jpg")) + sorted((coco / "train").glob("*.jpg"))


def assert_same(a: Prediction, b: Prediction, *, atol: float = 1e-3) -> None:
    assert len(a.scores) > 0
    assert a.class_names == b.class_names
    np.testing.assert_array_equal(a.class_ids, b.class_ids)
    np.testing.assert_allclose(a.scores, b.scores, rtol=1e-4)
    np.testing.assert_allclose(a.boxes, b.boxes, atol=atol)


class TestImport:
    def test_the_package_is_light(self) -> None:
        program = """
import sys, time
started = time.process_time()  # of the processor: whatever else the machine does
import rfdetr_core
print(time.process_time() - started, "RFDETRMedium" in dir(rfdetr_core), *sys.modules)
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        seconds, listed, *modules = done.stdout.split()
        assert float(seconds) < 0.3
        assert listed == "True"
        assert not {"torch", "numpy", "pydantic", "rfdetr_core.api"} & set(modules)

    def test_every_exported_name_exists(self) -> None:
        assert sorted(rfdetr_core.__all__) == sorted([kind.__name__ for kind in VARIANTS] + ["RFDETR", "__version__"])
        assert set(rfdetr_core.__all__) <= set(dir(rfdetr_core))
        for name in rfdetr_core.__all__:
            assert getattr(rfdetr_core, name)

    def test_other_names_do_not(self) -> None:
        with pytest.raises(AttributeError, match="RFDETRHuge"):
            _ = rfdetr_core.RFDETRHuge

    def test_each_class_is_its_variant(self) -> None:
        resolutions = {kind.__name__: kind().config.resolution for kind in VARIANTS}
        assert resolutions == {
            "RFDETRPico": 128,
            "RFDETRNano": 384,
            "RFDETRSmall": 512,
            "RFDETRMedium": 576,
            "RFDETRBase": 560,
            "RFDETRLarge": 704,
            "RFDETRLargeDeprecated": 560,
        }


class TestTrain:
    @pytest.mark.parameter("output_dir")
    def test_leaves_all_results_in_its_folder_and_the_best_weights_in_the_model(
        self, model: Any, output: Path, coco: Path
    ) -> None:
        names = {path.name for path in output.iterdir()}
        assert {"checkpoint.pth", "checkpoint_best_total.pth", "metrics.jsonl", "metrics.csv", "report.html"} <= names
        best = checkpoint.load(output / "checkpoint_best_total.pth")
        assert not tiny.differing(best["model"], model._trained.module.state_dict())
        assert model.class_names == ("rectangle", "ellipse", "triangle")
        assert model.config.num_classes == 3
        assert json.loads((output / "report.json").read_text())["usable"]
        assert len(list((output / "dataset").iterdir())) == 1
        assert sorted(path.name for path in coco.iterdir()) == ["test", "train", "valid"]  # untouched

    def test_the_same_call_again_returns_at_once(
        self, model: Any, output: Path, coco: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Engine, "optimizer_step", None)
        monkeypatch.setattr(folder, "write_prepared", None)  # nor is the dataset prepared anew
        again = RFDETRPico(**ARCHITECTURE)
        result = again.train(dataset_dir=coco, output_dir=output, **{**SETTINGS, "num_workers": 1})
        assert (result.epochs, result.optimizer_steps) == (1, 5)
        assert_same(*(m.predict(pictures(coco)[0], threshold=0) for m in (model, again)))

    def test_an_interrupted_training_continues(
        self, coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings = {**SETTINGS, "epochs": 2}
        RFDETRPico(**ARCHITECTURE).train(dataset_dir=coco, output_dir=tmp_path / "whole", **settings)
        step = Engine.optimizer_step

        def interrupt(self: Engine, *args: Any, global_step: int, **kwargs: Any) -> Any:
            if global_step == 7:
                raise KeyboardInterrupt
            return step(self, *args, global_step=global_step, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Engine, "optimizer_step", interrupt)
            RFDETRPico(**ARCHITECTURE).train(dataset_dir=coco, output_dir=tmp_path / "parts", **settings)
        RFDETRPico(**ARCHITECTURE).train(dataset_dir=coco, output_dir=tmp_path / "parts", **settings)
        whole, parts = (checkpoint.load(tmp_path / name / "checkpoint.pth") for name in ("whole", "parts"))
        assert not [name for name in tiny.differing(whole, parts) if name != "train_config.output_dir"]

    def test_another_training_is_not_overwritten(self, model: Any, output: Path, coco: Path) -> None:
        with pytest.raises(ConfigError, match=r"checkpoint\.pth: is of another training .*give another output_dir"):
            RFDETRPico(**ARCHITECTURE).train(dataset_dir=coco, output_dir=output, **{**SETTINGS, "lr": 2e-4})

    def test_a_prepared_dataset_is_used_as_it_is(self, model: Any, output: Path, tmp_path: Path) -> None:
        (prepared,) = (output / "dataset").iterdir()
        result = RFDETRPico(**ARCHITECTURE).train(dataset_dir=prepared, output_dir=tmp_path, **SETTINGS)
        assert not (tmp_path / "dataset").exists()
        assert result.best_score == checkpoint.load(output / "checkpoint_best_total.pth")["metrics"]["map"]

    def test_a_dataset_that_cannot_be_used_leaves_a_report(self, coco: Path, tmp_path: Path) -> None:
        broken = tmp_path / "broken"
        shutil.copytree(coco, broken)
        pictures(broken)[-1].write_bytes(b"no image")
        with pytest.raises(DatasetError, match="image cannot be read"):
            RFDETRPico(**ARCHITECTURE).train(dataset_dir=broken, output_dir=tmp_path / "out", **SETTINGS)
        assert "image cannot be read" in (tmp_path / "out" / "report.html").read_text()
        assert not (tmp_path / "out" / "dataset").exists()

    def test_a_folder_that_cannot_be_made_is_told(self, coco: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        for path in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nope"):
            with pytest.raises(StorageAccessError, match="cannot write "):
                RFDETRPico(**ARCHITECTURE).train(dataset_dir=coco, output_dir=path, **SETTINGS)

    def test_a_report_that_cannot_be_written_is_told(self, coco: Path, tmp_path: Path) -> None:
        (tmp_path / "report.json").mkdir()
        with pytest.raises(StorageAccessError, match=r"cannot write .*irectory"):
            RFDETRPico(**ARCHITECTURE).train(dataset_dir=coco, output_dir=tmp_path, **SETTINGS)

    @pytest.mark.parameter("batch_size", "auto_batch_target_effective")
    def test_auto_probes_once(self, coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        settings = {**SETTINGS, "batch_size": "auto", "auto_batch_target_effective": 2}
        RFDETRPico(**ARCHITECTURE).train(dataset_dir=coco, output_dir=tmp_path, **settings)
        found = json.loads((tmp_path / "probe.json").read_text())
        assert (found["batch_size"], found["grad_accum_steps"], found["worst_case"]["targets_per_image"]) == (2, 1, 3)
        monkeypatch.setattr(folder, "probe", None)
        RFDETRPico(**ARCHITECTURE).train(dataset_dir=coco, output_dir=tmp_path, **settings)

    def test_a_probe_alone_tells_batch_and_cost_and_trains_nothing(self, coco: Path, tmp_path: Path) -> None:
        model = RFDETRPico(**ARCHITECTURE)
        found = model.probe(dataset_dir=coco, output_dir=tmp_path, price_per_hour=2.0, **{**SETTINGS, "batch_size": 2})
        assert (found.batch_size, found.stopped_by, found.worst_case.targets) == (2, "given", 3)
        assert found.cost.price == pytest.approx(2 * found.cost.hours) and found.cost.hours > 0
        assert not list(tmp_path.glob("*.pth")) and not model.class_names
        with pytest.raises(ConfigError, match="price_per_hour: -1 is not allowed"):
            model.probe(dataset_dir=coco, output_dir=tmp_path, price_per_hour=-1, **SETTINGS)

    @pytest.mark.parameter("resolution", "num_select")
    def test_resolution_and_deprecated_fields_go_to_the_architecture(self, coco: Path, tmp_path: Path) -> None:
        moved = ("resolution", "num_select")
        model = RFDETRPico(**{name: value for name, value in ARCHITECTURE.items() if name not in moved})
        with pytest.warns(FutureWarning, match=r"train\.num_select is deprecated"):
            model.train(dataset_dir=coco, output_dir=tmp_path, resolution=48, num_select=5, **SETTINGS)
        assert (model.config.resolution, model.config.num_select) == (48, 5)
        assert checkpoint.load(tmp_path / "checkpoint.pth")["config"]["resolution"] == 48
        assert len(model.predict(pictures(coco)[0], threshold=0).scores) <= 5
        with pytest.raises(ConfigError, match=r"train\(\): resolution: 48 contradicts RFDETRPico\(resolution=32\)"):
            RFDETRPico(**ARCHITECTURE).train(dataset_dir=coco, output_dir=tmp_path, resolution=48, **SETTINGS)

    def test_spare_classes_are_kept_and_too_few_refused(self, coco: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="num_classes: 2 is too small: the dataset has 3 classes"):
            RFDETRPico(**ARCHITECTURE, num_classes=2).train(dataset_dir=coco, output_dir=tmp_path, **SETTINGS)
        model = RFDETRPico(**ARCHITECTURE, num_classes=9)
        model.train(dataset_dir=coco, output_dir=tmp_path, **SETTINGS)
        assert model.config.num_classes == 9
        found = model.predict(pictures(coco)[0], threshold=0)
        assert set(found.class_names) <= {"rectangle", "ellipse", "triangle"}


class TestPredict:
    def test_finds_what_the_evaluation_finds(self, model: Any, output: Path, coco: Path) -> None:
        (prepared,) = (output / "dataset").iterdir()
        dataset = PreparedDataset(prepared)
        _, expected = evaluate_model(
            checkpoint.load_trained(output / "checkpoint_best_total.pth"),
            dataset.split("valid"),
            dataset.class_map,
            batch_size=1,
            max_dets=500,
            device=torch.device("cpu"),
            loading=LoaderSettings(0, None, None, None),
        )
        for image, path in enumerate(pictures(coco)[:4]):
            found = model.predict(path, threshold=0)
            own = expected.images == image
            np.testing.assert_allclose(found.scores, expected.scores[own], rtol=1e-4)
            np.testing.assert_allclose(found.boxes, expected.boxes[own], atol=1e-3)
            np.testing.assert_array_equal(found.class_ids, expected.labels[own])

    def test_paths_and_pictures_alone_or_in_lists(self, model: Any, coco: Path) -> None:
        paths = pictures(coco)[: AT_ONCE + 1]
        several = model.predict([*paths[:-1], Image.open(paths[-1])], threshold=0)
        assert len(several) == AT_ONCE + 1
        for path, found in zip(paths, several, strict=True):
            alone = model.predict(str(path), threshold=0)
            assert_same(alone, found)
        assert model.predict([]) == []

    def test_boxes_lie_in_the_picture_and_the_best_come_first(self, model: Any, coco: Path) -> None:
        with Image.open(pictures(coco)[0]) as image:
            width, height = image.size
            found = model.predict(image.resize((3 * width, 2 * height)), threshold=0)
        assert found.boxes.shape == (len(found.scores), 4) == (len(found.class_ids), 4)
        assert (found.boxes >= 0).all()
        assert (found.boxes <= [3 * width, 2 * height] * 2).all()
        assert found.boxes[:, 2].max() > width  # in pixels of this picture, not of the network's square
        assert (np.diff(found.scores) <= 0).all()
        assert found.class_names == tuple(model.class_names[label] for label in found.class_ids)

    def test_only_scores_above_the_threshold(self, model: Any, coco: Path) -> None:
        everything = model.predict(pictures(coco)[0], threshold=0)
        third = float(everything.scores[2])
        found = model.predict(pictures(coco)[0], threshold=third)
        assert len(found.scores) == 2
        assert len(model.predict(pictures(coco)[0]).scores) == (everything.scores > 0.5).sum()

    def test_exif_orientation_is_applied(self, model: Any, coco: Path, tmp_path: Path) -> None:
        with Image.open(pictures(coco)[0]) as image:
            upright = image.convert("RGB").resize((80, 50))
        stored, exif = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
        exif[0x0112] = 6
        stored.save(tmp_path / "turned.png", exif=exif)
        assert_same(model.predict(tmp_path / "turned.png", threshold=0), model.predict(upright, threshold=0))
        with Image.open(tmp_path / "turned.png") as picture:
            assert_same(model.predict(picture, threshold=0), model.predict(upright, threshold=0))

    def test_grey_pictures_are_taken(self, model: Any, coco: Path) -> None:
        with Image.open(pictures(coco)[0]) as image:
            grey = image.convert("L")
        assert_same(model.predict(grey, threshold=0), model.predict(grey.convert("RGB"), threshold=0))

    @pytest.mark.parametrize("content", [None, b"", b"no image at all"])
    def test_what_cannot_be_read_is_named(self, model: Any, tmp_path: Path, content: bytes | None) -> None:
        path = tmp_path / "photo.jpg"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DatasetError, match=r"photo\.jpg: cannot be read") as caught:
            model.predict(path)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan"), "0.5", None, True])
    def test_a_threshold_outside_0_to_1_is_refused(self, model: Any, coco: Path, threshold: Any) -> None:
        with pytest.raises(ConfigError, match="threshold"):
            model.predict(pictures(coco)[0], threshold=threshold)

    def test_what_is_no_picture_is_refused(self, model: Any) -> None:
        with pytest.raises(ConfigError, match=r"images\[0\]: an array \(8, 8, 3\) of float64 is no picture"):
            model.predict([np.zeros((8, 8, 3))])

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_the_bytes_of_a_file_are_no_list_of_pictures(self, model: Any, coco: Path, kind: Any) -> None:
        data = pictures(coco)[0].read_bytes()
        with pytest.raises(ConfigError, match=rf"^images: {kind.__name__} is no picture \(give a path, a Pillow image"):
            model.predict(kind(data))

    def test_freed_memory_is_kept_as_in_training(self, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        kept: list[int] = []
        monkeypatch.setattr("rfdetr_core.api.keep_freed_memory", lambda: kept.append(1))
        monkeypatch.setattr("rfdetr_core.api.first_device", lambda train: torch.device("cpu"))
        RFDETRPico(**ARCHITECTURE)
        assert not kept  # nothing to predict with yet
        RFDETRPico(pretrain_weights=weights, **ARCHITECTURE)
        assert kept


class TestDevice:
    """Where it predicts, evaluates and trains."""

    def test_all_stay_on_it(self, weights: Path, coco: Path, tmp_path: Path) -> None:
        model = RFDETRPico(pretrain_weights=weights, device="cpu", **ARCHITECTURE)
        settings = {name: value for name, value in SETTINGS.items() if name != "accelerator"}
        assert len(model.predict(pictures(coco)[0], threshold=0)) > 0
        model.evaluate(dataset_dir=coco, num_workers=0)
        model.train(dataset_dir=coco, output_dir=tmp_path, **settings)
        assert next(model._trained.module.parameters()).device.type == "cpu"
        again = RFDETR.from_checkpoint(tmp_path / "checkpoint_best_total.pth", device="cpu")
        assert_same(*(m.predict(pictures(coco)[0], threshold=0) for m in (model, again)))
        assert json.loads((tmp_path / "training_config.json").read_text())["train"]["accelerator"] == "cpu"

    def test_train_takes_it_as_well(self, coco: Path, tmp_path: Path) -> None:
        settings = {name: value for name, value in SETTINGS.items() if name != "accelerator"}
        model = RFDETRPico(**ARCHITECTURE)
        model.train(dataset_dir=coco, output_dir=tmp_path, device=torch.device("cpu"), **settings)
        assert json.loads((tmp_path / "training_config.json").read_text())["train"]["accelerator"] == "cpu"

    @pytest.mark.parametrize(("device", "there"), [("cuda:1", "cuda:1"), ("cuda", "cuda"), (None, "cuda")])
    def test_the_model_is_moved_there(
        self, weights: Path, device: str | None, there: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        moved: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(detector.RFDETR, "to", lambda self, where: moved.append(where) or self)
        RFDETRPico(pretrain_weights=weights, device=device, **ARCHITECTURE)
        assert moved == [torch.device(there)]

    @pytest.mark.parametrize(
        ("built", "trained", "message"),
        [
            ({"device": "tpu"}, {}, r'RFDETRPico\(\): device: "tpu" is not allowed: must be "cpu", "cuda", "cuda:N"'),
            ({}, {"device": "gpu"}, r'train\(\): device: "gpu" is not allowed: must be "cpu", "cuda", "cuda:N"'),
            ({}, {"device": 0}, r"train\(\): device: 0 is not allowed: must be text"),
            ({"device": "cpu"}, {"accelerator": "gpu"}, r'device: cpu is not allowed: train.accelerator is "gpu"'),
            ({}, {"device": "cuda", "accelerator": "cpu"}, r'device: cuda is not allowed: train.accelerator is "cpu"'),
            ({"device": "cpu"}, {"device": "cuda"}, r'device: cpu is not allowed: train.accelerator is "cuda"'),
            ({}, {"device": "cuda:1", "devices": 2}, r"device: cuda:1 is not allowed: train.devices is 2"),
        ],
    )
    def test_refusals(self, tmp_path: Path, built: Any, trained: Any, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            RFDETRPico(**built).train(dataset_dir=tmp_path / "nowhere", output_dir=tmp_path / "out", **trained)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("amp", "settings", "expected"),
        [(False, {}, None), (False, {"amp_dtype": "bf16"}, "bf16"), (True, {}, "auto"), (None, {}, "auto")],
    )
    def test_amp_is_amp_dtype(self, amp: bool | None, settings: Any, expected: str | None) -> None:
        if amp is None:
            model = RFDETRPico()
        else:
            with pytest.warns(FutureWarning, match=r"model\.amp is deprecated: give train\.amp_dtype"):
                model = RFDETRPico(amp=amp)
        assert model._training({"dataset_dir": "data", **settings}).amp_dtype == expected


class TestExport:
    def test_writes_a_file_that_detects_the_same(self, model: Any, tmp_path: Path) -> None:
        path = model.export(tmp_path / "exported")
        assert path == tmp_path / "exported" / "rfdetr-pico.onnx"
        assert [found.name for found in path.parent.iterdir()] == ["rfdetr-pico.onnx"]
        assert open_session(path).get_inputs()[0].shape == ["batch", 3, 32, 32]
        fixed = model.export(tmp_path / "fixed", dynamic_batch=False)
        assert open_session(fixed).get_inputs()[0].shape == [1, 3, 32, 32]

    def test_a_file_that_differs_is_not_left_there(self, model: Any, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match="differs from the trained model"):
            model.export(tmp_path, logits_tolerance=1e-12)
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_cannot_be_made_is_told(self, model: Any, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        for path in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nope"):
            with pytest.raises(StorageAccessError, match="cannot write ") as caught:
                model.export(path)
            assert "\n" not in str(caught.value)

    def test_unknown_settings_are_refused(self, model: Any, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"export\(\): presicion: unknown field; did you mean precision\?"):
            model.export(tmp_path, presicion="fp16")


class TestFromCheckpoint:
    def test_detects_the_same(self, model: Any, output: Path, coco: Path) -> None:
        loaded = RFDETRPico.from_checkpoint(output / "checkpoint_best_total.pth")
        assert loaded.class_names == model.class_names
        assert loaded.config == model.config
        assert_same(*(m.predict(pictures(coco)[0], threshold=0) for m in (model, loaded)))

    def test_another_class_is_refused(self, model: Any, output: Path) -> None:
        with pytest.raises(CheckpointError, match=r"is of the variant pico \(use RFDETRPico\)"):
            RFDETRNano.from_checkpoint(output / "checkpoint_best_total.pth")

    @pytest.mark.parametrize("path", [None, 3, b"x.pth"])
    def test_what_is_no_path_is_refused(self, model: Any, path: Any) -> None:
        for call in (RFDETR.from_checkpoint, model.save, model.export, lambda path: model.evaluate(dataset_dir=path)):
            with pytest.raises(ConfigError, match=f"{type(path).__name__} is no path"):
                call(path)

    def test_of_a_store(
        self, model: Any, output: Path, s3_root: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RF_HOME", str(tmp_path))
        place = s3_root / "best.pth"
        with pytest.raises(MissingObjectError, match=r"s3://.*/best\.pth"):
            RFDETR.from_checkpoint(place.uri)
        place.upload_file(output / "checkpoint_best_total.pth")
        assert RFDETR.from_checkpoint(place.uri).config == model.config

    def test_a_checkpoint_for_resuming_is_refused(self, model: Any, output: Path) -> None:
        with pytest.raises(CheckpointError, match=r"give checkpoint_best_total\.pth"):
            RFDETRPico.from_checkpoint(output / "checkpoint.pth")


class TestPretrained:
    """`pretrain_weights`, and training a model that has weights already."""

    def test_the_model_predicts_at_once(self, weights: Path, coco: Path) -> None:
        model = RFDETRPico(pretrain_weights=weights, **ARCHITECTURE)
        assert model.class_names == ("a", "b", "c", "d", "e")
        assert model.config.num_classes == 5
        found = model.predict(pictures(coco)[0], threshold=0)
        assert len(found) > 3
        assert set(found.class_names) <= set(model.class_names)

    def test_a_number_of_classes_cuts_or_grows_the_head(self, weights: Path, coco: Path) -> None:
        whole = RFDETRPico(pretrain_weights=weights, **ARCHITECTURE)._trained.module.class_embed.weight
        cut = RFDETRPico(pretrain_weights=str(weights), num_classes=2, **ARCHITECTURE)
        assert torch.equal(cut._trained.module.class_embed.weight, whole[:3])
        assert set(cut.predict(pictures(coco)[0], threshold=0).class_names) <= {"a", "b"}
        grown = RFDETRPico(pretrain_weights=weights, num_classes=7, **ARCHITECTURE)
        assert torch.equal(grown._trained.module.class_embed.weight, whole[[0, 1, 2, 3, 4, 5, 0, 1]])

    def test_training_begins_with_them(self, weights: Path, coco: Path, tmp_path: Path) -> None:
        """With a rate of next to nothing they are what comes out, raw and averaged, but for the head's rows."""
        model = RFDETRPico(pretrain_weights=weights, **ARCHITECTURE)
        start = {key: value.clone() for key, value in model._trained.module.state_dict().items()}
        model.train(dataset_dir=coco, output_dir=tmp_path, **STILL)
        assert model.class_names == ("rectangle", "ellipse", "triangle")
        for name in ("regular", "ema"):
            found = checkpoint.load(tmp_path / f"checkpoint_best_{name}.pth")["model"]
            for key, value in found.items():
                expected = start[key][:4] if "class_embed" in key else start[key]
                torch.testing.assert_close(value, expected, msg=lambda text, key=key: f"{key}: {text}")
        report = json.loads((tmp_path / "weights.json").read_text())
        assert report["class_rows"] == [6, 4]
        assert report["missing"] == []

    def test_training_again_goes_on_from_the_models_own_weights(
        self, weights: Path, coco: Path, tmp_path: Path
    ) -> None:
        model = RFDETRPico(pretrain_weights=weights, **ARCHITECTURE)
        model.train(dataset_dir=coco, output_dir=tmp_path / "first", **SETTINGS)
        first = {key: value.clone() for key, value in model._trained.module.state_dict().items()}
        model.train(dataset_dir=coco, output_dir=tmp_path / "second", **STILL)
        for key, value in model._trained.module.state_dict().items():
            torch.testing.assert_close(value, first[key])
        with pytest.raises(ConfigError, match=r"is of another training \(the start weights\)"):
            model.train(dataset_dir=coco, output_dir=tmp_path / "second", **STILL)

    def test_the_same_program_again_does_nothing(
        self, weights: Path, coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        results = []
        for _ in range(2):
            model = RFDETRPico(pretrain_weights=weights, **ARCHITECTURE)
            results.append(model.train(dataset_dir=coco, output_dir=tmp_path, **SETTINGS))
            monkeypatch.setattr(Engine, "optimizer_step", None)
        assert results[0].best_score == results[1].best_score
        other = RFDETRPico(**ARCHITECTURE)
        with pytest.raises(ConfigError, match=r"is of another training \(the start weights\)"):
            other.train(dataset_dir=coco, output_dir=tmp_path, **SETTINGS)

    def test_without_any_it_is_said_once(self, coco: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        RFDETRPico(**ARCHITECTURE).train(dataset_dir=coco, output_dir=tmp_path, **SETTINGS)
        warned = [
            row.getMessage()
            for row in caplog.records
            if row.getMessage().startswith("training starts from random weights, which takes")
        ]
        assert len(warned) == 1
        assert "RFDETRPico(pretrain_weights=" in warned[0]
        assert not (tmp_path / "weights.json").exists()

    def test_a_loaded_model_trains_on_at_another_resolution(self, model: Any, coco: Path, tmp_path: Path) -> None:
        """Its architecture is the file's, and what the train call says goes first."""
        loaded = RFDETRPico.from_checkpoint(model.save(tmp_path / "saved.pth"))
        loaded.train(dataset_dir=coco, output_dir=tmp_path / "out", resolution=48, **SETTINGS)
        assert (loaded.config.resolution, loaded.config.positional_encoding_size) == (48, 6)
        assert loaded.config.num_queries == tiny.MODEL["num_queries"]
        report = json.loads((tmp_path / "out" / "weights.json").read_text())
        assert [change["key"].rpartition(".")[2] for change in report["resized"]] == ["position_embeddings"]

    @pytest.mark.parameter("resolution")
    @pytest.mark.long
    def test_the_resolution_of_each_training_stays_until_another_is_given(
        self, weights: Path, coco: Path, tmp_path: Path
    ) -> None:
        architecture = {name: value for name, value in ARCHITECTURE.items() if name != "resolution"}
        with pytest.warns(UserWarning, match="42 is not a multiple"):
            rounded = RFDETRPico(pretrain_weights=weights, resolution=42, **architecture)
        model = RFDETRPico.from_checkpoint(rounded.save(tmp_path / "rounded.pth"))
        assert (model.config.resolution, model.config.requested_resolution) == (48, 42)
        sides = []
        for run, given in enumerate([{}, {"resolution": 32}, {}]):
            model.train(dataset_dir=coco, output_dir=tmp_path / str(run), **SETTINGS, **given)
            sides.append((model.config.resolution, model.config.positional_encoding_size))
        assert sides == [(48, 6), (32, 4), (32, 4)]

    @pytest.mark.parametrize("data", [None, b"", b"no weights", b"PK\x03\x04cut off"])
    def test_what_cannot_be_used_is_told_in_one_line(self, tmp_path: Path, data: bytes | None) -> None:
        if data is not None:
            (tmp_path / "w.pth").write_bytes(data)
        with pytest.raises(UserError, match=r"w\.pth: ") as caught:
            RFDETRPico(pretrain_weights=tmp_path / "w.pth")
        assert "\n" not in str(caught.value)

    def test_weights_of_another_variant_are_refused(self, weights: Path) -> None:
        with pytest.raises(CheckpointError, match=r"five\.pth: .*patches of 8 pixels"):
            RFDETRNano(pretrain_weights=weights)


class TestSave:
    def test_saved_and_loaded_it_detects_the_same(self, model: Any, coco: Path, tmp_path: Path) -> None:
        path = model.save(tmp_path / "mine.pth")
        assert path == tmp_path / "mine.pth"
        loaded = RFDETR.from_checkpoint(path)
        assert type(loaded) is RFDETRPico
        assert (loaded.config, loaded.class_names) == (model.config, model.class_names)
        assert_same(*(m.predict(pictures(coco)[0], threshold=0) for m in (model, loaded)))

    def test_a_folder_that_is_not_there_is_told(self, model: Any, tmp_path: Path) -> None:
        with pytest.raises(StorageAccessError, match=r"mine\.pth: cannot be written: no such folder \(make .*absent\)"):
            model.save(tmp_path / "absent" / "mine.pth")

    def test_a_folder_is_no_file(self, model: Any, tmp_path: Path) -> None:
        with pytest.raises(StorageAccessError, match=r"cannot be written: is a folder"):
            model.save(tmp_path)


class TestEvaluate:
    @pytest.mark.parametrize("split", ["valid", "test"])
    def test_gives_the_metrics_of_the_stage(self, model: Any, output: Path, coco: Path, split: str) -> None:
        (prepared,) = (output / "dataset").iterdir()
        dataset = PreparedDataset(prepared)
        expected, _ = evaluate_model(
            checkpoint.load_trained(output / "checkpoint_best_total.pth"),
            dataset.split(split),
            dataset.class_map,
            batch_size=2,
            max_dets=500,
            device=torch.device("cpu"),
            loading=LoaderSettings(0, None, None, None),
        )
        for source in (coco, prepared):
            found = model.evaluate(dataset_dir=source, split=split, num_workers=0)
            assert tiny.flat(found.to_json()) == pytest.approx(tiny.flat(expected.to_json()))
        assert sorted(path.name for path in coco.iterdir()) == ["test", "train", "valid"]  # untouched

    def test_classes_that_do_not_match_are_told(
        self, coco: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        other = detector.RFDETR(tiny.model_config())
        path = tmp_path / "other.pth"
        torch.save({"model": other.state_dict(), "args": {"class_names": ["ellipse", "square", "star"]}}, path)
        model = RFDETRPico(pretrain_weights=path, **ARCHITECTURE)
        model.evaluate(dataset_dir=coco, num_workers=0)
        assert "2 classes that the dataset lacks, dropping their detections: square, star" in caplog.text
        assert "2 classes that the model lacks, so that it cannot find them: rectangle, triangle" in caplog.text

    @pytest.mark.parametrize(
        ("keywords", "message"),
        [
            ({"split": "trial"}, r'evaluate\(\): split: "trial" is not allowed'),
            ({"batch_size": 0}, r"evaluate\(\): batch_size: 0 is not allowed"),
            ({"eval_max_dets": 0}, r"evaluate\(\): eval_max_dets: 0 is not allowed"),
        ],
    )
    def test_refusals(self, model: Any, coco: Path, keywords: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            model.evaluate(dataset_dir=coco, **keywords)


@pytest.fixture(scope="module")
def seen_by_alpha(coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PNG files; alpha differs from image to image."""
    folder = tmp_path_factory.mktemp("alpha") / "coco"
    shutil.copytree(coco, folder)
    for split in ("train", "valid", "test"):
        for i, path in enumerate(sorted((folder / split).glob("*.jpg"))):
            with Image.open(path) as image:
                image = image.convert("RGB")
            image.putalpha(20 * i + 5)
            image.save(path, "PNG")
    return folder


class TestOtherChannels:
    """Image files are read as grey for one channel, as RGBA for four; of other counts they cannot be."""

    @pytest.mark.parametrize("channels", [pytest.param(1, marks=pytest.mark.long), 4])
    def test_train_evaluate_export_predict(self, seen_by_alpha: Path, tmp_path: Path, channels: int) -> None:
        model = RFDETRPico(**ARCHITECTURE, num_channels=channels)
        # Once with the probe, which takes ten seconds on a CPU.
        batch = {"batch_size": "auto"} if channels == 1 else {}
        model.train(dataset_dir=seen_by_alpha, output_dir=tmp_path / "out", **{**SETTINGS, **batch})
        assert model._trained.module.backbone[0].encoder.encoder.embeddings.patch_embeddings.projection.in_channels == (
            channels
        )
        metrics = model.evaluate(dataset_dir=seen_by_alpha, split="valid", num_workers=0)
        (best,) = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
        assert metrics.map in (
            pytest.approx(best["val/mAP_50_95"], abs=1e-9),
            pytest.approx(best["val/ema_mAP_50_95"], abs=1e-9),
        )
        again = RFDETR.from_checkpoint(model.save(tmp_path / "saved.pth"))
        path = pictures(seen_by_alpha)[0]
        found = again.predict(path, threshold=0)
        with Image.open(path) as image:
            opaque = image.convert("RGB")
            assert_same(found, model.predict(image, threshold=0))
        same = np.isclose(found.scores[0], model.predict(opaque, threshold=0).scores[0], atol=1e-6)
        assert same == (channels == 1)  # a fourth channel is seen
        exported = open_session(model.export(tmp_path / "exported"))
        assert exported.get_inputs()[0].shape == ["batch", channels, 32, 32]
        metadata = exported.get_modelmeta().custom_metadata_map
        assert len(json.loads(metadata["mean"])) == len(json.loads(metadata["std"])) == channels
        assert metadata["channels"] == {1: "L", 4: "RGBA"}[channels]

    @pytest.mark.long
    def test_a_dataset_that_was_reduced_has_lost_the_fourth_channel(
        self, coco: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        RFDETRPico(**ARCHITECTURE).train(dataset_dir=coco, output_dir=tmp_path / "rgb", **SETTINGS)
        (reduced,) = (tmp_path / "rgb" / "dataset").iterdir()
        for channels, told in ((3, False), (4, True)):
            caplog.clear()
            model = RFDETRPico(**ARCHITECTURE, num_channels=channels)
            model.train(dataset_dir=reduced, output_dir=tmp_path / str(channels), **SETTINGS)
            assert ("images larger than 600 px have lost their fourth channel" in caplog.text) == told

    def test_other_counts_are_refused_where_files_are_read(self, coco: Path, weights: Path, tmp_path: Path) -> None:
        model = RFDETRPico(pretrain_weights=weights, num_channels=5, **ARCHITECTURE)
        assert model.predict(np.zeros((40, 50, 5), np.uint8), threshold=0).boxes.shape[1] == 4
        for what, call in (
            ("training", lambda: model.train(dataset_dir=coco, output_dir=tmp_path / "out", **SETTINGS)),
            ("evaluation", lambda: model.evaluate(dataset_dir=coco)),
        ):
            with pytest.raises(ConfigError, match=f"model.num_channels: 5 does not go with {what}"):
                call()
        assert not (tmp_path / "out").exists()
        assert open_session(model.export(tmp_path)).get_inputs()[0].shape == ["batch", 5, 32, 32]


class TestRefusals:
    def test_the_class_of_all_variants_is_none(self) -> None:
        with pytest.raises(ConfigError, match=r"RFDETR itself is no variant \(use RFDETRPico, RFDETRNano"):
            RFDETR()

    def test_without_weights(self, tmp_path: Path) -> None:
        model = RFDETRPico()
        assert model.class_names == ()
        for call in (
            lambda: model.predict("photo.jpg"),
            lambda: model.export(tmp_path),
            lambda: model.save(tmp_path / "w.pth"),
            lambda: model.evaluate(dataset_dir=tmp_path),
        ):
            with pytest.raises(ConfigError, match=r"no weights yet \(train it, or use RFDETRPico\.from_checkpoint"):
                call()

    @pytest.mark.parametrize(
        ("keywords", "message"),
        [
            ({"resolutoin": 64}, r"RFDETRPico\(\): resolutoin: unknown field; did you mean resolution\?"),
            ({"resolution": 33}, r"RFDETRPico\(\): resolution: 33 is not allowed: must be .* \(use 32 or 48\)"),
            (
                {"pretrain_weights": "missing.pth"},
                r"missing\.pth: neither in the current folder nor in .*, nor a published",
            ),
            ({"variant": "nano"}, r"RFDETRPico is the variant pico"),
            ({"pretrain_weights": True}, r"pretrain_weights: bool is no source of weights"),
            ({"segmentation_head": True}, r"model\.segmentation_head: true is not built yet"),
        ],
    )
    def test_of_the_constructor(self, keywords: dict[str, Any], message: str) -> None:
        with pytest.raises((ConfigError, MissingObjectError), match=message) as caught:
            RFDETRPico(**keywords)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("keywords", "message"),
        [
            ({"epoch": 3}, r"train\(\): epoch: unknown field; did you mean epochs\?"),
            ({"epochs": 0}, r"train\(\): epochs: 0 is not allowed"),
            ({"gradient_checkpointing": True}, r"belongs to the architecture \(RFDETRPico\(gradient_checkpointing="),
            ({"amp_dtype": "fp8"}, r"train\.amp_dtype: \"fp8\" is not built yet"),
        ],
    )
    def test_of_train(self, tmp_path: Path, keywords: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            RFDETRPico().train(dataset_dir=tmp_path / "nowhere", output_dir=tmp_path / "out", **keywords)
        assert not (tmp_path / "out").exists()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*is not the published file of that name")
def test_the_page_on_python_tells_the_truth(coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every snippet runs, in order; with a small detector, one epoch of small images, and weights made here."""
    page = (Path(__file__).parents[1] / "docs" / "python.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(snippets) == 7
    shutil.copytree(coco, tmp_path / "data")
    shutil.copy(pictures(coco)[0], tmp_path / "photo.jpg")
    module = detector.RFDETR(tiny.model_config(num_classes=90))
    torch.save({"model": module.state_dict()}, tmp_path / "rf-detr-nano.pth")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"SMALL": ARCHITECTURE}
    smaller = {"RFDETRNano(": "RFDETRPico(**SMALL, ", "RFDETRNano": "RFDETRPico", "epochs=20": "epochs=1"}
    for snippet in snippets:
        code = snippet
        for given, ours in smaller.items():
            code = code.replace(given, ours)
        exec(compile(code, "docs/python.md", "exec"), names)
    assert type(names["model"]) is RFDETRPico
    assert names["path"] == Path("output/rfdetr-pico.onnx")
    for found in (names["b"], names["c"]):
        np.testing.assert_array_equal(found.scores, names["a"].scores)
