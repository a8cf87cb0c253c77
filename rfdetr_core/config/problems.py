"""What is wrong with a configuration, in words for people.

One problem names the dotted field, the value, the rule and the nearest legal value; all problems of a
configuration make one ConfigError of one line.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, get_args

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from rfdetr_core.errors import ConfigError

SHOWN = 5
"""Problems spelled out in one message; the rest is counted."""

_UNKNOWN = object()


class Problem(NamedTuple):
    """One thing that is wrong: the dotted field and what to say of it."""

    field: str
    text: str

    def __str__(self) -> str:
        return f"{self.field}: {self.text}" if self.field else self.text


def not_allowed(field: str, value: object, rule: str, use: object = _UNKNOWN) -> Problem:
    """A value breaks a rule; `use` is a legal value, or a tuple of two."""
    # What belongs to notify may be a secret pasted into the wrong place.
    shown = "this value" if field.startswith("notify.") else show(value)
    return Problem(field, f"{shown} is not allowed: {rule}{_advice(use)}")


def _advice(use: object) -> str:
    if use is _UNKNOWN:
        return ""
    choices = use if isinstance(use, tuple) else (use,)
    return f" (use {' or '.join(show(choice) for choice in choices)})"


def show(value: object) -> str:
    """A value as one would write it in YAML, without credentials, at most 60 characters."""
    if isinstance(value, float) and not math.isfinite(value):
        text = str(value)
    else:
        try:
            text = json.dumps(value, ensure_ascii=False, default=str)
        except (TypeError, ValueError):
            text = type(value).__name__
    text = redact(text)
    return text if len(text) <= 60 else text[:59] + "…"


def redact(text: str) -> str:
    """Hide the user part and the query of every URI in the text: both are where credentials stand."""
    text = re.sub(r"(://)[^/\s\"]*@", r"\1***@", text)  # up to the last @: a password may hold one as it is
    return re.sub(r"(://[^\s\"?]*)\?[^\s\"]*", r"\1?***", text)


def broken_rule(kind: str, rule: str, use: object = _UNKNOWN) -> PydanticCustomError:
    """What a field's validator raises; the field and the value are added by pydantic."""
    context = {"rule": rule} if use is _UNKNOWN else {"rule": rule, "use": use}
    return PydanticCustomError(kind, "{rule}", context)


def refusal(problems: Sequence[Problem]) -> PydanticCustomError:
    """What a validator of a whole section raises; fields are named relative to that section."""
    text = "; ".join(map(str, problems))
    return PydanticCustomError("refused", "{text}", {"text": text, "problems": list(problems)})


def config_error(error: ValidationError, cls: type[BaseModel], source: str = "") -> ConfigError:
    """Turn what pydantic found into one line."""
    found = [p for details in error.errors(include_url=False) for p in _explain(details, cls)]
    return as_config_error(found, source)


def as_config_error(problems: Iterable[Problem], source: str = "") -> ConfigError:
    """All problems in one line, at most five spelled out; `source` is the file or call they came from."""
    lines = [str(problem) for problem in problems]
    if len(lines) > SHOWN:
        lines[SHOWN:] = [f"and {len(lines) - SHOWN} more"]
    prefix = f"{redact(source)}: " if source else ""
    return ConfigError(prefix + "; ".join(lines))


def _explain(details: ErrorDetails, cls: type[BaseModel]) -> Iterator[Problem]:
    location = details["loc"]
    field = dotted(location)
    context = details.get("ctx", {})
    kind = details["type"]
    if kind == "refused":
        for problem in context["problems"]:
            yield Problem(f"{field}.{problem.field}" if field else problem.field, problem.text)
    elif kind == "extra_forbidden":
        yield Problem(field, "unknown field; " + _suggestion(location, cls))
    elif kind == "missing":
        yield Problem(field, "required, and not given")
    else:
        info = _field_info(location, cls)
        yield not_allowed(field, details["input"], *_rule(details, info))


