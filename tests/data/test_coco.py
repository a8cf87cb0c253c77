"""Reading COCO folders: the form."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rfdetr_core.data.formats.coco import read_coco_folder, read_coco_split
from rfdetr_core.data.formats.source import SourceCategory
from rfdetr_core.errors import DatasetError
from tests.data.helpers import annotation, document, image_row, write_dataset, write_split


def read(folder: Path, content: dict[str, Any]) -> Any:
    write_split(folder, "train", content, draw=False)
    return read_coco_split("train", folder / "train" / "_annotations.coco.json")


def test_a_split_is_read_as_written(tmp_path: Path) -> None:
    split = read(
        tmp_path,
        document(
            images=[image_row(7, "b.jpg", 640, 480), {"id": 3, "file_name": "sub/a.jpg"}],
            annotations=[
                annotation(11, 3, 2, [1, 2.5, 3, 4], area=12, iscrowd=1),
                annotation(12, 7, 5, [-1, 0, 1e3, 0.25]),
            ],
            categories=[{"id": 5, "name": "dog", "supercategory": "animal"}, {"id": 2, "name": "cat"}],
        ),
    )
    assert split.name == "train" and split.image_folder == tmp_path / "train"
    assert split.image_ids.tolist() == [7, 3]
    assert split.file_names == ("b.jpg", "sub/a.jpg")
    assert split.widths.tolist() == [640, -1] and split.heights.tolist() == [480, -1]
    assert split.annotation_ids.tolist() == [11, 12]
    assert split.annotation_images.tolist() == [3, 7]
    assert split.annotation_categories.tolist() == [2, 5]
    assert split.bboxes.tolist() == [[1, 2.5, 3, 4], [-1, 0, 1000, 0.25]]
    assert split.areas[0] == 12 and np.isnan(split.areas[1])
    assert split.crowd.tolist() == [True, False]
    assert split.categories == (SourceCategory(5, "dog", "animal"), SourceCategory(2, "cat", ""))


@pytest.mark.parametrize("written", ["7", " 7 ", 7.0, "0007"])
def test_ids_as_text_and_whole_floats_are_the_number(tmp_path: Path, written: Any) -> None:
    split = read(
        tmp_path,
        document(
            images=[image_row(written)],
            annotations=[annotation(written, 7, written, iscrowd="0")],
            categories=[{"id": written, "name": "cat"}],
        ),
    )
    assert split.image_ids.tolist() == split.annotation_ids.tolist() == split.annotation_categories.tolist() == [7]
    assert split.categories[0].id == 7
    assert split.crowd.tolist() == [False]


def test_iscrowd_may_be_a_boolean_or_null(tmp_path: Path) -> None:
    rows = [annotation(i, iscrowd=value) for i, value in enumerate((True, False, None, 1))]
    assert read(tmp_path, document(annotations=rows)).crowd.tolist() == [True, False, False, True]


def test_a_byte_order_mark_and_utf_16_are_read(tmp_path: Path) -> None:
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "a.json").write_bytes(json.dumps(document()).encode(encoding))
        assert read_coco_split("train", tmp_path / "a.json").file_names == ("a.png",)


def test_names_are_made_plain(tmp_path: Path) -> None:
    rows = [image_row(1, "./a.png"), image_row(2, "sub//b.png"), image_row(3, "名前 é.png")]
    assert read(tmp_path, document(rows)).file_names == ("a.png", "sub/b.png", "名前 é.png")


HUGE = 10**400
NOT_WHOLE = [
    (None, "null"), ("x", '"x"'), ("--5", '"--5"'), ("1.5", '"1.5"'), ("", '""'), (1.5, "1.5"), (True, "true"),
    (float("nan"), "NaN"), (float("inf"), "Infinity"), (1e300, "1e+300"), (2**63, "9223372036854775808"),
    ("9" * 5000, '"99999'), ([1], "[1]"), ({}, "{}"), (HUGE, "1000"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "shown"), NOT_WHOLE, ids=[shown for _, shown in NOT_WHOLE])
@pytest.mark.parametrize(
    ("where", "content"),
    [
        ("images[0].id", lambda v: document(images=[image_row(v)])),
        ("annotations[1].id", lambda v: document(annotations=[annotation(1), annotation(v)])),
        ("annotations[0].image_id", lambda v: document(annotations=[annotation(1, v)])),
        ("annotations[0].category_id", lambda v: document(annotations=[annotation(1, 1, v)])),
        ("categories[0].id", lambda v: document(categories=[{"id": v, "name": "cat"}])),
    ],
)
def test_what_is_no_whole_number_is_named(tmp_path: Path, where: str, content: Any, value: Any, shown: str) -> None:
    assert f"{where} must be a whole number, found {shown}" in fails(tmp_path, content(value))


@pytest.mark.parametrize(
    ("where", "content"),
    [
        ("images[0].id", document(images=[{"file_name": "a.png"}])),
        ("annotations[0].image_id", document(annotations=[{"id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]}])),
        ("categories[0].id", document(categories=[{"name": "cat"}])),
    ],
)
def test_an_absent_id_is_named(tmp_path: Path, where: str, content: Any) -> None:
    assert f"{where} must be a whole number, found absent" in fails(tmp_path, content)


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"annotations": [], "categories": []}, "'images' must be a list, found absent"),
    ({"images": [], "categories": []}, "'annotations' must be a list, found absent"),
    ({"images": [], "annotations": []}, "'categories' must be a list, found absent"),
    ({**document(), "images": {}}, "'images' must be a list, found an object"),
    ({**document(), "annotations": None}, "'annotations' must be a list, found null"),
    (document(images=[image_row(), 5]), "images[1] must be an object, found a number"),
    (document(annotations=["x\ny"]), "annotations[0] must be an object, found a text"),
    (document(categories=[[]]), "categories[0] must be an object, found a list"),
    (document(images=[{"id": 1}]), "images[0].file_name must be a text, found null"),
    (document(images=[image_row(1, 5)]), "images[0].file_name must be a text, found 5"),
    (document(images=[image_row(1, " ")]), 'images[0].file_name must be a text, found " "'),
    (document(images=[image_row(1, "/etc/passwd")]), 'images[0].file_name "/etc/passwd" leaves its split\'s folder'),
    (document(images=[image_row(1, "a/../../b.png")]), "leaves its split's folder"),
    (document(images=[image_row(1, "./.")]), "leaves its split's folder"),
    (document(images=[image_row(1, "a\\b.png")]), "leaves its split's folder"),
    (document(images=[image_row(1, "a\0.png")]), 'images[0].file_name "a\\u0000.png" holds an unprintable character'),
    (document(images=[image_row(1, "a\nb.png")]), "holds an unprintable character"),
    (document(images=[image_row(1, "\ud800.png")]), "holds an unprintable character"),
    (document(images=[image_row(width="wide")]), 'images[0].width must be a whole number, found "wide"'),  # type: ignore[arg-type]
    (document(annotations=[annotation(bbox=None)]), "annotations[0].bbox must be four numbers x, y, w, h, found null"),
    (document(annotations=[annotation(bbox=[1, 2, 3])]), "found [1, 2, 3]"),
    (document(annotations=[annotation(bbox=[1, 2, 3, "4"])]), "annotations[0].bbox must be four numbers"),
    (document(annotations=[annotation(bbox=[1, 2, 3, True])]), "annotations[0].bbox must be four numbers"),
    (document(annotations=[annotation(bbox=[1, 2, 3, HUGE])]), "annotations[0].bbox must be four numbers"),
    (document(annotations=[annotation(bbox="a\nb")]), 'found "a\\nb"'),
    (document(annotations=[annotation(area="large\n")]), 'annotations[0].area must be a number, found "large\\n"'),
    (document(annotations=[annotation(iscrowd="no")]), 'annotations[0].iscrowd must be a whole number, found "no"'),
    (document(categories=[{"id": 1}]), "categories[0].name must be a text, found null"),
    (document(categories=[{"id": 1, "name": ""}]), 'categories[0].name must be a text, found ""'),
    (document(categories=[{"id": 1, "name": "a\r"}]), 'categories[0].name "a\\r" holds an unprintable character'),
]


@pytest.mark.parametrize(("content", "expected"), BROKEN, ids=[expected for _, expected in BROKEN])
def test_structural_errors_name_file_and_row_in_one_line(tmp_path: Path, content: Any, expected: str) -> None:
    assert expected in fails(tmp_path, content)


RAW: list[tuple[bytes, str]] = [
    (b"", "not JSON at line 1, column 1: Expecting value"),
    (b'{\n "images": [,]}', "not JSON at line 2, column 13"),
    (b"[]", "a JSON object is wanted, not a list"),
    (b"null", "a JSON object is wanted, not null"),
    (b'{"images": "\xff"}', "not UTF-8 at byte 12"),
    (b'{"images": ' + b"9" * 5000 + b"}", "not JSON: "),
    (b"[" * 200_000, "nested too deeply"),
]


@pytest.mark.parametrize(("data", "expected"), RAW, ids=[expected for _, expected in RAW])
def test_what_is_no_json_object_is_said_in_one_line(tmp_path: Path, data: bytes, expected: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=re.escape(f"{path}: {expected}")) as caught:
        read_coco_split("train", path)
    assert "\n" not in str(caught.value)


def fails(folder: Path, content: dict[str, Any]) -> str:
    """The one-line message of the error that reading must raise; it names the file."""
    with pytest.raises(DatasetError) as caught:
        read(folder, content)
    message = str(caught.value)
    assert message.startswith(str(folder / "train" / "_annotations.coco.json"))
    assert "\n" not in message and len(message) < 400 + len(str(folder))
    return message


def test_all_splits_that_are_there_are_read(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    assert list(read_coco_folder(tmp_path)) == ["train", "valid"]
    write_split(tmp_path, "test", document())
    assert list(read_coco_folder(tmp_path)) == ["train", "valid", "test"]


def test_folders_without_a_dataset_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="nowhere: no such folder"):
        read_coco_folder(tmp_path / "nowhere")
    write_split(tmp_path, "valid", document())
    with pytest.raises(DatasetError, match=r"no annotations found \(looked for train/_annotations.coco.json\)"):
        read_coco_folder(tmp_path)
    (tmp_path / "train" / "_annotations.coco.json").mkdir(parents=True)
    with pytest.raises(DatasetError, match="Is a directory"):
        read_coco_split("train", tmp_path / "train" / "_annotations.coco.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


def rows(**likely: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Lists of rows that are mostly right, so that the reader gets far before it meets what is wrong."""
    row = st.fixed_dictionaries({}, optional={key: value | JSON for key, value in likely.items()})
    return st.lists(row | JSON, max_size=3) | JSON


