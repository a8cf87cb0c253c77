"""The ONNX file says what it is, computes what the detector computes, and is refused when it does not."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from PIL import Image

from rfdetr_core import __version__
from rfdetr_core.data.sample import draw_image
from rfdetr_core.data.transforms import preprocess
from rfdetr_core.errors import ExportError
from rfdetr_core.export.onnx import export_onnx
from rfdetr_core.export.parity import check_parity, measure_latency, open_session, run
from rfdetr_core.models.detector import RFDETR
from rfdetr_core.models.weights import TrainedModel
from tests.training import tiny


def images(count: int) -> list[Image.Image]:
    return [draw_image(np.random.default_rng(seed), 64, 3)[0] for seed in range(count)]


@pytest.fixture(scope="module")
def trained() -> TrainedModel:
    """A detector none of whose heads is constant, as an untrained one's are."""
    torch.manual_seed(3)
    module = RFDETR(tiny.model_config()).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return TrainedModel(module, tiny.model_config(), ("ant", "Käfer", "fly"), "ema", 7, "0123abcd")


@pytest.fixture(scope="module")
def dynamic(trained: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "dynamic.onnx"
    export_onnx(trained, path, opset=17, dynamic_batch=True)
    return path


@pytest.fixture(scope="module")
def fixed(trained: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "fixed.onnx"
    export_onnx(trained, path, opset=17, dynamic_batch=False)
    return path


class TestExport:
    def test_metadata_tells_a_consumer_all_it_needs(self, dynamic: Path) -> None:
        found = {entry.key: entry.value for entry in onnx.load(str(dynamic)).metadata_props}
        assert json.loads(found.pop("class_names")) == ["ant", "Käfer", "fly"]
        assert json.loads(found.pop("mean")) == [0.485, 0.456, 0.406]
        assert json.loads(found.pop("std")) == [0.229, 0.224, 0.225]
        assert "antialias" in found.pop("resize")
        assert found == {
            "resolution": "32",
            "num_select": "8",
            "variant": "pico",
            "rfdetr_core": __version__,
            "weights_sha256": "0123abcd",
        }

    @pytest.mark.parametrize(("name", "batch"), [("dynamic", "batch"), ("fixed", 1)])
    def test_names_shapes_and_opset(self, name: str, batch: Any, request: pytest.FixtureRequest) -> None:
        path: Path = request.getfixturevalue(name)
        model = onnx.load(str(path))
        onnx.checker.check_model(model, full_check=True)
        assert {entry.version for entry in model.opset_import if not entry.domain} == {17}
        session = open_session(path)
        assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [
            ("input", "tensor(float)", [batch, 3, 32, 32])
        ]
        assert [o.name for o in session.get_outputs()] == ["dets", "labels"]
        found = run(session, preprocess(images(1)[0], 32).numpy())
        assert (found["dets"].shape, found["labels"].shape) == ((1, 8, 4), (1, 8, 4))

    def test_the_model_stays_as_it_is(self, trained: TrainedModel, tmp_path: Path) -> None:
        before = {name: value.clone() for name, value in trained.module.state_dict().items()}
        mode = trained.module.training
        export_onnx(trained, tmp_path / "model.onnx", opset=17, dynamic_batch=True)
        assert not tiny.differing(before, trained.module.state_dict())
        assert trained.module.training == mode

    @pytest.mark.parametrize("opset", [16, 23])
    def test_other_opsets(self, trained: TrainedModel, tmp_path: Path, opset: int) -> None:
        export_onnx(trained, tmp_path / "model.onnx", opset=opset, dynamic_batch=True)
        model = onnx.load(str(tmp_path / "model.onnx"))
        assert {entry.version for entry in model.opset_import if not entry.domain} == {opset}
        check_parity(trained, tmp_path / "model.onnx", images(2), dynamic_batch=True, tolerance=1e-3)

    def test_what_cannot_be_written_is_told(self, trained: TrainedModel, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match="cannot be written with opset 99") as caught:
            export_onnx(trained, tmp_path / "model.onnx", opset=99, dynamic_batch=True)
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 2


class TestParity:
    def test_an_open_batch_is_proven_one_by_one_and_all_at_once(self, trained: TrainedModel, dynamic: Path) -> None:
        parity = check_parity(trained, dynamic, images(4), dynamic_batch=True, tolerance=1e-3)
        assert (parity.images, parity.batch_sizes) == (4, (1, 4))
        assert 0 < parity.logits < 1e-4
        assert 0 < parity.boxes < 1e-5
        assert parity.to_json()["tolerance"] == 1e-3

    def test_a_fixed_batch_is_proven_one_by_one(self, trained: TrainedModel, fixed: Path) -> None:
        parity = check_parity(trained, fixed, images(4), dynamic_batch=False, tolerance=1e-3)
        assert parity.batch_sizes == (1,)
        assert 0 < parity.logits < 1e-4

    def test_one_image_proves_larger_batches_too(self, trained: TrainedModel, dynamic: Path, fixed: Path) -> None:
        assert check_parity(trained, dynamic, images(1), dynamic_batch=True, tolerance=1e-3).batch_sizes == (1, 2)
        with pytest.raises(Exception, match=r"(?i)dimension|index: 0"):  # a fixed file is no open one
            check_parity(trained, fixed, images(1), dynamic_batch=True, tolerance=1e-3)

    def test_the_tolerance_decides(self, trained: TrainedModel, dynamic: Path) -> None:
        with pytest.raises(ExportError, match=r"dynamic\.onnx differs .* logits by .*export\.tolerance is 1e-12"):
            check_parity(trained, dynamic, images(2), dynamic_batch=True, tolerance=1e-12)

    @pytest.mark.parametrize(
        ("weights", "by"),
        [
            ("model.class_embed.bias", 0.01),
            ("model.bbox_embed.layers.2.bias", 0.02),
            ("model.class_embed.bias", float("nan")),
        ],
        ids=["labels", "boxes", "nan"],
    )
    def test_altered_weights_are_refused(
        self, trained: TrainedModel, dynamic: Path, tmp_path: Path, weights: str, by: float
    ) -> None:
        model = onnx.load(str(dynamic))
        (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == weights]
        value = numpy_helper.to_array(tensor) + np.float32(by)
        tensor.CopyFrom(numpy_helper.from_array(value, weights))
        onnx.save(model, str(tmp_path / "model.onnx"))
        with pytest.raises(ExportError, match=r"model\.onnx differs from the trained model") as caught:
            check_parity(trained, tmp_path / "model.onnx", images(2), dynamic_batch=True, tolerance=1e-3)
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)

    def test_another_model_is_refused(self, trained: TrainedModel, dynamic: Path) -> None:
        other = copy.deepcopy(trained.module)
        with torch.no_grad():
            other.backbone[0].encoder.encoder.embeddings.patch_embeddings.projection.weight *= 1.05
        changed = TrainedModel(other, trained.config, trained.class_names, "ema", 7, "0123abcd")
        with pytest.raises(ExportError):
            check_parity(changed, dynamic, images(2), dynamic_batch=True, tolerance=1e-3)

    def test_another_selection_is_refused(self, trained: TrainedModel, dynamic: Path, tmp_path: Path) -> None:
        """Given the same tokens PyTorch would find the same boxes: that they are the best ones is part of the proof."""
        prefer_later_tokens(dynamic, tmp_path / "model.onnx", by=3.0)
        with pytest.raises(ExportError, match=r"scores of selected tokens by \d\.\d\de[-+]0[01]"):
            check_parity(trained, tmp_path / "model.onnx", images(2), dynamic_batch=True, tolerance=1e-3)

    def test_tokens_of_equal_score_may_be_ranked_either_way(self, trained: TrainedModel, tmp_path: Path) -> None:
        """Where float32 cannot tell scores apart, both rankings are right: PyTorch follows the file's."""
        module = copy.deepcopy(trained.module)
        with torch.no_grad():
            module.transformer.enc_output[0].weight.zero_()  # every token scores the same
        tied = TrainedModel(module, trained.config, trained.class_names, "ema", 7, "0")
        export_onnx(tied, tmp_path / "tied.onnx", opset=17, dynamic_batch=True)
        prefer_later_tokens(tmp_path / "tied.onnx", tmp_path / "tied.onnx", by=1e-6)

        inputs = preprocess(images(1)[0], 32)
        found = run(open_session(tmp_path / "tied.onnx"), inputs.numpy())
        with torch.inference_mode():
            boxes = module(inputs)["pred_boxes"].numpy()
        assert np.abs(found["dets"] - boxes).max() > 0.1  # compared rank by rank they differ
        parity = check_parity(tied, tmp_path / "tied.onnx", images(2), dynamic_batch=True, tolerance=1e-3)
        assert parity.boxes < 1e-5
        assert parity.selection < 2e-6


def prefer_later_tokens(source: Path, target: Path, *, by: float) -> None:
    """Add 0 .. `by` to the scores of the 16 tokens, before the best are selected."""
    model = onnx.load(str(source))
    (top_k,) = [node for node in model.graph.node if node.op_type == "TopK"]
    model.graph.initializer.append(numpy_helper.from_array(np.linspace(0, by, 16, dtype=np.float32), "nudge"))
    add = onnx.helper.make_node("Add", [top_k.input[0], "nudge"], ["nudged"])
    model.graph.node.insert(list(model.graph.node).index(top_k), add)
    top_k.input[0] = "nudged"
    onnx.save(model, str(target))


def test_latency_of_both(trained: TrainedModel, dynamic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rfdetr_core.export.parity.TIMED_RUNS", 3)
    found = measure_latency(trained, dynamic)
    milliseconds = found["milliseconds"]
    assert set(milliseconds) == {"onnxruntime", "pytorch"}
    assert min(milliseconds.values()) > 0
    assert found["speedup_over_pytorch"] == pytest.approx(
        milliseconds["pytorch"] / milliseconds["onnxruntime"], rel=1e-2
    )
    assert (found["runs"], found["batch_size"], found["device"]) == (3, 1, "cpu")
