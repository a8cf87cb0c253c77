"""YAML as people mean it: 1e-4 is a number, off is text, and a key stands once.

PyYAML follows YAML 1.1, in which 1e-4 is text, `off` and `no` are booleans, 1:30 is ninety and 2024-01-01 a date.
Here plain values are read by the core schema of YAML 1.2, and written so that readers of both kinds agree.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml
from yaml.error import MarkedYAMLError
from yaml.reader import ReaderError

from rfdetr_core.config.problems import redact, show
from rfdetr_core.errors import ConfigError

_TAG = "tag:yaml.org,2002:"
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
DEEPEST = 50
"""Levels of lists and mappings within each other; a configuration has four."""


class _Reader(yaml.SafeLoader):
    """Core schema of YAML 1.2; no aliases, no tags beyond JSON's types, no key twice."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise _at(event, "aliases are not supported")
        if self.depth > DEEPEST:
            raise _at(event, f"nested deeper than {DEEPEST}")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag != _TAG + "str":
                raise _at(key_node, "a key must be text")
            if key_node.value in keys:
                raise _at(key_node, f"duplicate key {show(key_node.value)}")
            keys.add(key_node.value)
        return super().construct_mapping(node, deep)


def _at(where: yaml.Event | yaml.Node, problem: str) -> MarkedYAMLError:
    return MarkedYAMLError(problem=problem, problem_mark=where.start_mark)  # type: ignore[arg-type]


def _int(loader: _Reader, node: yaml.ScalarNode) -> int:
    try:
        return int(node.value, 0) if node.value.startswith(("0x", "0o")) else int(node.value)
    except ValueError:  # thousands of digits, or a tag on something else
        raise _at(node, f"{show(node.value)} is no whole number") from None


def _float(loader: _Reader, node: yaml.ScalarNode) -> float:
    try:
        return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        raise _at(node, f"{show(node.value)} is no number") from None


def _unsupported(loader: _Reader, node: yaml.Node) -> None:
    raise _at(node, f"the tag {node.tag.replace(_TAG, '!!')} is not supported")


def _bool(loader: _Reader, node: yaml.ScalarNode) -> bool:
    return str(node.value).lower() == "true"


_Reader.yaml_implicit_resolvers = {}
_Reader.yaml_constructors = {
    _TAG + kind: yaml.SafeLoader.yaml_constructors[_TAG + kind] for kind in ("null", "str", "seq", "map")
}
for _name, _pattern in (("null", _NULL), ("bool", _BOOL), ("int", _INT), ("float", _FLOAT)):
    _Reader.add_implicit_resolver(_TAG + _name, re.compile(f"(?:{_pattern.pattern})$"), None)
_Reader.add_constructor(_TAG + "bool", _bool)
_Reader.add_constructor(_TAG + "int", _int)
_Reader.add_constructor(_TAG + "float", _float)
_Reader.add_constructor(None, _unsupported)


class _Writer(yaml.SafeDumper):
    """Quotes all text that a reader of YAML 1.1 or 1.2 would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_list(self, data: Any) -> yaml.SequenceNode:
        return self.represent_sequence(_TAG + "seq", data, flow_style=True)

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # In single quotes PyYAML writes these line breaks as they are, and reads them back as spaces.
        style = '"' if re.search("[\x85\u2028\u2029]", data) else None
        return self.represent_scalar(_TAG + "str", data, style=style)


_Writer.add_representer(list, _Writer.represent_list)
_Writer.add_representer(str, _Writer.represent_str)
_Writer.add_implicit_resolver(_TAG + "int", re.compile(f"(?:{_INT.pattern})$"), None)
_Writer.add_implicit_resolver(_TAG + "float", re.compile(f"(?:{_FLOAT.pattern})$"), None)


def read_yaml(text: str | bytes, source: str) -> Any:
    """Parse one YAML document; `source` names it in errors.

    Raises:
        ConfigError: not UTF-8, or not YAML of the kind described above; with line and column.
    """
    if isinstance(text, bytes):
        text = _decode(text, source)
    try:
        loader = _Reader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except ReaderError as error:
        problem = f"the character U+{_code_point(error.character):04X} is not allowed"
        raise _config_error(source, _place(text, error.position), problem) from None
    except MarkedYAMLError as error:
        raise _explained(error, source) from None


def read_scalar(text: str, source: str) -> Any:
    """A plain YAML value without the rest of YAML's syntax: ` #` and `: ` are part of it.

    Raises:
        ConfigError: a number of thousands of digits.
    """
    loader = _Reader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
    start = yaml.Mark(source, 0, 0, 0, None, 0)
    try:
        return loader.construct_object(yaml.ScalarNode(tag, text, start, start))
    except MarkedYAMLError as error:
        raise _explained(error, source) from None


def write_yaml(values: dict[str, Any]) -> str:
    """Block style, one line per field, in the order of the mapping; `read_yaml` gives the values back."""
    return yaml.dump(values, Dumper=_Writer, sort_keys=False, default_flow_style=False, allow_unicode=True, width=10**6)


def _decode(text: bytes, source: str) -> str:
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = text[: error.start].decode("utf-8")
        raise _config_error(source, _place(before, len(before)), "not UTF-8; save the file as UTF-8") from None


def _explained(error: MarkedYAMLError, source: str) -> ConfigError:
    mark = error.problem_mark or error.context_mark
    problem = error.problem or error.context or "not YAML"
    if problem.startswith("but "):
        problem = f"{error.context}, {problem}"
    return _config_error(source, (mark.line + 1, mark.column + 1) if mark else (1, 1), problem)


def _config_error(source: str, place: tuple[int, int], problem: str) -> ConfigError:
    return ConfigError(f"{redact(source)}: line {place[0]}, column {place[1]}: {problem}")


def _code_point(character: Any) -> int:
    return ord(character) if isinstance(character, str) else int(character)


def _place(text: str, position: int) -> tuple[int, int]:
    before = text[:position]
    return before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
