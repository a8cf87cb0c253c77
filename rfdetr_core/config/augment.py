"""The vocabulary of `train.aug_config`: names, parameters and ranges, checked before anything is loaded.

Names and parameters are those of the published package (training spec 3.5), as far as they are offered; what they
do to pixels and boxes stands in `rfdetr_core.data.augment`. Whatever is not offered is an error, never skipped.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rfdetr_core.config.base import plain_json, whole_number
from rfdetr_core.config.problems import Problem, as_config_error, broken_rule, not_allowed, refusal

AugConfig = Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""{name: {parameter: value}}, or a list of such mappings of one entry, which may repeat a name."""

Span = tuple[float, float]
"""A value is drawn uniformly between the two, once per image."""


@dataclass(frozen=True)
class Augmentation:
    """One entry of `aug_config` with every parameter filled in; numbers are spans."""

    name: str
    p: float
    values: Mapping[str, Any] = field(default_factory=dict)
    inner: tuple[Augmentation, ...] = ()  # of a container


class _IllegalError(ValueError):
    """What a parameter must be; the text is the rule."""


class _Parameter(NamedTuple):
    default: Any  # as one would write it
    read: Callable[[Any], Any]  # to the form that augmentation uses; raises _IllegalError


# ---- how parameters are read ------------------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: Any, least: float, most: float, what: str = "a number") -> float:
    if not _is_number(value) or not least <= value <= most:
        raise _IllegalError(f"must be {what} from {least:g} to {most:g}")
    return float(value)


def _span(least: float, most: float, alone: Callable[[float], Span]) -> Callable[[Any], Span]:
    """[low, high] within the limits, or a number that `alone` turns into them."""

    def read(value: Any) -> Span:
        given = value if isinstance(value, list) else [value]
        numbers = all(map(_is_number, given))
        if numbers and len(given) == (2 if isinstance(value, list) else 1):
            low, high = alone(float(value)) if given is not value else map(float, given)
            if least <= low <= high <= most:
                return low, high
        raise _IllegalError(f"must be [low, high] within {least:g} to {most:g}, or a number")

    return read


def _both_ways(value: float) -> Span:
    return -abs(value), abs(value)


def _fixed(value: float) -> Span:
    return value, value


def _around_one(value: float) -> Span:
    return max(0.0, 1.0 - value), 1.0 + value


def _per_axis(span: Callable[[Any], Span]) -> Callable[[Any], tuple[Span, Span | None]]:
    """One span, or {"x": ..., "y": ...}: spans of x and of y, the latter None where only one was given."""

    def read(value: Any) -> tuple[Span, Span | None]:
        if not isinstance(value, dict):
            return span(value), None
        if set(value) != {"x", "y"}:
            raise _IllegalError('must be [low, high], a number, or {"x": ..., "y": ...}')
        return span(value["x"]), span(value["y"])

    return read


def _kernel(value: Any) -> tuple[int, int]:
    """Odd sides in pixels, smallest and largest; a number alone is the largest, from 3 on."""
    given = value if isinstance(value, list) and len(value) == 2 else [min(3, value) if _is_odd(value) else 3, value]
    if not all(map(_is_odd, given)) or given[0] > given[1]:
        raise _IllegalError("must be an odd number of pixels from 1 to 99, or [smallest, largest] of such")
    return int(given[0]), int(given[1])


def _is_odd(value: Any) -> bool:
    return _is_number(value) and 1 <= value <= 99 and bool(value % 2 == 1)


def _fill(value: Any) -> tuple[float, float, float]:
    if isinstance(value, list) and len(value) == 3:
        red, green, blue = (_number(v, 0, 255, "three numbers, each") for v in value)
        return red, green, blue
    return (_number(value, 0, 255, "a number, or three,"),) * 3


