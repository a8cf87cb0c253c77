"""Fields that are part of the language and have no effect yet: only their default is accepted.

A field that would be taken and ignored is a lie to the user, so any other value is an error. Who builds a
field's effect removes its row here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from rfdetr_core.config.base import Config
from rfdetr_core.config.model import ModelSection
from rfdetr_core.config.problems import Problem, as_config_error, show
from rfdetr_core.errors import ConfigError


class Unbuilt(NamedTuple):
    """What is missing, and the values that work all the same."""

    missing: str
    works: tuple[Any, ...] = ()


NOT_BUILT: dict[str, Unbuilt] = {
    "model.segmentation_head": Unbuilt("masks"),
    "model.mask_downsample_ratio": Unbuilt("masks"),
    "model.backbone_lora": Unbuilt("low-rank adapters"),
    "model.num_decoder_registers": Unbuilt("extra decoder tokens"),
    "model.cuda_graphs": Unbuilt("CUDA graphs of the training step"),
    "train.eval_masks_head_resolution": Unbuilt("masks"),
    "train.accelerator": Unbuilt("TPU", works=("auto", "cpu", "gpu", "cuda", "mps")),
    "train.amp_dtype": Unbuilt("fp8", works=("auto", None, "bf16", "fp16")),
}
"""Dotted field → what is missing. The error advises the first of `works`; without it, the default."""


def unbuilt_problems(config: Config, section: str = "") -> Iterator[Problem]:
    """Every field of a configuration, or of one of its sections, that asks for what is not built."""
    prefix = f"{section}." if section else ""
    for path, row in NOT_BUILT.items():
        if not path.startswith(prefix):
            continue
        owner: Any = config
        *parents, name = path.removeprefix(prefix).split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        value = getattr(owner, name)
        works = row.works or (type(owner).model_fields[name].default,)
        if value not in works:
            shown = "this value" if path.startswith("notify.") else show(value)
            others = f" or use {' or '.join(map(show, works[1:]))}" if works[1:] else ""
            yield Problem(
                path,
                f"{shown} is not built yet; leave it at {show(works[0])}{others} (missing: {row.missing})",
            )


def refuse_unbuilt(config: Config, section: str) -> None:
    """Refuse a ModelConfig (`section` "model") or TrainConfig ("train") that stands alone.

    Raises:
        ConfigError: a field asks for what is not built. RunConfig refuses it by itself.
    """
    problems = list(unbuilt_problems(config, section))
    if problems:
        raise as_config_error(problems)


def refuse_other_channels(model: ModelSection, what: str) -> None:
    """Refuse what reads image files for a model of other than one, three or four channels.

    Raises:
        ConfigError: model.num_channels is another number.
    """
    if model.num_channels not in (1, 3, 4):
        raise ConfigError(
            f"model.num_channels: {model.num_channels} does not go with {what}: image files are grey, RGB or RGBA",
            hint="use 1, 3 or 4; prediction alone takes arrays of other channel counts",
        )


def unbuilt_fields() -> list[str]:
    """Each field of the table with what is missing, for people."""
    return [f"{path}: {row.missing}" for path, row in NOT_BUILT.items()]
