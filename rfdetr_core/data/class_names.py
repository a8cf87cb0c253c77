"""Checks the class names that a training was given against those of its dataset (training spec 2.6)."""

from __future__ import annotations

import warnings

from rfdetr_core.data.annotations import ClassMap
from rfdetr_core.errors import ConfigError


def named(class_map: ClassMap, given: tuple[str, ...] | None) -> ClassMap:
    """The class map under the given names, where they are as many and not the same ones: a rename.

    Raises:
        ConfigError: see `check_class_names`.
    """
    check_class_names(given, class_map.names)
    if given is None or len(given) != len(class_map) or set(given) == set(class_map.names):
        return class_map
    return ClassMap(class_map.source_ids, given)


def check_class_names(given: tuple[str, ...] | None, dataset_names: tuple[str, ...]) -> None:
    """Compare `train.class_names` with the dataset's names; both are in label order, each name stands once.

    Equal names, and as many of which some differ (a rename), are in order. The same names in another order, and
    another number of names, are a UserWarning: labels follow the dataset.

    Raises:
        ConfigError: the dataset's names in their order, and others before the last of them: every name behind one of
            those would stand at another label. It is so where the grouping category of a Roboflow export is listed.
    """
    if given is None or given == dataset_names:
        return
    if len(given) == len(dataset_names):
        if set(given) == set(dataset_names):
            _warn(f"the dataset has these names in another order: {_listed(dataset_names)}; labels follow the dataset")
        return
    extra = [name for name in given if name not in dataset_names]
    in_order = tuple(name for name in given if name in dataset_names) == dataset_names
    above = [name for name in extra if in_order and given.index(name) < given.index(dataset_names[-1])]
    if above:
        raise ConfigError(
            f"train.class_names: {_listed(tuple(above))} is no class of the dataset and moves those behind it to other "
            f"labels; the dataset has {_listed(dataset_names)}",
            hint="leave it out of train.class_names",
        )
    _warn(f"{len(given)} names, the dataset has {len(dataset_names)}: {_listed(dataset_names)}; labels follow it")


def _warn(what: str) -> None:
    warnings.warn(f"train.class_names: {what}", UserWarning, stacklevel=3)


def _listed(names: tuple[str, ...]) -> str:
    shown = ", ".join(repr(name) for name in names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"
