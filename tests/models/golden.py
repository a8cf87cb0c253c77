"""Reference data and the formulas of its weights and images ("W1" and "gauss" of the golden README)."""

from __future__ import annotations

import functools
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rfdetr_core.config import ModelConfig
from rfdetr_core.models.detector import RFDETR

FOLDER = Path(__file__).parents[1] / "golden"
TINY = {
    "resolution": 128,
    "num_queries": 20,
    "num_select": 25,
    "group_detr": 3,
    "num_classes": 7,
    "dec_layers": 3,
}
TINY_IMAGE = (1248, (2, 3, 128, 128))
"""Seed and shape, for `gauss`."""
VARIANTS: dict[str, dict[str, Any]] = {
    "var_no_bbox_reparam": {"bbox_reparam": False},
    "var_full_refine": {"lite_refpoint_refine": False},
    "var_full_refine_no_reparam": {"lite_refpoint_refine": False, "bbox_reparam": False},
    "var_no_two_stage": {"two_stage": False},
    "var_batchnorm_projector": {"layer_norm": False},
    "var_p3p4p5": {"projector_scale": ("P3", "P4", "P5")},
    "var_registers": {"encoder": "dinov2_registers_windowed_small"},
    "var_windows1": {"num_windows": 1},
    "var_windows4": {"num_windows": 4},
    "var_base_indexes": {**TINY, "variant": "base", "resolution": 112, "positional_encoding_size": 8},
}
"""Architecture flags of the stored cases, over TINY."""


@functools.cache
def arrays(name: str) -> dict[str, NDArray[Any]]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


@functools.cache
def scalars(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return content


def _location_and_scale(key: str, shape: tuple[int, ...], count: int) -> tuple[float, float]:
    parts = key.split(".")
    if parts[-2:] == ["class_embed", "bias"] or (
        len(parts) > 2 and parts[-3] == "enc_out_class_embed" and parts[-1] == "bias"
    ):
        return -2.0, 0.5
    if key.endswith("sampling_offsets.bias"):
        return 0.0, 1.5
    if key.endswith("refpoint_embed.weight"):
        return 0.0, 0.1
    if key.endswith("query_feat.weight"):
        return 0.0, 1.0
    if key.endswith(("position_embeddings", "cls_token", "mask_token", "register_tokens")):
        return 0.0, 0.2
    if key.endswith("running_var"):
        return 1.0, 0.1
    if len(shape) == 1 and key.endswith((".weight", ".lambda1")):
        return 1.0, 0.1
    if len(shape) <= 1:
        return 0.0, 0.05
    gain = 0.5 if key.endswith("sampling_offsets.weight") else 1.0
    return 0.0, gain / math.sqrt(count / shape[0])


@functools.cache
def w1(key: str, shape: tuple[int, ...]) -> Tensor:
    """The reference value of the parameter `key`."""
    count = math.prod(shape)
    draws = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(count).reshape(shape)
    location, scale = _location_and_scale(key, shape, count)
    return torch.from_numpy((location + scale * draws).astype(np.float32))


def fill_w1(module: nn.Module, prefix: str = "", *, keep: bool = True) -> None:
    """Overwrite every floating-point entry; an aliased box head takes its detector's key."""
    value_of = w1 if keep else w1.__wrapped__  # the largest models are not worth the memory
    state = {}
    for key, value in module.state_dict().items():
        if value.is_floating_point():
            named = key.replace("transformer.decoder.bbox_embed.", "bbox_embed.")
            state[key] = value_of(prefix + named, tuple(value.shape))
        else:
            state[key] = value
    module.load_state_dict(state)


def build(dtype: torch.dtype = torch.float32, **overrides: Any) -> RFDETR:
    """A model with the reference weights; `overrides` over the tiny configuration, or a whole `variant`."""
    whole = "variant" in overrides
    model = RFDETR(ModelConfig(**(overrides if whole else {**TINY, **overrides})))
    fill_w1(model, keep=not whole)
    return model.to(dtype)


@functools.cache
def shared_tiny() -> RFDETR:
    """One tiny model for all tests that leave its weights alone. Callers set the mode they need."""
    return build()


def gauss(seed: int, shape: tuple[int, ...]) -> Tensor:
    """A reference image, already normalised."""
    draws = np.random.RandomState(seed).standard_normal(math.prod(shape)).astype(np.float32)
    return torch.from_numpy(draws.reshape(shape))


def targets(name: str, images: int = 2, prefix: str = "") -> list[dict[str, Tensor]]:
    """The stored targets of a case."""
    data = arrays(name)
    return [
        {part: torch.from_numpy(data[f"{prefix}targets{i}.{part}"]) for part in ("labels", "boxes")}
        for i in range(images)
    ]