def dotted(location: Iterable[int | str]) -> str:
    """('model', 'projector_scale', 0) → model.projector_scale[0]."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".")


def _rule(details: ErrorDetails, info: FieldInfo | None) -> tuple[str, object]:
    """The rule that was broken, and a legal value near to the given one."""
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    default = info.default if info is not None and not info.is_required() else _UNKNOWN
    if "use" in context:
        return context["rule"], context["use"]
    if kind == "whole_number":
        return context["rule"], _whole_numbers_near(value, info) or default
    if kind in ("greater_than_equal", "less_than_equal"):
        return _range(info, context), context["ge" if kind == "greater_than_equal" else "le"]
    if kind in ("greater_than", "less_than"):
        return _range(info, context), default
    if kind == "literal_error":
        choices = _literals(info)
        return f"must be one of {', '.join(map(show, choices))}", _closest(value, choices, default)
    if kind == "text":
        return context["rule"], str(value) if isinstance(value, (int, float)) else default
    if kind == "bool_type":
        words = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
        meant = bool(value) if value in (0, 1) else words.get(str(value).lower(), default)
        return "must be true or false", meant
    plain = {
        "model_type": "must be a mapping of fields",
        "dict_type": "must be a mapping",
        "tuple_type": "must be a list",
        "string_too_short": "must not be empty",
        "too_short": "must not be empty",
    }
    return context.get("rule") or plain.get(kind, details["msg"]), default if _is_plain(default) else _UNKNOWN


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _whole_numbers_near(value: object, info: FieldInfo | None) -> tuple[int, ...]:
    if isinstance(value, str):
        return (int(value),) if re.fullmatch(r"[+-]?[0-9]{1,18}", value) else ()
    if isinstance(value, bool) or not isinstance(value, float) or not math.isfinite(value):
        return ()
    bounds = info.metadata if info is not None else []
    least = max((b.ge for b in bounds if isinstance(b, Ge)), default=-math.inf)  # type: ignore[type-var]
    most = min((b.le for b in bounds if isinstance(b, Le)), default=math.inf)  # type: ignore[type-var]
    return tuple(n for n in (math.floor(value), math.ceil(value)) if least <= n <= most)  # type: ignore[operator]


def _range(info: FieldInfo | None, context: dict[str, Any]) -> str:
    """The whole allowed range of a field, not only the side that was crossed."""
    bounds: dict[str, Any] = {}
    for item in info.metadata if info is not None else ():
        for kind, name in ((Ge, "ge"), (Gt, "gt"), (Le, "le"), (Lt, "lt")):
            if isinstance(item, kind):
                bounds[name] = getattr(item, name)
    bounds = bounds or context  # an element of a list: only the crossed side is known
    words = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}
    return "must be " + " and ".join(f"{words[name]} {show(bounds[name])}" for name in words if name in bounds)


def _literals(info: FieldInfo | None) -> list[object]:
    """The choices of a Literal, also inside Optional and tuple."""

    def walk(annotation: Any) -> Iterator[object]:
        for argument in get_args(annotation):
            if get_args(argument):
                yield from walk(argument)
            elif argument is type(None):
                yield None
            elif not isinstance(argument, type) and argument is not Ellipsis:
                yield argument

    return list(walk(info.annotation)) if info is not None else []


def _closest(value: object, choices: Sequence[object], default: object) -> object:
    names = [choice for choice in choices if isinstance(choice, str)]
    near = difflib.get_close_matches(str(value), names, n=1)
    if near:
        return near[0]
    return default if default in choices else choices[0]


def _field_info(location: Sequence[int | str], cls: type[BaseModel]) -> FieldInfo | None:
    info: FieldInfo | None = None
    for part in location:
        if not isinstance(part, str):
            return info
        info = cls.model_fields.get(part)
        if info is None:
            return None
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            cls = info.annotation
    return info


def _suggestion(location: Sequence[int | str], cls: type[BaseModel]) -> str:
    """The field that was probably meant: the same name elsewhere, else a near one here, else a near one elsewhere."""
    *section, name = [str(part) for part in location]
    paths = list(field_paths(cls))
    prefix = ".".join([*section, ""]) if section else ""
    siblings = [p.removeprefix(prefix) for p in paths if p.startswith(prefix) and "." not in p.removeprefix(prefix)]
    elsewhere = {path.rpartition(".")[2]: path for path in paths}
    if name in elsewhere:
        return f"did you mean {elsewhere[name]}?"
    near = difflib.get_close_matches(name, siblings, n=1)
    if near:
        return f"did you mean {prefix}{near[0]}?"
    near = difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.8)
    if near:
        return f"did you mean {elsewhere[near[0]]}?"
    return f"known here: {', '.join(sorted(siblings))}"


def field_paths(cls: type[BaseModel]) -> Iterator[str]:
    """Every dotted field of a configuration class, sections included, in the order of the classes."""
    for name, info in cls.model_fields.items():
        yield name
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from (f"{name}.{below}" for below in field_paths(info.annotation))
