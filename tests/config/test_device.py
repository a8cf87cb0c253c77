"""device and amp of the model section: other spellings of what `train` says, moved there."""

from __future__ import annotations

from typing import Any

import pytest

from rfdetr_core.config import ModelConfig, ModelSection, RunConfig, parse_run_config
from rfdetr_core.config.device import contradiction, legal_device
from rfdetr_core.errors import ConfigError
from tests.config.helpers import MINIMAL, error_of, run_config

DEVICE = r"model\.device is deprecated: give train\.accelerator"
AMP = r"model\.amp is deprecated: give train\.amp_dtype \(null for amp: false\)"


@pytest.mark.parametrize(
    ("device", "train", "expected"),
    [
        ("cpu", {}, ("cpu", 1)),
        ("mps", {"accelerator": "auto"}, ("mps", 1)),
        ("cuda", {"devices": 4}, ("cuda", 4)),
        ("cuda:0", {}, ("cuda", "0,")),
        ("cuda:12", {"accelerator": "gpu", "devices": 1}, ("cuda", "12,")),
        ("cuda", {"accelerator": "cuda"}, ("cuda", 1)),
    ],
)
def test_a_device_becomes_accelerator_and_devices(
    device: str, train: dict[str, Any], expected: tuple[str, Any]
) -> None:
    with pytest.warns(FutureWarning, match=DEVICE):
        config = run_config(model={"device": device}, train=train)
    assert (config.train.accelerator, config.train.devices) == expected
    assert config.model.device is None
    resolved = config.as_dict()
    assert not {"device", "amp"} & set(resolved["model"])
    assert RunConfig.parse(resolved) == config  # and without a warning


@pytest.mark.parametrize(
    ("device", "train", "other"),
    [
        ("cpu", {"accelerator": "gpu"}, 'train.accelerator is "gpu"'),
        ("cuda:1", {"accelerator": "cpu"}, 'train.accelerator is "cpu"'),
        ("cuda:1", {"devices": 2}, "train.devices is 2"),
        ("cuda:1", {"devices": "0,"}, 'train.devices is "0,"'),
    ],
)
def test_a_device_that_contradicts_train_is_refused(device: str, train: dict[str, Any], other: str) -> None:
    assert error_of(model={"device": device}, train=train) == (
        f'model.device: "{device}" is not allowed: {other}; give one of them (use null)'
    )


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "cuda:x", "CPU", "tpu", "xla", "cpu:0", " cpu"])
def test_what_is_no_device_is_told_what_is(device: str) -> None:
    assert error_of(model={"device": device}) == (
        f'model.device: "{device}" is not allowed: must be "cpu", "cuda", "cuda:N" (N is the number of a GPU) or "mps" '
        '(use "cpu" or "cuda")'
    )
    assert error_of(model={"device": 0}).startswith("model.device: 0 is not allowed: must be text")


@pytest.mark.parametrize(
    ("amp", "train", "expected"),
    [
        (False, {}, None),
        (False, {"amp_dtype": "auto"}, None),
        (False, {"amp_dtype": "bf16"}, "bf16"),
        (True, {}, "auto"),
        (True, {"amp_dtype": None}, None),
    ],
)
def test_amp_speaks_where_amp_dtype_is_auto(amp: bool, train: dict[str, Any], expected: str | None) -> None:
    with pytest.warns(FutureWarning, match=AMP):
        config = run_config(model={"amp": amp}, train=train)
    assert config.train.amp_dtype == expected
    assert config.model.amp is None
    assert RunConfig.parse(config.as_dict()) == config


def test_amp_is_true_or_false() -> None:
    assert error_of(model={"amp": "no"}) == 'model.amp: "no" is not allowed: must be true or false (use false)'
    with pytest.warns(FutureWarning, match=AMP):
        assert ModelConfig.parse({"amp": False}).amp is False


def test_sections_that_are_built_already() -> None:
    with pytest.warns(FutureWarning, match=DEVICE):
        config = RunConfig(**MINIMAL, model=ModelSection(device="cpu"))
    assert config.train.accelerator == "cpu"


def test_an_override_wins_over_the_other_spelling_in_the_file() -> None:
    text = "name: a\ndataset: {uri: s3://b/x}\n"
    config = parse_run_config(text + "model: {device: cpu}\n", {"train": {"accelerator": "cuda"}})
    assert config.train.accelerator == "cuda"
    with pytest.warns(FutureWarning, match=DEVICE):
        config = parse_run_config(text + "train: {accelerator: cpu, devices: 2}\n", {"model": {"device": "cuda:1"}})
    assert (config.train.accelerator, config.train.devices) == ("cuda", "1,")
    assert parse_run_config(text + "model: {amp: false}\n", {"train": {"amp_dtype": "auto"}}).train.amp_dtype == "auto"


def test_the_functions_by_themselves() -> None:
    assert legal_device("cuda:3") == "cuda:3"
    assert not contradiction("cuda:3", {"devices": "3,", "accelerator": "gpu"})
    with pytest.raises(ConfigError):
        RunConfig.parse({**MINIMAL, "model": {"device": "cuda:1000"}})
