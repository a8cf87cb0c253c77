"""Pretrained weights through the first stages: checked without torch, loaded once, recorded."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from components.probe_batch_size import stage as probe_batch_size
from components.train import stage as train
from components.validate_dataset import stage as validate_dataset
from components.validate_dataset import weights
from rfdetr_core.config import ModelSection
from rfdetr_core.errors import CheckpointError
from rfdetr_core.models.detector import RFDETR
from rfdetr_core.models.published import PublishedFile
from rfdetr_core.publication import MANIFEST
from rfdetr_core.storage import Location
from rfdetr_core.training import checkpoint
from tests.models.golden import fill_w1
from tests.s3_server import s3_root, s3_server
from tests.training import tiny

__all__ = ["s3_root", "s3_server"]

ARCHITECTURE = {name: value for name, value in tiny.MODEL.items() if name != "num_classes"}


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.draw(tmp_path_factory.mktemp("drawn") / "coco")


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Weights of five classes for the tiny architecture."""
    module = RFDETR(tiny.model_config(num_classes=5))
    fill_w1(module)
    torch.save({"model": module.state_dict()}, tmp_path / "start.pth")
    return tmp_path / "start.pth"


class Run:
    """The first three stages, in this process."""

    def __init__(self, folder: Path, coco: Path) -> None:
        self.folder, self.coco = folder, coco
        self.place = folder / "root" / "runs" / "r1"

    def start(self, pretrained: Path | str, *more: str, run: str = "r1", **model: Any) -> int:
        self.place = self.folder / "root" / "runs" / run
        train = {**tiny.TRAIN, "epochs": 1, "batch_size": 2, "grad_accum_steps": 1, "lr": 1e-12, "lr_encoder": 1e-12}
        sections = {
            "name": "shapes",
            "dataset": {"uri": str(self.coco)},
            "model": {**ARCHITECTURE, "pretrain_weights": str(pretrained), **model},
            "train": train,
        }
        config = self.folder / "config.yaml"
        config.write_text(json.dumps(sections))  # JSON is YAML
        return validate_dataset.main(["--run-uri", str(self.place), "--config", str(config), *more])

    def go_on(self) -> int:
        code = probe_batch_size.main(["--run-uri", str(self.place)])
        return code or train.main(["--run-uri", str(self.place)])

    def json(self, name: str) -> Any:
        return json.loads((self.place / name).read_text())

    def error(self, stage: str) -> str:
        failed = self.json(f"status/{stage}.json")
        assert failed["exit_code"] == 2
        text = f"{failed['error']['message']} ({failed['error']['hint']})"
        assert "\n" not in text
        return text


@pytest.fixture
def run(tmp_path: Path, coco: Path) -> Run:
    return Run(tmp_path, coco)


def test_they_are_recorded_and_training_begins_with_them(run: Run, file: Path) -> None:
    assert run.start(file) == 0
    seen = run.json("dataset/weights.json")
    assert (seen["uri"], seen["size"], seen["published"]) == (str(file), file.stat().st_size, None)
    assert run.go_on() == 0
    start = torch.load(file, weights_only=True)["model"]
    found = checkpoint.load(run.place / "train" / "checkpoints" / "checkpoint_best_total.pth")["model"]
    for key in ("query_feat.weight", "transformer.decoder.layers.0.linear1.weight"):
        torch.testing.assert_close(found[key], start[key])
    torch.testing.assert_close(found["class_embed.weight"], start["class_embed.weight"][:4])
    report = run.json("train/weights.json")
    assert (report["md5"], report["class_rows"]) == (seen["md5"], [6, 4])


