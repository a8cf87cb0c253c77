"""The ONNX file says what it is, finds what the detector finds, and is refused when it does not."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from PIL import Image

from rfdetr_core import __version__
from rfdetr_core.config import ExportConfig
from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.data.sample import draw_image
from rfdetr_core.data.transforms import preprocess
from rfdetr_core.errors import ExportError
from rfdetr_core.export.consumer import Consumer, Found
from rfdetr_core.export.latency import measure_latency
from rfdetr_core.export.onnx import export_onnx
from rfdetr_core.export.parity import Sample, Tolerances, check_ap, check_parity, difference_of, split_samples
from rfdetr_core.models.detector import RFDETR
from rfdetr_core.models.weights import TrainedModel
from tests.training import tiny

NAMES = ("ant", "Käfer", "fly")
DEFAULT = ExportConfig()


def samples(count: int) -> list[Sample]:
    """Drawn pictures as files."""
    found = []
    for seed in range(count):
        picture = draw_image(np.random.default_rng(seed), 64, 3)[0]
        file = io.BytesIO()
        picture.save(file, "PNG")
        found.append(Sample(f"{seed}.png", file.getvalue(), picture))
    return found


@pytest.fixture(scope="module")
def trained() -> TrainedModel:
    """A detector none of whose heads is constant, as an untrained one's are."""
    torch.manual_seed(3)
    module = RFDETR(tiny.model_config()).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return TrainedModel(module, tiny.model_config(), NAMES, "ema", 7, "0123abcd")


