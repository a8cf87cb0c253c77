"""Pascal VOC: its layouts, what its files may say, and the same dataset as in COCO."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfdetr_core.data.checks import CHECKS
from rfdetr_core.data.findings import Finding, Report
from rfdetr_core.data.formats.layout import read_folder
from rfdetr_core.data.formats.voc import parse_voc, read_voc_folder
from rfdetr_core.data.validation import validate
from rfdetr_core.errors import DatasetError
from tests.data.helpers import picture
from tests.data.layouts import small_voc, voc_xml

Edit = Callable[[Path], Any]


def findings(folder: Path) -> dict[str, Finding]:
    report = Report()
    try:
        validate(read_folder(folder), report)
    except DatasetError as error:
        assert report.errors and "\n" not in str(error)
    return report.findings


def text(name: str, content: str | bytes) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return edit


def xml(*objects: str, filename: str = "a.png", more: str = "") -> Edit:
    return text("Annotations/a.xml", voc_xml(filename, *objects, more=more))


CAT = "<name>cat</name><bndbox><xmin>4</xmin><ymin>4</ymin><xmax>24</xmax><ymax>14</ymax></bndbox>"
DOG = CAT.replace("cat", "dog").replace("24", "30")
CASES: dict[str, list[tuple[Edit, list[str], Edit]]] = {
    "unreadable-labels": [
        (xml(CAT, DOG, more="<open>"), ["train/a.xml: not XML at line 1, column"], xml(CAT, DOG)),
        (text("Annotations/a.xml", b""), ["train/a.xml: not XML at line 1, column 1: no element found"], xml(CAT, DOG)),
        (
            text("Annotations/a.xml", "<html/>"),
            ['train/a.xml: its root is "html", not annotation'],
            text("Annotations/a.xml", "<annotation/>"),
        ),
        (
            text("Annotations/a.xml", '<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>'),
            ["train/a.xml: has a document type, which is not read"],
            xml(CAT, DOG),
        ),
        (
            text("Annotations/a.xml", "<annotation>" + "<a>" * 50_000),
            ["train/a.xml: nested too deeply to be an annotation"],
            xml(CAT, DOG, more="<a><b><c/></b></a>"),
        ),
        (
            text("ImageSets/Main/train.txt", "a\nb\nc\n"),
            ["train/c.xml: cannot be read: No such file or directory"],
            text("ImageSets/Main/train.txt", "a\nb\n"),
        ),
    ],
    "bad-object": [
        (
            xml(CAT, DOG, "<name>dog</name><bndbox><xmin>x</xmin></bndbox>"),
            ['train/a.xml object 3: xmin is "x"'],
            xml(CAT, DOG),
        ),
        (xml(CAT, DOG, "<name>dog</name>"), ["train/a.xml object 3: xmin is null"], xml(CAT, DOG)),
        (xml(CAT, DOG, "<bndbox/>"), ['train/a.xml object 3: its name is ""'], xml(CAT, DOG)),
    ],
    "difficult-object": [
        (
            xml(CAT + "<difficult>1</difficult>", DOG),
            ["train/a.xml object 1"],
            xml(CAT + "<difficult>0</difficult>", DOG),
        )
    ],
    "image-by-other-name": [
        (xml(CAT, DOG, filename="old.png"), ['train/a.xml: "old.png", took "a.png"'], xml(CAT, DOG)),
        (xml(CAT, DOG, filename="/home/x/z.png"), ['train/a.xml: "z.png", took "a.png"'], xml(CAT, DOG)),
    ],
    "missing-image": [
        (lambda folder: (folder / "JPEGImages" / "a.png").unlink(), ["train/a.png"], xml(CAT, DOG)),
    ],
    "unlisted-image": [
        (
            text("ImageSets/Main/train.txt", "a\n"),
            ["train/b.png", "valid/b.png"],
            text("ImageSets/Main/train.txt", "a\nb\n"),
        )
    ],
    "box-empty": [
        (
            xml(CAT, DOG, CAT.replace("24", "4")),
            ["train/a.png: a.xml object 3 [4.0, 4.0, 0.0, 10.0]"],
            xml(CAT, DOG, CAT.replace("24", "5")),
        )
    ],
    "unknown-category": [
        (
            text("Annotations/v.xml", voc_xml("v.png", CAT.replace("cat", "eel"))),
            ["valid: annotation 1 names category 2 'eel'"],
            text("Annotations/v.xml", voc_xml("v.png", CAT)),
        )
    ],
}
FLAT = [(code, *case) for code, cases in CASES.items() for case in cases]


@pytest.mark.parametrize(
    ("code", "provoke", "rows", "near_miss"), FLAT, ids=[f"{i}-{c[0]}" for i, c in enumerate(FLAT)]
)
def test_each_finding_and_its_near_miss(
    tmp_path: Path, code: str, provoke: Edit, rows: list[str], near_miss: Edit
) -> None:
    small_voc(tmp_path / "a")
    assert findings(tmp_path / "a") == {}
    provoke(tmp_path / "a")
    found = findings(tmp_path / "a")[code]
    assert len(found.rows) == len(rows)
    assert all(row.startswith(start) for row, start in zip(found.rows, rows, strict=True)), found.rows
    small_voc(tmp_path / "b")
    near_miss(tmp_path / "b")
    assert code not in findings(tmp_path / "b")


def test_parts_of_an_object_have_boxes_of_their_own(tmp_path: Path) -> None:
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    said = parse_voc(voc_xml("a.png", CAT + part).encode())
    assert [o.values["xmin"] for o in said.objects] == ["4"] and said.objects[0].values["name"] == "cat"


def test_a_folder_per_split_with_the_files_beside_the_images(tmp_path: Path) -> None:
    """Roboflow's export; the folder that archives wrap around it does not matter."""
    flat = small_voc(tmp_path / "flat")
    root = tmp_path / "made" / "export"
    for split, stems in (("train", ("a", "b")), ("valid", ("v",))):
        (root / split).mkdir(parents=True)
        for stem in stems:
            shutil.copy(flat / "Annotations" / f"{stem}.xml", root / split)
            shutil.copy(flat / "JPEGImages" / f"{stem}.png", root / split)
    one, other = read_folder(flat), read_folder(tmp_path / "made")
    for split in ("train", "valid"):
        assert one[split].file_names == other[split].file_names
        assert np.array_equal(one[split].bboxes, other[split].bboxes)
    assert other["train"].root == root


