"""One entry for every layout: the same dataset from all of them, and errors that say what was looked for."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components.validate_dataset import stage
from rfdetr_core.data.annotations import ClassMap
from rfdetr_core.data.boxes import ValidSplit
from rfdetr_core.data.findings import Report
from rfdetr_core.data.formats.layout import LAYOUTS, read_folder
from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.data.preparing import PrepareOptions, dataset_digest, write_prepared
from rfdetr_core.data.splitting import fill_missing_splits
from rfdetr_core.data.validation import validate
from rfdetr_core.errors import ConfigError, DatasetError
from tests.data.helpers import annotation, document, image_row, picture, validated, write_dataset, write_split
from tests.data.layouts import small_yolo, write_standard_coco, write_yolo

pytestmark = pytest.mark.parameter("dataset_dir")
Edit = Callable[[Path], Any]
CATEGORIES = [
    {"id": 0, "name": "animals", "supercategory": "none"},
    {"id": 7, "name": "dog", "supercategory": "animals"},
    {"id": 3, "name": "cat", "supercategory": "animals"},
]


def read(folder: Path, layout: str = "auto") -> tuple[ClassMap, dict[str, ValidSplit]]:
    return validate(read_folder(folder, layout), Report())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images of two sizes as a Roboflow export: its parent category, one image without boxes, odd floats."""
    folder, rng = tmp_path_factory.mktemp("roboflow"), np.random.default_rng(4)
    for seed, (split, count) in enumerate((("train", 12), ("valid", 5), ("test", 3))):
        sizes = [(64, 48) if i % 2 else (37, 91) for i in range(count)]
        images = [image_row(10 + i, f"{split}{i:02d}.png", *size) for i, size in enumerate(sizes)]
        boxes = []
        for i, (width, height) in enumerate(sizes[1:], start=1):
            for _ in range(int(rng.integers(1, 4))):
                x, y, w, h = rng.uniform(0, 0.5, 4) * [width, height, width, height]
                boxes.append(annotation(len(boxes) + 1, 10 + i, (3, 7)[len(boxes) % 2], (x, y, w + 1, h + 1)))
        write_split(folder, split, document(images, boxes, CATEGORIES), seed=seed)
    return folder


