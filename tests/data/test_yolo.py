"""Reading YOLO folders: label lines, data.yaml, where the folders are, and every finding with its near miss."""

from __future__ import annotations

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

from rfdetr_core.data.annotations import AnnotationTable
from rfdetr_core.data.boxes import ValidSplit
from rfdetr_core.data.checks import CHECKS
from rfdetr_core.data.findings import Finding, Report
from rfdetr_core.data.formats.yolo import LabelBox, LineProblem, read_label_line, read_yolo_folder
from rfdetr_core.data.formats.yolo_data_file import read_data_file
from rfdetr_core.data.validation import validate
from rfdetr_core.errors import DatasetError
from tests.data.helpers import encoded, picture
from tests.data.layouts import small_yolo, write_labels

pytestmark = pytest.mark.parameter("dataset_dir")
Edit = Callable[[Path], Any]

# ---- label lines ------------------------------------------------------------------------------------------

BOXES = {
    "1 0.5 0.5 0.25 0.5": (1, 0.375, 0.25, 0.25, 0.5),
    "\t+1  .5 5e-1 0.25 0.5 \r": (1, 0.375, 0.25, 0.25, 0.5),
    "0 1.001 0 1.001 1": (0, 0.5005, -0.5, 1.001, 1),
    "0 -0.001 0.5 0.5 0.5": (0, -0.251, 0.25, 0.5, 0.5),
    "0 0.5 0.5 0 0.5": (0, 0.5, 0.25, 0, 0.5),
    "0 0.5 0.5 -0.5 0.5": (0, 0.75, 0.25, -0.5, 0.5),
    "2 0.5 0.25 0.75 0.5 0.25 1": (2, 0.25, 0.25, 0.5, 0.75),
    "2 0.1 0.2 0.1 0.2 0.1 0.2 0.3 0.4": (2, 0.1, 0.2, 0.2, 0.2),
}


@pytest.mark.parametrize("line", BOXES)
def test_lines_that_are_objects(line: str) -> None:
    found = read_label_line(line, 3)
    assert isinstance(found, LabelBox)
    assert found == pytest.approx(BOXES[line])


PROBLEMS = {
    "": ("bad-label-line", 'the class "" is not a whole number'),
    "cat 0.5 0.5 0.5 0.5": ("bad-label-line", 'the class "cat" is not a whole number'),
    "0.0 0.5 0.5 0.5 0.5": ("bad-label-line", 'the class "0.0" is not a whole number'),
    "9999999999999999999 0 0 1 1": ("bad-label-line", 'the class "9999999999999999999" is not a whole number'),
    "1": ("bad-label-line", "1 fields where at least 5 belong: class cx cy w h"),
    "1 0.5 0.5 0.5": ("bad-label-line", "4 fields where at least 5 belong: class cx cy w h"),
    "1 0.5 0.5 0.5 0.5 0.9": ("bad-label-line", "5 coordinates: neither a box (4) nor pairs of a polygon"),
    "1 0.5 0.5 x 0.5": ("bad-label-line", '"x" is not a number'),
    "1 0.5 nan 0.5 0.5": ("bad-label-line", '"nan" is not a number'),
    "1 0.5 0.5 -inf 0.5": ("bad-label-line", '"-inf" is not a number'),
    "1 0.5 0.5 1e999 0.5": ("bad-label-line", '"1e999" is not a number'),
    "1 0.5 0.5 0_1 0.5": ("bad-label-line", '"0_1" is not a number'),
    "1 0,5 0,5 0,5 0,5": ("bad-label-line", '"0,5" is not a number'),
    "3 0.5 0.5 0.5 0.5": ("class-out-of-range", "class 3, the data file has 0 to 2"),
    "-1 0.5 0.5 0.5 0.5": ("class-out-of-range", "class -1, the data file has 0 to 2"),
    "0 320 240 64 48": ("coordinate-out-of-range", "320"),
    "0 1.0011 0.5 0.5 0.5": ("coordinate-out-of-range", "1.0011"),
    "0 0.5 -0.0011 0.5 0.5": ("coordinate-out-of-range", "-0.0011"),
    "0 0.5 0.5 0.5 1.5": ("coordinate-out-of-range", "1.5"),
    "0 0.1 0.1 0.2 0.2 0.3 -0.2": ("coordinate-out-of-range", "-0.2"),
}