@pytest.fixture(scope="module")
def dynamic(trained: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "dynamic.onnx"
    export_onnx(trained, path, DEFAULT, facts={"threshold": 0.25, "run": "r1"})
    return path


def exported(trained: TrainedModel, folder: Path, **settings: Any) -> tuple[Path, ExportConfig]:
    config = ExportConfig.parse(settings)
    export_onnx(trained, folder / "model.onnx", config)
    return folder / "model.onnx", config


class TestExport:
    def test_metadata_tells_a_consumer_all_it_needs(self, dynamic: Path) -> None:
        found = {entry.key: entry.value for entry in onnx.load(str(dynamic)).metadata_props}
        assert json.loads(found.pop("class_names")) == list(NAMES)
        assert json.loads(found.pop("mean")) == [0.485, 0.456, 0.406]
        assert json.loads(found.pop("std")) == [0.229, 0.224, 0.225]
        assert json.loads(found.pop("resolution")) == [32, 32]
        assert found.pop("pre_processing").startswith("EXIF orientation applied; channels RGB; ")
        assert found == {
            "channels": "RGB",
            "resize": "bilinear-antialias",
            "post_processing": "false",
            "num_select": "8",
            "opset": "17",
            "precision": "fp32",
            "variant": "pico",
            "rfdetr_core": __version__,
            "weights_sha256": "0123abcd",
            "threshold": "0.25",
            "run": "r1",
        }

    def test_the_model_stays_as_it_is(self, trained: TrainedModel, tmp_path: Path) -> None:
        before = {name: value.clone() for name, value in trained.module.state_dict().items()}
        mode = trained.module.training
        exported(trained, tmp_path)
        assert not tiny.differing(before, trained.module.state_dict())
        assert trained.module.training == mode

    def test_names_and_shapes(self, dynamic: Path) -> None:
        onnx.checker.check_model(onnx.load(str(dynamic)), full_check=True)
        session = Consumer(dynamic).session
        assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [
            ("input", "tensor(float)", ["batch", 3, 32, 32])
        ]
        assert [o.name for o in session.get_outputs()] == ["dets", "labels"]
        found = Consumer(dynamic).run(preprocess(samples(1)[0].picture, 32).numpy(), [(64, 64)])
        assert (found["dets"].shape, found["labels"].shape) == ((1, 8, 4), (1, 8, 4))

    @pytest.mark.parametrize(
        "settings",
        [
            {"dynamic_batch": False},
            {"dynamic_batch": False, "fixed_batch": 2},
            {"shape": [64, 32], "opset": 16},
            {"post_processing": True, "opset": 23},
            {"precision": "fp16"},
            {"precision": "fp16", "post_processing": True, "shape": [32, 64]},
        ],
        ids=lambda settings: ",".join(map(str, settings)),
    )
    def test_every_form_finds_what_the_detector_finds(
        self, trained: TrainedModel, tmp_path: Path, settings: dict[str, Any]
    ) -> None:
        path, config = exported(trained, tmp_path, **settings)
        parity = check_parity(trained, path, samples(5), config)
        fixed = settings.get("fixed_batch", 1) if "dynamic_batch" in settings else None
        assert parity.passed and parity.batch_sizes == ((fixed,) if fixed else (1, 4))
        model = onnx.load(str(path))
        assert {entry.version for entry in model.opset_import if not entry.domain} == {settings.get("opset", 17)}
        assert not {entry.domain for entry in model.opset_import} - {""}  # any runtime has the standard operators
        session = Consumer(path).session
        height, width = settings.get("shape", [32, 32])
        assert session.get_inputs()[0].shape == [fixed or "batch", 3, height, width]
        assert {i.type for i in session.get_inputs()} <= {"tensor(float)", "tensor(int64)"}
        half = config.precision == "fp16"
        assert (path.stat().st_size < 1_400_000) == half
        assert parity.logits < (0.02 if half else 1e-4) and parity.boxes < (0.005 if half else 1e-5)

    def test_detections_of_a_graph_with_post_processing(self, trained: TrainedModel, tmp_path: Path) -> None:
        """The spare column and a class without a name find nothing; boxes are in pixels, inside the image."""
        nameless = TrainedModel(trained.module, trained.config, ("ant", "", "fly"), "ema", 7, "0")
        path, config = exported(nameless, tmp_path, post_processing=True)
        consumer = Consumer(path)
        pixels, _ = consumer.read(samples(1)[0].data)
        found = consumer.run(np.repeat(pixels, 2, 0), [(100, 300), (50, 20)])
        assert found["labels"].dtype == np.int64 and set(np.unique(found["labels"])) <= {-1, 0, 2}
        assert (found["labels"] == -1).any() and not found["scores"][found["labels"] == -1].any()
        assert (found["boxes"][0] <= [300, 100, 300, 100]).all() and (found["boxes"] >= 0).all()
        assert np.allclose(found["boxes"][0] / [300, 100, 300, 100], found["boxes"][1] / [20, 50, 20, 50], atol=1e-6)
        check_parity(nameless, path, samples(3), config)

    def test_what_cannot_be_written_is_told(self, trained: TrainedModel, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match="cannot be written with opset 99") as caught:
            export_onnx(
                trained, tmp_path / "model.onnx", ExportConfig.model_construct(**{**dict(DEFAULT), "opset": 99})
            )
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 2


def changed(path: Path, target: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(str(path))
    change(model)
    onnx.save(model, str(target))
    return target


def fact(key: str, value: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        (entry,) = [entry for entry in model.metadata_props if entry.key == key]
        entry.value = value

    return change


def weights(name: str, make: Callable[[Any], Any]) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
        value = np.ascontiguousarray(make(numpy_helper.to_array(tensor)))
        tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))

    return change


WRONG = {
    "resize rule": fact("resize", "nearest"),
    "another filter": fact("resize", "bicubic-antialias"),
    "channel order": fact("channels", "BGR"),
    "mean": fact("mean", "[0.5, 0.5, 0.5]"),
    "class shift": weights("model.class_embed.bias", lambda bias: np.roll(bias, 1)),
    "class names shifted": fact("class_names", '["fly", "ant", "Käfer"]'),
    "logits": weights("model.class_embed.bias", lambda bias: bias + 0.01),
    "boxes": weights("model.bbox_embed.layers.2.bias", lambda bias: bias + 0.02),
    "not finite": weights("model.class_embed.bias", lambda bias: bias * float("nan")),
}


class TestParity:
    def test_what_was_compared_is_told(self, trained: TrainedModel, dynamic: Path) -> None:
        parity = check_parity(trained, dynamic, samples(5), DEFAULT)
        assert (parity.images, parity.batch_sizes, parity.passed) == (5, (1, 4), True)
        assert 0 < parity.logits < 1e-4 and 0 < parity.boxes < 1e-5
        assert parity.worst_image.endswith(".png")
        assert parity.to_json()["logits_tolerance"] == 1e-3 and parity.to_json()["boxes_tolerance"] == 1e-4

    @pytest.mark.parametrize("case", WRONG)
    def test_what_is_wrong_makes_the_gate_fail(
        self, trained: TrainedModel, dynamic: Path, tmp_path: Path, case: str
    ) -> None:
        path = changed(dynamic, tmp_path / "model.onnx", WRONG[case])
        with pytest.raises(ExportError, match=r"^model\.onnx ") as caught:
            check_parity(trained, path, samples(4), DEFAULT)
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
        if case not in ("class names shifted",):
            assert "differs from the trained model: on " in str(caught.value) and ".png logits by " in str(caught.value)

    def test_the_worst_image_is_named(self, trained: TrainedModel, dynamic: Path) -> None:
        """The bytes of one image are those of another picture."""
        pictures = samples(6)
        pictures[3] = pictures[3]._replace(data=pictures[4].data)
        with pytest.raises(ExportError, match=r"on 3\.png logits by"):
            check_parity(trained, dynamic, pictures, DEFAULT)

    def test_an_orientation_in_the_file_is_applied_by_both(self, trained: TrainedModel, dynamic: Path) -> None:
        picture = draw_image(np.random.default_rng(9), 64, 3)[0].crop((0, 0, 64, 40))
        exif, file = Image.Exif(), io.BytesIO()
        exif[0x0112] = 6
        picture.save(file, "PNG", exif=exif)
        turned = Sample("turned.png", file.getvalue(), picture.transpose(Image.Transpose.ROTATE_270))
        assert check_parity(trained, dynamic, [turned], DEFAULT).passed
        with pytest.raises(ExportError):
            check_parity(trained, dynamic, [turned._replace(picture=picture)], DEFAULT)

    def test_the_tolerance_decides(self, trained: TrainedModel, dynamic: Path) -> None:
        for field in ("logits_tolerance", "boxes_tolerance"):
            with pytest.raises(ExportError, match=rf"dynamic\.onnx differs .*export\.{field} (is )?1e-12"):
                check_parity(trained, dynamic, samples(2), ExportConfig.parse({field: 1e-12}))

    def test_another_model_is_refused(self, trained: TrainedModel, dynamic: Path) -> None:
        other = copy.deepcopy(trained.module)
        with torch.no_grad():
            other.backbone[0].encoder.encoder.embeddings.patch_embeddings.projection.weight *= 1.05
        different = TrainedModel(other, trained.config, trained.class_names, "ema", 7, "0123abcd")
        with pytest.raises(ExportError):
            check_parity(different, dynamic, samples(2), DEFAULT)

    def test_another_selection_is_refused(self, trained: TrainedModel, dynamic: Path, tmp_path: Path) -> None:
        """Given the same tokens PyTorch would find the same boxes: that they are the best ones is part of the proof."""
        path = changed(dynamic, tmp_path / "model.onnx", prefer_later_tokens(3.0))
        with pytest.raises(ExportError, match=r"scores of selected tokens by \d\.\d\de[-+]0[01]"):
            check_parity(trained, path, samples(2), DEFAULT)

    def test_tokens_of_equal_score_may_be_ranked_either_way(self, trained: TrainedModel, tmp_path: Path) -> None:
        """Where float32 cannot tell scores apart, both rankings are right: PyTorch follows the file's."""
        module = copy.deepcopy(trained.module)
        with torch.no_grad():
            module.transformer.enc_output[0].weight.zero_()  # every token scores the same
        tied = TrainedModel(module, trained.config, trained.class_names, "ema", 7, "0")
        path, config = exported(tied, tmp_path)
        changed(path, path, prefer_later_tokens(1e-6))
        pixels = preprocess(samples(1)[0].picture, 32)
        found = Consumer(path).run(pixels.numpy(), [(64, 64)])
        with torch.inference_mode():
            boxes = module(pixels)["pred_boxes"].numpy()
        assert np.abs(found["dets"] - boxes).max() > 0.1  # compared rank by rank they differ
        parity = check_parity(tied, path, samples(2), config)
        assert parity.boxes < 1e-5 and parity.selection < 2e-6

    @pytest.mark.parametrize("damage", ["cut short", "empty", "text"])
    def test_a_damaged_file_is_told(self, trained: TrainedModel, dynamic: Path, tmp_path: Path, damage: str) -> None:
        data = {"cut short": dynamic.read_bytes()[:-5000], "empty": b"", "text": b"not a model"}[damage]
        (tmp_path / "model.onnx").write_bytes(data)
        with pytest.raises(ExportError, match=r"model\.onnx: not a readable ONNX file"):
            check_parity(trained, tmp_path / "model.onnx", samples(1), DEFAULT)
        with pytest.raises(ExportError, match=r"model\.onnx: (ONNX Runtime cannot run it|its metadata)"):
            Consumer(tmp_path / "model.onnx")


def prefer_later_tokens(by: float) -> Callable[[onnx.ModelProto], None]:
    """Add 0 .. `by` to the scores of the 16 tokens, before the best are selected."""

    def change(model: onnx.ModelProto) -> None:
        (top_k,) = [node for node in model.graph.node if node.op_type == "TopK"]
        model.graph.initializer.append(numpy_helper.from_array(np.linspace(0, by, 16, dtype=np.float32), "nudge"))
        add = onnx.helper.make_node("Add", [top_k.input[0], "nudge"], ["nudged"])
        model.graph.node.insert(list(model.graph.node).index(top_k), add)
        top_k.input[0] = "nudged"

    return change


class TestMatching:
    limits = Tolerances(1e-3, 1e-4, 0.001)
    boxes = np.array([[0.1, 0.1, 0.3, 0.3], [0.5, 0.5, 0.9, 0.9], [0.2, 0.6, 0.4, 0.8], [0.0, 0.0, 1.0, 1.0]])
    found = Found(np.array([0, 1, 0, 2]), np.array([2.0, 1.0, 1.0, -3.0]), boxes)

    def reordered(self, *order: int) -> Found:
        return Found(*(part[list(order)] for part in self.found))

    def test_equal_scores_may_stand_in_either_order(self) -> None:
        assert difference_of(self.found, self.reordered(0, 2, 1, 3), self.limits) == (0.0, 0.0)

    def test_the_largest_difference_of_each_kind(self) -> None:
        other = self.found._replace(
            logits=self.found.logits + np.array([0, 5e-4, 0, 0]), boxes=self.boxes + np.array([[0], [0], [4e-5], [0]])
        )
        assert difference_of(self.found, other, self.limits) == pytest.approx((5e-4, 4e-5))

    def test_another_class_is_no_match(self) -> None:
        other = self.found._replace(labels=np.array([1, 1, 0, 2]))
        assert difference_of(self.found, other, self.limits) == (float("inf"), float("inf"))

    def test_the_cut_after_the_last_one_may_fall_between_equals(self) -> None:
        last = Found(
            np.array([0, 1, 0, 1]), self.found.logits + np.array([0, 0, 0, 9e-4]), self.boxes * [[1], [1], [1], [0.5]]
        )
        assert difference_of(self.found, last, self.limits) == (0.0, 0.0)
        stronger = last._replace(logits=self.found.logits + np.array([0, 0, 0, 0.5]))
        assert difference_of(self.found, stronger, self.limits)[0] == float("inf")

    def test_none_on_one_side(self) -> None:
        none = self.reordered()
        assert difference_of(none, none, self.limits) == (0.0, 0.0)
        assert difference_of(self.found, none, self.limits)[0] == float("inf")
        assert difference_of(self.found, self.reordered(0, 1), self.limits)[0] == float("inf")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    folder = tmp_path_factory.mktemp("dataset")
    return tiny.prepare(tiny.draw(folder / "coco", test=6), folder / "prepared")


@pytest.fixture(scope="module")
def of_the_dataset(trained: TrainedModel, dataset: PreparedDataset) -> TrainedModel:
    """It finds nothing in particular, but every class of the dataset scores somewhere."""
    return TrainedModel(trained.module, trained.config, dataset.class_map.names, "ema", 1, "0")


class TestSplit:
    def test_images_are_spread_over_the_split(self, dataset: PreparedDataset) -> None:
        split = dataset.split("test")
        names = [str(name) for name in split.table.file_names]
        assert [sample.name for sample in split_samples(split, 3, 3)] == [names[0], names[2], names[5]]
        assert len(split_samples(split, 32, 3)) == 6
        assert split_samples(split, 1, 3)[0].data == split.read_bytes(0)

    def test_ap_on_the_split(self, of_the_dataset: TrainedModel, dataset: PreparedDataset, tmp_path: Path) -> None:
        for settings in ({}, {"dynamic_batch": False, "fixed_batch": 4, "post_processing": True}):
            path, config = exported(of_the_dataset, tmp_path, **settings)
            found = check_ap(of_the_dataset, path, dataset.split("test"), dataset.class_map, config, max_dets=100)
            assert (found["images"], found["difference"], found["tolerance"]) == (6, 0.0, 0.001)
            assert 0 <= found["pytorch"] <= 1

    def test_a_difference_of_ap_is_a_breach(
        self, of_the_dataset: TrainedModel, dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, config = exported(of_the_dataset, tmp_path)
        scores = iter((0.5, 0.4985))
        monkeypatch.setattr(
            "rfdetr_core.export.parity.coco_metrics", lambda *_, **__: type("Score", (), {"map": next(scores)})
        )
        with pytest.raises(
            ExportError, match=r"AP 0\.4985, PyTorch 0\.5000 on 6 images \(export\.ap_tolerance is 0\.001"
        ):
            check_ap(of_the_dataset, path, dataset.split("test"), dataset.class_map, config, max_dets=100)

    def test_the_example_prints_what_the_consumer_finds(
        self, of_the_dataset: TrainedModel, dataset: PreparedDataset, tmp_path: Path
    ) -> None:
        """examples/onnx_inference.py, as a program of its own; it loads nothing of ours and no torch."""
        split = dataset.split("test")
        program = Path(__file__).parents[2] / "examples" / "onnx_inference.py"
        picture = tmp_path / "picture.png"
        picture.write_bytes(split.read_bytes(1))
        printed = []
        for settings in ({}, {"post_processing": True}):
            config = ExportConfig.parse(settings)
            export_onnx(of_the_dataset, tmp_path / "model.onnx", config, facts={"threshold": 0.0})
            command = [sys.executable, "-c", f"import sys; sys.argv = {['x', 'model.onnx', 'picture.png']!r}\n"]
            command[-1] += f"exec(open({str(program)!r}).read())\n"
            command[-1] += "assert not {'torch', 'rfdetr_core', 'onnx'} & set(sys.modules)"
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            printed.append(done.stdout)
        consumer = Consumer(tmp_path / "model.onnx")
        pixels, size = consumer.read(picture.read_bytes())
        (found,) = consumer.detections(consumer.run(pixels, [size]), [size])
        for text in printed:
            rows = [line.split() for line in text.splitlines()]
            assert [row[:2] for row in rows] == [["picture.png", consumer.class_names[i]] for i in found.labels]
            values = np.array([row[2:] for row in rows], float)
            assert np.allclose(values[:, 0], 1 / (1 + np.exp(-found.logits)), atol=6e-4)
            assert np.allclose(values[:, 1:], found.boxes * [size[1], size[0], size[1], size[0]], atol=0.06)


def test_latency_of_all_that_is_there(trained: TrainedModel, dynamic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rfdetr_core.export.latency.RUNS", 3)
    monkeypatch.setattr("rfdetr_core.hardware.cpu_count", lambda: 2)
    threads = torch.get_num_threads()
    found = measure_latency(trained, dynamic)
    assert torch.get_num_threads() == threads
    cpu = [(row["runtime"], row["threads"]) for row in found["rows"] if row["device"] == "cpu"]
    assert cpu == [("onnxruntime", 1), ("onnxruntime", 2), ("pytorch", 1), ("pytorch", 2)]
    assert all(0 < row["milliseconds"] <= row["p90_milliseconds"] for row in found["rows"])
    assert (found["runs"], found["batch_size"], found["input"]) == (3, 1, [32, 32])
