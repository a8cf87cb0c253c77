"""Detectors out of weight files of any form: architecture, class names, variant."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rfdetr_core import RFDETRNano, RFDETRPico, api
from rfdetr_core.__main__ import main
from rfdetr_core.coco_names import COCO_NAMES, names_by_slot
from rfdetr_core.config import ModelConfig, ModelSection
from rfdetr_core.detector_files import as_weight_file, begin_from, class_names_of, read_detector, write_detector
from rfdetr_core.errors import CheckpointError
from rfdetr_core.models.detector import RFDETR
from rfdetr_core.models.weight_file import WeightFile, read_weight_file, variant_of
from rfdetr_core.models.weights import TrainedModel
from rfdetr_core.prediction import predict_pictures
from tests.models import golden
from tests.training import tiny

OWN = ("ant", "bee", "fly")
SIZES = {name: value for name, value in tiny.MODEL.items() if name != "variant"}


def file_of(slots: int, names: tuple[str, ...] = ()) -> WeightFile:
    state = {"class_embed.bias": torch.zeros(slots)}
    return WeightFile(Path("w.pth"), state, {}, None, {}, names, (), "")


def tiny_model(**fields: Any) -> RFDETR:
    module = RFDETR(tiny.model_config(**fields))
    golden.fill_w1(module)
    return module.eval()


class TestClassNames:
    @pytest.mark.parametrize(
        ("slots", "names", "classes", "expected"),
        [
            (4, OWN, 3, OWN),
            (4, (*OWN, "__background__"), 3, OWN),  # how some name the spare column
            (6, OWN, 5, (*OWN, "class_3", "class_4")),
            (6, (*OWN, "__background__"), 5, (*OWN, "class_3", "class_4")),
            (4, OWN, 2, OWN[:2]),  # a head that is cut
            (4, OWN, 5, (*OWN, "class_3", "class_4")),  # a head that is grown
            (4, (), 4, ("class_0", "class_1", "class_2", "class_3")),
            (4, (), 3, ("class_0", "class_1", "class_2")),
            (366, (), 2, ("class_0", "class_1")),
            (91, (), 90, names_by_slot()),
            (91, tuple(COCO_NAMES.values()), 90, names_by_slot()),
            (91, names_by_slot(), 90, names_by_slot()),
            (91, (), 3, ("", "person", "bicycle")),
            (91, (), 93, (*names_by_slot(), "class_91", "class_92")),
            (94, names_by_slot(), 93, (*names_by_slot(), "class_91", "class_92")),
            (91, tuple(f"own {i}" for i in range(90)), 90, tuple(f"own {i}" for i in range(90))),
        ],
    )
    def test_rules(self, slots: int, names: tuple[str, ...], classes: int, expected: tuple[str, ...]) -> None:
        assert class_names_of(file_of(slots, names), classes) == expected

    def test_the_table_of_coco(self) -> None:
        assert len(COCO_NAMES) == len(set(COCO_NAMES.values())) == 80
        assert [COCO_NAMES[i] for i in (1, 13, 44, 90)] == ["person", "stop sign", "bottle", "toothbrush"]
        slots = names_by_slot()
        assert [slot for slot, name in enumerate(slots) if not name] == [0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83]
        assert slots.index("dog") == 18


class TestReadDetector:
    def test_a_published_file_names_its_architecture(self, tmp_path: Path) -> None:
        """Sizes that no variant has come from the file."""
        module = tiny_model(num_queries=6, num_select=6)
        config = {"resolution": 48, "num_queries": 6, "num_select": 6, "group_detr": 2, "out_feature_indexes": [1, 2]}
        config |= {"patch_size": 8, "num_windows": 2, "hidden_dim": 32, "positional_encoding_size": 4}
        content = {"model": module.state_dict(), "model_name": "RFDETRPico", "model_config": config}
        torch.save({**content, "args": Namespace(class_names=list(OWN))}, tmp_path / "best.pth")
        trained = read_detector(tmp_path / "best.pth")
        assert (trained.config.variant, trained.config.resolution, trained.config.num_queries) == ("pico", 48, 6)
        assert (trained.config.num_classes, trained.class_names) == (3, OWN)
        assert not tiny.differing(trained.module.state_dict(), module.state_dict())
        assert not trained.module.training
        assert trained.source == "pretrained"

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"model_name": "RFDETRSegNano"}, "the weights of a segmentation model, and masks are not built"),
            ({"model_name": "RFDETR2XLarge"}, r"is of the kind 2xlarge \(known are pico, nano"),
            ({"model_config": {"resolution": 33}, "model_name": "RFDETRPico"}, "cannot be built: .*resolution"),
            (
                {"model_config": {"num_decoder_registers": 2}, "model_name": "RFDETRPico"},
                "cannot be built: .*num_decoder_registers: 2 is not built yet",
            ),
            ({}, "of no variant that this program knows"),
        ],
    )
    def test_what_it_is_not(self, tmp_path: Path, content: dict[str, Any], message: str) -> None:
        torch.save({"model": tiny_model().state_dict(), **content}, tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match=message) as caught:
            read_detector(tmp_path / "w.pth")
        assert "\n" not in str(caught.value)

    def test_how_and_where_somebody_trained_is_no_part_of_a_file(self, tmp_path: Path) -> None:
        """Files of the published package, trained with its speed switches; of ours too."""
        module, switches = tiny_model(), {"compile": True, "cuda_graphs": True, "fused_optimizer": False}
        stated = {name: list(v) if isinstance(v, tuple) else v for name, v in tiny.MODEL.items()}
        config = {**stated, **switches, "device": "cuda", "amp": False, "mask_downsample_ratio": 2}
        content = {"model": module.state_dict(), "model_name": "RFDETRPico", "model_config": config}
        torch.save(content, tmp_path / "theirs.pth")
        write_detector(TrainedModel(module, module.config, OWN, "ema", 0, "0" * 64), tmp_path / "ours.pth")
        ours = torch.load(tmp_path / "ours.pth", weights_only=True)
        torch.save({**ours, "config": {**ours["config"], **switches, "device": "cuda"}}, tmp_path / "ours.pth")
        for name in ("theirs.pth", "ours.pth"):
            assert read_detector(tmp_path / name).config == module.config
        assert RFDETRPico.from_checkpoint(tmp_path / "theirs.pth").config.compile is False

    def test_more_is_selected_in_a_file_than_there_is(self, tmp_path: Path) -> None:
        """One class and few queries, with num_select as upstream leaves it."""
        module = tiny_model(num_classes=1, num_select=None)
        config = {**tiny.MODEL, "num_classes": 1, "num_select": 300, "out_feature_indexes": [1, 2]}
        content = {"model": module.state_dict(), "model_name": "RFDETRPico", "model_config": config}
        torch.save(content, tmp_path / "w.pth")
        assert read_detector(tmp_path / "w.pth").config.num_select == 16

    @pytest.mark.parametrize("version", [3, 0, "2"])
    def test_our_file_of_another_format_is_not_read_as_somebody_elses(self, tmp_path: Path, version: Any) -> None:
        """The loss that it was trained with stands in our own section alone."""
        module = tiny_model(ia_bce_loss=False, use_varifocal_loss=True)
        write_detector(TrainedModel(module, module.config, OWN, "ema", 0, "0" * 64), tmp_path / "own.pth")
        content = torch.load(tmp_path / "own.pth", weights_only=True)
        torch.save({**content, "format_version": version}, tmp_path / "own.pth")
        with pytest.raises(CheckpointError, match=f"format version {version}, this program reads 2"):
            read_detector(tmp_path / "own.pth")
        assert read_weight_file(tmp_path / "own.pth").class_names == OWN  # to begin a training with, it is good

    @pytest.mark.parametrize("data", [b"", b"no weights", b"PK\x03\x04 cut off"])
    def test_what_is_no_weight_file(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "w.pth").write_bytes(data)
        with pytest.raises(CheckpointError, match=r"w\.pth: ") as caught:
            read_detector(tmp_path / "w.pth")
        assert "\n" not in str(caught.value)

    def test_one_wrong_bit_is_refused(self, tmp_path: Path) -> None:
        path, module = tmp_path / "own.pth", tiny_model()
        write_detector(TrainedModel(module, module.config, OWN, "ema", 0, "0" * 64), path)
        data = bytearray(path.read_bytes())
        data[data.index(module.class_embed.weight.detach().numpy().tobytes()) + 17] ^= 1
        path.write_bytes(data)
        assert torch.load(path, weights_only=True)
        with pytest.raises(CheckpointError, match=r"own\.pth: the file is damaged: .* has another checksum"):
            read_detector(path)

    def test_written_and_read(self, tmp_path: Path) -> None:
        module = tiny_model(num_classes=5)
        trained = TrainedModel(module, module.config, OWN, "ema", 7, "0" * 64)
        write_detector(trained, tmp_path / "own.pth")
        found = read_detector(tmp_path / "own.pth")
        assert (found.config, found.class_names, found.source, found.epoch) == (module.config, OWN, "ema", 7)
        assert not tiny.differing(found.module.state_dict(), module.state_dict())
        file = read_weight_file(tmp_path / "own.pth")  # what any other reader sees
        assert (file.class_names, file.model_name, file.num_classes) == (OWN, "RFDETRPico", 5)

    @pytest.mark.parametrize(
        "losses",
        [
            {"ia_bce_loss": False},
            {"ia_bce_loss": False, "use_varifocal_loss": True},
            {"ia_bce_loss": False, "use_position_supervised_loss": True, "sum_group_losses": True},
        ],
        ids=str,
    )
    def test_losses_stay_with_the_file(self, tmp_path: Path, losses: dict[str, bool]) -> None:
        """In our own section: the published package's architecture has the first of them only."""
        module = tiny_model(**losses)
        write_detector(TrainedModel(module, module.config, OWN, "ema", 0, "0" * 64), tmp_path / "own.pth")
        config = read_detector(tmp_path / "own.pth").config
        assert losses.items() <= config.model_dump().items() and config == module.config
        published = read_weight_file(tmp_path / "own.pth").model_config
        assert published["ia_bce_loss"] is False
        assert not {"use_varifocal_loss", "use_position_supervised_loss", "sum_group_losses"} & published.keys()