@pytest.mark.parametrize("line", PROBLEMS)
def test_lines_that_are_none_say_why(line: str) -> None:
    assert read_label_line(line, 3) == LineProblem(*PROBLEMS[line])


FIELDS = st.one_of(
    st.floats(allow_nan=True).map(repr),
    st.floats(-0.1, 1.1).map(repr),
    st.integers(-2, 5).map(str),
    st.text(max_size=4),
)


@settings(max_examples=500)
@given(line=st.text(max_size=40) | st.lists(FIELDS, max_size=10).map(" ".join), classes=st.integers(1, 5))
def test_any_line_is_an_object_in_range_or_a_problem_of_one_line(line: str, classes: int) -> None:
    found = read_label_line(line, classes)
    if isinstance(found, LineProblem):
        assert found.code in CHECKS and found.why.isprintable()
    else:
        assert 0 <= found.label < classes
        assert all(math.isfinite(value) for value in found)
        assert -1 < found.x < 2 and -1 < found.y < 2 and found.w < 1.01 and found.h < 1.01


# ---- data.yaml --------------------------------------------------------------------------------------------

NAMES = {
    "names: [cat, dog]": ("cat", "dog"),
    "names:\n- cat\n- dog\n": ("cat", "dog"),
    "names:\n  1: dog\n  0: cat\n": ("cat", "dog"),
    "names: {'0': cat, 01: dog}": ("cat", "dog"),
    "names: [no, on, 1e3, 007, 1:30, 'null', ~x]": ("no", "on", "1e3", "007", "1:30", "null", "~x"),
    "names: [猫, 'a b', \"c: d\"]": ("猫", "a b", "c: d"),
    "\ufeffnc: 2\nnames: [cat, dog]\nroboflow: {version: 3}": ("cat", "dog"),
    "nc:\nnames: [cat]": ("cat",),
    "names: &n [cat]\nother: *n": ("cat",),
}


@pytest.mark.parametrize("text", NAMES)
def test_names_are_taken_as_they_are_written(tmp_path: Path, text: str) -> None:
    (tmp_path / "data.yaml").write_text(text)
    assert read_data_file(tmp_path / "data.yaml").names == NAMES[text]


BAD: list[tuple[str | bytes, str]] = [
    ("names: [cat", "not YAML: line 1, column 12: "),
    ("a: b: c", "not YAML: line 1, column 5: mapping values are not allowed here"),
    ("names: [a]\nnames: [b]", 'not YAML: line 2, column 1: duplicate key "names"'),
    ("names: {0: a, 0: b}", 'not YAML: line 1, column 15: duplicate key "0"'),
    ("names: [a\x07]", "not YAML: unacceptable character #x0007"),
    ("? [a]\n: b", "not YAML: "),
    ("names: &n [*n]", "not YAML: line 1, column 8: found unconstructable recursive node"),
    (b"names: [\xff]", "not UTF-8 at byte 8 (save it as UTF-8)"),
    ("[" * 20_000, "nested too deeply to describe a dataset"),
    ("", "keys and values are wanted: names, train, val"),
    ("- a", "keys and values are wanted"),
    ("train: a", "names must list the classes (write names: [cat, dog])"),
    ("names: cat", "names must list the classes"),
    ("names: []", "names must list the classes"),
    ("names: {}", "names must list the classes"),
    ("names: [a, '']", "names[1] must be a text, found an empty text"),
    ("names: [a, [b]]", "names[1] must be a text, found a list"),
    ("names: {0: a, 1: {b: c}}", "names[1] must be a text, found a mapping"),
    ('names: ["a\\nb"]', 'names[0] "a\\nb" holds an unprintable character'),
    ("names: {0: a, 2: c}", "names: the label 1 is missing (number them from 0 without gaps)"),
    ("names: {1: a, 2: c}", "names: the label 0 is missing"),
    ("names: {0: a, 00: c}", "names: the label 0 stands twice"),
    ("names: {cat: a}", 'names: the key "cat" is not a label'),
    ("names: {-1: a}", 'names: the key "-1" is not a label'),
    ("names: [a]\nnc: 2", 'nc is "2", names has 1 (mend the one that is wrong)'),
    ("names: [a]\nnc: [1]", 'nc is ["1"], names has 1'),
    ("names: [a]\ntrain: [x, {y: z}]", "train must name folders or lists of images, found a mapping"),
    ("names: [a]\nval: {x: y}", "val must name folders or lists of images, found a mapping"),
    ("names: [a]\npath: [x]", "path must name folders or lists of images, found a list"),
    ('names: [a]\ntest: "a\\0b"', 'test: "a\\u0000b" holds an unprintable character'),
    ("names: [a]\nkpt_shape: [17, 3]", "kpt_shape: labels of poses, not of boxes"),
]


