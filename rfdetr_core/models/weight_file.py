"""Weight files as others write them (model spec 7.2), and what they are files of."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rfdetr_core.config import ENCODERS, VARIANTS, ModelConfig
from rfdetr_core.errors import CheckpointError
from rfdetr_core.models.adapters import merge_adapters
from rfdetr_core.models.file_form import AGAIN, kind_of_keys, other_kind
from rfdetr_core.models.inert_pickle import Plain, kind_of, load_inert, shape_text, shown

ENCODER = "backbone.0.encoder.encoder."
POSITIONS = ENCODER + "embeddings.position_embeddings"
PATCHES = ENCODER + "embeddings.patch_embeddings.projection.weight"
DECODER_LAYERS = "transformer.decoder.layers."

# Tested in this order: a name that holds "seg-large" holds "large" as well (spec 7.3, last rule).
_NAME_PARTS = (
    *(f"seg-{size}" for size in ("2xlarge", "xxlarge", "xlarge", "large", "medium", "small", "nano", "preview")),
    "keypoint-preview",
    *("2xlarge", "xxlarge", "xlarge", "large-deprecated", "large", "medium", "small", "nano", "base", "pico"),
)
_LOSSES = ("ia_bce_loss", "use_position_supervised_loss", "use_varifocal_loss")
"""Classification losses: the first that is true is used (spec 6.3), and the first is true by default."""
_ARCHITECTURE = {
    *("encoder", "hidden_dim", "patch_size", "num_windows", "out_feature_indexes", "projector_scale", "dec_layers"),
    *("sa_nheads", "ca_nheads", "dec_n_points", "dim_feedforward", "resolution", "positional_encoding_size"),
    *("num_queries", "num_select", "group_detr", "num_channels", "two_stage", "bbox_reparam"),
    *("lite_refpoint_refine", "layer_norm", "segmentation_head", "num_decoder_registers"),
    *("sum_group_losses", *_LOSSES),
}
"""What shapes the network and its loss; further fields say how, and on which machine, somebody trained."""


@dataclass(frozen=True)
class WeightFile:
    """What a weight file holds, whichever program wrote it; tensors lie on the CPU."""

    path: Path
    state: dict[str, Tensor]
    """Published key -> tensor; prefixes are stripped."""
    args: dict[str, Any]
    """Training arguments as plain data; empty if the file has none."""
    model_name: str | None
    """Class name such as RFDETRNano."""
    model_config: dict[str, Any]
    """Architecture fields, where the file has them."""
    class_names: tuple[str, ...]
    """In the order of the labels; empty if unknown."""
    stubs: tuple[str, ...]
    """Dotted names of the unknown classes of the metadata; none was imported."""
    md5: str
    notes: tuple[str, ...] = ()
    """What a reader should know: one sentence each."""
    format_version: Any = None
    """Of a file of ours; None if another program wrote it."""

    @property
    def num_classes(self) -> int:
        """Classes of the head: its rows, less the one that no label uses."""
        return len(self.state["class_embed.bias"]) - 1


def read_weight_file(path: Path) -> WeightFile:
    """Read a weight file of upstream (spec 7.2), of ours, or a bare state dict.

    Raises:
        CheckpointError: absent, not a weight file, damaged, holds code, values that are not finite, or no detector.
    """
    path = Path(path)
    content, stubs = load_inert(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {kind_of(content)}, and no weights", hint=AGAIN)
    try:
        plain = Plain()
        args = plain.mapping(content.get("args")) or plain.mapping(content.get("hyper_parameters"))
        model_config = plain.mapping(content.get("model_config"))
        model_name = content.get("model_name")
        names = _class_names(args, plain.of(content.get("classes")))
    except RecursionError as error:
        raise CheckpointError(f"{path}: its metadata is nested without end", hint=AGAIN) from error
    state, adapters = merge_adapters(_checked(_state(content, path), path), path)
    _require_detector(state, path)
    with path.open("rb") as file:
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    return WeightFile(
        path=path,
        state=state,
        args=args,
        model_name=model_name if isinstance(model_name, str) else None,
        model_config=model_config,
        class_names=names,
        stubs=tuple(shown(name) for name in stubs),
        md5=md5,
        notes=tuple(_notes(content, adapters)),
        format_version=content.get("format_version"),
    )


# Weights


def _state(content: dict[Any, Any], path: Path) -> dict[Any, Any]:
    """The state dict with published keys, wherever the file has it."""
    if "model" in content:
        state = content["model"]
        prefixes = ["module."]
    elif "state_dict" in content:
        state = content["state_dict"]
        prefixes = ["model.", "_orig_mod."]
    else:
        state, prefixes = content, ["module."]
        if not any(isinstance(value, Tensor) for value in content.values()):
            keys = ", ".join(shown(str(key)) for key in list(content)[:5]) or "no entry"
            raise CheckpointError(
                f"{path}: no weights in it: neither 'model' nor 'state_dict', only {keys}", hint=AGAIN
            )
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: its weights are {kind_of(state)}, not a table of tensors", hint=AGAIN)
    for prefix in prefixes:
        state = _stripped(state, prefix, path)
    return state


def _stripped(state: dict[Any, Any], prefix: str, path: Path) -> dict[Any, Any]:
    stripped = {key.removeprefix(prefix) if isinstance(key, str) else key: value for key, value in state.items()}
    if len(stripped) != len(state):
        raise CheckpointError(f"{path}: has keys both with and without the prefix {prefix!r}", hint=AGAIN)
    return stripped


def _checked(state: dict[Any, Any], path: Path) -> dict[str, Tensor]:
    """Plain tensors of finite numbers, detached from whatever the file attached to them."""
    checked = {}
    for key, value in state.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{path}: a key of its weights is {kind_of(key)}", hint=AGAIN)
        where = f"{path}: {shown(key)}"
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{where} is {kind_of(value)}, not a tensor", hint=AGAIN)
        if type(value) not in (Tensor, torch.nn.Parameter) or not _is_plain(value):
            raise CheckpointError(f"{where} is no plain tensor", hint="save it as a dense tensor")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"{where} has values that are not finite", hint="its training diverged: give other weights"
            )
        checked[key] = value.detach()
    return checked


def _is_plain(value: Tensor) -> bool:
    """Dense, on the CPU, and with as many bytes behind it as it has elements: a stride of 0 can pretend terabytes."""
    if value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _require_detector(state: dict[str, Tensor], path: Path) -> None:
    weight, bias = state.get("class_embed.weight"), state.get("class_embed.bias")
    if weight is None or bias is None:
        key = "class_embed.weight" if weight is None else "class_embed.bias"
        raise CheckpointError(f"{path}: not the weights of an RF-DETR detector: no {key}", hint=AGAIN)
    if bias.dim() != 1 or len(bias) < 2 or weight.dim() != 2 or len(weight) != len(bias):
        found = f"{shape_text(tuple(weight.shape))} and {shape_text(tuple(bias.shape))}"
        raise CheckpointError(f"{path}: class_embed is no class head: weight and bias are {found}", hint=AGAIN)


# Metadata


def _class_names(args: dict[str, Any], classes: Any) -> tuple[str, ...]:
    """`args.class_names`, or the class table of our own files."""
    names = args.get("class_names")
    if isinstance(names, dict) and {str(key) for key in names} == {str(label) for label in range(len(names))}:
        names = [name for _, name in sorted(names.items(), key=lambda item: int(item[0]))]
    if not names and isinstance(classes, list):
        names = [row.get("name") if isinstance(row, dict) else None for row in classes]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return ()
    return tuple(names)


def _notes(content: dict[Any, Any], adapters: int) -> list[str]:
    used = "model" if "model" in content else "state_dict"
    averaged = [key for key in ("ema_model", "legacy_ema_state_dict") if isinstance(content.get(key), dict)]
    notes = [f"the file also holds averaged weights ({key}): they are not used, {used} is" for key in averaged]
    return notes + ([f"LoRA adapters of {adapters} layers were merged into their weights"] if adapters else [])


# What the file is


def variant_of(file: WeightFile, name: str | None = None) -> str | None:
    """The variant of a file: by its class, else by name (spec 7.3, last rule), else by the shapes of its tensors.

    A name that contradicts the shapes does not count, if these are exactly those of another variant: the
    published rf-detr-large.pth is large-deprecated.

    Args:
        file: what `read_weight_file` gave.
        name: the name under which it is published, if `file.path` has another one.

    Returns:
        A key of VARIANTS; or the published name of a kind that this package does not build, such as seg-nano;
        or None.
    """
    if (stated_variant := _stated_variant(file)) is not None:
        return stated_variant
    named = _variant_in(file.args.get("pretrain_weights"), name or file.path.name)
    if named in VARIANTS and _resembles(file, named):
        return named
    alike = [variant for variant in VARIANTS if _resembles(file, variant)]
    if len(alike) > 1:  # medium and large differ in resolution alone
        alike = [v for v in alike if ModelConfig.parse({"variant": v}).positional_encoding_size == _grid(file)]
    return alike[0] if len(alike) == 1 else named


def _stated_variant(file: WeightFile) -> str | None:
    """What our own architecture section says, or the name of the class."""
    own = file.model_config.get("variant")
    if isinstance(own, str) and own in VARIANTS:
        return own
    if file.model_name is not None and file.model_name.startswith("RFDETR"):
        words = re.sub(r"(?<=[a-z])(?=[A-Z0-9])", "-", file.model_name.removeprefix("RFDETR")).lower()
        if words in _NAME_PARTS:
            return words
    return None


def _variant_in(*texts: Any) -> str | None:
    """The first variant, built or not, that is part of a name."""
    return next((part for text in texts if isinstance(text, str) for part in _NAME_PARTS if part in text), None)


def _resembles(file: WeightFile, variant: str) -> bool:
    """Whether the sizes that a user rarely changes are the variant's."""
    found, wanted = _from_shapes(file.state), VARIANTS[variant]
    return all(found.get(field) == wanted[field] for field in ("encoder", "patch_size", "hidden_dim", "dec_layers"))