def test_they_may_lie_in_s3(
    run: Run, file: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RF_HOME", str(run.folder / "cache"))
    root: Location = request.getfixturevalue("s3_root")
    (root / "start.pth").upload_file(file)
    uri = f"{root.uri}/start.pth"
    assert run.start(uri) == 0
    assert (run.json("dataset/weights.json")["uri"], run.json("dataset/weights.json")["size"]) == (
        uri,
        file.stat().st_size,
    )
    assert run.go_on() == 0
    assert run.json("train/weights.json")["md5"] == run.json("dataset/weights.json")["md5"]
    assert not (run.folder / "cache").exists()  # stages keep what they copy in their scratch folder


def test_without_any_nothing_is_recorded(run: Run) -> None:
    config = run.folder / "plain.yaml"
    config.write_text(json.dumps({"name": "shapes", "dataset": {"uri": str(run.coco)}}))
    assert validate_dataset.main(["--run-uri", str(run.place), "--config", str(config)]) == 0
    assert not (run.place / "dataset" / "weights.json").exists()


def test_other_content_under_the_same_uri_is_noticed(run: Run, file: Path) -> None:
    """By the train stage at once; after a new look of the first stage, training starts anew."""
    assert run.start(file) == 0
    content = torch.load(file, weights_only=True)
    content["model"]["query_feat.weight"] += 1
    torch.save(content, file)
    assert run.go_on() == 2
    assert f"{file}: its content has changed since validate_dataset looked at it" in run.error("train")
    assert run.start(file, "--force") == 0
    before = run.json("status/train.json")["inputs"]
    assert run.go_on() == 0
    assert run.json("status/train.json")["inputs"] != before


def test_a_continued_training_needs_them_no_more(run: Run, file: Path) -> None:
    assert run.start(file) == 0
    assert run.go_on() == 0
    report = run.json("train/weights.json")
    (run.place / "train" / MANIFEST).unlink()  # as if it had been interrupted
    file.unlink()
    assert run.go_on() == 0
    assert run.json("train/weights.json") == report


def test_others_and_another_architecture_are_looked_at_again(run: Run, file: Path) -> None:
    def state(**model: Any) -> str:
        assert run.start(other if model.pop("other", False) else file, **model) == 0
        return str(run.json("status/validate_dataset.json")["state"])

    other = shutil.copy(file, file.with_name("other.pth"))
    assert [state(), state()] == ["succeeded", "already done"]
    assert state(other=True) == "succeeded"
    assert run.json("dataset/weights.json")["uri"] == str(other)
    assert [state(), state(dec_layers=1), state(hidden_dim=16)] == ["succeeded"] * 3
    assert state(hidden_dim=16, encoder="dinov2_windowed_small") == "succeeded"


def test_another_variant_that_only_torch_can_see(run: Run, file: Path) -> None:
    torch.save({**torch.load(file, weights_only=True), "model_name": "RFDETRNano"}, file)
    assert run.start(file, dec_layers=1) == 0
    assert run.go_on() == 2
    assert "holds the weights of nano (2 decoder layers), the model is pico (1)" in run.error("train")


@pytest.mark.parametrize("form", ["model", "state_dict", "bare"])
def test_a_segmentation_file_is_known_without_torch(run: Run, form: str) -> None:
    """By the names of its tensors, under whatever name the file goes, before a GPU is asked for."""
    state = {"class_embed.bias": torch.ones(3), "segmentation_head.spatial_features_proj.bias": torch.ones(3)}
    content = {
        "model": {"model": state, "args": {"segmentation_head": True}},
        "state_dict": {"state_dict": {f"model._orig_mod.{key}": value for key, value in state.items()}},
        "bare": state,
    }[form]
    torch.save(content, run.folder / "mine.pth")
    assert run.start(run.folder / "mine.pth") == 2
    assert "mine.pth: holds the weights of a segmentation model, and masks are not built" in run.error(
        "validate_dataset"
    )


def test_a_segmentation_file_that_only_torch_can_see(run: Run, file: Path) -> None:
    """In the form before torch 1.6, which is no archive."""
    state = {**torch.load(file, weights_only=True)["model"], "segmentation_head.bias": torch.ones(1)}
    torch.save({"model": state}, file, _use_new_zipfile_serialization=False)
    assert run.start(file) == 0
    assert run.go_on() == 2
    assert "start.pth: holds the weights of a segmentation model, and masks are not built" in run.error("train")


def test_a_detector_is_none_for_what_is_written_beside_its_tensors(file: Path) -> None:
    args = {"segmentation_head": False, "notes": "segmentation_head.pth", "keypoint_embed": "model.keypoint_embed"}
    torch.save({**torch.load(file, weights_only=True), "args": args}, file)
    assert weights.describe_weights(file, "w", ModelSection.parse({}))["published"] is None


def test_a_file_that_is_not_there(run: Run) -> None:
    assert run.start(run.folder / "absent.pth") == 2
    text = run.error("validate_dataset")
    assert text.startswith(f"model.pretrain_weights: {run.folder / 'absent.pth'}: no such file (check the path; ")
    assert "rfdetr-pipeline weights put" in text
    assert not (run.place / "dataset").exists()


def test_what_only_torch_can_see_ends_the_train_stage(run: Run, file: Path) -> None:
    assert run.start(file, hidden_dim=16) == 0
    assert run.go_on() == 2
    assert "start.pth: " in run.error("train")
    assert not (run.place / "train" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"<html>", r"not a weight file of PyTorch: it starts with b'<htm'"),
        (b"PK\x03\x04" + bytes(100), "the file is cut off or damaged"),
    ],
)
def test_no_weight_file(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "w.pth").write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        weights.describe_weights(tmp_path / "w.pth", "s3://b/w.pth", ModelSection.parse({}))
    assert str(caught.value).startswith(f"s3://b/w.pth: {reason}")