@pytest.mark.parametrize(("text", "expected"), BAD, ids=[expected for _, expected in BAD])
def test_what_is_wrong_with_a_data_file_is_said_in_one_line(tmp_path: Path, text: str | bytes, expected: str) -> None:
    path = tmp_path / "data.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DatasetError, match=re.escape(f"{path}: {expected}")) as caught:
        read_data_file(path)
    assert str(caught.value).isprintable()


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=30)
    | st.text(max_size=30).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.text("names:trai[]{}- \n01,&*!'\"", max_size=40).map(lambda text: f"names: {text}".encode())
)
def test_any_data_file_is_read_or_a_dataset_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.yaml"
    path.write_bytes(content)
    try:
        found = read_data_file(path)
    except DatasetError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert found.names and all(isinstance(name, str) and name for name in found.names)


# ---- where the folders are --------------------------------------------------------------------------------


def move(source: str, target: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        (folder / source).rename(folder / target)

    return edit


def text(name: str, content: str | bytes) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return edit


def data_file(content: str) -> Edit:
    return text("data.yaml", f"names: [cat, dog]\n{content}")


def together(folder: Path) -> None:
    for split in ("train", "valid"):
        for path in [*(folder / split / "images").iterdir(), *(folder / split / "labels").iterdir()]:
            path.rename(folder / split / path.name)
        (folder / split / "images").rmdir()
        (folder / split / "labels").rmdir()


PLACES: dict[str, list[Edit]] = {
    "images swapped for labels": [],
    "data.yml": [move("data.yaml", "data.yml")],
    "images/train and labels/train": [
        *(move(f"{split}/{kind}", f"{kind}/{split}x") for split in ("train", "valid") for kind in ("images", "labels")),
        data_file("train: images/trainx\nval: ./images/validx/\n"),
    ],
    "the right-most images that has labels": [
        *(
            move(f"{split}/{kind}", f"images/{split}/{kind}/images")
            for split in ("train", "valid")
            for kind in ("images", "labels")
        ),
        data_file("train: images/train/images/images\nval: images/valid/images/images\n"),
    ],
    "the folder that holds both": [data_file("train: train\nval: valid\n")],
    "labels among the images": [together, data_file("train: train\nval: valid\n")],
    "nothing declared": [data_file("")],
    "val/ where valid/ is missing": [data_file(""), move("valid", "val")],
    "`valid` for `val`": [data_file("train: train/images\nvalid: other/images\n"), move("valid", "other")],
    "a base that is there": [
        *(move(split, f"data/{split}") for split in ("train", "valid")),
        data_file("path: data\ntrain: train/images\nval: valid/images\n"),
    ],
    "a base that is not": [data_file("path: ../datasets/mine\ntrain: train/images\nval: valid/images\n")],
    "entries left empty": [data_file("path: ''\ntrain: train/images\nval: valid/images\ntest:\n")],
    "capital suffixes": [move("train/images/a.png", "train/images/a.PNG")],
}  # fmt: skip


@pytest.mark.parametrize("case", PLACES)
def test_images_and_labels_are_found(tmp_path: Path, case: str) -> None:
    small_yolo(tmp_path)
    for edit in PLACES[case]:
        edit(tmp_path)
    splits, report = read_yolo_folder(tmp_path), Report()
    class_map, valid = validate(splits, report)
    assert report.findings == {}
    assert class_map.names == ("cat", "dog") and class_map.source_ids == (0, 1)
    assert list(valid) == ["train", "valid"]
    for split in valid.values():
        assert split.table.boxes.tolist() == [[24, 12, 40, 36], [0, 0, 32, 24]]
        assert split.table.labels.tolist() == [0, 1]
        assert split.table.areas.tolist() == [16 * 24, 32 * 24]


def test_an_absolute_base_and_a_link_within_the_dataset_are_followed(tmp_path: Path) -> None:
    small_yolo(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "train")
    data_file(f"path: {tmp_path}\ntrain: link/images\nval: valid/images\n")(tmp_path)
    assert validate(read_yolo_folder(tmp_path), report := Report())[1]["train"].table.labels.tolist() == [0, 1]
    assert report.findings == {}


@pytest.mark.parametrize("declared", ["../other/images", "/", "gone", "train/images/a.png", "x" * 300])
def test_a_declared_folder_that_is_not_in_the_dataset_is_replaced_by_the_usual_one(
    tmp_path: Path, declared: str
) -> None:
    folder = small_yolo(tmp_path / "outer" / "inner")
    small_yolo(tmp_path / "outer" / "other")
    data_file(f"train: {declared}\nval: valid/images\n")(folder)
    found = findings(folder)
    assert list(found) == ["declared-folder-ignored"]
    [row] = found["declared-folder-ignored"].rows
    assert row.startswith("train: ") and row.endswith(", used train/images")


def test_a_link_that_leaves_the_dataset_is_not_followed(tmp_path: Path) -> None:
    folder, elsewhere = small_yolo(tmp_path / "mine"), small_yolo(tmp_path / "elsewhere")
    (folder / "link").symlink_to(elsewhere / "train")
    data_file("train: link/images\nval: valid/images\n")(folder)
    assert "declared-folder-ignored" in findings(folder)
    shutil.rmtree(folder / "train")
    (folder / "train").symlink_to(elsewhere / "train")
    with pytest.raises(DatasetError, match="no training images"):
        read_yolo_folder(folder)


NOT_THERE: list[tuple[str, Edit, str]] = [
    (
        "",
        lambda folder: shutil.rmtree(folder / "train"),
        "no training images: train/images is no folder in the dataset",
    ),
    (
        "train: pictures\n",
        lambda folder: shutil.rmtree(folder / "train"),
        'no training images: its train: "pictures" and train/images is no folder in the dataset',
    ),
    (
        "val: ../val/images\n",
        lambda folder: shutil.rmtree(folder / "valid"),
        'val: "../val/images" is no folder in the dataset, nor is valid/images and val/images (mend or',
    ),
    ("test: test/images\n", lambda folder: None, 'test: "test/images" is no folder in the dataset, nor is test/images'),
]


@pytest.mark.parametrize(("content", "edit", "expected"), NOT_THERE, ids=[row[2] for row in NOT_THERE])
def test_a_split_that_is_declared_and_not_there_is_an_error(
    tmp_path: Path, content: str, edit: Edit, expected: str
) -> None:
    small_yolo(tmp_path)
    data_file(content)(tmp_path)
    edit(tmp_path)
    with pytest.raises(DatasetError, match=re.escape(f"{tmp_path / 'data.yaml'}: {expected}")):
        read_yolo_folder(tmp_path)


def test_folders_without_a_dataset_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="nowhere: no such folder"):
        read_yolo_folder(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=re.escape(f"{tmp_path}: no data.yaml or data.yml")):
        read_yolo_folder(tmp_path)


