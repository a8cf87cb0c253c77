"""YAML of what goes to a cluster: the same bytes every time, whatever else the process has imported."""

from __future__ import annotations

from typing import Any

import yaml
from yaml.representer import SafeRepresenter


class _Dumper(yaml.SafeDumper):
    """SafeDumper as PyYAML has it: hera changes, for the whole process, how that one writes text of several lines."""


_Dumper.add_representer(str, SafeRepresenter.represent_str)


def dump_documents(*documents: Any) -> str:
    """Documents, one after the other."""
    text: str = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=True, allow_unicode=True, width=120)
    return text
