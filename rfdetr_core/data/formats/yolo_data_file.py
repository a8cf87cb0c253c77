"""Reads data.yaml of a YOLO dataset: the classes, and the folders of the splits.

Every value is taken as it is written, as text: a class may be called `no`, `on` or `1e3`, which YAML itself would
read as other things.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yaml.error import MarkedYAMLError

from rfdetr_core.data.formats.source import UNPRINTABLE, read_annotation_file, shown
from rfdetr_core.errors import DatasetError

NAMES = ("data.yaml", "data.yml")


MAX_MB = 16  # of a data file


class Declared(NamedTuple):
    """Where a split's images are, as the data file has it: folders, or text files that list images."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class DataFile:
    """What data.yaml says; a class's label is its position in `names`."""

    path: Path
    names: tuple[str, ...]
    folders: dict[str, Declared]  # by train, valid, test
    declared_base: str | None  # `path`

    def base(self, root: Path) -> Path:
        """What the declared folders are relative to: `path` where there is such a folder, else the dataset's."""
        base = root / (self.declared_base or "")
        return base if is_folder(base) else root


class _TextLoader(yaml.BaseLoader):
    """All scalars are text, tags are ignored; a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys: set[str] = set()
        if not isinstance(node, yaml.MappingNode):
            raise MarkedYAMLError(problem="a mapping is wanted", problem_mark=node.start_mark)
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                raise MarkedYAMLError(problem=f"duplicate key {shown(key.value)}", problem_mark=key.start_mark)
            keys.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return super().construct_mapping(node, deep)


def is_folder(path: Path) -> bool:
    """Whether there is such a folder; what the system refuses to look up (a name too long, ...) is none."""
    try:
        return path.is_dir()
    except OSError:
        return False


def find_data_file(folder: Path) -> Path | None:
    """data.yaml, or data.yml, of a dataset's folder."""
    return next((folder / name for name in NAMES if (folder / name).is_file()), None)


def read_data_file(path: Path) -> DataFile:
    """Read data.yaml.

    Raises:
        DatasetError: unreadable, not YAML; `names` is neither a list nor a mapping from 0 to N-1; `nc` is not their
            number; a split is neither a text nor a list of texts; the labels are of poses.
    """
    document = _load(path)
    if "kpt_shape" in document:
        raise DatasetError(f"{path}: kpt_shape: labels of poses, not of boxes", hint="export it for detection")
    names = _names(document.get("names"), path)
    count = document.get("nc")
    if not _is_nothing(count) and count != str(len(names)):
        raise DatasetError(f"{path}: nc is {shown(count)}, names has {len(names)}", hint="mend the one that is wrong")
    folders = {}
    for key, split in (("train", "train"), ("valid", "valid"), ("val", "valid"), ("test", "test")):
        value = document.get(key)
        if not _is_nothing(value):
            values = value if isinstance(value, list) and value else [value]
            folders[split] = Declared(key, tuple(_text(part, key, path) for part in values))
    base = document.get("path")
    return DataFile(path, names, folders, None if _is_nothing(base) else _text(base, "path", path))


def _load(path: Path) -> dict[str, Any]:
    try:
        document = yaml.load(read_annotation_file(path, path.parent, MAX_MB).decode("utf-8-sig"), _TextLoader)
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not UTF-8 at byte {error.start}", hint="save it as UTF-8") from error
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise DatasetError(f"{path}: not YAML: {place}{error.problem or error.context}", hint="mend it") from error
    except yaml.YAMLError as error:
        raise DatasetError(f"{path}: not YAML: {' '.join(str(error).split())}", hint="mend it") from error
    except RecursionError as error:
        raise DatasetError(f"{path}: nested too deeply to describe a dataset", hint="export it again") from error
    if not isinstance(document, dict):
        raise DatasetError(f"{path}: keys and values are wanted: names, train, val", hint="export it again")
    return document


def _names(value: Any, path: Path) -> tuple[str, ...]:
    if value is None or not isinstance(value, list | dict) or not value:
        raise DatasetError(f"{path}: names must list the classes", hint="write names: [cat, dog]")
    names = _in_order(value, path) if isinstance(value, dict) else value
    for label, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise DatasetError(f"{path}: names[{label}] must be a text, found {_kind(name)}")
        if UNPRINTABLE.search(name):
            raise DatasetError(f"{path}: names[{label}] {shown(name)} holds an unprintable character")
    return tuple(names)


def _in_order(value: dict[Any, Any], path: Path) -> list[Any]:
    by_label: dict[int, Any] = {}
    for key, name in value.items():
        if not isinstance(key, str) or re.fullmatch(r"\d{1,9}", key, re.ASCII) is None:
            raise DatasetError(f"{path}: names: the key {shown(str(key))} is not a label", hint="number them from 0")
        if int(key) in by_label:
            raise DatasetError(f"{path}: names: the label {int(key)} stands twice", hint="number them from 0")
        by_label[int(key)] = name
    absent = next(label for label in range(len(by_label) + 1) if label not in by_label)
    if absent < len(by_label):
        raise DatasetError(f"{path}: names: the label {absent} is missing", hint="number them from 0 without gaps")
    return [by_label[label] for label in range(len(by_label))]


def _text(value: Any, key: str, path: Path) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DatasetError(f"{path}: {key} must name folders or lists of images, found {_kind(value)}")
    if UNPRINTABLE.search(value):
        raise DatasetError(f"{path}: {key}: {shown(value)} holds an unprintable character")
    return value


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value in ("", "~", "null", "Null", "NULL"))


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "an empty text"
    return "a list" if isinstance(value, list) else "a mapping" if isinstance(value, dict) else "nothing"
