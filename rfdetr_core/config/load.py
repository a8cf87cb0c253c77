"""From a YAML file and what was typed in the pipeline's UI to a RunConfig, and back to YAML."""

from __future__ import annotations

import copy
import json
import os
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from rfdetr_core.config.base import home_expanded
from rfdetr_core.config.device import is_device, train_settings
from rfdetr_core.config.model import VARIANTS
from rfdetr_core.config.problems import redact, show
from rfdetr_core.config.run import RunConfig
from rfdetr_core.config.train import MOVED_TO_MODEL, OWN_CHECKPOINT
from rfdetr_core.config.unbuilt import refuse_other_channels
from rfdetr_core.config.yaml_text import DEEPEST, read_scalar, read_yaml, write_yaml
from rfdetr_core.errors import ConfigError

_LOCATIONS = (("dataset", "uri"), ("model", "pretrain_weights"), ("train", "resume"))


def load_run_config(uri: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a configuration from a path, file:// or s3:// URI and lay the overrides over it.

    Raises:
        ConfigError: the text is not YAML, or what it says is not legal; one line with every problem.
        StorageAccessError: there is no such file.
        StorageUnavailableError: the store does not answer.
    """
    from rfdetr_core.storage import location  # boto3 is slow to import, and only needed here

    source = os.fspath(uri)
    return parse_run_config(location(source).read_bytes(), overrides, source=source)


def parse_run_config(
    text: str | bytes, overrides: Mapping[str, Any] | None = None, *, source: str = "config.yaml"
) -> RunConfig:
    """The same, from the YAML text itself; `source` names it in errors. Relative paths become absolute.

    Raises:
        ConfigError: the text is not YAML, or what it says is not legal; one line with every problem.
    """
    values = read_yaml(text, source)
    if values is None:
        raise ConfigError(f"{redact(source)}: is empty", hint="give at least name and dataset.uri")
    if not isinstance(values, dict):
        raise ConfigError(f"{redact(source)}: must be a mapping (name, dataset, model, train, …), not {_kind(values)}")
    if overrides is not None and not isinstance(overrides, Mapping):
        raise ConfigError(f"overrides: must be a mapping, not {_kind(overrides)}")
    if overrides:
        _check_overrides(overrides, "overrides")
        values = merge(_without_superseded(values, overrides), overrides)
        source += " with overrides"
    _refuse_weights_of_the_web(values, source)
    config = RunConfig.parse(_with_absolute_paths(values), source=source)
    refuse_other_channels(config.model, "a pipeline")
    return config


def merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A new mapping: mappings are merged key by key, everything else (lists, null) is replaced."""
    merged = dict(copy.deepcopy(base))
    for key, value in overrides.items():
        if isinstance(value, Mapping):
            below = merged.get(key)
            merged[key] = merge(below if isinstance(below, Mapping) else {}, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def parse_overrides(text: str) -> dict[str, Any]:
    """The JSON object a person types in the pipeline's UI; blank text is none.

    Raises:
        ConfigError: not JSON, not an object, or a key twice in one object.
    """
    if not text.strip():
        return {}
    try:
        values = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ConfigError(f"overrides: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"overrides: {str(error).partition(';')[0]}") from None
    if not isinstance(values, dict):
        raise ConfigError('overrides: must be a JSON object, such as {"train": {"epochs": 3}}')
    return values


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Overrides from texts such as train.epochs=3.

    The value is a plain YAML scalar; one that begins with [, {, " or ' is YAML of that kind; no value is null.

    Raises:
        ConfigError: no =, an empty name, a value that is not YAML, or a field set twice.
    """
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        path, text = path.strip(), text.strip()
        if not equals:
            raise ConfigError(f"--set {assignment}: no = in it", hint="write it as train.epochs=3")
        *sections, name = path.split(".")
        if not all([*sections, name]):
            raise ConfigError(f"--set {path}=…: not a dotted field", hint="write it as train.epochs=3")
        read = read_yaml if text[:1] in ("[", "{", '"', "'") else read_scalar
        value = read(text, f"--set {path}=…")
        owner = overrides
        for section in sections:
            owner = owner.setdefault(section, {})
            if not isinstance(owner, dict):
                raise ConfigError(f"--set {path}=…: {section} is set to a value as well")
        if name in owner:
            raise ConfigError(f"--set {path}=…: is set twice")
        owner[name] = value
    return overrides


def dump_yaml(config: RunConfig) -> str:
    """The resolved configuration: every field, in the order of the classes; read back, it is equal."""
    notes = ["Every value of this run, as resolved before it began."]
    model = config.model
    if model.requested_resolution is not None:
        notes.append(
            f"Resolution {model.requested_resolution} was asked for and {model.resolution} is used: the next "
            f"multiple of patch_size x num_windows = {model.block}."
        )
    notes.append("Not built yet, left as they are:")
    lines = [line for note in notes for line in textwrap.wrap(note, 100)]
    lines += [f"  {field}" for field in config.not_built()]
    return "".join(f"# {line}\n" for line in lines) + write_yaml(config.as_dict())


def _check_overrides(value: Any, path: str, depth: int = 0) -> None:
    if depth > DEEPEST:
        raise ConfigError(f"overrides: nested deeper than {DEEPEST}")
    if isinstance(value, Mapping):
        for key, below in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{path}: the key {show(key)} must be text")
            _check_overrides(below, f"{path}.{key}", depth + 1)
    elif isinstance(value, list):
        for below in value:
            _check_overrides(below, f"{path}[]", depth + 1)


def _without_superseded(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Drop from a file what only followed from a value that is overridden, or contradicts it in another spelling.

    A resolved file names every field: with another variant, the old one's values must not stay as if they had
    been chosen; with another resolution, neither must the positional table or the record of rounding.
    """
    model, train = _mapping(values.get("model")), _mapping(values.get("train"))
    new_model, new_train = _mapping(overrides.get("model")), _mapping(overrides.get("train"))
    gone = set()
    if {"variant", "resolution", "patch_size", "num_windows"} & set(new_model) or "resolution" in new_train:
        gone |= _derived_positions(model)
        asked = model.pop("requested_resolution", None)
        if asked is not None:
            model["resolution"] = asked
    old = model.get("variant") or "nano"
    if new_model.get("variant", old) != old:
        gone |= {k for k, value in VARIANTS.get(str(old), {}).items() if model.get(k) == _as_read(value)}
    for name in (*MOVED_TO_MODEL, "resolution"):
        if new_train.get(name) is not None:
            gone.add(name)
        if new_model.get(name) is not None:
            train.pop(name, None)
    if new_train.get("accelerator") is not None:
        gone.add("device")
    if is_device(new_model.get("device")):
        train = {name: value for name, value in train.items() if name not in train_settings(new_model["device"])}
    if "amp_dtype" in new_train:
        gone.add("amp")
    kept = {"model": {name: value for name, value in model.items() if name not in gone}, "train": train}
    return {name: kept.get(name, value) if isinstance(value, dict) else value for name, value in values.items()}


def _kind(value: object) -> str:
    # Never the text itself: a wrong file may be one of secrets.
    return "a list" if isinstance(value, list) else "text" if isinstance(value, str) else "a single value"


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _derived_positions(model: Mapping[str, Any]) -> set[str]:
    """positional_encoding_size, where it is what the resolution makes it."""
    sides = [model.get(name) for name in ("resolution", "patch_size", "positional_encoding_size")]
    resolution, patch, positions = (side if isinstance(side, int) and side > 0 else 0 for side in sides)
    return {"positional_encoding_size"} if patch and positions == resolution // patch else set()


def _as_read(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _with_absolute_paths(values: dict[str, Any]) -> dict[str, Any]:
    """Stages run in folders of their own: a relative path means the folder in which it was given."""
    result = dict(values)
    for section, name in _LOCATIONS:
        fields = result.get(section)
        if not isinstance(fields, dict):
            continue
        path = fields.get(name)
        if isinstance(path, str) and path not in OWN_CHECKPOINT and "://" not in path:
            result[section] = {**fields, name: str(home_expanded(path).absolute())}
    return result


def _refuse_weights_of_the_web(values: dict[str, Any], source: str) -> None:
    """Stages see no network but the store (DESIGN section 9): weights are brought there once."""
    given = _mapping(values.get("model")).get("pretrain_weights")
    if isinstance(given, str) and given.lower().startswith(("http://", "https://")):
        raise ConfigError(
            f"{redact(source)}: model.pretrain_weights: {show(given)} is not reached from a pipeline",
            hint="bring it into the store once, with rfdetr-pipeline weights put, and give the s3:// URI it prints",
        )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"duplicate key {show(key)}")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number that JSON has")
