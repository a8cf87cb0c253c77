"""Weights into a detector: pretrained files by the published loading rules, and checkpoints of ours as they are.

`load_pretrained` follows model spec 7.3. Everything is fitted and checked on the side; the model changes last,
all at once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rfdetr_core.config import VARIANTS, ModelConfig
from rfdetr_core.errors import CheckpointError, ConfigError
from rfdetr_core.models.detector import RFDETR
from rfdetr_core.models.inert_pickle import shape_text, shown
from rfdetr_core.models.published import PUBLISHED
from rfdetr_core.models.vit import resize_table
from rfdetr_core.models.weight_file import (
    DECODER_LAYERS,
    ENCODER,
    PATCHES,
    POSITIONS,
    WeightFile,
    architecture_of,
    refuse_other_kinds,
    stated,
    variant_of,
)

KEYPOINT_MASK = "_kp_active_mask"
QUERY_TABLES = ("refpoint_embed.weight", "query_feat.weight")
_HEADS = ("class_embed.", "transformer.enc_out_class_embed.")
_MACHINE = {"compile", "cuda_graphs", "fused_optimizer", "device"}
"""Fields of ModelConfig that suit the machine of a training, and say nothing of its weights."""
_SAME_TENSORS = {
    *("encoder", "num_windows", "out_feature_indexes", "projector_scale", "sa_nheads", "ca_nheads", "dec_n_points"),
    *("two_stage", "bbox_reparam", "lite_refpoint_refine", "layer_norm", "num_decoder_registers"),
}
"""Fields that make another network of the same tensors, or of most of them: no shape tells that they differ."""
_PUBLISHED_MD5 = {file.md5 for file in PUBLISHED.values()}


@dataclass(frozen=True)
class TrainedModel:
    """A detector in eval mode, and what its file says about it."""

    module: RFDETR
    config: ModelConfig
    class_names: tuple[str, ...]
    source: str  # "ema" or "regular"
    epoch: int
    sha256: str  # of the file


def build_trained(content: dict[str, Any], path: Path, *, sha256: str) -> TrainedModel:
    """Build the detector of a file of weights; `content` is what the file holds, `path` serves messages.

    Raises:
        CheckpointError: its weights do not fit the architecture that it names.
    """
    try:
        config = ModelConfig.parse({k: v for k, v in content["model_config"].items() if k not in _MACHINE})
        module = RFDETR(config)
        module.load_state_dict(content["model"])
        if (broken := next((k for k, v in module.state_dict().items() if not v.isfinite().all()), None)) is not None:
            raise ValueError(f"{broken} has values that are not finite")
        names = tuple(str(row["name"]) for row in content["classes"])
        if not 0 < len(names) <= config.num_classes + 1:  # fewer where columns are spare, the last one too for COCO
            raise ValueError(f"classes has {len(names)} rows, and the model {config.num_classes} classes")
        trained = TrainedModel(module.eval(), config, names, str(content["source"]), int(content["epoch"]), sha256)
    except KeyError as error:
        raise CheckpointError(f"{path}: not the weights of a detector: no {error}", hint="train again") from error
    except (AttributeError, RuntimeError, TypeError, ValueError, ConfigError) as error:
        reason = " ".join(str(error).split())[:200]  # torch lists every key that does not fit
        raise CheckpointError(f"{path}: not the weights of a detector: {reason}", hint="train again") from error
    return trained


@dataclass(frozen=True)
class Change:
    """A tensor that was made to fit: its shape in the file and in the model."""

    key: str
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class LoadReport:
    """What became of each tensor of a weight file, and of each of the model."""

    file: str
    md5: str
    variant: str | None
    """The file's."""
    model_variant: str
    loaded: int
    """Tensors of the model that have the file's values now, as they are or made to fit."""
    class_rows: tuple[int, int]
    """Rows of the class heads, in the file and in the model."""
    resized: tuple[Change, ...]
    """Positional table and patch kernel."""
    sliced: tuple[Change, ...]
    """Query tables."""
    sliced_flat: bool
    """The tables were cut regardless of groups, since the file does not say how many it has."""
    differing: tuple[str, ...]
    """Architecture in which the model differs from what the file states, as it was asked to."""
    dropped: tuple[str, ...]
    """Of the file; on purpose."""
    missing: tuple[str, ...]
    """Of the model, not in the file: they keep their initial values."""
    unexpected: tuple[str, ...]
    """Of the file; the model has no place for them."""
    stubs: tuple[str, ...]
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """For people: what was loaded, then what is notable, one sentence each."""
        kind = f", {self.variant}" if self.variant else ""
        total = self.loaded + len(self.missing)
        lines = [f"weights: {self.file} (md5 {self.md5}{kind}): {self.loaded} of the model's {total} tensors"]
        before, after = self.class_rows
        if before != after:
            how = f"the first {after} are kept" if after < before else "repeated from the first on"
            lines.append(f"weights: class heads have {before} rows in the file and {after} in the model: {how}")
        for change in self.resized:
            shapes = f"{shape_text(change.before)} to {shape_text(change.after)}"
            lines.append(f"weights: {change.key} resized from {shapes}")
        for change in self.sliced:
            how = ", regardless of groups: the file does not say how many it has" if self.sliced_flat else ""
            lines.append(f"weights: {change.key} cut from {change.before[0]} to {change.after[0]} queries{how}")
        lines += [f"weights: {difference}, as asked for" for difference in self.differing]
        if self.variant not in (None, self.model_variant):
            lines.append(f"weights: the file is {self.variant}, and the model {self.model_variant}")
        if self.missing:
            lines.append(f"weights: {_some(self.missing)} not in the file: left at initial values")
        if self.unexpected:
            lines.append(f"weights: {_some(self.unexpected)} of the file without a place in the model: not used")
        if self.stubs:
            lines.append(f"weights: unknown classes in the metadata, not loaded: {', '.join(self.stubs)}")
        return lines + [f"weights: {note}" for note in self.notes]

    def to_json(self) -> dict[str, Any]:
        """All of it, for result files."""
        return asdict(self)


