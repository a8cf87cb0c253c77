"""docs/parameters.md: a table of every parameter, made from the configuration classes.

`make docs` writes it, and a test holds it current.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rfdetr_core.config.model import VARIANTS
from rfdetr_core.config.problems import show
from rfdetr_core.config.run import RunConfig
from rfdetr_core.config.train import API_ONLY
from rfdetr_core.config.unbuilt import NOT_BUILT

SEED_TRAIN = {
    "dataset_dir", "output_dir", "epochs", "resume", "seed",
    "batch_size", "grad_accum_steps",
    "auto_batch_target_effective", "auto_batch_max_targets_per_image", "auto_batch_ema_headroom",
    "lr", "lr_encoder", "lr_scheduler", "lr_drop", "lr_min_factor", "warmup_epochs",
    "resolution", "weight_decay", "drop_path", "use_ema", "checkpoint_interval",
    "early_stopping", "early_stopping_patience", "early_stopping_min_delta", "early_stopping_use_ema",
    "tensorboard", "wandb", "mlflow", "project", "run",
    "eval_max_dets", "eval_interval", "log_per_class_metrics", "progress_bar",
    "num_workers", "pin_memory", "persistent_workers", "prefetch_factor", "aug_config",
    "accelerator", "fp16_eval", "compute_val_loss", "compute_test_loss",
    "group_detr", "ia_bce_loss", "segmentation_head", "num_select",
}  # fmt: skip
"""Fields of `train` that the seed document names."""

SEED_MODEL = {"gradient_checkpointing", "group_detr", "ia_bce_loss", "segmentation_head", "num_select"}
"""Those that it gives to the model's constructor."""

OURS = {
    "train": {"max_hours", "checkpoint_minutes", "skip_corrupt"},
    "model": {"variant", "requested_resolution"},
}
"""Fields of these two sections that neither the seed document nor the published package has."""

CHECKED_BY_A_FUNCTION = {"train.batch_size": ("≥ 1",), "train.devices": ("≥ 1", '`"auto"`')}
"""Ranges that no annotation tells."""

_HEAD = """# Parameters

Every field of a run's YAML, section by section; those of `train` are also the keyword arguments of `model.train(...)`,
those of `model` (but for `variant`) of the constructors. A name that is not here is an error that names the nearest
one; so is a value outside its range.

*From*: `seed` is the document that this project began with, `1.11` the published package rfdetr 1.11, `ours` neither.
Where the seed and 1.11 differ, the seed's meaning and default hold. *Not built* means that only the named values are
accepted until it is.

Written by `make docs` from the classes in `rfdetr_core/config`.
"""


def markdown() -> str:
    """The whole page."""
    return "\n".join([_HEAD, *_run(), *(line for name in _sections() for line in _section(name)), *_variants()])


def default_text(info: FieldInfo) -> str:
    """A default as one would write it in YAML; a field without one is required, or the variant's."""
    return "required" if info.is_required() else show(info.default)


def _sections() -> dict[str, type[BaseModel]]:
    found = {name: info.annotation for name, info in RunConfig.model_fields.items()}
    return {name: kind for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}


def _run() -> Iterator[str]:
    yield from ("## The run", "", "| name | meaning |", "|---|---|")
    for name, info in RunConfig.model_fields.items():
        shown = f"[`{name}`](#{name})" if name in _sections() else f"`{name}`"
        yield f"| {shown} | {_cell(info.description)} |"
    yield ""


def _section(section: str) -> Iterator[str]:
    yield from (f"## {section}", "")
    yield "| name | type | default | range | from | meaning |"
    yield "|---|---|---|---|---|---|"
    for name, info in _sections()[section].model_fields.items():
        cells = (
            f"`{name}`",
            _type(info.annotation),
            _default(section, name, info),
            _range(section, name, info),
            _origin(section, name),
            " ".join(filter(None, (_cell(info.description), _limits(section, name)))),
        )
        yield f"| {' | '.join(cells)} |"
    yield ""


def _variants() -> Iterator[str]:
    """What each variant fills in."""
    names = list(VARIANTS)
    yield from ("## Variants", "", "What `model.variant` fills in where a field is not given.", "")
    yield f"| name | {' | '.join(names)} |"
    yield f"|---|{'---|' * len(names)}"
    fields = dict.fromkeys(field for fills in VARIANTS.values() for field in fills)
    for field in fields:
        cells = [_value(fills[field]) if field in fills else "" for fills in VARIANTS.values()]
        yield f"| `{field}` | {' | '.join(cells)} |"
    yield ""
    yield "Where `positional_encoding_size` is empty it is `resolution` / `patch_size`."


def _value(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _default(section: str, name: str, info: FieldInfo) -> str:
    if section == "model" and info.is_required():
        return "the variant's"
    text = default_text(info)
    return text if text == "required" else f"`{text}`"


def _type(annotation: Any) -> str:
    """The type in a YAML reader's words."""
    if get_origin(annotation) is Literal:
        return "choice"
    if get_origin(annotation) is tuple:
        member = _type(get_args(annotation)[0])
        return f"list of {member}{'' if member == 'text' else 's'}"
    if get_origin(annotation) is dict:
        return "mapping"
    if hasattr(annotation, "__metadata__"):
        return _type(get_args(annotation)[0])
    if get_args(annotation):
        return " or ".join(dict.fromkeys(_type(member) for member in get_args(annotation)))
    words = {bool: "boolean", int: "whole number", float: "number", str: "text", type(None): "null", Any: "anything"}
    return words[annotation]


def _range(section: str, name: str, info: FieldInfo) -> str:
    """The choices of a field, or the bounds of its number."""
    choices = [f"`{show(choice)}`" for choice in _choices(info.annotation)]
    signs = ((Ge, "ge", "≥"), (Gt, "gt", ">"), (Le, "le", "≤"), (Lt, "lt", "<"))
    bounds = [
        f"{sign} {getattr(item, bound)}"
        for kind, bound, sign in signs
        for item in info.metadata
        if isinstance(item, kind)
    ]
    return ", ".join([*choices, *bounds, *CHECKED_BY_A_FUNCTION.get(f"{section}.{name}", ())])


def _choices(annotation: Any) -> Iterator[object]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for member in get_args(annotation):
            yield from _choices(member)


def _origin(section: str, name: str) -> str:
    if name in {"train": SEED_TRAIN, "model": SEED_MODEL}.get(section, ()):
        return "seed"
    return "1.11" if section in OURS and name not in OURS[section] else "ours"


def _limits(section: str, name: str) -> str:
    """Where the field works only in part."""
    row = NOT_BUILT.get(f"{section}.{name}")
    if section == "train" and name in API_ONLY:
        return f"In a pipeline {API_ONLY[name]}."
    if row is None:
        return ""
    works = row.works or (_sections()[section].model_fields[name].default,)
    return f"*Not built: {row.missing}; accepted: {', '.join(f'`{show(value)}`' for value in works)}.*"


def _cell(text: str | None) -> str:
    return " ".join((text or "").replace("|", "\\|").replace("<", "&lt;").split())


if __name__ == "__main__":
    sys.stdout.write(markdown() + "\n")
