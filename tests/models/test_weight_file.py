"""Weight files as others write them: every form, what is said about a file, and nothing in it is ever executed."""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import types
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rfdetr_core.config import VARIANTS, ModelConfig
from rfdetr_core.errors import CheckpointError
from rfdetr_core.models.detector import RFDETR
from rfdetr_core.models.weight_file import WeightFile, architecture_of, read_weight_file, variant_of
from rfdetr_core.training.checkpoint import published_sections
from tests.models import golden

# The least that is a detector: reading looks at the class head, and takes the rest as it is.
STATE = {
    "class_embed.weight": torch.arange(12.0).reshape(4, 3),
    "class_embed.bias": torch.arange(4.0),
    "backbone.0.encoder.encoder.layernorm.weight": torch.ones(3),
}
ARGS = {"num_queries": 20, "pretrain_weights": "none", "class_names": ["cat", "dog", "écureuil"]}


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in STATE.items()}


def read(content: Any, folder: Path, name: str = "weights.pth", **how: Any) -> WeightFile:
    torch.save(content, folder / name, **how)
    return read_weight_file(folder / name)


def assert_is_state(state: dict[str, Tensor]) -> None:
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[key], value) for key, value in STATE.items())


# Forms (spec 7.2)


@pytest.mark.parametrize(
    "args",
    [argparse.Namespace(**ARGS), types.SimpleNamespace(**ARGS), ARGS],
    ids=["Namespace", "SimpleNamespace", "dict"],
)
@pytest.mark.parametrize("how", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "before torch 1.6"])
def test_a_published_file(args: Any, how: dict[str, Any], tmp_path: Path) -> None:
    file = read({"model": STATE, "args": args, "epoch": 3}, tmp_path, **how)
    assert_is_state(file.state)
    assert file.args == ARGS and type(file.args) is dict
    assert file.class_names == ("cat", "dog", "écureuil")
    assert (file.num_classes, file.stubs, file.notes, file.model_name, file.model_config) == (3, (), (), None, {})
    assert file.md5 == hashlib.md5((tmp_path / "weights.pth").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "content",
    [
        {"model": STATE},
        {"model": prefixed("module.")},
        {"model": OrderedDict(STATE), "state_dict": prefixed("model."), "global_step": 7},
        {"state_dict": prefixed("model.")},
        {"state_dict": prefixed("model._orig_mod.")},
        STATE,
        prefixed("module."),
        {"model": {key: torch.nn.Parameter(value) for key, value in STATE.items()}},
    ],
    ids=[
        "bare model",
        "module.",
        "best_*.pth",
        "ckpt",
        "compiled ckpt",
        "state dict",
        "state dict module.",
        "Parameter",
    ],
)
def test_where_the_weights_are(content: Any, tmp_path: Path) -> None:
    file = read(content, tmp_path)
    assert_is_state(file.state)
    assert not any(value.requires_grad for value in file.state.values())
    assert (file.args, file.class_names) == ({}, ())


def test_a_lightning_file_tells_its_arguments_elsewhere(tmp_path: Path) -> None:
    file = read({"state_dict": prefixed("model."), "hyper_parameters": ARGS, "model_name": "RFDETRSmall"}, tmp_path)
    assert file.args == ARGS
    assert file.model_name == "RFDETRSmall"


def test_arguments_go_before_hyper_parameters(tmp_path: Path) -> None:
    file = read({"model": STATE, "args": {"num_queries": 1}, "hyper_parameters": {"num_queries": 2}}, tmp_path)
    assert file.args == {"num_queries": 1}


@pytest.mark.parametrize("form", ["today's", "of format version 1"])
def test_a_checkpoint_of_ours(form: str, tmp_path: Path) -> None:
    config = ModelConfig(variant="large-deprecated", num_classes=3, num_windows=2)
    content: dict[str, Any] = {"model": STATE, "classes": [{"label": i, "name": name} for i, name in enumerate("abc")]}
    if form == "today's":
        content |= {"config": config.model_dump(mode="json"), **published_sections(config, ["a", "b", "c"])}
    else:
        content["model_config"] = config.model_dump(mode="json")
    file = read(content, tmp_path, "checkpoint_best_total.pth")
    assert_is_state(file.state)
    assert file.class_names == ("a", "b", "c")
    assert variant_of(file) == "large-deprecated"
    assert architecture_of(file)["num_windows"] == 2