def _some(keys: tuple[str, ...]) -> str:
    noun = "tensor" if len(keys) == 1 else "tensors"
    return f"{len(keys)} {noun} ({', '.join(map(shown, keys[:3]))}{', ...' if len(keys) > 3 else ''})"


# Tensors that may have another size


def resize_class_rows(rows: Tensor, count: int) -> Tensor:
    """(c, ...) to (count, ...): the first rows, or all of them over and over (spec 7.3, rule 4)."""
    return rows[torch.arange(count) % len(rows)]


def slice_queries(table: Tensor, held: tuple[int, int] | None, wanted: tuple[int, int]) -> Tensor:
    """The first queries of the first groups (spec 7.3, rule 5).

    Args:
        table: (groups * queries, width), group by group.
        held: queries per group and groups of the table; None, if unknown, keeps the first rows of all.
        wanted: those of the model; of either the smaller number is kept.
    """
    if held is None:
        return table[: math.prod(wanted)]
    queries, groups = (min(have, want) for have, want in zip(held, wanted, strict=True))
    return table.reshape(held[1], held[0], -1)[:groups, :queries].reshape(groups * queries, -1)


def resize_positions(table: Tensor, side: int) -> Tensor:
    """(1, 1 + s*s, width) to (1, 1 + side*side, width): bicubic with antialias, CLS row kept (spec 7.3, rule 6)."""
    old = math.isqrt(table.shape[1] - 1)
    return resize_table(table, (old, old), (side, side))


def adapt_channels(kernel: Tensor, channels: int) -> Tensor:
    """An RGB kernel (width, 3, p, p) for other images (spec 7.3, rule 9).

    One channel takes the mean; k take R, G, B over and over, scaled by 3/k.
    """
    if channels == 1:
        return kernel.mean(dim=1, keepdim=True)
    return kernel[:, torch.arange(channels) % 3] * (3.0 / channels)


# Loading


