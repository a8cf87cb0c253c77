"""Class names given by hand, against those of the dataset."""

from __future__ import annotations

import warnings

import pytest

from rfdetr_core.data.annotations import ClassMap
from rfdetr_core.data.class_names import check_class_names, named
from rfdetr_core.errors import ConfigError

DATASET = ("RBC", "WBC", "Platelets")


@pytest.mark.parametrize(
    "given",
    [None, DATASET, ("red", "white", "Platelets"), ("a", "b", "c"), ("WBC", "RBC", "cells")],
    ids=["none", "same", "one renamed", "all renamed", "renamed and moved"],
)
@pytest.mark.parameter("class_names")
def test_the_same_names_and_renames_are_fine(given: tuple[str, ...] | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_class_names(given, DATASET)


@pytest.mark.parameter("class_names")
def test_another_order_is_a_warning_that_gives_the_dataset_s() -> None:
    with pytest.warns(UserWarning, match=r"^train.class_names: .* another order: 'RBC', 'WBC', 'Platelets'; labels"):
        check_class_names(("WBC", "RBC", "Platelets"), DATASET)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (("cells", *DATASET), "'cells' is no class"),
        (("RBC", "x", "WBC", "Platelets"), "'x' is no class"),
        (("a", "RBC", "b", "WBC", "Platelets", "below"), "'a', 'b' is no class"),
    ],
)
@pytest.mark.parameter("class_names")
def test_names_that_shift_the_dataset_s_are_an_error_that_names_them(given: tuple[str, ...], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_class_names(given, DATASET)
    assert str(caught.value).startswith(f"train.class_names: {named} of the dataset and moves those behind it")
    assert "the dataset has 'RBC', 'WBC', 'Platelets' (leave it out" in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        ("RBC", "WBC"),
        (*DATASET, "below"),
        ("cells", "WBC", "RBC", "Platelets"),
        ("a", "b"),
        ("cells", "RBC", "WBC", "x"),
    ],
    ids=["fewer", "one more at the end", "one more, another order", "two others", "not all of the dataset's"],
)
@pytest.mark.parameter("class_names")
def test_another_number_of_names_is_a_warning(given: tuple[str, ...]) -> None:
    with pytest.warns(UserWarning, match=rf"^train.class_names: {len(given)} names, the dataset has 3: 'RBC', 'WBC'"):
        check_class_names(given, DATASET)


def test_long_lists_are_cut_in_messages() -> None:
    names = tuple(f"c{i}" for i in range(20))
    with pytest.warns(UserWarning, match=r"'c7' and 12 more; labels follow it$"):
        check_class_names(("a",), names)


def test_as_many_other_names_rename() -> None:
    class_map = ClassMap((3, 7), ("cat", "dog"))
    assert named(class_map, ("Katze", "Hund")) == ClassMap((3, 7), ("Katze", "Hund"))
    assert named(class_map, None) is class_map
    with pytest.warns(UserWarning, match="labels follow the dataset"):
        assert named(class_map, ("dog", "cat")) is class_map
    with pytest.warns(UserWarning, match="3 names, the dataset has 2"):
        assert named(class_map, ("cat", "dog", "cow")) is class_map