def test_averaged_weights_are_mentioned_and_not_used(tmp_path: Path) -> None:
    file = read({"model": STATE, "ema_model": {key: value + 1.0 for key, value in STATE.items()}}, tmp_path)
    assert_is_state(file.state)
    assert file.notes == ("the file also holds averaged weights (ema_model): they are not used, model is",)
    file = read({"state_dict": prefixed("model."), "legacy_ema_state_dict": {}}, tmp_path)
    assert file.notes == (
        "the file also holds averaged weights (legacy_ema_state_dict): they are not used, state_dict is",
    )


def test_metadata_becomes_plain_data_however_it_is_nested(tmp_path: Path) -> None:
    shared = [1, (2.5, None)]
    loop: dict[str, Any] = {"a": shared, "b": shared, 3: "a key that is no text"}
    loop["self"] = loop
    billion: list[Any] = []
    for _ in range(60):  # 2**60 entries, if each reference were followed
        billion = [billion, billion]
    args = argparse.Namespace(loop=loop, inner=types.SimpleNamespace(path=Path("/somewhere")), billion=billion)
    plain = read({"model": STATE, "args": args}, tmp_path).args
    assert plain["loop"]["a"] == [1, [2.5, None]]
    assert plain["loop"]["self"] is plain["loop"]
    assert plain["inner"] == {"path": None}
    assert 3 not in plain["loop"]


class Empty:
    """Pickled without any state."""


@pytest.mark.parametrize("args", [argparse.Namespace(), types.SimpleNamespace(), Empty()])
def test_empty_objects(args: Any, tmp_path: Path) -> None:
    file = read({"model": STATE, "args": args}, tmp_path)
    assert_is_state(file.state)
    assert file.args == {}
    nested = {"first": args, "rest": [args, 7]}
    assert read({"model": STATE, "args": nested}, tmp_path).args == {"first": None, "rest": [None, 7]}


def test_unknown_classes_are_named(tmp_path: Path) -> None:
    file = read({"model": STATE, "args": {"folder": Path("/data"), "epochs": 3}}, tmp_path)
    assert file.stubs == (f"{type(Path()).__module__}.{type(Path()).__name__}",)
    assert file.args == {"folder": None, "epochs": 3}


# Code in a file