@dataclass
class _Fitting:
    """The file's tensors on their way to the model's shapes."""

    config: ModelConfig
    file: WeightFile
    target: Mapping[str, Tensor]
    state: dict[str, Tensor]
    resized: list[Change] = field(default_factory=list)
    sliced: list[Change] = field(default_factory=list)
    sliced_flat: bool = False
    dropped: list[str] = field(default_factory=list)

    def said(self, name: str) -> Any:
        """What the file states about its architecture; None if nothing."""
        return stated(self.file).get(name)

    def replace(self, key: str, tensor: Tensor) -> Change:
        change = Change(key, tuple(self.state[key].shape), tuple(tensor.shape))
        self.state[key] = tensor
        return change

    def refusal(self, problem: str, hint: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: {problem}", hint=hint)


def load_pretrained(model: RFDETR, file: WeightFile) -> LoadReport:
    """Put a file's weights into a detector, by the published rules (spec 7.3).

    The class heads, the query tables and the positional table may have other sizes in the file; growing the
    query tables may not. The model is changed only when everything fits.

    An architecture that the file states is the model's, unless the model has been given another one than its
    variant's: that is a warning.

    Raises:
        CheckpointError: weights of another kind of model or of another architecture; the key and both shapes, or
            the field and both values, are named.
    """
    target = model.state_dict()
    fitting = _Fitting(model.config, file, target, dict(file.state))
    refuse_other_kinds(file)
    _refuse_other_patches(fitting)
    differing = _differing(fitting)
    _fit_heads(fitting)
    _fit_queries(fitting)
    _fit_positions(fitting)
    _fit_channels(fitting)
    _fit_keypoint_mask(fitting)
    taken = {key: value for key, value in fitting.state.items() if key in target}
    _require_shapes(fitting, taken)
    _require_body(fitting, taken)
    # Where references are refined layer by layer, the box head has two names: one of them is enough.
    given = {target[key].data_ptr() for key in taken if target[key].numel()}
    missing = [key for key in target if key not in taken and target[key].data_ptr() not in given]
    model.load_state_dict(taken, strict=False)
    if differing:
        warnings.warn(
            f"{file.path.name} was trained as another network: {'; '.join(differing)}", UserWarning, stacklevel=2
        )
    return LoadReport(
        file=file.path.name,
        md5=file.md5,
        variant=variant_of(file),
        model_variant=model.config.variant,
        loaded=len(taken),
        class_rows=(file.num_classes + 1, model.config.num_classes + 1),
        resized=tuple(fitting.resized),
        sliced=tuple(fitting.sliced),
        sliced_flat=fitting.sliced_flat,
        differing=differing,
        dropped=tuple(fitting.dropped),
        missing=tuple(key for key in missing if key != KEYPOINT_MASK),
        unexpected=tuple(key for key in fitting.state if key not in target),
        stubs=file.stubs,
        notes=file.notes,
    )


def _refuse_other_patches(fitting: _Fitting) -> None:
    kernel, wanted = fitting.state.get(PATCHES), fitting.config.patch_size
    found = [fitting.said("patch_size"), kernel.shape[-1] if kernel is not None and kernel.dim() == 4 else None]
    for size in found:
        if size is not None and size != wanted:
            raise fitting.refusal(
                f"was trained on patches of {shown(str(size))} pixels, and the model has patches of {wanted}"
                + _variants(fitting),
                "choose the file's variant, or weights of the model's",
            )


def _differing(fitting: _Fitting) -> tuple[str, ...]:
    """Fields that the file states otherwise, and the user too; those that only the file states are refused.

    What is stated beside published weights is not looked at: they are those of their variant.
    """
    file, config = fitting.file, fitting.config
    if file.md5 in _PUBLISHED_MD5:
        return ()
    said, found = stated(file), architecture_of(file)
    wanted: list[str] = []
    refused: list[str] = []
    for name in sorted(said.keys() & _SAME_TENSORS):
        theirs, ours = found[name], getattr(config, name)
        theirs = tuple(theirs) if isinstance(theirs, list) else theirs
        if theirs != ours:
            usual = VARIANTS[config.variant].get(name, ModelConfig.model_fields[name].default)
            difference = f"{name} is {_text(theirs)} in the file and {_text(ours)} in the model"
            (refused if ours == usual else wanted).append(difference)
    if refused:
        raise fitting.refusal(
            f"is of another architecture: {'; '.join(refused)}{_variants(fitting)}",
            "set these fields of model as they are in the file, or give other weights",
        )
    return tuple(wanted)


def _text(value: Any) -> str:
    return shown(", ".join(map(str, value)) if isinstance(value, tuple) else str(value))


def _variants(fitting: _Fitting) -> str:
    found = variant_of(fitting.file)
    asked = fitting.config.variant
    return f": the file is {found}, and {asked} was asked for" if found not in (None, asked) else ""


def _fit_heads(fitting: _Fitting) -> None:
    before, after = fitting.file.num_classes + 1, fitting.config.num_classes + 1
    for key, value in fitting.state.items():
        if key.startswith(_HEADS) and before != after and value.shape[:1] == (before,):
            fitting.state[key] = resize_class_rows(value, after)


def _fit_queries(fitting: _Fitting) -> None:
    wanted = (fitting.config.num_queries, fitting.config.group_detr)
    for key in QUERY_TABLES:
        table = fitting.state.get(key)
        if table is None or table.dim() != 2:
            continue  # reported as missing, or refused by its shape
        held = _queries_and_groups(fitting, len(table))
        if held == wanted or (held is None and len(table) == math.prod(wanted)):
            continue
        fitted = slice_queries(table, held, wanted)
        if len(fitted) < math.prod(wanted):
            have = f"{held[0]} queries in {held[1]} groups" if held else f"{len(table)} rows"
            raise fitting.refusal(
                f"{key} has {have}, and the model has {wanted[0]} queries in {wanted[1]} groups: it cannot grow",
                "lower model.num_queries or model.group_detr to the file's",
            )
        fitting.sliced_flat |= held is None
        fitting.sliced.append(fitting.replace(key, fitted))


def _queries_and_groups(fitting: _Fitting, rows: int) -> tuple[int, int] | None:
    """Queries per group and groups of the file, where it says enough; one follows from the other."""
    queries, groups = (
        value if type(value) is int and value > 0 else None
        for value in (fitting.said("num_queries"), fitting.said("group_detr"))
    )
    if queries is None and groups is not None:
        queries = rows // groups
    if groups is None and queries is not None:
        groups = rows // queries
    return (queries, groups) if queries and groups and queries * groups == rows else None


def _fit_positions(fitting: _Fitting) -> None:
    table, side = fitting.state.get(POSITIONS), fitting.config.positional_encoding_size
    if table is None or table.dim() != 3 or table.shape[0] != 1 or table.shape[1] in (1 + side * side, 0, 1):
        return
    if math.isqrt(table.shape[1] - 1) ** 2 != table.shape[1] - 1:
        return  # not square: refused by its shape
    fitting.resized.append(fitting.replace(POSITIONS, resize_positions(table, side)))


def _fit_channels(fitting: _Fitting) -> None:
    kernel, channels = fitting.state.get(PATCHES), fitting.config.num_channels
    if kernel is not None and kernel.dim() == 4 and kernel.shape[1] == 3 != channels:
        fitting.resized.append(fitting.replace(PATCHES, adapt_channels(kernel, channels)))


def _fit_keypoint_mask(fitting: _Fitting) -> None:
    mask = fitting.state.get(KEYPOINT_MASK)
    if mask is not None and mask.shape != fitting.target[KEYPOINT_MASK].shape:
        del fitting.state[KEYPOINT_MASK]
        fitting.dropped.append(KEYPOINT_MASK)


def _require_shapes(fitting: _Fitting, taken: Mapping[str, Tensor]) -> None:
    hint = "choose the file's variant and sizes, or weights of the model's"
    for key, value in taken.items():
        wanted = fitting.target[key]
        if value.shape != wanted.shape:
            found, need = shape_text(tuple(value.shape)), shape_text(tuple(wanted.shape))
            raise fitting.refusal(f"{key} is {found}, and in the model {need}{_variants(fitting)}", hint)
        if value.dtype != wanted.dtype and not (value.is_floating_point() and wanted.is_floating_point()):
            raise fitting.refusal(f"{key} is of type {value.dtype}, and in the model of {wanted.dtype}", hint)


def _require_body(fitting: _Fitting, taken: Mapping[str, Tensor]) -> None:
    """A head alone, or the weights of something else that has one, is not worth starting from."""
    for part, prefix in (("encoder", ENCODER), ("decoder layers", DECODER_LAYERS)):
        if not any(key.startswith(prefix) for key in taken):
            raise fitting.refusal(
                f"has no {part} (no {prefix}*){_variants(fitting)}", "give the weights of a whole detector"
            )
