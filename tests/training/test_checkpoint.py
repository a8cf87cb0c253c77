"""Checkpoint files are whole or absent, and reading them executes nothing."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from rfdetr_core.coco_names import names_by_slot
from rfdetr_core.config import ModelConfig
from rfdetr_core.errors import CheckpointError, StorageAccessError
from rfdetr_core.models.detector import RFDETR
from rfdetr_core.training import checkpoint
from tests.training import tiny

CONTENT: dict[str, Any] = {"weights": torch.arange(1000.0), "epoch": 3, "rows": [{"loss": 0.5}]}


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def one_line(caught: pytest.ExceptionInfo[CheckpointError]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.exit_code == 2
    return text


def test_names() -> None:
    assert checkpoint.best_name("ema") == "checkpoint_best_ema.pth"
    assert checkpoint.best_name("regular") == "checkpoint_best_regular.pth"
    assert checkpoint.periodic_name(9) == "checkpoint_9.pth"


class TestSave:
    def test_what_is_saved_is_loaded(self, tmp_path: Path) -> None:
        path = tmp_path / "checkpoint.pth"
        checkpoint.save(CONTENT, path)
        found = checkpoint.load(path)
        assert not tiny.differing({name: found[name] for name in CONTENT}, CONTENT)
        assert found["format_version"] == checkpoint.FORMAT_VERSION
        assert found["versions"]["torch"] == torch.__version__
        assert names(tmp_path) == ["checkpoint.pth"]

    def test_a_full_disk_leaves_the_former_file_whole(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "checkpoint.pth"
        checkpoint.save(CONTENT, path)

        def fsync(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(StorageAccessError, match=r"checkpoint\.pth: cannot be written: No space left on device"):
            checkpoint.save({"epoch": 4}, path)
        assert checkpoint.load(path)["epoch"] == 3
        assert names(tmp_path) == ["checkpoint.pth"]

    def test_a_folder_that_is_gone_is_told(self, tmp_path: Path) -> None:
        with pytest.raises(StorageAccessError, match="No such file or directory"):
            checkpoint.save(CONTENT, tmp_path / "gone" / "checkpoint.pth")

    def test_what_a_killed_process_left_is_overwritten(self, tmp_path: Path) -> None:
        """The writer uses one temporary name, and never the final one before the file is whole."""
        path = tmp_path / "checkpoint.pth"
        seen: list[list[str]] = []
        real = torch.save

        def save(content: Any, file: Any) -> None:
            real(content, file)
            seen.append(names(tmp_path))
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "save", save)
            for _ in range(2):
                with pytest.raises(KeyboardInterrupt):
                    checkpoint.save(CONTENT, path)
        assert len(seen[1]) == 1  # not one more with every kill
        assert not list(tmp_path.glob("checkpoint*.pth"))
        checkpoint.save(CONTENT, path)
        assert names(tmp_path) == ["checkpoint.pth"]

    def test_others_may_read_it(self, tmp_path: Path) -> None:
        checkpoint.save(CONTENT, tmp_path / "checkpoint.pth")
        (tmp_path / "plain").touch()
        assert (tmp_path / "checkpoint.pth").stat().st_mode == (tmp_path / "plain").stat().st_mode


class TestLoad:
    def test_absent(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no such file") as caught:
            checkpoint.load(tmp_path / "checkpoint.pth")
        one_line(caught)

    def test_torn_anywhere(self, tmp_path: Path) -> None:
        path = tmp_path / "checkpoint.pth"
        checkpoint.save(CONTENT, path)
        data = path.read_bytes()
        for length in [0, 1, 4, 30, 64, *range(100, len(data), 211), len(data) - 1]:
            path.write_bytes(data[:length])
            with pytest.raises(CheckpointError, match="not a readable checkpoint") as caught:
                checkpoint.load(path)
            one_line(caught)

    def test_one_wrong_bit_in_a_tensor(self, tmp_path: Path) -> None:
        """torch itself would load it, and the detector would see something else."""
        path = tmp_path / "checkpoint.pth"
        values = torch.rand(64)
        checkpoint.save({**CONTENT, "model": {"weight": values}}, path)
        data = bytearray(path.read_bytes())
        data[data.index(values.numpy().tobytes()) + 17] ^= 1
        path.write_bytes(data)
        assert torch.load(path, weights_only=True)
        with pytest.raises(CheckpointError, match=r"the file is damaged: .* has another checksum") as caught:
            checkpoint.load(path)
        one_line(caught)

    @pytest.mark.parametrize("data", [b"not a checkpoint", b"PK\x03\x04" + bytes(200), bytes(1000), os.urandom(500)])
    def test_something_else(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "checkpoint.pth").write_bytes(data)
        with pytest.raises(CheckpointError, match="not a readable checkpoint") as caught:
            checkpoint.load(tmp_path / "checkpoint.pth")
        one_line(caught)

    def test_a_zip_file_of_something_else(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "checkpoint.pth", "w") as archive:
            archive.writestr("checkpoint/version", "3")
        with pytest.raises(CheckpointError, match=r"a zip file without data\.pkl \(download") as caught:
            checkpoint.load(tmp_path / "checkpoint.pth")
        one_line(caught)

    @pytest.mark.parametrize("content", [{"format_version": 99}, {}, [1, 2], "text"])
    def test_another_format_version(self, tmp_path: Path, content: Any) -> None:
        torch.save(content, tmp_path / "checkpoint.pth")
        with pytest.raises(CheckpointError, match=r"format version (99|None), this program reads 2") as caught:
            checkpoint.load(tmp_path / "checkpoint.pth")
        one_line(caught)

    @pytest.mark.parametrize("form", ["torch", "pickle"])
    def test_no_pickle_is_executed(self, tmp_path: Path, form: str) -> None:
        victim = tmp_path / "executed"

        class Malice:
            def __reduce__(self) -> tuple[Any, ...]:
                return (Path.touch, (victim,))

        path = tmp_path / "checkpoint.pth"
        content = {"format_version": 2, "model": Malice()}
        if form == "torch":
            torch.save(content, path)
        else:
            path.write_bytes(pickle.dumps(content))
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(path)
        one_line(caught)
        assert not victim.exists()
        pickle.loads(pickle.dumps(content))
        assert victim.exists()  # it would have


def weights(**changes: Any) -> dict[str, Any]:
    model = RFDETR(tiny.model_config())
    return {
        "model": model.state_dict(),
        "config": model.config.model_dump(mode="json"),
        "classes": [{"name": name} for name in ("a", "b", "c")],
        "source": "ema",
        "epoch": 4,
        **changes,
    }


class TestLoadTrained:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite_are_refused(self, tmp_path: Path, value: float) -> None:
        content = weights()
        content["model"]["transformer.decoder.norm.weight"][3] = value
        checkpoint.save(content, tmp_path / "best.pth")
        with pytest.raises(CheckpointError, match=r"decoder\.norm\.weight has values that are not finite"):
            checkpoint.load_trained(tmp_path / "best.pth")

    def test_gives_the_detector_of_the_file(self, tmp_path: Path) -> None:
        content = weights()
        checkpoint.save(content, tmp_path / "best.pth")
        trained = checkpoint.load_trained(tmp_path / "best.pth")
        assert not tiny.differing(trained.module.state_dict(), content["model"])
        assert trained.config == tiny.model_config()
        assert trained.class_names == ("a", "b", "c")
        assert (trained.source, trained.epoch) == ("ema", 4)
        assert not trained.module.training
        assert trained.sha256 == hashlib.sha256((tmp_path / "best.pth").read_bytes()).hexdigest()

    def test_a_rounded_resolution_is_read_back(self, tmp_path: Path) -> None:
        with pytest.warns(UserWarning, match="42 is not a multiple"):
            config = tiny.model_config(resolution=42)
        assert config.resolution == 48
        content = weights(model=RFDETR(config).state_dict(), config=config.model_dump(mode="json"))
        checkpoint.save(content, tmp_path / "best.pth")
        assert checkpoint.load_trained(tmp_path / "best.pth").config == config

    @pytest.mark.parametrize("lost", ["model", "config", "classes", "epoch"])
    def test_what_is_lacking_is_named(self, tmp_path: Path, lost: str) -> None:
        content = weights()
        del content[lost]
        checkpoint.save(content, tmp_path / "best.pth")
        with pytest.raises(CheckpointError, match=f"not the weights of a detector: no '(model_)?{lost}'") as caught:
            checkpoint.load_trained(tmp_path / "best.pth")
        one_line(caught)

    @pytest.mark.parametrize(
        "changes",
        [
            {"model": {}},
            {"model": [1]},
            {"model": {"class_embed.weight": torch.zeros(1)}},
            {"config": {"variant": "enormous"}},
            {"classes": 3},
            {"classes": []},
            {"classes": [{"name": name} for name in "abcde"]},
            {"epoch": "last"},
        ],
        ids=["empty", "list", "other shapes", "unknown variant", "classes", "no class", "too many classes", "epoch"],
    )
    def test_what_does_not_fit_is_refused(self, tmp_path: Path, changes: dict[str, Any]) -> None:
        checkpoint.save(weights(**changes), tmp_path / "best.pth")
        with pytest.raises(CheckpointError, match="not the weights of a detector: ") as caught:
            checkpoint.load_trained(tmp_path / "best.pth")
        assert len(one_line(caught)) < 500

    def test_a_file_of_the_first_format_is_read(self, tmp_path: Path) -> None:
        """It has our own architecture under the name that the published form now needs."""
        content = weights(format_version=1)
        content["model_config"] = content.pop("config")
        torch.save(content, tmp_path / "best.pth")
        trained = checkpoint.load_trained(tmp_path / "best.pth")
        assert (trained.config, trained.class_names) == (tiny.model_config(), ("a", "b", "c"))

    def test_a_checkpoint_for_resuming_is_pointed_out(self, tmp_path: Path) -> None:
        checkpoint.save({"model": {}, "ema_model": {}, "optimizer": {}}, tmp_path / "checkpoint.pth")
        with pytest.raises(CheckpointError, match=r"for resuming.*give checkpoint_best_total\.pth"):
            checkpoint.load_trained(tmp_path / "checkpoint.pth")


class TestPublishedSections:
    """What rfdetr 1.11 reads (model spec 7.2); tests/peer shows that it does."""

    def test_of_a_variant(self) -> None:
        config = ModelConfig(variant="nano", num_classes=2)
        sections = checkpoint.published_sections(config, ["cat", "dog"])
        assert sections["model_name"] == "RFDETRNano"
        assert sections["args"]["class_names"] == ["cat", "dog"]
        assert (sections["args"]["num_queries"], sections["args"]["group_detr"]) == (300, 13)
        fields = sections["model_config"]
        assert (fields["hidden_dim"], fields["dec_layers"], fields["out_feature_indexes"]) == (256, 2, [3, 6, 9, 12])
        assert not {"variant", "requested_resolution", "dim_feedforward", "pretrain_weights"} & set(fields)

    def test_the_class_of_a_longer_name(self) -> None:
        config = ModelConfig(variant="large-deprecated")
        assert checkpoint.published_sections(config, ["a"])["model_name"] == "RFDETRLargeDeprecated"

    def test_the_slots_of_coco_are_left_without_names(self) -> None:
        """The reader of 91 slots without names takes them for COCO's ids."""
        sections = checkpoint.published_sections(ModelConfig(variant="nano"), names_by_slot())
        assert "class_names" not in sections["args"]