class Call:
    """Pickled as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def bombs(sentinel: Path) -> dict[str, Call]:
    """Objects that make `sentinel` when they are unpickled."""
    python = f"__import__('pathlib').Path({str(sentinel)!r}).touch()"
    return {
        "os.system": Call(os.system, f"touch {sentinel}"),
        "eval": Call(eval, python),
        "exec": Call(exec, python),
        "os.mkdir": Call(os.mkdir, str(sentinel)),
        "subprocess.call": Call(subprocess.call, ["touch", str(sentinel)]),
    }


NAMES = sorted(bombs(Path()))


@pytest.fixture
def sentinel(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.mark.parametrize("name", NAMES)
def test_the_bombs_of_these_tests_are_live(name: str, sentinel: Path, tmp_path: Path) -> None:
    torch.save({"model": STATE, "args": bombs(sentinel)[name]}, tmp_path / "bomb.pth")
    torch.load(tmp_path / "bomb.pth", weights_only=False)
    assert sentinel.exists()


@pytest.mark.parametrize("how", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["args", "in args", "in Namespace", "in model", "as model", "as the file", "as key"])
def test_nothing_in_a_file_is_executed(
    name: str, place: str, how: dict[str, Any], sentinel: Path, tmp_path: Path
) -> None:
    bomb = bombs(sentinel)[name]
    content: Any = {
        "args": {"model": STATE, "args": bomb},
        "in args": {"model": STATE, "args": {"lr": 0.1, "deep": [{"x": (bomb,)}]}},
        "in Namespace": {"model": STATE, "args": argparse.Namespace(output=bomb)},
        "in model": {"model": {**STATE, "extra": bomb}},
        "as model": {"model": bomb},
        "as the file": bomb,
        "as key": {"model": STATE, "args": {bomb: 1}},
    }[place]
    try:
        file = read(content, tmp_path, **how)
    except CheckpointError:
        assert how or name.startswith("os.") or "model" in place or "file" in place
    else:
        assert file.stubs
        assert_is_state(file.state)
    assert not sentinel.exists()


def test_a_refusal_says_what_the_file_wants_to_run(sentinel: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"refused: it asks to run {os.system.__module__}\.system"):
        read({"model": STATE, "args": bombs(sentinel)["os.system"]}, tmp_path)


def test_torch_s_advice_to_trust_the_file_is_not_passed_on(sentinel: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read({"model": STATE, "args": bombs(sentinel)["eval"]}, tmp_path, _use_new_zipfile_serialization=False)
    assert caught.value.message.endswith(
        "refused: it needs eval, and a file in the format before torch 1.6 cannot be read without it"
    )


class Table(dict[str, int]):
    """A dict that only its own class can restore."""


def test_metadata_that_is_no_plain_data(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"refused: it holds a tests\.\S+\.Table that cannot be read as plain data"
    ):
        read({"model": STATE, "args": Table(a=1)}, tmp_path)


def test_a_defaultdict_is_a_dict(tmp_path: Path) -> None:
    file = read({"model": STATE, "args": defaultdict(list, a=[1])}, tmp_path)
    assert (file.args, file.stubs) == ({"a": [1]}, ("builtins.list",))


@pytest.mark.parametrize("part", ["tensor", "table"])
def test_an_unknown_object_is_no_tensor(part: str, tmp_path: Path) -> None:
    unknown = Call(eval, "1")
    with pytest.raises(CheckpointError, match=r"of the unknown class (builtins\.)?eval"):
        read({"model": {**STATE, "x": unknown} if part == "tensor" else unknown}, tmp_path)


class Disguised:
    """Its state would replace attributes and methods of an object that took it as it is."""

    def __init__(self) -> None:
        vars(self).update({"__class__": dict, "__setstate__": print, "kept": 1, "dotted": "os.system"})


def test_the_state_of_an_unknown_object_is_data_only(tmp_path: Path) -> None:
    file = read({"model": STATE, "args": Disguised()}, tmp_path)
    assert file.args == {"__class__": None, "__setstate__": None, "kept": 1, "dotted": "os.system"}
    assert file.stubs == ("builtins.dict", "builtins.print", f"{__name__}.Disguised")


def test_nothing_stays_allowed_afterwards(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    read({"model": STATE, "args": argparse.Namespace(folder=Path("/data"))}, tmp_path)
    assert set(torch.serialization.get_safe_globals()) == before


# Files that are none


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.pth: cannot be read: No such file"):
        read_weight_file(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        read_weight_file(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"not a weight file of PyTorch: it starts with b'vers'"),
        (b"<!DOCTYPE html><html>", r"not a weight file of PyTorch: it starts with b'<!DO'"),
        (b"PK\x03\x04 and no more", "cut off or damaged: its end is missing"),
        (b"\x80\x02}q\x00", "not a readable weight file"),
    ],
)
def test_what_is_no_weight_file(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_weight_file(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value) and caught.value.hint


def test_one_wrong_bit_in_a_tensor(tmp_path: Path) -> None:
    torch.save({"model": {**STATE, "x": torch.full((1000,), 2.5)}}, tmp_path / "weights.pth")
    data = bytearray((tmp_path / "weights.pth").read_bytes())
    data[data.index(torch.full((9,), 2.5).numpy().tobytes()) + 400] ^= 1
    (tmp_path / "weights.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"the file is damaged: \w+/data/\d+ has another checksum"):
        read_weight_file(tmp_path / "weights.pth")


def test_a_file_without_checksums(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        assert_is_state(read({"model": STATE}, tmp_path).state)
    finally:
        torch.serialization.set_crc32_options(True)


def test_a_compressed_archive(tmp_path: Path) -> None:
    torch.save({"model": STATE}, tmp_path / "whole.pth")
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(tmp_path / "whole.pth") as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    with pytest.raises(CheckpointError, match="its records are compressed"):
        read_weight_file(path)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], r"a zip file without data\.pkl \("),
        (["image.jpg"], r"a zip file without data\.pkl \("),
        (["weights/version", "weights/data/0"], r"a zip file without data\.pkl \("),
        (["weights/version", "other/data.pkl"], r"a zip file without data\.pkl \("),
        (["weights/data.pkl"], r'Expected hasRecord\("version"\) to be true, but got false \(download'),
    ],
)
def test_a_zip_archive_of_something_else(records: list[str], message: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "weights.pth", "w") as archive:
        for name in records:
            archive.writestr(name, b"...")
    with pytest.raises(CheckpointError, match=message):
        read_weight_file(tmp_path / "weights.pth")


def test_half_a_download(tmp_path: Path) -> None:
    torch.save({"model": STATE}, tmp_path / "whole.pth")
    data = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="cut off or damaged"):
        read_weight_file(tmp_path / "half.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, and no weights"),
        ({"epoch": 3, "optimizer": {}}, "neither 'model' nor 'state_dict', only epoch, optimizer"),
        ({}, "only no entry"),
        ({"model": None}, "its weights are nothing, not a table"),
        ({"model": {}}, "not the weights of an RF-DETR detector: no class_embed.weight"),
        ({"model": {"class_embed.weight": torch.ones(4, 3)}}, "no class_embed.bias"),
        ({**STATE, "class_embed.bias": torch.tensor(1.0)}, "no class head: weight and bias are 4 x 3 and a scalar"),
        ({"model": {**STATE, "class_embed.weight": torch.ones(5, 3)}}, "weight and bias are 5 x 3 and 4"),
        ({"class_embed.bias": torch.ones(1), "class_embed.weight": torch.ones(1, 3)}, "class_embed is no class head"),
        ({"model": {**STATE, "x": 3}}, "x is an int, not a tensor"),
        ({"model": {**STATE, 3: torch.ones(1)}}, "a key of its weights is an int"),
        ({"model": {**STATE, "a\nb\x1b[31m": None}}, r"a\\nb\\x1b\[31m is nothing"),
        ({"model": {**STATE, "x": torch.ones(2, 2).to_sparse()}}, "x is no plain tensor"),
        ({"model": {**STATE, "x": torch.ones(2, device="meta")}}, "x is no plain tensor"),
        ({"model": {**STATE, "x": torch.zeros(1).expand(2**40)}}, "x is no plain tensor"),
        ({"model": {**STATE, **prefixed("module.")}}, "keys both with and without the prefix 'module.'"),
    ],
)  # fmt: skip
def test_content_that_is_no_detector(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read(content, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(value: float, tmp_path: Path) -> None:
    state = {**STATE, "a": torch.ones(2), "b": torch.tensor([1.0, value]), "c": torch.tensor([value])}
    with pytest.raises(CheckpointError, match=r"weights\.pth: b has values that are not finite"):
        read({"model": state}, tmp_path)


def test_adapters_are_merged(tmp_path: Path) -> None:
    """All that is found in a file is under its published name then."""
    wrapped = "backbone.0.encoder.base_model.model.encoder."
    layer = "encoder.layer.0.attention.attention.query"
    state = {key.replace("backbone.0.encoder.encoder.", wrapped): value for key, value in STATE.items()}
    state |= {
        f"{wrapped}{layer}.base_layer.weight": torch.eye(3),
        f"{wrapped}{layer}.base_layer.bias": torch.ones(3),
        f"{wrapped}{layer}.lora_A.default.weight": torch.ones(16, 3),
        f"{wrapped}{layer}.lora_B.default.weight": torch.ones(3, 16),
    }
    for content in ({"model": state}, {"state_dict": {f"model.{key}": value for key, value in state.items()}}):
        file = read(content, tmp_path)
        query = f"backbone.0.encoder.encoder.{layer}"
        assert file.state.keys() == STATE.keys() | {f"{query}.weight", f"{query}.bias"}
        assert torch.equal(file.state[f"{query}.weight"], torch.eye(3) + 16)
        assert file.notes == ("LoRA adapters of 1 layers were merged into their weights",)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("damaged")
    torch.save({"model": STATE, "args": argparse.Namespace(**ARGS, p=Path("/x"))}, folder / "whole.pth")
    return folder / "damaged.pth", (folder / "whole.pth").read_bytes()


def test_an_end_that_contradicts_itself(small_file: tuple[Path, bytes]) -> None:
    """Python's zipfile raises on it even when asked whether it is a zip file at all."""
    path, whole = small_file
    at = whole.rindex(b"PK\x06\x07") + 16  # number of disks
    path.write_bytes(whole[:at] + b"\x02" + whole[at + 1 :])
    with pytest.raises(CheckpointError, match="cut off or damaged"):
        read_weight_file(path)