# ---- findings ---------------------------------------------------------------------------------------------


def findings(folder: Path) -> dict[str, Finding]:
    """What reading and validation find; an error must be raised as well, and only then."""
    report = Report()
    try:
        validate(read_yolo_folder(folder), report)
    except DatasetError as error:
        assert report.errors and "\n" not in str(error) and str(error).startswith(str(folder))
    else:
        assert not report.errors
    return report.findings


def labels(content: str | bytes, name: str = "a") -> Edit:
    """Put these lines in place of a label file of train."""
    return text(f"train/labels/{name}.txt", content)


def image(name: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / "train" / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed=9).save(folder / "train" / "images" / name)

    return edit


def both(*edits: Edit) -> Edit:
    return lambda folder: [edit(folder) for edit in edits]


WHOLE = "0 0.5 0.5 0.25 0.5\n1 0.25 0.25 0.5 0.5\n"
# Of each code: its severity, what provokes it, the rows that are then named, and the nearest that does not.
CASES: dict[str, list[tuple[str, Edit, list[str], Edit]]] = {
    "declared-folder-ignored": [
        (
            "note",
            data_file("train: gone/images\n"),
            ['train: "gone/images", used train/images'],
            data_file("train: train/images\n"),
        )
    ],
    "labels-missing": [
        (
            "error",
            lambda folder: shutil.rmtree(folder / "train" / "labels"),
            ["train: none beside train/images"],
            lambda folder: [shutil.rmtree(folder / "train" / x) for x in ("labels", "images")]
            and (folder / "train" / "images").mkdir(),
        ),
        (
            "error",
            lambda folder: shutil.rmtree(folder / "valid" / "labels"),
            ["valid: none beside valid/images"],
            lambda folder: (folder / "valid" / "labels" / "a.txt").unlink(),
        ),
    ],
    "bad-file-name": [("error", image("b\n.png"), ["train/b\\n.png"], image("b .png"))],
    "label-file-absent": [("note", image("b.png"), ["train/b.png"], both(image("b.png"), labels("", "b")))],
    "label-file-shared": [
        ("warning", image("a.bmp"), ["train: a.bmp and a.png"], both(image("b.bmp"), labels("", "b"))),
    ],
    "label-without-image": [
        ("warning", labels("", "b"), ["train/b.txt"], labels("cat\n", "classes")),
    ],
    "unreadable-labels": [
        ("error", labels(WHOLE.encode() + b"\xff"), ["train/a.txt: not UTF-8 at byte 39"], labels("\ufeff" + WHOLE)),
        (
            "error",
            both(image("b.png"), lambda folder: (folder / "train" / "labels" / "b.txt").mkdir()),
            ["train/b.txt: Is a directory"],
            both(image("b.png"), labels("", "b")),
        ),
    ],
    "bad-label-line": [
        (
            "error",
            labels(f"{WHOLE}\n \n1 0.5\r\n0 a 0 0 0"),
            [
                "train/labels/a.txt line 5: 2 fields where at least 5 belong: class cx cy w h",
                'train/labels/a.txt line 6: "a" is not a number',
            ],
            labels(f"{WHOLE}\n \r\n\n"),
        )
    ],
    "class-out-of-range": [
        (
            "error",
            labels(f"{WHOLE}2 0.5 0.5 0.5 0.5"),
            ["train/labels/a.txt line 3: class 2, the data file has 0 to 1"],
            labels(f"{WHOLE}1 0.5 0.5 0.5 0.5"),
        )
    ],
    "coordinate-out-of-range": [
        (
            "error",
            labels(f"{WHOLE}1 32 24 8 8\n1 0.5 -0.2 0.1 0.1"),
            ["train/labels/a.txt line 3: 32", "train/labels/a.txt line 4: -0.2"],
            labels(f"{WHOLE}1 1.001 -0.001 0.1 0.1"),
        )
    ],
    "pixel-coordinates": [
        (
            "error",
            labels("0 32 24 8 8\n1 16 12 8 8\n1 0.5 0.5 0.5 0.5"),
            ["train/labels/a.txt line 1: 32", "train/labels/a.txt line 2: 16"],
            labels(f"{WHOLE}0 32 24 8 8\n1 16 12 8 8"),
        )
    ],
    # ... and those of validation, which name the line
    "box-empty": [
        (
            "warning",
            labels(f"{WHOLE}1 0.5 0.5 0 0.5"),
            ["train/a.png: a.txt line 3 [32.0, 12.0, 0.0, 24.0]"],
            labels(f"{WHOLE}1 0.5 0.5 1e-6 0.5"),
        )
    ],
    "box-clipped": [
        (
            "warning",
            labels(f"{WHOLE}\n1 0 0.5 0.25 0.5"),
            ["train/a.png: a.txt line 4 [-8.0, 12.0, 16.0, 24.0]"],
            labels(f"{WHOLE}1 0 0.5 0.0625 0.5"),
        )
    ],
    "bad-categories": [
        (
            "error",
            text("data.yaml", "names: [cat, dog, cat]"),
            ["{root}/data.yaml: category name 'cat' occurs twice"],
            data_file(""),
        )
    ],
    "class-absent": [
        (
            "warning",
            text("data.yaml", "names: [cat, dog, bird]"),
            ["train: bird", "valid: bird"],
            text("data.yaml", "names: [dog, bird]"),
        )
    ],
    "class-untrained": [("warning", labels("0 0.5 0.5 0.5 0.5"), ["valid: dog"], labels(WHOLE))],
    "no-boxes": [
        ("error", labels(""), ["train"], labels("0 0.5 0.5 0.5 0.5")),
        ("error", lambda folder: (folder / "train" / "labels" / "a.txt").unlink(), ["train"], labels(WHOLE)),
    ],
    "empty-split": [
        (
            "error",
            lambda folder: (folder / "valid" / "images" / "a.png").unlink(),
            ["valid"],
            text("valid/labels/a.txt", ""),
        ),
        ("error", lambda folder: (folder / "train" / "images" / "a.png").unlink(), ["train"], labels(WHOLE)),
    ],
    "unlisted-image": [("warning", image("sub/b.png"), ["train/sub/b.png"], both(image("b.png"), labels("", "b")))],
    "unreadable-image": [
        (
            "error",
            text("train/images/a.png", b"text"),
            ["train/a.png: no image format that is read"],
            text("train/images/a.png", encoded(picture(seed=3), "BMP")),
        )
    ],
}  # fmt: skip
FLAT = [(code, *case) for code, cases in CASES.items() for case in cases]