class TestBeginFrom:
    def test_another_number_of_layers_is_refused(self) -> None:
        file = as_weight_file(self.trained(RFDETR(ModelConfig(variant="nano", num_classes=3))))
        with pytest.raises(
            CheckpointError, match=r"holds the weights of nano \(2 decoder layers\), the model is medium \(4\)"
        ):
            begin_from(file, ModelSection.parse({"variant": "medium"}))

    @pytest.mark.parametrize("resolution", [384, 320])  # at 320 its positional table is nobody's
    def test_a_file_without_any_name_is_known_by_its_tensors(self, tmp_path: Path, resolution: int) -> None:
        module = RFDETR(ModelConfig(variant="nano", num_classes=3, resolution=resolution))
        torch.save({"model": module.state_dict()}, tmp_path / "own.pth")
        assert variant_of(read_weight_file(tmp_path / "own.pth")) == "nano"
        with pytest.raises(CheckpointError, match="the model is small"):
            begin_from(read_weight_file(tmp_path / "own.pth"), ModelSection.parse({"variant": "small"}))

    def test_layers_of_no_variant_are_refused_unless_wanted(self, tmp_path: Path) -> None:
        torch.save({"model": tiny_model(dec_layers=3).state_dict()}, tmp_path / "own.pth")
        file = read_weight_file(tmp_path / "own.pth")
        with pytest.raises(CheckpointError, match=r"weights of an unknown variant \(3 decoder layers\)"):
            begin_from(file, ModelSection.parse({**tiny.MODEL, "dec_layers": 2}))
        assert len(begin_from(file, ModelSection.parse({**tiny.MODEL, "dec_layers": 3})).module.state_dict())

    def test_layers_would_stay_random_though_the_variant_is_the_same(self) -> None:
        file = as_weight_file(self.trained(tiny_model(dec_layers=1)))
        with pytest.raises(
            CheckpointError,
            match=r"weights of pico \(1 decoder layers\), the model is pico \(2\) \(set model.dec_layers: 1\)",
        ):
            begin_from(file, ModelSection.parse(tiny.MODEL))

    def test_fewer_layers_of_the_same_variant_are_the_users_choice(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tmp_path / "w.pth"
        write_detector(self.trained(tiny_model()), path)
        begin_from(read_weight_file(path), ModelSection.parse({**tiny.MODEL, "dec_layers": 1}))
        assert "of the file without a place in the model: not used" in caplog.text

    def test_classes_are_the_files_unless_asked_for(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        path, module = tmp_path / "w.pth", tiny_model()
        write_detector(self.trained(module), path)
        caplog.set_level(logging.INFO)
        section = {name: value for name, value in tiny.MODEL.items() if name != "num_classes"}
        rows = module.class_embed.weight
        kept = begin_from(read_weight_file(path), ModelSection.parse(section))
        assert torch.equal(kept.module.class_embed.weight, rows)
        grown = begin_from(read_weight_file(path), ModelSection.parse({**section, "num_classes": 5}))
        assert torch.equal(grown.module.class_embed.weight, rows[[0, 1, 2, 3, 0, 1]])
        assert "class heads have 4 rows in the file and 6 in the model" in caplog.text
        assert (grown.config.num_classes, grown.class_names) == (5, (*OWN, "class_3", "class_4"))
        assert "w.pth names 3 of 5 classes: the others are class_3, class_4" in caplog.text

    def test_without_a_number_no_more_classes_than_a_detector_has_by_default(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Weights of Objects365, for example."""
        module = tiny_model(num_classes=365)
        torch.save({"model": module.state_dict()}, tmp_path / "w.pth")
        caplog.set_level(logging.INFO)
        section = {name: value for name, value in tiny.MODEL.items() if name != "num_classes"}
        cut = begin_from(read_weight_file(tmp_path / "w.pth"), ModelSection.parse(section))
        assert (cut.config.num_classes, len(cut.class_names)) == (90, 90)
        assert torch.equal(cut.module.class_embed.weight, module.class_embed.weight[:91])
        assert "class heads have 366 rows in the file and 91 in the model: the first 91 are kept" in caplog.text
        told = [row.getMessage() for row in caplog.records if row.levelno == logging.WARNING]
        assert "w.pth has 365 classes, and num_classes is not given: the first 90 are kept" in told
        whole = begin_from(
            read_weight_file(tmp_path / "w.pth"), ModelSection.parse({**section, "num_classes": 365})
        ).module
        assert torch.equal(whole.class_embed.weight, module.class_embed.weight)

    @pytest.mark.parametrize("classes", [89, 90])
    def test_as_many_classes_as_a_detector_has_by_default_stay(
        self, classes: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        section = {name: value for name, value in tiny.MODEL.items() if name != "num_classes"}
        torch.save({"model": tiny_model(num_classes=classes).state_dict()}, tmp_path / "w.pth")
        file = read_weight_file(tmp_path / "w.pth")
        assert begin_from(file, ModelSection.parse(section)).config.num_classes == classes
        assert "is not given" not in caplog.text

    @pytest.mark.parametrize("class_names", [["ant", "bee"], {0: "ant", 1: "bee"}])
    def test_a_class_that_the_file_does_not_name_is_found_all_the_same(self, tmp_path: Path, class_names: Any) -> None:
        content = {"model": tiny_model().state_dict(), "args": {"class_names": class_names}}
        torch.save(content, tmp_path / "w.pth")
        trained = begin_from(read_weight_file(tmp_path / "w.pth"), ModelSection.parse(tiny.MODEL))
        found = predict_pictures(trained, [np.zeros((40, 40, 3), np.uint8)], 0.0)[0]
        assert set(found.class_names) == {"ant", "bee", "class_2"}  # and the last column is no class

    def test_a_file_without_a_decoder_is_not_one_of_another_variant(self, tmp_path: Path) -> None:
        state = {key: value for key, value in tiny_model().state_dict().items() if "decoder.layers" not in key}
        torch.save({"model": state}, tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match="has no decoder layers"):
            begin_from(read_weight_file(tmp_path / "w.pth"), ModelSection.parse(tiny.MODEL))

    @pytest.mark.parametrize("lost", [None, "transformer.decoder.norm.weight"])
    def test_what_is_lacking_is_a_warning(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, lost: str | None
    ) -> None:
        state = tiny_model().state_dict()
        torch.save({"model": {key: value for key, value in state.items() if key != lost}}, tmp_path / "w.pth")
        begin_from(read_weight_file(tmp_path / "w.pth"), ModelSection.parse(tiny.MODEL))
        told = f"1 tensor ({lost}) not in the file: left at initial values"
        assert (told in caplog.text) is (lost is not None)

    @staticmethod
    def trained(module: RFDETR) -> TrainedModel:
        return TrainedModel(module, module.config, OWN, "ema", 0, "0" * 64)


@pytest.mark.filterwarnings("ignore:.* is not the published file of that name")
class TestOtherKinds:
    """A segmentation file says so, before anything else that may not fit; the pipeline's tests have its ways."""

    @pytest.fixture(params=["rf-detr-seg-nano.pt", "mine.pth"])
    def masks(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        """As many decoder layers as seg-nano has, and its head; nothing else tells its kind."""
        state = {**tiny_model(dec_layers=4).state_dict(), "segmentation_head.blocks.0.dwconv.bias": torch.ones(3)}
        torch.save({"model": state}, tmp_path / request.param)
        return tmp_path / str(request.param)

    @pytest.mark.parametrize(
        "use", ["RFDETRNano", "RFDETRPico", "RFDETR.from_checkpoint", "RFDETRNano.from_checkpoint"]
    )
    def test_in_python(self, masks: Path, use: str) -> None:
        with pytest.raises(CheckpointError) as caught:
            {
                "RFDETRNano": lambda: RFDETRNano(pretrain_weights=masks),
                "RFDETRPico": lambda: RFDETRPico(pretrain_weights=masks, **SIZES),
                "RFDETR.from_checkpoint": lambda: api.RFDETR.from_checkpoint(masks),
                "RFDETRNano.from_checkpoint": lambda: RFDETRNano.from_checkpoint(masks),
            }[use]()
        assert str(caught.value) == self.refusal(masks)

    def test_on_the_command_line(self, masks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        sections = {"model": tiny.MODEL, "train": {**tiny.TRAIN, "batch_size": 2}}
        run = {"name": "shapes", "dataset": {"uri": str(tiny.draw(tmp_path / "coco"))}, **sections}
        (tmp_path / "run.yaml").write_text(json.dumps(run))  # JSON is YAML
        command = ["train", "--config", str(tmp_path / "run.yaml"), "--output-dir", str(tmp_path / "output")]
        assert main([*command, "--pretrain-weights", str(masks)]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"error: {self.refusal(masks)}"
        assert main(["predict", "--weights", str(masks), "picture.jpg"]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"error: {self.refusal(masks)}"

    @staticmethod
    def refusal(path: Path) -> str:
        return (
            f"{path}: holds the weights of a segmentation model, and masks are not built: this program has detectors "
            "only (give the weights of a detector, such as rf-detr-nano.pth)"
        )


def test_weights_at_hand_are_a_file_too() -> None:
    module = tiny_model()
    trained = TrainedModel(module, module.config, OWN, "ema", 0, "0" * 64)
    file = as_weight_file(trained)
    assert not tiny.differing(file.state, module.state_dict())
    with torch.no_grad():
        module.class_embed.bias.add_(1)
    assert tiny.differing(file.state, module.state_dict()) == ["class_embed.bias"]  # a copy
    assert file.md5 != as_weight_file(trained).md5