def test_a_tensor_that_is_marked_as_a_folder(small_file: tuple[Path, bytes]) -> None:
    """torch.load reads no bytes of it, and returns memory that nobody has written to."""
    path, whole = small_file
    at = whole.rindex(b"whole/data/1") - 46 + 38  # external attributes, in the central directory
    path.write_bytes(whole[:at] + b"\x10" + whole[at + 1 :])
    with pytest.raises(CheckpointError, match="the file is damaged: whole/data/1 is a folder"):
        read_weight_file(path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read(small_file: tuple[Path, bytes], data: st.DataObject) -> None:
    """Whole in all that matters, that is: what is read is what was written."""
    path, whole = small_file
    damaged = bytearray(whole[: data.draw(st.one_of(st.just(len(whole)), st.integers(0, len(whole) - 1)))])
    for _ in range(data.draw(st.integers(0, 4)) if damaged else 0):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    try:
        file = read_weight_file(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert_is_state(file.state)
        assert file.args == {**ARGS, "p": None}


# What the file is


def described(state: dict[str, Tensor] | None = None, path: str = "weights.pth", **fields: Any) -> WeightFile:
    known = {"args": {}, "model_name": None, "model_config": {}, "class_names": (), "stubs": (), "md5": ""}
    return WeightFile(path=Path(path), state=STATE if state is None else state, **{**known, **fields})


def published(variant: str) -> dict[str, Tensor]:
    """The shapes of upstream's own model."""
    shapes = golden.scalars(f"state_dict/state_dict_{variant.replace('-', '_')}")
    return {
        key: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]), device="meta")
        for key, entry in shapes.items()
    }