@pytest.mark.parametrize(
    ("code", "severity", "provoke", "rows", "near_miss"), FLAT, ids=[f"{i}-{case[0]}" for i, case in enumerate(FLAT)]
)
def test_each_finding_and_its_near_miss(
    tmp_path: Path, code: str, severity: str, provoke: Edit, rows: list[str], near_miss: Edit
) -> None:
    small_yolo(tmp_path)
    assert findings(tmp_path) == {}
    provoke(tmp_path)
    found = findings(tmp_path)[code]
    assert found.severity == severity
    assert found.rows == [row.replace("{root}", str(tmp_path)) for row in rows]
    shutil.rmtree(tmp_path)
    small_yolo(tmp_path)
    near_miss(tmp_path)
    assert code not in findings(tmp_path)


def test_all_bad_lines_are_found_in_one_go(tmp_path: Path) -> None:
    small_yolo(tmp_path)
    labels("0 0.5 0.5 0.5 0.5\nx\n9 0 0 1 1\n")(tmp_path)
    text("valid/labels/a.txt", "0 0 0 1\n")(tmp_path)
    report = Report()
    with pytest.raises(DatasetError) as caught:
        validate(read_yolo_folder(tmp_path), report)
    assert {f.code: f.count for f in report.errors} == {"bad-label-line": 2, "class-out-of-range": 1}
    first = 'train/labels/a.txt line 2: the class "x" is not a whole number and 1 more; '
    assert first in str(caught.value)