def test_a_whole_file_that_lost_its_end(tmp_path: Path, file: Path) -> None:
    (tmp_path / "w.pth").write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut off or damaged"):
        weights.describe_weights(tmp_path / "w.pth", "w.pth", ModelSection.parse({}))


def test_a_file_whose_end_contradicts_itself(run: Run, file: Path) -> None:
    """Python's zipfile raises on it even when asked whether it is a zip file at all."""
    whole = file.read_bytes()
    at = whole.rindex(b"PK\x06\x07") + 16  # number of disks
    file.write_bytes(whole[:at] + b"\x02" + whole[at + 1 :])
    assert run.start(file) == 2
    assert f"{file}: the file is cut off or damaged: its end is missing" in run.error("validate_dataset")


class TestPublished:
    """A published file is known by its MD5, whatever its name."""

    @pytest.fixture
    def publish(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        def publish(name: str) -> Path:
            md5 = weights.describe_weights(file, "w", ModelSection.parse({}))["md5"]
            monkeypatch.setattr(weights, "PUBLISHED", {name: PublishedFile(name, "https://example.org", md5)})
            copy = file.with_name("renamed.pth")
            shutil.copy(file, copy)
            return copy

        return publish

    def test_it_is_named(self, publish: Any) -> None:
        path = publish("rf-detr-medium.pth")
        found = weights.describe_weights(path, "w", ModelSection.parse({"variant": "medium"}))
        assert found["published"] == "rf-detr-medium.pth"

    def test_of_another_variant(self, publish: Any) -> None:
        path = publish("rf-detr-medium.pth")
        with pytest.raises(CheckpointError, match=r"weights of the variant medium; the model is nano \(set model.var"):
            weights.describe_weights(path, "w", ModelSection.parse({"variant": "nano"}))

    def test_of_another_size_of_the_same_layers(self, publish: Any) -> None:
        path = publish("rf-detr-medium.pth")
        assert weights.describe_weights(path, "w", ModelSection.parse({"variant": "large"}))["published"]

    @pytest.mark.parametrize(
        ("name", "kind"), [("rf-detr-seg-nano.pt", "segmentation"), ("rf-detr-keypoint-preview-xlarge.pth", "keypoint")]
    )
    def test_no_detector(self, publish: Any, name: str, kind: str) -> None:
        path = publish(name)
        with pytest.raises(CheckpointError, match=f"holds the weights of a {kind} model, and .* are not built"):
            weights.describe_weights(path, "w", ModelSection.parse({}))

    def test_every_published_file_is_a_variant_or_no_detector(self) -> None:
        known = {name for name in weights.PUBLISHED if "seg" not in name and "keypoint" not in name}
        assert set(weights._PUBLISHED_VARIANTS) == known