@pytest.fixture(scope="module")
def layouts(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same images and boxes three times."""
    class_map, splits = read(source)
    tables = {name: split.table for name, split in splits.items()}
    folder = tmp_path_factory.mktemp("layouts")
    return {
        "roboflow": source,
        "standard": write_standard_coco(folder / "standard", source),
        "yolo": write_yolo(folder / "yolo", source, tables, class_map.names),
    }


@pytest.mark.parametrize("asked", ["auto", "named"])
@pytest.mark.parametrize("layout", ["roboflow", "standard", "yolo"])
@pytest.mark.parameter("dataset_dir", "dataset_file")
def test_the_same_dataset_in_every_layout(layouts: dict[str, Path], layout: str, asked: str) -> None:
    class_map, splits = read(layouts["roboflow"])
    assert class_map.names == ("cat", "dog") and [len(s.table) for s in splits.values()] == [12, 5, 3]
    named = "yolo" if layout == "yolo" else "coco"
    other_map, other = read(layouts[layout], "auto" if asked == "auto" else named)
    assert other_map.names == class_map.names
    assert list(other) == list(splits) == ["train", "valid", "test"]
    for name, split in splits.items():
        one, two = split.table, other[name].table
        for exact in ("file_names", "widths", "heights", "offsets", "labels", "crowd"):
            assert getattr(two, exact).tolist() == getattr(one, exact).tolist()
        np.testing.assert_allclose(two.boxes, one.boxes, rtol=0, atol=0.01)
        np.testing.assert_allclose(two.areas, one.areas, rtol=1e-3)
        assert [file.sha256 for file in other[name].files] == [file.sha256 for file in split.files]


def test_both_layouts_of_coco_are_one_dataset_by_digest(layouts: dict[str, Path]) -> None:
    options = PrepareOptions(600)
    digests = {name: dataset_digest(*read(folder), options) for name, folder in layouts.items()}
    assert digests["roboflow"] == digests["standard"]
    assert digests["yolo"] != digests["roboflow"]  # its source ids are positions in names, not those of COCO


def test_prepared_they_hold_the_same_annotations(layouts: dict[str, Path], tmp_path: Path) -> None:
    boxes = {}
    for name, folder in layouts.items():
        class_map, splits = read(folder)
        target = tmp_path / name
        target.mkdir()
        write_prepared(target, class_map, splits, PrepareOptions(32), source="test")
        boxes[name] = PreparedDataset(target).split("train").table
    for name in ("standard", "yolo"):
        assert boxes[name].labels.tolist() == boxes["roboflow"].labels.tolist()
        np.testing.assert_allclose(boxes[name].boxes, boxes["roboflow"].boxes, rtol=0, atol=0.01)


@pytest.mark.slow
def test_blood_cells_as_yolo_are_the_blood_cells(bccd: Path) -> None:
    class_map, splits = read(bccd / "coco")
    yolo_map, yolo = read(bccd / "yolo")
    assert yolo_map.names == class_map.names
    for name, split in splits.items():
        assert yolo[name].table.file_names.tolist() == split.table.file_names.tolist()
        assert yolo[name].table.labels.tolist() == split.table.labels.tolist()
        np.testing.assert_allclose(yolo[name].table.boxes, split.table.boxes, rtol=0, atol=0.01)


# ---- which layout -----------------------------------------------------------------------------------------


def test_coco_wins_where_both_are_there_and_a_name_decides(tmp_path: Path) -> None:
    small_yolo(tmp_path)
    write_dataset(tmp_path, document(images=[image_row(1, "images/a.png")]), document([image_row(1, "images/a.png")]))
    assert read_folder(tmp_path)["train"].path.name == "_annotations.coco.json"
    assert read_folder(tmp_path, "roboflow")["train"].path.name == "_annotations.coco.json"
    assert read_folder(tmp_path, "coco")["train"].path.name == "_annotations.coco.json"
    assert read_folder(tmp_path, "yolo")["train"].path.name == "data.yaml"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_that_is_not_there_is_named(tmp_path: Path, layout: str) -> None:
    with pytest.raises(DatasetError, match=re.escape(f"{tmp_path / 'gone'}: no such folder")):
        read_folder(tmp_path / "gone", layout)


def test_another_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"'o365' is not a layout that is read \(use one of auto, roboflow, coco, yolo, voc"
    ):
        read_folder(tmp_path, "o365")


NEITHER = {
    "auto": "no dataset of a known layout in it (looked for train/_annotations.coco.json (COCO as Roboflow exports "
    "it), annotations/instances_train*.json (COCO), data.yaml or data.yml (YOLO), Annotations/*.xml (Pascal VOC))",
    "coco": "no COCO dataset in it (looked for train/_annotations.coco.json and annotations/instances_train*.json)",
    "yolo": "no data.yaml or data.yml (a YOLO dataset has data.yaml with names",
    "voc": "no Pascal VOC dataset in it (it has Annotations/*.xml with JPEGImages/",
}


@pytest.mark.parametrize("layout", NEITHER)
def test_a_folder_without_a_dataset_says_what_was_looked_for(tmp_path: Path, layout: str) -> None:
    write_split(tmp_path, "valid", document())  # no train
    with pytest.raises(DatasetError, match=re.escape(f"{tmp_path}: {NEITHER[layout]}")):
        read_folder(tmp_path, layout)


def test_a_data_file_without_training_images_is_told_from_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text("names: [cat]\ntrain: images/train\n")
    expected = f'{tmp_path / "data.yaml"}: no training images: its train: "images/train" and train/images is no folder'
    with pytest.raises(DatasetError, match=re.escape(expected)):
        read_folder(tmp_path)


# ---- the standard layout of COCO ---------------------------------------------------------------------------


def renamed(**moves: str) -> Edit:
    """Move folders and files; `__` stands for a dot, `_in_` for a slash."""
    return lambda folder: [
        ((folder / new).parent.mkdir(parents=True, exist_ok=True), (folder / old).rename(folder / new))
        for old, new in ((k.replace("_in_", "/").replace("__", "."), v) for k, v in moves.items())
    ]


def one_folder(folder: Path) -> None:
    for split in ("train2017", "val2017", "test2017"):
        for path in (folder / split).iterdir():
            (folder / "images").mkdir(exist_ok=True)
            path.rename(folder / "images" / path.name)
        (folder / split).rmdir()


STANDARD: dict[str, Edit] = {
    "folders in images/": renamed(train2017="images/train2017", val2017="images/val2017", test2017="images/test2017"),
    "all images in one folder": one_folder,
    "names that begin alike": renamed(train2017="train", val2017="valid_images", test2017="tests"),
    "`valid` in the file's name": renamed(annotations_in_instances_val2017__json="annotations/instances_valid.json"),
    "what is not of a split": lambda folder: [
        (folder / "annotations" / name).write_text("no JSON")
        for name in ("captions_train2017.json", "instances_minival.json", "image_info_test-dev2017.json")
    ],
}


@pytest.mark.parametrize("case", STANDARD)
def test_images_of_the_standard_layout_are_found(layouts: dict[str, Path], tmp_path: Path, case: str) -> None:
    folder = Path(shutil.copytree(layouts["standard"], tmp_path / "copy"))
    STANDARD[case](folder)
    report, options = Report(), PrepareOptions(None)
    found = validate(read_folder(folder), report)
    assert set(report.findings) == {"category-dropped", "no-objects"}
    assert dataset_digest(*found, options) == dataset_digest(*read(layouts["standard"]), options)


AMBIGUOUS: dict[str, tuple[Edit, str]] = {
    "two files": (
        lambda folder: shutil.copy(*(folder / f"annotations/instances_{name}.json" for name in ("val2017", "valid"))),
        "/annotations: instances_val2017.json and instances_valid.json both describe the valid split (leave one",
    ),
    "two folders": (
        lambda folder: [(folder / "train2017").rename(folder / "train_a"), (folder / "train_b").mkdir()],
        "/annotations/instances_train2017.json: train_a/ and train_b/ may both hold its images (name the right one "
        "train2017/)",
    ),
    "no folder": (
        lambda folder: shutil.rmtree(folder / "val2017"),
        "/annotations/instances_val2017.json: no folder of images for it (put them into ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_what_the_standard_layout_leaves_open_is_an_error(layouts: dict[str, Path], tmp_path: Path, case: str) -> None:
    folder = Path(shutil.copytree(layouts["standard"], tmp_path / "copy"))
    edit, expected = AMBIGUOUS[case]
    edit(folder)
    with pytest.raises(DatasetError, match=re.escape(f"{folder}{expected}")):
        read_folder(folder)


def test_an_image_that_no_split_lists_is_found_in_a_shared_folder(layouts: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(layouts["standard"], tmp_path / "copy"))
    one_folder(folder)
    picture().save(folder / "images" / "more.png")
    report = Report()
    validate(read_folder(folder), report)
    assert report.findings["unlisted-image"].rows == [f"{split}/more.png" for split in ("train", "valid", "test")]


# ---- splits of a Roboflow export ---------------------------------------------------------------------------


def test_a_folder_of_a_split_without_annotations_is_an_error(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    (tmp_path / "test").mkdir()
    with pytest.raises(DatasetError, match=re.escape(f"{tmp_path / 'test'}: the test split has no _annotations.coco")):
        read_folder(tmp_path)


def test_val_is_valid_where_valid_is_not_there(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    (tmp_path / "valid").rename(tmp_path / "val")
    assert {name: split.image_folder.name for name, split in read_folder(tmp_path).items()} == {
        "train": "train",
        "valid": "val",
    }


def test_one_image_alone_is_an_error_that_says_what_is_missing(tmp_path: Path) -> None:
    write_split(tmp_path, "train", document())
    report = Report()
    with pytest.raises(
        DatasetError, match=r"^train has too few images \(1\) to take valid and test from it \(add images"
    ):
        fill_missing_splits(validate(read_folder(tmp_path), report)[1], report)
    assert [error.code for error in report.errors] == ["too-few-images"]


# ---- through the stage -------------------------------------------------------------------------------------


def run_stage(folder: Path, dataset: dict[str, Any]) -> int:
    sections = {"name": "shapes", "dataset": dataset, "model": {"variant": "pico", "pretrain_weights": None}}
    (folder / "config.yaml").write_text(json.dumps(sections))  # JSON is YAML
    return stage.main(["--run-uri", str(folder / "root" / "runs" / "r"), "--config", str(folder / "config.yaml")])


@pytest.mark.parametrize("layout", ["auto", "yolo"])
def test_the_stage_prepares_yolo(layouts: dict[str, Path], tmp_path: Path, layout: str) -> None:
    assert run_stage(tmp_path, {"uri": str(layouts["yolo"]), "format": layout}) == 0
    document = json.loads((tmp_path / "root" / "runs" / "r" / "dataset" / "dataset.json").read_text())
    assert [row["name"] for row in document["classes"]] == ["cat", "dog"]
    assert [row["source_id"] for row in document["classes"]] == [0, 1]
    _, splits, _ = validated(layouts["roboflow"])
    assert {name: split["boxes"] for name, split in document["splits"].items()} == {
        name: len(split.table.boxes) for name, split in splits.items()
    }


def test_the_stage_takes_the_layout_that_it_is_told(layouts: dict[str, Path], tmp_path: Path) -> None:
    assert run_stage(tmp_path, {"uri": str(layouts["yolo"]), "format": "coco"}) == 2
    status = json.loads((tmp_path / "root" / "runs" / "r" / "status" / "validate_dataset.json").read_text())
    assert status["error"]["message"] == f"{layouts['yolo']}: no COCO dataset in it"


def test_bad_lines_are_in_the_stage_s_report(tmp_path: Path) -> None:
    small_yolo(tmp_path / "yolo")
    (tmp_path / "yolo" / "train" / "labels" / "a.txt").write_text("0 0.5 0.5\n7 0 0 1 1\n")
    assert run_stage(tmp_path, {"uri": str(tmp_path / "yolo")}) == 2
    report = json.loads((tmp_path / "root" / "runs" / "r" / "dataset" / "report.json").read_text())
    assert {row["code"]: row["rows"] for row in report["findings"]} == {
        "bad-label-line": ["train/labels/a.txt line 1: 3 fields where at least 5 belong: class cx cy w h"],
        "class-out-of-range": ["train/labels/a.txt line 2: class 7, the data file has 0 to 1"],
    }