def test_without_image_sets_all_is_train_and_the_rest_by_hash(tmp_path: Path) -> None:
    folder = small_voc(tmp_path / "d")
    shutil.rmtree(folder / "ImageSets")
    assert {name: len(split.file_names) for name, split in read_voc_folder(folder).items()} == {"train": 3}


def test_trainval_stands_for_an_absent_train(tmp_path: Path) -> None:
    folder = small_voc(tmp_path / "d")
    (folder / "ImageSets" / "Main" / "train.txt").rename(folder / "ImageSets" / "Main" / "trainval.txt")
    text("ImageSets/Main/cat_train.txt", "a 1\nb -1\n")(folder)  # VOC's lists per class
    assert read_voc_folder(folder)["train"].file_names == ("a.png", "b.png")


@pytest.mark.parametrize("name", ["../a", "..", "x/y", "a\\b"])
def test_an_image_set_that_leads_out_is_refused(tmp_path: Path, name: str) -> None:
    folder = small_voc(tmp_path / "d")
    text("ImageSets/Main/train.txt", f"a\n{name}\n")(folder)
    with pytest.raises(DatasetError, match=re.escape("train.txt: ")):
        read_voc_folder(folder)


@given(st.binary(max_size=300) | st.text(max_size=200).map(lambda t: f"<annotation>{t}</annotation>".encode()))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        parse_voc(data)
    except DatasetError as error:
        assert error.message.isprintable() or "\n" not in error.message


def test_codes_are_known() -> None:
    assert set(CASES) <= set(CHECKS)


@pytest.mark.slow
def test_blood_cells_are_the_same_in_all_four_forms(bccd: Path) -> None:
    """Boxes per image and class name; the source's own splits are others, so images are compared over all of them."""
    found: dict[str, dict[tuple[str, str], np.ndarray[Any, Any]]] = {}
    empty: dict[str, list[str]] = {}
    for form in ("coco", "yolo", "raw_coco", "raw_voc"):
        report = Report()
        class_map, splits = validate(read_folder(bccd / form), report, pixels=False)
        boxes = {}
        for split in splits.values():
            for i, name in enumerate(split.table.file_names.tolist()):
                rows = split.table.rows(i)
                for label in range(len(class_map)):
                    own = split.table.boxes[rows][split.table.labels[rows] == label]
                    boxes[name, class_map.names[label]] = own[np.lexsort(own.round().T)]
        found[form] = boxes
        rows_of = report.findings["box-empty"].rows if "box-empty" in report.findings else []
        empty[form] = sorted(re.findall(r"BloodImage_\d+\.jpg", " ".join(rows_of)))
    assert len(found["coco"]) == 364 * 3 and sum(map(len, found["coco"].values())) == 4886
    for form in ("yolo", "raw_coco", "raw_voc"):
        assert found[form].keys() == found["coco"].keys()
        for key, boxes in found["coco"].items():
            other = found[form][key]
            assert len(other) == len(boxes), key
            np.testing.assert_allclose(other, boxes, rtol=0, atol=0.01)
    two = ["BloodImage_00338.jpg", "BloodImage_00343.jpg"]
    assert empty == {"coco": [], "yolo": [], "raw_coco": two, "raw_voc": two}


def test_declared_sizes_decide_the_frame_of_a_turned_image(tmp_path: Path) -> None:
    """VOC declares sizes: boxes drawn on the stored frame are found by them, as in COCO."""
    folder = small_voc(tmp_path / "d")
    image = picture(64, 48, seed=9)
    tags = image.getexif()
    tags[0x0112] = 6
    image.save(folder / "JPEGImages" / "a.png", exif=tags)
    assert findings(folder)["exif-ignored"].rows == ["train/a.png: 6"]
