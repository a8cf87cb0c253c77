"""What all configuration classes share: strict keys, exact types, errors in one line.

The constructor is for code and raises pydantic's ValidationError; `parse` is the door for what people write
and raises ConfigError.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationError

from rfdetr_core.config.problems import broken_rule, config_error


class Config(BaseModel):
    """Base of every section: unknown keys are errors, instances never change."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        defer_build=True,  # validators are built at first use: importing stays cheap in every stage
    )

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, source: str = "") -> Self:
        """Build from plain values; `source` names them in errors.

        Raises:
            ConfigError: one line with every problem: dotted field, value, rule, a legal value.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise config_error(error, cls, source) from None


def whole_number(value: Any) -> Any:
    """Accept 3.0 for 3: KFP turns integers inside lists and dicts into floats. Refuse text and booleans."""
    if isinstance(value, bool):
        raise broken_rule("whole_number", "must be a whole number, not a boolean")
    whole = isinstance(value, Integral) or (
        isinstance(value, Real) and math.isfinite(value) and value == math.floor(value)
    )
    if not whole:
        raise broken_rule("whole_number", "must be a whole number")
    number = int(value)
    if abs(number) >= 2**63:
        raise broken_rule("whole_number", "must be a whole number of at most 64 bits")
    return number


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise broken_rule("number", "must be a number, not a boolean")
    if not isinstance(value, Real):
        raise broken_rule("number", "must be a number")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        finite = False
    if not finite:
        raise broken_rule("number", "must be a finite number")
    return value if isinstance(value, (int, float)) else float(value)


def _text(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise broken_rule("text", "must be text")
    if re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", value):
        # Lone surrogates cannot be written to a UTF-8 file.
        raise broken_rule("text", "must be one line of printable characters")
    return value


def plain_json(value: Any) -> Any:
    """A copy of a value that any JSON reader would give back; refuse anything else."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError, RecursionError):  # UnicodeEncodeError is a ValueError
        copy = object()
    else:
        copy = json.loads(text)
    if copy != value:
        raise broken_rule("json", "must be plain JSON: text, finite numbers, booleans, null, lists, mappings")
    return copy


def home_expanded(path: str) -> Path:
    """A path with ~ replaced; a ~name that is no user's is a file name like any other."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _uri(value: str) -> str:
    if "://" not in value:
        return value
    if not re.match(r"(file:///|s3://[^/])", value):
        raise broken_rule("uri", "must be a path, file:///path or s3://bucket/key")
    if re.match(r"s3://[^/]*[@?]", value):
        raise broken_rule("uri", "must not hold credentials; the environment gives them")
    return value


Int = Annotated[int, Strict(), BeforeValidator(whole_number)]
"""An integer field of a configuration."""

Float = Annotated[float, Strict(), BeforeValidator(_number)]
"""A finite floating-point field; integers are taken, text and booleans are not."""

Bool = Annotated[bool, Strict()]
"""true or false, and nothing else."""

Text = Annotated[str, Field(min_length=1), BeforeValidator(_text)]
"""One line of text, not empty."""

Uri = Annotated[Text, AfterValidator(_uri)]
"""Where something lies: a path, file:///path or s3://bucket/key, without credentials."""