@pytest.mark.parametrize(
    ("path", "fields", "variant"),
    [
        ("rf-detr-nano.pth", {}, "nano"),
        ("checkpoint.pth", {"model_name": "RFDETRMedium"}, "medium"),
        ("checkpoint.pth", {"model_name": "RFDETRLargeDeprecated"}, "large-deprecated"),
        ("checkpoint.pth", {"model_name": "RFDETRSegNano"}, "seg-nano"),
        ("checkpoint.pth", {"model_name": "RFDETRSeg2XLarge"}, "seg-2xlarge"),
        ("checkpoint.pth", {"model_name": "Other", "args": {"pretrain_weights": "/x/rf-detr-small.pth"}}, "small"),
        ("rf-detr-base.pth", {"args": {"pretrain_weights": "none"}}, "base"),
        ("rf-detr-nano.pth", {"args": {"pretrain_weights": "rf-detr-small.pth"}}, "small"),
        ("rf-detr-nano.pth", {"model_name": "RFDETRSmall", "args": {"pretrain_weights": "medium"}}, "small"),
        ("rf-detr-seg-large.pt", {}, "seg-large"),
        ("rf-detr-seg-xxlarge.pt", {}, "seg-xxlarge"),
        ("rf-detr-keypoint-preview-xlarge.pth", {}, "keypoint-preview"),
        ("rf-detr-xlarge.pth", {}, "xlarge"),
        ("nano.pth", {"model_config": {"variant": "pico"}, "model_name": "RFDETRSmall"}, "pico"),
        ("rf-detr-seg-nano.pt", {"model_name": "RFDETRNano"}, "nano"),
        ("checkpoint_best_total.pth", {}, None),
    ],
)
def test_the_variant_by_name(path: str, fields: dict[str, Any], variant: str | None) -> None:
    assert variant_of(described(path=path, **fields)) == variant