def _grid(file: WeightFile) -> int | None:
    side: int | None = _from_shapes(file.state).get("positional_encoding_size")
    return side


def refuse_other_kinds(file: WeightFile) -> None:
    """Refuse weights of a kind of model that is not built, whatever else may be wrong with them.

    Raises:
        CheckpointError: a segmentation or keypoint model, by its tensors, its flag or its class.
    """
    kind, name = kind_of_keys(file.state), _stated_variant(file) or ""
    if stated(file).get("segmentation_head") is True or name.startswith("seg-"):
        kind = "segmentation"
    elif name.startswith("keypoint-"):
        kind = "keypoint"
    if kind is not None:
        raise other_kind(str(file.path), kind)


def stated(file: WeightFile) -> dict[str, Any]:
    """What the metadata says of the architecture: `model_config`, and `args` where it says nothing; None says nothing.

    Values are as the file has them, of any type.
    """
    return {
        key: value
        for source in (file.args, file.model_config)
        for key, value in source.items()
        if key in _ARCHITECTURE and value is not None
    }


def architecture_of(file: WeightFile) -> dict[str, Any]:
    """The fields of ModelConfig that the file determines; `variant` is `variant_of`'s to say.

    They are what the file states; shapes of tensors go first. `num_select` is at most what there is to select from
    (spec 5).
    """
    said = stated(file)
    used = next((name for name in _LOSSES if said.get(name, name == _LOSSES[0])), None)
    found = said | {name: False for name in _LOSSES if name in said and name != used} | _from_shapes(file.state)
    groups, queries = found.get("group_detr"), file.state.get("refpoint_embed.weight")
    if isinstance(groups, int) and groups > 0 and queries is not None and queries.dim() == 2:
        rows = queries.shape[0]
        if rows and rows % groups == 0:
            found["num_queries"] = rows // groups
    select, queries_of_one = found.get("num_select"), found.get("num_queries")
    if isinstance(select, int) and isinstance(queries_of_one, int) and queries_of_one > 0:
        found["num_select"] = min(select, queries_of_one * (file.num_classes + 1))
    return found | {"num_classes": file.num_classes}


