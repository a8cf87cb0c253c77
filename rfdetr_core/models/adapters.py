"""Low-rank adapters of the encoder (LoRA, DoRA), merged into the weights that they change (model spec 7.3, rule 8).

Beside the weight W (out, in) of a linear layer a file holds A (r, in), B (out, r) and, for DoRA, a magnitude m (out).
The layer computes with V = W + s B A, and with DoRA with m V / |V|, the norm taken over each row. The factor
s = alpha / r is not in the file: rfdetr has one setting, r = alpha = 16.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from rfdetr_core.errors import CheckpointError
from rfdetr_core.models.inert_pickle import shape_text, shown

RANK = 16
ALPHA = 16.0

_ENCODER = "backbone.0.encoder."
_WRAPPED = _ENCODER + "base_model.model."
_ADAPTER = re.compile(r"(.+)\.lora_(A|B|magnitude_vector)\.default\.weight")


def merged_weight(weight: Tensor, down: Tensor, up: Tensor, magnitude: Tensor | None) -> Tensor:
    """The weight (out, in) of a layer with an adapter: A is `down` (16, in), B is `up` (out, 16), m has (out)."""
    merged = weight.float() + ALPHA / RANK * up.float() @ down.float()
    if magnitude is not None:
        merged = merged * (magnitude.float() / merged.norm(dim=1))[:, None]
    return merged.to(weight.dtype)


def merge_adapters(state: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], int]:
    """The weights under their published keys, and how many layers had an adapter; `path` serves messages.

    Raises:
        CheckpointError: an adapter without its layer, of another rank, or in a form that is not known.
    """
    merged: dict[str, Tensor] = {}
    adapters: dict[str, dict[str, Tensor]] = {}  # by layer; the weight of one that has an adapter is its base_layer's
    for key, value in state.items():
        plain = _ENCODER + key.removeprefix(_WRAPPED) if key.startswith(_WRAPPED) else key
        if (part := _ADAPTER.fullmatch(plain)) is not None:
            adapters.setdefault(part[1], {})[part[2]] = value
            continue
        if plain.endswith(".base_layer.weight"):
            adapters.setdefault(plain.removesuffix(".base_layer.weight"), {})
        plain = plain.replace(".base_layer.", ".")
        if plain in merged or ".lora_" in plain or ".base_model." in plain:
            raise _refusal(path, f"{shown(key)} is no part of an adapter that is known")
        merged[plain] = value
    for layer, parts in adapters.items():
        key = f"{layer}.weight"
        _check(merged.get(key), parts, layer, path)
        merged[key] = merged_weight(merged[key], parts["A"], parts["B"], parts.get("magnitude_vector"))
        if not bool(merged[key].isfinite().all()):
            raise _refusal(path, f"{shown(layer)} has values that are not finite once its adapter is merged")
    return merged, len(adapters)


def _check(weight: Tensor | None, parts: Mapping[str, Tensor], layer: str, path: Path) -> None:
    if weight is None or weight.dim() != 2 or not {"A", "B"} <= parts.keys():
        raise _refusal(path, f"the adapter of {shown(layer)} is not whole")
    rows, columns = weight.shape
    wanted = {"A": (RANK, columns), "B": (rows, RANK), "magnitude_vector": (rows,)}
    for name, tensor in parts.items():
        if tuple(tensor.shape) != wanted[name]:
            found, need = shape_text(tuple(tensor.shape)), shape_text(wanted[name])
            raise _refusal(path, f"lora_{name} of {shown(layer)} is {found}, and {need} is known")


def _refusal(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: holds LoRA adapters that cannot be merged: {problem}",
        hint="merge them with the program that trained it, and save the result",
    )