def _yes_or_no(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _IllegalError("must be true or false")
    return value


def _only_true(value: Any) -> bool:
    if value is not True:
        raise _IllegalError("must be true: the size of a batch is the detector's")
    return value


def _count(value: Any) -> int:
    try:
        number = int(whole_number(value))
    except ValueError:
        number = 0
    if number < 1:
        raise _IllegalError("must be a whole number of at least 1")
    return number


def _probability(value: Any) -> float:
    return _number(value, 0, 1)


# ---- what is offered --------------------------------------------------------------------------------------

_FILL = _Parameter(0, _fill)
_LIMIT = _span(-1, 1, _both_ways)
_FACTOR = _span(0, 10, _around_one)
_SCALE = _span(0.1, 10, _fixed)
_SHARE = _span(0, 1, _fixed)

TRANSFORMS: dict[str, dict[str, _Parameter]] = {
    "HorizontalFlip": {},
    "VerticalFlip": {},
    "Rotate": {"limit": _Parameter(90, _span(-360, 360, _both_ways)), "fill": _FILL},
    "Affine": {
        "scale": _Parameter(1.0, _per_axis(_SCALE)),
        "translate_percent": _Parameter(0.0, _per_axis(_span(-1, 1, _fixed))),
        "rotate": _Parameter(0.0, _span(-360, 360, _fixed)),
        "shear": _Parameter(0.0, _per_axis(_span(-60, 60, _fixed))),
        "fill": _FILL,
    },
    "ShiftScaleRotate": {
        "shift_limit": _Parameter(0.0625, _LIMIT),
        "scale_limit": _Parameter(0.1, _span(-0.9, 9, _both_ways)),
        "rotate_limit": _Parameter(45, _span(-360, 360, _both_ways)),
        "fill": _FILL,
    },
    "Perspective": {"scale": _Parameter([0.05, 0.1], _span(0, 0.3, _fixed)), "keep_size": _Parameter(True, _only_true)},
    "ColorJitter": {
        "brightness": _Parameter([0.8, 1.2], _FACTOR),
        "contrast": _Parameter([0.8, 1.2], _FACTOR),
        "saturation": _Parameter([0.8, 1.2], _FACTOR),
        "hue": _Parameter([-0.5, 0.5], _span(-0.5, 0.5, _both_ways)),
    },
    "ToGray": {},
    "RandomBrightnessContrast": {
        "brightness_limit": _Parameter(0.2, _LIMIT),
        "contrast_limit": _Parameter(0.2, _LIMIT),
    },
    "GaussianBlur": {
        "blur_limit": _Parameter([3, 7], _kernel),
        "sigma_limit": _Parameter([0.5, 3.0], _span(0.01, 100, _fixed)),
    },
    "GaussNoise": {
        "std_range": _Parameter([0.2, 0.44], _SHARE),
        "mean_range": _Parameter(0.0, _span(-1, 1, _fixed)),
        "per_channel": _Parameter(True, _yes_or_no),
    },
    "Blur": {"blur_limit": _Parameter([3, 7], _kernel)},
    "Sharpen": {"alpha": _Parameter([0.2, 0.5], _SHARE), "lightness": _Parameter([0.5, 1.0], _span(0, 10, _fixed))},
    "Equalize": {},
}
"""Every transform and its parameters beside `p`, which is 0.5 unless given."""

CONTAINERS: dict[str, dict[str, _Parameter]] = {
    "OneOf": {},
    "SomeOf": {"n": _Parameter(1, _count)},
    "Sequential": {},
}
"""What holds other transforms, as a list or in "transforms"; `p` is 1 unless given."""

NOT_OFFERED = {"CLAHE": "Equalize"}
"""Names of the published package that are left out, and what comes near."""


# ---- presets (training spec 3.5) --------------------------------------------------------------------------

_FLIP = {"HorizontalFlip": {"p": 0.5}}

CONSERVATIVE: dict[str, Any] = {
    **_FLIP,
    "RandomBrightnessContrast": {"brightness_limit": 0.1, "contrast_limit": 0.1, "p": 0.3},
}
"""For fewer than 500 training images."""

AGGRESSIVE: dict[str, Any] = {
    **_FLIP,
    "VerticalFlip": {"p": 0.5},
    "Rotate": {"limit": 45, "p": 0.5},
    "Affine": {
        "scale": [0.8, 1.2],
        "translate_percent": [-0.1, 0.1],
        "rotate": [-15, 15],
        "shear": [-5, 5],
        "p": 0.5,
    },
    "ColorJitter": {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.1, "p": 0.5},
}
"""For more than 2,000 training images."""

AERIAL: dict[str, Any] = {
    **_FLIP,
    "VerticalFlip": {"p": 0.5},
    "Rotate": {"limit": [90, 90], "p": 0.5},
    "RandomBrightnessContrast": {"brightness_limit": 0.15, "contrast_limit": 0.15, "p": 0.4},
}
"""Seen from above there is no upside."""

INDUSTRIAL: dict[str, Any] = {
    "HorizontalFlip": {"p": 0.3},
    "RandomBrightnessContrast": {"brightness_limit": 0.2, "contrast_limit": 0.2, "p": 0.5},
    "GaussianBlur": {"blur_limit": 3, "p": 0.3},
    "GaussNoise": {"std_range": [0.01, 0.05], "p": 0.3},
}
"""Light, focus and sensors vary, the scene does not."""


# ---- reading ----------------------------------------------------------------------------------------------


def parse_augmentations(config: AugConfig | None) -> tuple[Augmentation, ...]:
    """The entries of `aug_config` in their order; none for null and for an empty one.

    Raises:
        ConfigError: an unknown name or parameter, or a value out of its range.
    """
    entries, problems = _read_entries(_with_lists({} if config is None else config), "")
    if problems:
        raise as_config_error([Problem(f"aug_config.{p.field}".rstrip("."), p.text) for p in problems])
    return tuple(entries)


def legal_aug_config(value: Any) -> Any:
    """Validator of the field: plain JSON in the vocabulary, as it was given; tuples become lists."""
    if value is None:
        return None
    if not isinstance(value, (Mapping, list, tuple)):
        raise broken_rule("aug_config", "must be a mapping of transforms, or a list of them", None)
    plain = plain_json(_with_lists(value))
    _, problems = _read_entries(plain, "")
    if problems:
        raise refusal(problems)
    return plain


def _with_lists(value: Any) -> Any:
    """Tuples, as Python code likes to write ranges, become lists."""
    if isinstance(value, Mapping):
        return {key: _with_lists(inner) for key, inner in value.items()}
    return [_with_lists(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _read_entries(config: Any, path: str) -> tuple[list[Augmentation], list[Problem]]:
    entries: list[Augmentation] = []
    problems: list[Problem] = []
    for where, name, given in _named(config, path, problems):
        if name in CONTAINERS:
            entry = _container(where, name, given, problems)
        elif name in TRANSFORMS:
            entry = Augmentation(name, *_values(where, given, TRANSFORMS[name], 0.5, problems))
        else:
            problems.append(Problem(where, _unknown_name(name)))
            continue
        entries.append(entry)
    return entries, problems


def _named(config: Any, path: str, problems: list[Problem]) -> Iterator[tuple[str, str, Any]]:
    """Where it stands, name and parameters of every entry."""
    if isinstance(config, dict):
        for name, given in config.items():
            yield f"{path}.{name}".lstrip("."), name, given
        return
    for position, item in enumerate(config):
        where = f"{path}[{position}]" if path else str(position)
        if not isinstance(item, dict) or len(item) != 1:
            rule = "must be a mapping of one transform to its parameters"
            problems.append(not_allowed(where, item, rule, {"HorizontalFlip": {"p": 0.5}}))
            continue
        ((name, given),) = item.items()
        yield f"{where}.{name}", name, given


def _container(where: str, name: str, given: Any, problems: list[Problem]) -> Augmentation:
    settings = {"transforms": given} if isinstance(given, list) else given
    if not isinstance(settings, dict) or not isinstance(settings.get("transforms"), (list, dict)):
        rule = 'must be a list of transforms, or {"transforms": [...]}'
        problems.append(not_allowed(where, given, rule))
        return Augmentation(name, 1.0)
    rest = {key: value for key, value in settings.items() if key != "transforms"}
    p, values = _values(where, rest, CONTAINERS[name], 1.0, problems)
    inner, found = _read_entries(settings["transforms"], f"{where}.transforms")
    problems += found
    if not settings["transforms"]:
        problems.append(Problem(f"{where}.transforms", "must not be empty"))
    elif name in ("OneOf", "SomeOf") and not found:
        possible = sum(entry.p > 0 for entry in inner)
        if possible < values.get("n", 1):
            text = f"has {possible} with p above 0 to choose from, and {values.get('n', 1)} are asked for"
            problems.append(Problem(f"{where}.transforms", text))
    return Augmentation(name, p, values, tuple(inner))


def _values(
    where: str, given: Any, parameters: Mapping[str, _Parameter], default_p: float, problems: list[Problem]
) -> tuple[float, dict[str, Any]]:
    """`p` and every other parameter in the form that augmentation uses, defaults filled in."""
    known = {**parameters, "p": _Parameter(default_p, _probability)}
    if not isinstance(given, dict):
        problems.append(not_allowed(where, given, "must be a mapping of parameters", {"p": default_p}))
        given = {}
    for name in sorted(set(given) - set(known), key=str):
        near = difflib.get_close_matches(str(name), known, n=1)
        advice = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        problems.append(Problem(f"{where}.{name}", f"unknown parameter; {advice}"))
    values = {}
    for name, parameter in known.items():
        try:
            values[name] = parameter.read(given.get(name, parameter.default))
        except _IllegalError as error:
            problems.append(not_allowed(f"{where}.{name}", given[name], str(error), parameter.default))
            values[name] = parameter.read(parameter.default)
    return values.pop("p"), values


def _unknown_name(name: str) -> str:
    if name in NOT_OFFERED:
        return f"is not offered; {NOT_OFFERED[name]} comes near"
    known = [*TRANSFORMS, *CONTAINERS]
    lower = {each.lower(): each for each in known}
    near = difflib.get_close_matches(name.lower(), lower, n=1)
    if near:
        return f"unknown transform; did you mean {lower[near[0]]}?"
    return f"unknown transform; known are {', '.join(known)}"
