"""What all configuration classes share: strict keys, and integers that forgive KFP's floats."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Config(BaseModel):
    """Base of every section: unknown keys are errors, instances never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)


def _whole_number(value: Any) -> Any:
    """Reject booleans, and accept 3.0 for 3: KFP turns integers inside lists and dicts into floats."""
    if isinstance(value, bool):
        raise ValueError("a whole number is wanted, not a boolean")
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


Int = Annotated[int, BeforeValidator(_whole_number)]
"""An integer field of a configuration."""