IDS = st.integers(-2, 3) | st.sampled_from(["1", "--1", 2.0, 10**25])
DOCUMENTS = (
    st.fixed_dictionaries(
        {
            "images": rows(id=IDS, file_name=st.text(max_size=12), width=IDS, height=IDS),
            "annotations": rows(
                id=IDS, image_id=IDS, category_id=IDS, bbox=st.lists(st.floats() | st.integers(), max_size=5), area=IDS
            ),
            "categories": rows(id=IDS, name=st.text(max_size=4), supercategory=st.text(max_size=4)),
        }
    )
    | JSON
)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=DOCUMENTS)
def test_random_json_is_a_split_or_a_dataset_error(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "fuzz.json"
    path.write_text(json.dumps(content))
    try:
        split = read_coco_split("train", path)
    except DatasetError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert len(split.image_ids) == len(split.file_names) == len(content["images"])
        assert len(split.bboxes) == len(split.areas) == len(split.crowd) == len(content["annotations"])
        assert all(split.image_folder in (split.image_folder / name).parents for name in split.file_names)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=40))
def test_random_bytes_are_a_dataset_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "fuzz.json"
    path.write_bytes(data)
    with pytest.raises(DatasetError):
        read_coco_split("train", path)


def test_a_file_that_is_too_large_or_leads_out_is_not_read(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d")
    with pytest.raises(DatasetError, match=r"0 MB, and 0\.0001 are read at most \(raise dataset\.max_annotation_mb\)"):
        read_coco_folder(folder, 0.0001)
    path = folder / "train" / "_annotations.coco.json"
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(DatasetError, match="leads out of the dataset's folder"):
        read_coco_folder(folder)