def test_the_variant_by_the_name_under_which_it_is_published() -> None:
    file = described(path="a1b2c3")
    assert variant_of(file, "rf-detr-nano.pth") == "nano"
    assert variant_of(file) is None


UPSTREAM = ["nano", "small", "medium", "base", "large", "large-deprecated"]


@pytest.mark.parametrize("variant", UPSTREAM)
def test_the_variant_by_shapes(variant: str) -> None:
    assert variant_of(described(published(variant), "checkpoint.pth")) == variant


@pytest.mark.parametrize(
    ("variant", "path"), [("large-deprecated", "rf-detr-large.pth"), ("nano", "large-birds.pth"), ("base", "small.pth")]
)
def test_shapes_go_before_a_name_that_contradicts_them(variant: str, path: str) -> None:
    assert variant_of(described(published(variant), path)) == variant


def test_the_class_goes_before_the_shapes() -> None:
    """A small detector that was trained with other depths is small all the same."""
    file = described(published("nano"), "nano.pth", model_name="RFDETRSmall", model_config={"dec_layers": 2})
    assert variant_of(file) == "small"
    assert architecture_of(file)["dec_layers"] == 2


def test_shapes_go_before_the_name_of_a_kind_that_is_not_built() -> None:
    assert variant_of(described(published("nano"), "house-seg-small.pth")) == "nano"


def test_a_name_decides_between_variants_of_one_shape() -> None:
    """Medium and large differ by the positional table alone, which follows the resolution."""
    assert variant_of(described(published("large"), "x.pth", model_name="RFDETRMedium")) == "medium"


def test_a_segmentation_file_is_none_of_the_detectors() -> None:
    assert variant_of(described(published("seg_nano"), "x.pth")) is None


@pytest.mark.parametrize("variant", UPSTREAM)
def test_the_architecture_by_shapes(variant: str) -> None:
    found = architecture_of(described(published(variant)))
    config = ModelConfig(variant=variant)
    assert found == {field: getattr(config, field) for field in found}
    assert set(found) == {
        *("encoder", "hidden_dim", "patch_size", "positional_encoding_size", "dec_layers", "dim_feedforward"),
        *(
            "num_queries",
            "group_detr",
            "num_classes",
            "num_channels",
            "two_stage",
            "lite_refpoint_refine",
            "layer_norm",
        ),
    }