# ---- boxes and pixels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", [1, 6])
def test_shares_are_of_the_image_as_it_is_displayed(tmp_path: Path, orientation: int) -> None:
    small_yolo(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "train" / "images" / "a.png").unlink()
    picture().save(tmp_path / "train" / "images" / "a.jpg", exif=exif)  # stored 64 x 48
    labels("0 0.25 0.5 0.5 0.5")(tmp_path)
    table = validate(read_yolo_folder(tmp_path), Report())[1]["train"].table
    expected = [0, 12, 32, 36] if orientation == 1 else [0, 16, 24, 48]
    assert table.boxes.tolist() == [expected]


@st.composite
def tables(draw: st.DrawFn) -> AnnotationTable:
    """Up to three images, the same size each, with boxes of a fiftieth of a pixel and more."""
    width, height = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    counts = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    share = st.floats(0, 1)
    boxes = []
    for _ in range(sum(counts)):
        w, h = (0.05 + 0.95 * draw(share) for _ in range(2))
        boxes.append([x := draw(share) * (1 - w), y := draw(share) * (1 - h), x + w, y + h])
    pixels = np.array(boxes, dtype=np.float64).reshape(-1, 4) * [width, height, width, height]
    return AnnotationTable(
        file_names=np.array([f"{i}.png" for i in range(len(counts))]),
        widths=np.full(len(counts), width),
        heights=np.full(len(counts), height),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=pixels,
        labels=np.array(draw(st.lists(st.integers(0, 2), min_size=len(boxes), max_size=len(boxes))), dtype=np.int64),
        areas=(pixels[:, 2] - pixels[:, 0]) * (pixels[:, 3] - pixels[:, 1]),
        crowd=np.zeros(len(boxes), dtype=np.bool_),
    )


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=tables())
def test_a_table_written_as_yolo_is_read_as_it_was(tmp_path: Path, table: AnnotationTable) -> None:
    shutil.rmtree(tmp_path)
    small_yolo(tmp_path, names=("a", "b", "c"))
    (tmp_path / "train" / "images" / "a.png").unlink()
    (tmp_path / "train" / "labels" / "a.txt").unlink()
    for name, width, height in zip(table.file_names, table.widths, table.heights, strict=True):
        picture(int(width), int(height)).save(tmp_path / "train" / "images" / name)
    write_labels(tmp_path / "train" / "labels", table)
    if not len(table.boxes):
        assert "no-boxes" in findings(tmp_path)
        return
    again = _validated(tmp_path)["train"].table
    for exact in ("file_names", "widths", "heights", "offsets", "labels", "crowd"):
        assert getattr(again, exact).tolist() == getattr(table, exact).tolist()
    np.testing.assert_allclose(again.boxes, table.boxes, rtol=0, atol=1e-9)
    np.testing.assert_allclose(again.areas, table.areas, rtol=1e-9)


