"""Judges a source dataset: what stops it, what is dropped or mended, what is worth knowing (checks.py has the list).

Nothing is dropped silently: every row stands in the report.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rfdetr_core.data.annotations import SPLITS, ClassMap
from rfdetr_core.data.boxes import ValidSplit, to_table
from rfdetr_core.data.findings import Report
from rfdetr_core.data.formats.source import IMAGE_SUFFIXES, SourceCategory, SourceSplit
from rfdetr_core.data.pixels import check_pixels
from rfdetr_core.data.survey import ImageFile, in_order, survey
from rfdetr_core.errors import DatasetError

Progress = Callable[[int], None]


def build_class_map(train: SourceSplit) -> ClassMap:
    """Labels from the train split (training spec 2.3).

    Categories sorted by id; a category goes when another names it as its supercategory and no annotation
    uses it (the parents that Roboflow adds; in a project of one class, parent and class may share their name).
    If all would go, all stay.

    Raises:
        DatasetError: no categories, an id that occurs twice, or a name that two of the remaining share.
    """
    categories = sorted(train.categories, key=lambda category: category.id)
    if not categories:
        raise DatasetError(f"{train.path}: no categories", hint="export the dataset with its class list")
    _refuse_repeated(train, "id", [c.id for c in categories])
    used = set(np.unique(train.annotation_categories).tolist())
    kept = [c for c in categories if c.id in used or not _is_parent(c, categories)] or categories
    _refuse_repeated(train, "name", [c.name for c in kept])
    return ClassMap(tuple(c.id for c in kept), tuple(c.name for c in kept))


def _is_parent(category: SourceCategory, categories: list[SourceCategory]) -> bool:
    """Whether another category names it as its supercategory; some exporters write "none" or "null" for no parent."""
    if category.name in ("none", "null"):
        return False
    return any(c.supercategory == category.name and c.id != category.id for c in categories)


def _refuse_repeated(train: SourceSplit, what: str, values: list[Any]) -> None:
    for value, n in Counter(values).items():
        if n > 1:
            raise DatasetError(f"{train.path}: category {what} {value!r} occurs twice", hint="make it unique")


def validate(
    splits: dict[str, SourceSplit], report: Report, *, pixels: bool = True, progress: Progress | None = None
) -> tuple[ClassMap, dict[str, ValidSplit]]:
    """Check every split against the class map of train.

    Args:
        pixels: decode every image; False leaves that to whoever prepares the dataset, which decodes them anyway. If
            there are errors they are decoded all the same, so that one report holds everything.
        progress: called with the number of images just looked at.

    Raises:
        DatasetError: with all errors in one line; `report` then holds every row.
    """
    train = splits["train"]
    class_map = _class_map(train, report)
    surveyed: dict[str, list[ImageFile | None]] = {}
    for name in (split for split in SPLITS if split in splits):
        source = splits[name]
        for remark in source.remarks:
            report.add(*remark)
        _check_ids(source, report)
        _check_classes(source, class_map, train.categories, report)
        surveyed[name] = survey(source, report, progress)
        _check_unlisted(source, splits, report)
    if pixels or report.errors:
        for name, files in surveyed.items():
            _drop_undecodable(splits[name], files, report)
    valid: dict[str, ValidSplit] = {}
    if not any(error.code in _NO_TABLE for error in report.errors):
        valid = {name: to_table(splits[name], class_map, files, report) for name, files in surveyed.items()}
    report.raise_errors(str(train.root))
    check_leakage(valid, report)
    check_content(valid, class_map, report)
    report.raise_errors(str(train.root))
    return class_map, valid


_NO_TABLE = {"duplicate-image-id", "duplicate-file-name"}
"""Errors with which annotations have no definite image."""


def _class_map(train: SourceSplit, report: Report) -> ClassMap:
    try:
        class_map = build_class_map(train)
    except DatasetError as error:
        for remark in train.remarks:
            report.add(*remark)
        report.add("bad-categories", [error.message])
        raise
    dropped = [c for c in train.categories if c.id not in class_map.source_ids]
    report.add("category-dropped", (f"{train.name}: id {c.id} {c.name!r}" for c in dropped))
    return class_map


def _check_ids(source: SourceSplit, report: Report) -> None:
    for code, values in (
        ("duplicate-image-id", source.image_ids.tolist()),
        ("duplicate-annotation-id", source.annotation_ids.tolist()),
        ("duplicate-file-name", list(source.file_names)),
    ):
        if len(set(values)) < len(values):
            repeated = [value for value, n in Counter(values).items() if n > 1]
            report.add(code, (f"{source.name}: {value}" for value in repeated))
    if source.lines is None and (source.annotation_ids == 0).any():
        report.add("annotation-id-zero", [source.name])
    known = np.isin(source.annotation_images, source.image_ids)
    report.add(
        "unknown-image",
        (
            f"{source.name}: annotation {a} names image {i}"
            for a, i in zip(source.annotation_ids[~known], source.annotation_images[~known], strict=True)
        ),
    )


def _check_classes(source: SourceSplit, class_map: ClassMap, train: tuple[SourceCategory, ...], report: Report) -> None:
    known = np.isin(source.annotation_categories, class_map.source_ids)
    own = {category.id: f" {category.name!r}" for category in source.categories}
    report.add(
        "unknown-category",
        (
            f"{source.name}: annotation {a} names category {c}{own.get(c, '')}"
            for a, c in zip(source.annotation_ids[~known], source.annotation_categories[~known], strict=True)
        ),
    )
    names = {category.id: category.name for category in train}
    report.add(
        "category-renamed",
        (
            f"{source.name}: id {c.id} is {c.name!r}, in train {names[c.id]!r}"
            for c in source.categories
            if c.id in names and c.name != names[c.id]
        ),
    )


def _drop_undecodable(source: SourceSplit, files: list[ImageFile | None], report: Report) -> None:
    """Decode what is there; what cannot be is reported and becomes None."""
    present = [i for i, file in enumerate(files) if file is not None]
    outcomes = in_order(check_pixels, (file for file in files if file is not None))
    for i, problem in zip(present, outcomes, strict=True):
        if problem is not None:
            report.add(problem.code, [f"{source.name}/{source.file_names[i]}: {problem.why}"])
            files[i] = None


def _check_unlisted(source: SourceSplit, splits: dict[str, SourceSplit], report: Report) -> None:
    # Splits may share a folder, or one's may lie within another's.
    top = str(source.image_folder)
    listed = {
        path for split in splits.values() for name in split.file_names if (path := split.path_of(name)).startswith(top)
    }
    found = []
    for folder, _, names in os.walk(top):
        for name in names:
            path = f"{folder}/{name}"
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and path not in listed:  # noqa: PTH122
                found.append(f"{source.name}/{path[len(top) + 1 :]}")
    report.add("unlisted-image", sorted(found))


def check_leakage(splits: dict[str, ValidSplit], report: Report, *, across: bool = False) -> None:
    """Images of equal bytes; with `across` only those in two splits."""
    seen: dict[str, tuple[str, str]] = {}
    for name, split in splits.items():
        for file_name, file in zip(split.table.file_names.tolist(), split.files, strict=True):
            first, first_name = seen.setdefault(file.sha256, (name, file_name))
            if (first, first_name) != (name, file_name):
                code = "image-repeated" if first == name else "image-in-two-splits"
                if first != name or not across:
                    report.add(code, [f"{name}/{file_name} = {first}/{first_name}"])


def check_content(splits: dict[str, ValidSplit], class_map: ClassMap, report: Report) -> None:
    """What can be said of the labels as a whole."""
    train = splits["train"].table
    if not len(train.boxes[~train.crowd]):
        report.add("no-boxes", ["train"])
    trained = set(train.labels[~train.crowd].tolist())
    queries = report.options.num_queries
    for name, split in splits.items():
        table = split.table
        if not len(table):
            report.add("empty-split", [name])
        counts = np.bincount(table.labels[~table.crowd], minlength=len(class_map))
        present = set(np.flatnonzero(counts).tolist())
        if len(table) and not present and name != "train":
            report.add("nothing-to-measure", [name])
        absent = [class_map.names[label] for label in range(len(class_map)) if label not in present]
        report.add("class-absent", (f"{name}: {class_name}" for class_name in absent))
        unlearned = [class_map.names[label] for label in sorted(present - trained)]
        report.add("class-untrained", (f"{name}: {class_name}" for class_name in unlearned))
        report.add("no-objects", (f"{name}/{f}" for f in table.file_names[table.counts == 0]))
        in_image = np.repeat(np.arange(len(table)), table.counts)
        report.add("crowd", (f"{name}/{f}" for f in table.file_names[in_image[table.crowd]]))
        boxes = np.bincount(in_image[~table.crowd], minlength=len(table))
        crowded = np.flatnonzero(boxes > queries)
        report.add(
            "too-many-boxes",
            (f"{name}/{table.file_names[i]}: {boxes[i]} boxes, {queries} queries" for i in crowded),
        )
        if name == "train":
            _check_imbalance(counts.tolist(), class_map, report)


def _check_imbalance(counts: Sequence[int], class_map: ClassMap, report: Report) -> None:
    most = max(counts, default=0)
    report.add(
        "class-imbalance",
        (
            f"train: {name} {n} boxes, {class_map.names[list(counts).index(most)]} {most}"
            for name, n in zip(class_map.names, counts, strict=True)
            if n and most > n * report.options.max_class_ratio
        ),
    )