def _from_shapes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fields that the shapes and names of the tensors determine."""
    found: dict[str, Any] = {"hidden_dim": state["class_embed.weight"].shape[1]}
    patches, positions = state.get(PATCHES), state.get(POSITIONS)
    if patches is not None and patches.dim() == 4:
        width, found["num_channels"], found["patch_size"] = patches.shape[:3]
        depth = _count(state, ENCODER + "encoder.layer.")
        registers = ENCODER + "embeddings.register_tokens" in state
        for name, size in ENCODERS.items():
            if (size.width, size.depth, "registers" in name) == (width, depth, registers):
                found["encoder"] = name
    if positions is not None and positions.dim() == 3:
        side = math.isqrt(max(positions.shape[1] - 1, 0))
        if side * side == positions.shape[1] - 1:
            found["positional_encoding_size"] = side
    if layers := _count(state, DECODER_LAYERS):
        found["dec_layers"] = layers
        found["lite_refpoint_refine"] = "transformer.decoder.bbox_embed.layers.0.weight" not in state
        groups = _count(state, "transformer.enc_output.")
        found["two_stage"] = groups > 0
        if groups:
            found["group_detr"] = groups
    inner = state.get(DECODER_LAYERS + "0.linear1.weight")
    if inner is not None and inner.dim() == 2:
        found["dim_feedforward"] = inner.shape[0]
    if any(key.startswith("backbone.0.projector.") for key in state):
        found["layer_norm"] = not any(
            key.startswith("backbone.0.projector.") and key.endswith(".running_mean") for key in state
        )
    return found


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered parts stand behind a prefix."""
    return len({key[len(prefix) :].partition(".")[0] for key in state if key.startswith(prefix)})