def _validated(folder: Path) -> dict[str, ValidSplit]:
    return validate(read_yolo_folder(folder), Report())[1]


# ---- lists of folders and of images ------------------------------------------------------------------------


def three_folders(folder: Path) -> Path:
    """Images in images/one and images/two with labels beside them; each holds a.png and b.png."""
    for n, part in enumerate(("one", "two")):
        for kind in ("images", "labels"):
            (folder / kind / part).mkdir(parents=True)
        for i, stem in enumerate("ab"):
            picture(seed=10 * n + i).save(folder / "images" / part / f"{stem}.png")
            (folder / "labels" / part / f"{stem}.txt").write_text(f"{n} 0.5 0.5 0.25 0.5\n")
    return folder


def read_with(folder: Path, text: str) -> tuple[dict[str, list[tuple[str, int]]], dict[str, Finding]]:
    """Per split (image, label of its box), and what validation finds."""
    (folder / "data.yaml").write_text(f"names: [cat, dog]\n{text}")
    report = Report()
    try:
        _, splits = validate(read_yolo_folder(folder), report)
    except DatasetError:
        return {}, report.findings
    found = {}
    for name, split in splits.items():
        labels = split.table.labels[split.table.offsets[:-1]].tolist()
        found[name] = list(zip(split.table.file_names.tolist(), labels, strict=True))
    return found, report.findings