@pytest.mark.parametrize(
    "flags",
    [
        {"two_stage": False},
        {"lite_refpoint_refine": False},
        {"layer_norm": False},
        {"encoder": "dinov2_registers_windowed_small"},
        {"num_channels": 4},
        {"num_queries": 7, "group_detr": 2, "num_classes": 5, "dec_layers": 1},
    ],
    ids=str,
)
def test_flags_by_shapes(flags: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = RFDETR(ModelConfig(**{"variant": "nano", "num_select": 10, **flags}))
    found = architecture_of(described(model.state_dict()))
    assert flags.items() <= found.items()


def test_the_architecture_that_a_file_names() -> None:
    given = ModelConfig(variant="small", num_classes=2, device="cuda", pretrain_weights="x.pth").model_dump()
    config = {**given, "amp": True, "num_select": None, "num_windows": 4, "backbone_lora": True, "sa_nheads": None}
    args = {"num_windows": 1, "sa_nheads": 16, "ca_nheads": None}
    found = architecture_of(described(published("nano"), model_config=config, args=args))
    assert (found["num_windows"], found["sa_nheads"], found["ca_nheads"]) == (4, 16, 16)
    assert found["num_classes"] == 90  # of the class head
    assert found["dec_layers"] == 2  # of the tensors
    assert not found.keys() & {"device", "pretrain_weights", "variant", "amp", "num_select", "backbone_lora"}
    assert ModelConfig(**{"variant": "nano", **found, "resolution": 384}).num_windows == 4


@pytest.mark.parametrize("source", ["args", "model_config"])
def test_settings_of_a_training_and_its_machine_are_not_the_files(source: str) -> None:
    settings = {
        "compile": True,
        "cuda_graphs": True,
        "fused_optimizer": False,
        "device": "cuda",
        "amp": False,
        "gradient_checkpointing": True,
        "freeze_encoder": True,
        "backbone_lora": True,
        "pretrain_weights": "x.pth",
        "mask_downsample_ratio": 2,
        "drop_path": 0.1,
        "requested_resolution": 378,
        "num_windows": 4,
    }
    found = architecture_of(described(published("nano"), **{source: settings}))
    assert found.keys() & settings.keys() == {"num_windows"}


@pytest.mark.parametrize(("select", "selects"), [(300, 100), (100, 100), (99, 99)])
def test_no_more_is_selected_than_there_is(select: int, selects: int) -> None:
    """A fine-tuned model of one class and fifty queries, whose num_select stayed at upstream's default."""
    with torch.device("meta"):
        model = RFDETR(ModelConfig(variant="nano", num_queries=50, num_classes=1))
    file = described(model.state_dict(), model_config={"num_queries": 50, "num_select": select})
    found = architecture_of(file)
    assert found["num_select"] == selects
    assert ModelConfig(**found, variant="nano").num_select == selects


def test_the_architecture_of_old_arguments() -> None:
    args = {"num_windows": 1, "two_stage": None, "lr": 1e-4, "device": "cuda", "compile": True, "resolution": 320}
    found = architecture_of(described(published("nano"), args=args))
    assert (found["num_windows"], found["resolution"], found["two_stage"]) == (1, 320, True)
    assert not found.keys() & {"lr", "device", "compile"}


@pytest.mark.parametrize(
    ("args", "used"),
    [
        ({"ia_bce_loss": True, "use_varifocal_loss": False}, ["ia_bce_loss"]),
        ({"ia_bce_loss": False, "use_varifocal_loss": True}, ["use_varifocal_loss"]),
        ({"ia_bce_loss": False, "use_varifocal_loss": True, "use_position_supervised_loss": True},
         ["use_position_supervised_loss"]),
        ({"ia_bce_loss": True, "use_varifocal_loss": True}, ["ia_bce_loss"]),
        ({"use_position_supervised_loss": True}, ["ia_bce_loss"]),  # which is the default
        ({"ia_bce_loss": False, "use_varifocal_loss": False}, []),
        ({"sum_group_losses": True}, ["ia_bce_loss", "sum_group_losses"]),
    ],
    ids=str,
)  # fmt: skip
def test_the_loss_of_old_arguments(args: dict[str, Any], used: list[str]) -> None:
    """Where several are true the first counts, as it did there: our configuration takes one only."""
    config = ModelConfig(**architecture_of(described(published("nano"), args=args)), variant="nano")
    losses = ("ia_bce_loss", "use_position_supervised_loss", "use_varifocal_loss", "sum_group_losses")
    assert sorted(name for name in losses if getattr(config, name)) == used


def test_every_variant_has_a_name_that_is_recognised() -> None:
    assert {variant_of(described(path=f"rf-detr-{variant}.pth")) for variant in VARIANTS} == set(VARIANTS)


@pytest.mark.parametrize("own", [["pico"], {"a": 1}, 3, None])
def test_a_variant_that_is_no_text_is_no_variant(tmp_path: Path, own: Any) -> None:
    torch.save({"model": golden.shared_tiny().state_dict(), "model_config": {"variant": own}}, tmp_path / "w.pth")
    assert variant_of(read_weight_file(tmp_path / "w.pth")) == "small"  # by its tensors


def test_class_names_by_number(tmp_path: Path) -> None:
    args = {"class_names": {1: "bee", 0: "ant"}}
    torch.save({"model": golden.shared_tiny().state_dict(), "args": args}, tmp_path / "w.pth")
    assert read_weight_file(tmp_path / "w.pth").class_names == ("ant", "bee")
