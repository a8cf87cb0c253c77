"""Judging a dataset: every finding provoked, and its near miss."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from rfdetr_core.data.checks import CHECKS, CheckOptions
from rfdetr_core.data.findings import Finding, Report
from rfdetr_core.data.formats.coco import read_coco_folder
from rfdetr_core.data.formats.source import SourceCategory, SourceSplit
from rfdetr_core.data.images import decode_image
from rfdetr_core.data.pixels import check_pixels
from rfdetr_core.data.preparing import PrepareOptions, dataset_digest
from rfdetr_core.data.survey import ImageFile, Problem, examine
from rfdetr_core.data.validation import build_class_map, validate
from rfdetr_core.errors import DatasetError
from tests.data.helpers import (
    CATEGORIES,
    annotation,
    document,
    encoded,
    image_row,
    picture,
    validated,
    write_dataset,
    write_split,
)

Edit = Callable[[Path], None]


def whole() -> dict[str, Any]:
    """One image with a box of each class: nothing to find."""
    return document(annotations=[annotation(1), annotation(2, category=2)])


def findings(folder: Path) -> dict[str, Finding]:
    """What validation finds; an error must be raised as well, and only then."""
    report = Report()
    try:
        validate(read_coco_folder(folder), report)
    except DatasetError as error:
        assert report.errors, "an error was raised that the report does not hold"
        assert "\n" not in str(error)
    else:
        assert not report.errors
    return report.findings


def annotations(*rows: dict[str, Any]) -> Edit:
    """Further annotations of train."""

    def edit(folder: Path) -> None:
        write_split(folder, "train", {**whole(), "annotations": [*whole()["annotations"], *rows]})

    return edit


def train(**parts: Any) -> Edit:
    return lambda folder: void(write_split(folder, "train", {**whole(), **parts}))


def valid(**parts: Any) -> Edit:
    return lambda folder: void(write_split(folder, "valid", {**whole(), **parts}, seed=2))


def void(_: Any) -> None:
    return None


def copy(source: str, target: str) -> Edit:
    def edit(folder: Path) -> None:
        write_split(folder, "train", {**whole(), "images": [image_row(), image_row(2, "b.png")]})
        shutil.copyfile(folder / source, folder / target)

    return edit


def damage(data: bytes | None, name: str = "a.png") -> Edit:
    """Put these bytes in place of the train image; None: take it away."""

    def edit(folder: Path) -> None:
        write_split(folder, "train", {**whole(), "images": [image_row(1, name)]}, draw=False)
        if data is None:
            (folder / "train" / name).unlink()
        else:
            (folder / "train" / name).write_bytes(data)

    return edit


def linked(target: str) -> Edit:
    """Put a link in place of the train image; a picture lies outside of the dataset, and one in it."""

    def edit(folder: Path) -> None:
        write_split(folder, "train", whole(), draw=False)
        picture(seed=5).save(folder.parent / "elsewhere.png")
        picture(seed=6).save(folder / "train" / "other.png")
        (folder / "train" / "a.png").unlink()
        (folder / "train" / "a.png").symlink_to(target)

    return edit


def boxes_of_class(category: int, count: int, first: int = 100) -> list[dict[str, Any]]:
    """So many boxes of which no two are equal."""
    return [annotation(first + i, category=category, bbox=(4 + i / 10, 4, 20, 10)) for i in range(count)]


def animated() -> bytes:
    frames = [picture(seed=seed) for seed in (1, 2)]
    return encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)


NAN, INF, PNG, JPEG = math.nan, math.inf, encoded(picture()), encoded(picture(), "JPEG")
CORRUPT = PNG[:2000] + bytes(64) + PNG[2064:]
CMYK, DEEP = encoded(picture().convert("CMYK"), "JPEG"), encoded(Image.new("I;16", (64, 48)))
PALETTE, ANIMATED, STILL = encoded(picture().convert("P")), animated(), encoded(picture(), "WEBP")
THIRD = {"id": 3, "name": "bird"}
PARENT = {"id": 0, "name": "animals", "supercategory": "none"}
CHILDREN = [{**row, "supercategory": "animals"} for row in CATEGORIES]
# Of each code: its severity, what provokes it, the rows that are then named, and the nearest that does not.
CASES: dict[str, list[tuple[str, Edit, list[str], Edit]]] = {
    "bad-categories": [
        ("error", train(categories=[]), ["{train}: no categories"], train(categories=CATEGORIES)),
        (
            "error",
            train(categories=[*CATEGORIES, {"id": 2, "name": "bird"}]),
            ["{train}: category id 2 occurs twice"],
            train(categories=[*CATEGORIES, {**PARENT, "id": 4}, {"id": 3, "name": "b", "supercategory": "animals"}]),
        ),
        (
            "error",
            train(categories=[*CATEGORIES, {"id": 3, "name": "dog"}]),
            ["{train}: category name 'dog' occurs twice"],
            train(categories=[*CATEGORIES, {"id": 3, "name": "Dog"}]),
        ),
    ],
    "category-dropped": [
        (
            "note",
            train(categories=[PARENT, *CHILDREN]),
            ["train: id 0 'animals'"],
            train(categories=[PARENT, *CATEGORIES]),
        )
    ],
    "duplicate-image-id": [
        (
            "error",
            train(images=[image_row(1), image_row(1, "b.png")]),
            ["train: 1"],
            train(images=[image_row(1), image_row(2, "b.png")]),
        )
    ],
    "duplicate-annotation-id": [("error", annotations(annotation(2)), ["train: 2"], annotations(annotation(3)))],
    "duplicate-file-name": [
        (
            "error",
            train(images=[image_row(1), image_row(2, "./a.png")]),
            ["train: a.png"],
            train(images=[image_row(1), image_row(2, "sub/a.png")]),
        )
    ],
    "unknown-image": [
        (
            "error",
            annotations(annotation(7, image=2)),
            ["train: annotation 7 names image 2"],
            annotations(annotation(7, image=1)),
        )
    ],
    "unknown-category": [
        (
            "error",
            annotations(annotation(7, category=3)),
            ["train: annotation 7 names category 3"],
            annotations(annotation(7, category=2)),
        ),
        (
            "error",
            valid(categories=[*CATEGORIES, THIRD], annotations=[annotation(9, category=3), annotation(10, category=2)]),
            ["valid: annotation 9 names category 3 'bird'"],
            valid(categories=[*CATEGORIES, THIRD]),
        ),
    ],
    "category-renamed": [
        (
            "error",
            valid(categories=[CATEGORIES[0], {"id": 2, "name": "Dog"}]),
            ["valid: id 2 is 'Dog', in train 'dog'"],
            valid(categories=[CATEGORIES[1], CATEGORIES[0]]),
        )
    ],
    "unreadable-image": [
        ("error", damage(b"text"), ["train/a.png: no image format that is read"], damage(PNG)),
        # in the pixels: found where they are decoded
        ("error", damage(CORRUPT), ["train/a.png: broken data stream when reading image file"], damage(PNG)),
    ],
    "missing-image": [("error", damage(None), ["train/a.png"], damage(PNG))],
    "empty-image": [("error", damage(b""), ["train/a.png"], damage(PNG))],
    "truncated-image": [
        ("error", damage(PNG[:-500]), ["train/a.png: image file is truncated"], damage(PNG)),
        (
            "error",
            damage(JPEG[:-500], "a.jpg"),
            ["train/a.jpg: image file is truncated (118 bytes not processed)"],
            damage(JPEG + bytes(9000), "a.jpg"),  # a camera's padding
        ),
    ],
    "outside-dataset": [
        ("error", linked("../../elsewhere.png"), ["train/a.png"], linked("other.png")),
        ("error", linked("/etc/hostname"), ["train/a.png"], linked("other.png")),
    ],
    "extension-differs": [("warning", damage(JPEG), ["train/a.png: JPEG"], damage(JPEG, "a.JPEG"))],
    "cmyk-image": [("note", damage(CMYK, "a.jpg"), ["train/a.jpg"], damage(JPEG, "a.jpg"))],
    "deep-image": [("note", damage(DEEP), ["train/a.png"], damage(PNG))],
    "palette-image": [("note", damage(PALETTE), ["train/a.png"], damage(PNG))],
    "alpha-image": [("note", damage(encoded(picture().convert("RGBA"))), ["train/a.png"], damage(PNG))],
    "animated-image": [("note", damage(ANIMATED, "a.webp"), ["train/a.webp: 2 frames"], damage(STILL, "a.webp"))],
    "annotation-id-zero": [("note", annotations(annotation(0)), ["train"], annotations(annotation(3)))],
    "mask-only-box": [
        (
            "note",
            annotations(annotation(7, segmentation={"size": [48, 64], "counts": "x"})),
            ["train: annotation 7"],
            annotations(annotation(7, segmentation=[[1, 1, 5, 1, 5, 5]])),
        )
    ],
    "unlisted-image": [
        (
            "warning",
            lambda folder: picture(seed=5).save(folder / "train" / "b.PNG"),
            ["train/b.PNG"],
            lambda folder: void((folder / "train" / "b.png.txt").write_text("")),
        ),
        (
            "warning",
            lambda folder: picture(seed=5).save(made(folder / "train" / "sub") / "b.png"),
            ["train/sub/b.png"],
            train(images=[image_row(), image_row(2, "sub/b.png")]),
        ),
    ],
    "box-not-finite": [
        (
            "error",
            annotations(annotation(7, bbox=[NAN, 0, 1, 1])),
            ["train/a.png: annotation 7 [nan, 0.0, 1.0, 1.0]"],
            annotations(annotation(7, bbox=[0, 0, 1, 1])),
        ),
        (
            "error",
            annotations(annotation(7, bbox=[1e308, 0, 1e308, 1]), annotation(8, bbox=[0, 0, 1, INF])),
            [
                "train/a.png: annotation 7 [1e+308, 0.0, 1e+308, 1.0]",
                "train/a.png: annotation 8 [0.0, 0.0, 1.0, inf]",
            ],
            annotations(annotation(7, bbox=[0, 0, 1, 1])),
        ),
    ],
    "box-empty": [
        (
            "warning",
            annotations(annotation(7, bbox=[5, 5, 0, 9]), annotation(8, bbox=[5, 5, 9, 0])),
            ["train/a.png: annotation 7 [5.0, 5.0, 0.0, 9.0]", "train/a.png: annotation 8 [5.0, 5.0, 9.0, 0.0]"],
            annotations(annotation(7, bbox=[5, 5, 1e-6, 9])),
        ),
    ],
    "box-negative": [
        (
            "warning",
            annotations(annotation(7, bbox=[5, 5, 9, -1])),
            ["train/a.png: annotation 7 [5.0, 5.0, 9.0, -1.0]"],
            annotations(annotation(7, bbox=[5, 5, 9, 1])),
        ),
    ],
    "box-outside": [
        (
            "warning",
            annotations(annotation(7, bbox=[64, 5, 2, 9])),
            ["train/a.png: annotation 7 [64.0, 5.0, 2.0, 9.0]"],
            annotations(annotation(7, bbox=[63.9, 5, 2, 9])),
        ),
    ],
    "box-clipped": [
        (
            "warning",
            annotations(annotation(7, bbox=[-2.1, 5, 9, 9])),
            ["train/a.png: annotation 7 [-2.1, 5.0, 9.0, 9.0]"],
            annotations(annotation(7, bbox=[-2, 5, 9, 9])),
        ),
        (
            "warning",
            annotations(annotation(7, bbox=[50, 40, 9, 10.1])),
            ["train/a.png: annotation 7 [50.0, 40.0, 9.0, 10.1]"],
            annotations(annotation(7, bbox=[50, 40, 9, 10])),
        ),
    ],
    "box-rounded": [
        (
            "note",
            annotations(annotation(7, bbox=[-2, 5, 9, 9])),
            ["train/a.png: annotation 7 [-2.0, 5.0, 9.0, 9.0]"],
            annotations(annotation(7, bbox=[-1e-4, 5, 9, 9])),
        ),
    ],
    "box-oversized": [
        (
            "warning",
            annotations(annotation(7, bbox=[-9, 5, 80, 9])),
            ["train/a.png: annotation 7 [-9.0, 5.0, 80.0, 9.0]"],
            annotations(annotation(7, bbox=[-9, 5, 64, 9])),
        ),
    ],
    "box-repeated": [
        (
            "warning",
            annotations(annotation(7), annotation(8)),
            [f"train/a.png: annotation {i} [4.0, 4.0, 20.0, 10.0]" for i in (7, 8)],
            annotations(annotation(7, category=2, bbox=[4, 4, 20, 11]), annotation(8, iscrowd=1)),
        ),
    ],
    "box-tiny": [
        (
            "warning",
            annotations(annotation(7, bbox=[5, 5, 0.19, 9])),  # of 64 px, at 560 px in patches of 14: 0.119 of one
            ["train/a.png: annotation 7 [5.0, 5.0, 0.19, 9.0]"],
            annotations(annotation(7, bbox=[5, 5, 0.21, 9])),
        ),
    ],
    "class-imbalance": [
        (
            "warning",
            annotations(*boxes_of_class(1, 100)),
            ["train: dog 1 boxes, cat 101"],
            annotations(*boxes_of_class(1, 99)),
        ),
    ],
    "too-many-boxes": [
        (
            "warning",
            annotations(*boxes_of_class(1, 150), *boxes_of_class(2, 149, first=1000)),
            ["train/a.png: 301 boxes, 300 queries"],
            annotations(*boxes_of_class(1, 150), *boxes_of_class(2, 148, first=1000)),
        ),
    ],
    "area-replaced": [
        (
            "warning",
            annotations(annotation(7, area=0), annotation(8, area=-1), annotation(9, area=INF)),
            [f"train/a.png: annotation {i} [4.0, 4.0, 20.0, 10.0]" for i in (7, 8, 9)],
            annotations(annotation(7, area=1e-6), annotation(8), annotation(9, area=None)),
        )
    ],
    "size-differs": [
        (
            "warning",
            train(images=[image_row(1, "a.png", 65, 48)]),
            ["train/a.png: listed 65x48, file 64x48"],
            train(images=[{"id": 1, "file_name": "a.png", "width": None}]),
        )
    ],
    "image-in-two-splits": [
        (
            "warning",
            copy("valid/a.png", "train/b.png"),
            ["valid/a.png = train/b.png"],
            train(images=[image_row(), image_row(2, "b.png")]),
        )
    ],
    "image-repeated": [
        (
            "warning",
            copy("train/a.png", "train/b.png"),
            ["train/b.png = train/a.png"],
            train(images=[image_row(), image_row(2, "b.png")]),
        )
    ],
    "no-boxes": [
        ("error", train(annotations=[]), ["train"], train(annotations=[annotation()])),
        (
            "error",
            train(annotations=[annotation(iscrowd=1)]),
            ["train"],
            train(annotations=[annotation(), annotation(2, iscrowd=1)]),
        ),
        ("error", train(annotations=[annotation(bbox=[5, 5, 0, 9])]), ["train"], train(annotations=[annotation()])),
    ],
    "nothing-to-measure": [
        ("warning", valid(annotations=[]), ["valid"], valid()),
        ("warning", valid(annotations=[annotation(iscrowd=1)]), ["valid"], train(annotations=[annotation()])),
    ],
    "empty-split": [
        (
            "error",
            lambda folder: void(shutil.rmtree(folder / "valid"))
            or void(write_split(folder, "valid", document([], []))),
            ["valid"],
            valid(annotations=[]),
        )
    ],
    "class-absent": [
        ("warning", valid(annotations=[annotation(1)]), ["valid: dog"], valid()),
        ("warning", train(categories=[*CATEGORIES, THIRD]), ["train: bird", "valid: bird"], valid()),
        (
            "warning",
            valid(annotations=[annotation(1), annotation(2, category=2, iscrowd=1)]),
            ["valid: dog"],
            valid(annotations=[annotation(1), annotation(2, category=2, iscrowd=0)]),
        ),
    ],
    "class-untrained": [
        (
            "warning",
            train(annotations=[annotation(1)]),
            ["valid: dog"],
            train(annotations=[annotation(1), annotation(2, category=2)]),
        ),
        (
            "warning",
            train(annotations=[annotation(1), annotation(2, category=2, iscrowd=1)]),
            ["valid: dog"],
            valid(annotations=[annotation(1), annotation(2, category=2, iscrowd=1)]),
        ),
    ],
    "no-objects": [
        (
            "note",
            train(images=[image_row(), image_row(2, "b.png")]),
            ["train/b.png"],
            train(images=[image_row(), image_row(2, "b.png")], annotations=[annotation(1, 1), annotation(2, 2, 2)]),
        )
    ],
    "crowd": [
        (
            "note",
            annotations(annotation(7, iscrowd=1), annotation(8, iscrowd=1)),
            ["train/a.png", "train/a.png"],
            annotations(annotation(7, iscrowd=0)),
        )
    ],
}  # fmt: skip


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


FLAT = [(code, *case) for code, cases in CASES.items() for case in cases]


@pytest.mark.parametrize(
    ("code", "severity", "provoke", "rows", "near_miss"), FLAT, ids=[f"{i}-{case[0]}" for i, case in enumerate(FLAT)]
)
def test_each_finding_and_its_near_miss(
    tmp_path: Path, code: str, severity: str, provoke: Edit, rows: list[str], near_miss: Edit
) -> None:
    write_dataset(tmp_path, whole(), whole())
    assert findings(tmp_path) == {}
    provoke(tmp_path)
    found = findings(tmp_path)[code]
    assert found.severity == severity
    file = tmp_path / "train" / "_annotations.coco.json"
    assert found.rows == [row.replace("{train}", str(file)) for row in rows]
    shutil.rmtree(tmp_path)
    write_dataset(tmp_path, whole(), whole())
    near_miss(tmp_path)
    assert code not in findings(tmp_path)


def test_all_errors_are_found_in_one_go_and_summed_up_in_one_line(tmp_path: Path) -> None:
    write_dataset(
        tmp_path,
        document(
            images=[image_row(1), image_row(2, "gone.png"), image_row(2, "b.png")],
            annotations=[annotation(1), annotation(1, image=9), annotation(3, category=8), annotation(4, category=8)],
        ),
        document(images=[image_row(1, "v.png"), image_row(2, "w.png")]),
    )
    (tmp_path / "train" / "gone.png").unlink()
    (tmp_path / "valid" / "w.png").write_bytes(b"")
    report = Report()
    with pytest.raises(DatasetError) as caught:
        validate(read_coco_folder(tmp_path), report)
    assert {f.code: f.count for f in report.errors} == {
        "duplicate-image-id": 1, "duplicate-annotation-id": 1, "unknown-image": 1, "unknown-category": 2,
        "missing-image": 1, "empty-image": 1,
    }  # fmt: skip
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: image id used twice: train: 2; annotation id used twice: train: 1; ")
    assert message.endswith("and 3 more kinds (report.html lists every row; mend the dataset and run again)")
    assert "\n" not in message


def test_a_bomb_is_refused_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path, whole(), whole())
    report = Report(CheckOptions(max_image_pixels=64 * 48 - 1))
    with pytest.raises(DatasetError, match="too many pixels"):
        validate(read_coco_folder(tmp_path), report)
    words = "64x48, dataset.max_image_pixels"
    assert report.findings["oversized-image"].rows == [f"{split}/a.png: {words}" for split in ("train", "valid")]
    validate(read_coco_folder(tmp_path), Report(CheckOptions(max_image_pixels=64 * 48)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 // 2 - 1)  # Pillow itself refuses above twice its limit
    assert findings(tmp_path)["oversized-image"].count == 2


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("GIF", {}), ("BMP", {}), ("TIFF", {})],
)
def test_a_cut_file_is_refused_or_decodes_all_the_same(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    """What validation lets pass, training can decode; it never lets half a file pass."""
    data, refused = encoded(picture(seed=1000), kind, **options), []
    large = [share * len(data) // 10 for share in range(3, 11)]
    for cut in (*range(1, 40, 3), *large):
        path = tmp_path / f"{cut}.img"
        path.write_bytes(data[:-cut])
        outcome = examine(str(path), 10**6).file
        problem = outcome if isinstance(outcome, Problem) else check_pixels(outcome)
        if problem is not None:
            refused.append(cut)
            assert problem.code in CHECKS
        else:
            assert isinstance(outcome, ImageFile)
            assert decode_image(data[:-cut], outcome.orientation).size == (64, 48)
    assert set(large) <= set(refused)


def test_whatever_a_decoder_raises_is_the_image_s_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path, whole(), whole())

    def load(self: Image.Image) -> None:
        raise IndexError

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    assert findings(tmp_path)["unreadable-image"].rows == ["train/a.png: IndexError", "valid/a.png: IndexError"]


def test_rows_are_lines_that_can_be_written(tmp_path: Path) -> None:
    write_dataset(tmp_path, whole(), whole())
    picture(seed=5).save(tmp_path / "train" / "new\nline \udcff.png")
    picture(seed=6).save(tmp_path / "train" / "名前 é.png")
    rows = findings(tmp_path)["unlisted-image"].rows
    assert rows == ["train/new\\nline \\udcff.png", "train/名前 é.png"]
    assert "\n".join(rows).encode()


def test_progress_counts_every_image(tmp_path: Path) -> None:
    ticks: list[int] = []
    write_dataset(tmp_path, document(images=[image_row(1), image_row(2, "b.png")]), whole())
    validate(read_coco_folder(tmp_path), Report(), progress=ticks.append)
    assert sum(ticks) == 3


# ---- what the table holds ---------------------------------------------------------------------------------


def test_the_table_is_sorted_clipped_and_complete(tmp_path: Path) -> None:
    write_dataset(
        tmp_path,
        document(
            images=[image_row(9, "b.png", 32, 16), image_row(3, "a.png", 64, 48), image_row(5, "empty.png", 8, 8)],
            annotations=[
                annotation(20, 9, 2, (-1, -1, 5, 5), area=7),
                annotation(11, 3, 1, (60, 40, 5, 9.5)),
                annotation(10, 3, 2, (0, 0, 64, 48), iscrowd=1),
                annotation(12, 3, 1, (70, 0, 5, 5)),
            ],
        ),
    )
    _, splits, _ = validated(tmp_path)
    table = splits["train"].table
    assert table.file_names.tolist() == ["a.png", "empty.png", "b.png"]
    assert table.widths.tolist() == [64, 8, 32] and table.heights.tolist() == [48, 8, 16]
    assert table.offsets.tolist() == [0, 2, 2, 3]
    assert table.boxes.tolist() == [[0, 0, 64, 48], [60, 40, 64, 48], [0, 0, 4, 4]]
    assert table.labels.tolist() == [1, 0, 1]
    assert table.areas.tolist() == [64 * 48, 32, 7]  # as annotated, else the clipped box's
    assert table.crowd.tolist() == [True, False, False]
    assert [file.path.name for file in splits["train"].files] == ["a.png", "empty.png", "b.png"]


# ---- class map --------------------------------------------------------------------------------------------


def class_map_of(categories: list[tuple[int, str, str]], used: list[int]) -> list[tuple[int, str]]:
    """(source id, name) in label order."""
    empty = np.empty(0, dtype=np.int64)
    source = SourceSplit(
        name="train",
        root=Path(),
        path=Path("train.json"),
        image_folder=Path(),
        image_ids=empty,
        file_names=(),
        widths=empty,
        heights=empty,
        annotation_ids=empty,
        annotation_images=empty,
        annotation_categories=np.array(used, dtype=np.int64),
        bboxes=np.empty((0, 4)),
        areas=np.empty(0),
        crowd=np.empty(0, dtype=np.bool_),
        categories=tuple(SourceCategory(*row) for row in categories),
    )
    found = build_class_map(source)
    return list(zip(found.source_ids, found.names, strict=True))


CLASS_MAPS = {
    "sorted by id": ([(7, "b", ""), (2, "a", "")], [], [(2, "a"), (7, "b")]),
    "Roboflow's parent goes": ([(0, "cells", "none"), (1, "RBC", "cells")], [1], [(1, "RBC")]),
    "a parent with annotations stays": (
        [(0, "cells", "none"), (1, "RBC", "cells")],
        [0, 1],
        [(0, "cells"), (1, "RBC")],
    ),
    "its own supercategory is no parent": ([(1, "man", "man"), (2, "x", "")], [], [(1, "man"), (2, "x")]),
    "parent and only class of one name": ([(0, "helmet", "none"), (1, "helmet", "helmet")], [1], [(1, "helmet")]),
    "all would go: all stay": ([(1, "a", "b"), (2, "b", "a")], [], [(1, "a"), (2, "b")]),
    "a parent of a parent goes": ([(0, "all", ""), (1, "cells", "all"), (2, "RBC", "cells")], [2], [(2, "RBC")]),
    "none and null name no parent": (
        [(1, "none", ""), (2, "null", "none"), (3, "a", "null")],
        [3],
        [(1, "none"), (2, "null"), (3, "a")],
    ),
    "names are compared whole": ([(0, "cell", "none"), (1, "RBC", "cells")], [1], [(0, "cell"), (1, "RBC")]),
}  # fmt: skip


@pytest.mark.parametrize("case", CLASS_MAPS)
def test_class_map(case: str) -> None:
    categories, used, expected = CLASS_MAPS[case]
    assert class_map_of(categories, used) == expected


def test_ids_as_text_are_the_same_classes(tmp_path: Path) -> None:
    for as_id, folder in ((int, tmp_path / "numbers"), (str, tmp_path / "texts")):
        rows = [annotation(1, as_id(1), as_id(10)), annotation(2, as_id(1), as_id(9))]
        categories = [{"id": as_id(10), "name": "ten"}, {"id": as_id(9), "name": "nine"}]
        content = document([image_row(as_id(1))], rows, categories)
        write_dataset(folder, content, content)
    (class_map, splits, _), (of_texts, splits_of_texts, _) = (
        validated(tmp_path / "numbers"),
        validated(tmp_path / "texts"),
    )
    assert class_map == of_texts
    assert class_map.names == ("nine", "ten")  # as numbers, not as texts
    options = PrepareOptions(None)
    assert dataset_digest(class_map, splits, options) == dataset_digest(of_texts, splits_of_texts, options)


# ---- category ids carry no meaning -------------------------------------------------------------------------

NAMES = ("ant", "bee", "cow", "dog")


def write_with_ids(folder: Path, ids: list[int]) -> None:
    """The same pictures, boxes and names, with these category ids."""
    rng = np.random.default_rng(3)
    for split in ("train", "valid"):
        images = [image_row(i + 1, f"{split}{i}.png", 32, 32) for i in range(3)]
        boxes = [
            annotation(i + 1, int(rng.integers(1, 4)), ids[int(rng.integers(4))], tuple(rng.integers(1, 9, 4).tolist()))
            for i in range(12)
        ]
        categories = [{"id": i, "name": name} for i, name in zip(ids, NAMES, strict=True)]
        write_split(folder, split, document(images, boxes, categories), seed=len(split))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(0, 10**6), min_size=4, max_size=4, unique=True))
def test_category_ids_carry_no_meaning(tmp_path: Path, ids: list[int]) -> None:
    """Permuted ids: the same boxes of the same names. Ids in the same order: the same bytes and labels too."""
    write_with_ids(tmp_path, [1, 2, 3, 4])
    class_map, splits, _ = validated(tmp_path)
    write_with_ids(tmp_path, ids)
    permuted, permuted_splits, _ = validated(tmp_path)

    assert permuted.source_ids == tuple(sorted(ids))
    assert dict(zip(permuted.names, permuted.source_ids, strict=True)) == dict(zip(NAMES, ids, strict=True))
    for name, split in splits.items():
        one, other = split.table, permuted_splits[name].table
        assert [class_map.names[n] for n in one.labels] == [permuted.names[n] for n in other.labels]
        assert np.array_equal(one.boxes, other.boxes) and np.array_equal(one.offsets, other.offsets)

    write_with_ids(tmp_path, sorted(ids))
    ordered, ordered_splits, _ = validated(tmp_path)
    options = PrepareOptions(None)
    assert ordered.names == class_map.names
    assert dataset_digest(class_map, ordered_splits, options) == dataset_digest(class_map, splits, options)
    # ... the digest itself differs by the source ids, which dataset.json tells
    same = ordered.source_ids == class_map.source_ids
    assert (dataset_digest(ordered, ordered_splits, options) == dataset_digest(class_map, splits, options)) == same


# ---- a real dataset ---------------------------------------------------------------------------------------

COUNTS = {
    "train": (255, {"RBC": 2975, "WBC": 257, "Platelets": 246}),
    "valid": (73, {"RBC": 845, "WBC": 76, "Platelets": 91}),
    "test": (36, {"RBC": 333, "WBC": 39, "Platelets": 24}),
}
EMPTY = {"BloodImage_00343.jpg [181.0, 329.0, 0.0, 0.0]", "BloodImage_00338.jpg [504.0, 337.0, 0.0, 0.0]"}


@pytest.mark.slow
def test_blood_cells_are_counted_as_their_readme_says(bccd: Path) -> None:
    class_map, splits, report = validated(bccd / "coco")
    assert class_map.source_ids == (1, 2, 3)
    for name, (images, per_class) in COUNTS.items():
        table = splits[name].table
        assert len(table) == images
        found = np.bincount(table.labels, minlength=3).tolist()
        assert dict(zip(class_map.names, found, strict=True)) == per_class
    assert set(report.findings) == {"category-dropped"}


@pytest.mark.slow
def test_blood_cells_with_their_two_empty_boxes_are_the_same_dataset(bccd: Path) -> None:
    class_map, splits, _ = validated(bccd / "coco")
    raw_map, raw_splits, report = validated(bccd / "raw_coco")
    rows = report.findings["box-empty"].rows
    assert {re.sub(r"^\w+/|: annotation \d+", "", row) for row in rows} == EMPTY
    options = PrepareOptions(600)
    assert dataset_digest(raw_map, raw_splits, options) == dataset_digest(class_map, splits, options)


def test_report_json_holds_all_rows(tmp_path: Path) -> None:
    write_dataset(tmp_path, whole(), whole())
    annotations(*(annotation(10 + i, bbox=[5, 5, 0, 9]) for i in range(300)))(tmp_path)
    _, _, report = validated(tmp_path)
    [row] = json.loads(json.dumps(report.to_json()))
    assert (row["code"], row["severity"], row["count"], len(row["rows"])) == ("box-empty", "warning", 300, 300)