def test_a_list_of_folders_is_all_of_them(tmp_path: Path) -> None:
    folder = three_folders(tmp_path / "d")
    found, findings = read_with(folder, "train: [images/one, ../images/two]\nval: images/two\n")
    assert found["train"] == [
        ("images/one/a.png", 0), ("images/one/b.png", 0), ("images/two/a.png", 1), ("images/two/b.png", 1)
    ]  # fmt: skip
    assert found["valid"] == [("a.png", 1), ("b.png", 1)]
    assert set(findings) == {"image-in-two-splits", "class-absent"}
    with pytest.raises(DatasetError, match=r'train: "images/three" is nothing in the dataset'):
        (folder / "data.yaml").write_text("names: [cat, dog]\ntrain: [images/one, images/three]\n")
        read_yolo_folder(folder)


def test_a_text_file_lists_images(tmp_path: Path) -> None:
    folder = three_folders(tmp_path / "d")
    absolute = folder / "images" / "one" / "b.png"
    (folder / "lists").mkdir()
    (folder / "lists" / "train.txt").write_text(f"../images/one/a.png\n\nimages/two/b.png\n{absolute}\n")
    (folder / "valid.txt").write_text("./images/two/a.png\r\n")
    found, findings = read_with(folder, "train: lists/train.txt\nval: valid.txt\n")
    assert found == {
        "train": [("images/one/a.png", 0), ("images/one/b.png", 0), ("images/two/b.png", 1)],
        "valid": [("images/two/a.png", 1)],
    }
    assert set(findings) == {"class-absent"}  # no label file without its image, none unlisted


def test_listed_images_that_are_not_there_or_elsewhere_are_errors(tmp_path: Path) -> None:
    folder = three_folders(tmp_path / "d")
    picture().save(tmp_path / "outside.png")
    (folder / "t.txt").write_text(f"images/one/a.png\nimages/one/gone.png\n../outside.png\n{tmp_path}/outside.png\n")
    _, findings = read_with(folder, "train: t.txt\nval: images/two\n")
    assert findings["missing-image"].rows == ["train/images/one/gone.png"]
    assert [row[:19] for row in findings["outside-dataset"].rows] == ["train: t.txt line 3", "train: t.txt line 4"]


def test_a_data_file_of_aliases_is_no_bomb(tmp_path: Path) -> None:
    """Each line doubles what the one before stands for."""
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]
    for key in ("names", "nc", "train", "path"):
        (tmp_path / "data.yaml").write_text(
            "\n".join([*lines, *(["names: [a]"] if key != "names" else []), f"{key}: *a59"])
        )
        with pytest.raises(DatasetError) as caught:
            read_data_file(tmp_path / "data.yaml")
        assert len(str(caught.value)) < 500
    (tmp_path / "data.yaml").write_text("names: &a [*a]\n")
    with pytest.raises(DatasetError, match="recursive node"):
        read_data_file(tmp_path / "data.yaml")


@pytest.mark.parametrize("target", ["a.png", "gone.png"])
def test_a_link_that_leads_nowhere_is_listed_as_not_used(tmp_path: Path, target: str) -> None:
    small_yolo(tmp_path)
    picture(seed=7).save(tmp_path / "train" / "images" / "b.png")
    (tmp_path / "train" / "labels" / "b.txt").write_text("0 0.5 0.5 0.25 0.5\n1 0.25 0.25 0.5 0.5\n")
    (tmp_path / "train" / "images" / "a.png").unlink()
    (tmp_path / "train" / "images" / "a.png").symlink_to(target)
    found = findings(tmp_path)
    assert found["unlisted-image"].rows == ["train/a.png"] and found["label-without-image"].rows == ["train/a.txt"]
