"""Converting: COCO → YOLO → COCO leaves the boxes where they were."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from rfdetr_core.data.conversion import write_coco, write_yolo
from rfdetr_core.data.findings import Report
from rfdetr_core.data.formats.layout import read_folder
from rfdetr_core.data.survey import examine
from rfdetr_core.data.validation import validate
from tests.data.helpers import annotation, document, image_row, picture, validated, write_dataset

SIZES = [(64, 48), (37, 91), (640, 11)]
BOXES = st.tuples(*(st.floats(0, 1) for _ in range(4)), st.integers(1, 2))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(st.integers(0, 2), BOXES), min_size=1, max_size=12))
def test_coco_to_yolo_to_coco_is_the_identity_on_boxes(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, tuple[float, float, float, float, int]]]
) -> None:
    folder = tmp_path_factory.mktemp("c")
    images = [image_row(i + 1, f"{i}.png", *size) for i, size in enumerate(SIZES)]
    boxes = [annotation(99, 1, bbox=(1, 1, 5, 5))]
    for n, (i, (x, y, w, h, category)) in enumerate(rows):
        width, height = SIZES[i]
        box = (x * width * 0.9, y * height * 0.9, max(w * (1 - x), 0.01) * width, max(h * (1 - y), 0.01) * height)
        boxes.append(annotation(n + 100, i + 1, category, box))
    write_dataset(folder / "coco", document(images, boxes))
    class_map, splits, _ = validated(folder / "coco")
    assert write_yolo(folder / "yolo", class_map, splits) == []
    yolo_map, yolo = validate(read_folder(folder / "yolo", "yolo"), Report())
    write_coco(folder / "back", yolo_map, {name: yolo[name] for name in splits})
    back_map, back = validate(read_folder(folder / "back", "coco"), Report())
    assert back_map.names == class_map.names
    for name, split in splits.items():
        assert back[name].table.file_names.tolist() == split.table.file_names.tolist()
        assert back[name].table.labels.tolist() == split.table.labels.tolist()
        assert back[name].table.offsets.tolist() == split.table.offsets.tolist()
        np.testing.assert_allclose(back[name].table.boxes, split.table.boxes, rtol=0, atol=1e-3)
        assert [f.sha256 for f in back[name].files] == [f.sha256 for f in split.files]


def test_what_yolo_cannot_say_is_said(tmp_path: Path) -> None:
    images = [image_row(1, "a.png"), image_row(2, "sub/a.png"), image_row(3, "A.bmp")]
    boxes = [annotation(1), annotation(2, 2, 2, iscrowd=1), annotation(3, 3, 2)]
    write_dataset(tmp_path / "s", document(images, boxes))
    class_map, splits, _ = validated(tmp_path / "s")
    lost = write_yolo(tmp_path / "y", class_map, splits)
    assert lost == [
        "train: 2 images renamed, since YOLO has no folders and one label file per stem",
        "train: 1 crowd regions left out",
    ]
    _, back = validate(read_folder(tmp_path / "y"), Report())
    assert back["train"].table.file_names.tolist() == ["A_2.bmp", "a.png", "sub__a.png"]
    assert [len(back["train"].table.boxes[back["train"].table.rows(i)]) for i in range(3)] == [1, 1, 0]


def test_boxes_of_the_stored_frame_are_turned_for_yolo(tmp_path: Path) -> None:
    """Its readers apply the EXIF orientation: 6 shows the stored picture turned clockwise."""
    tags = Image.Exif()
    tags[0x0112] = 6
    write_dataset(tmp_path / "s", document([image_row(1, "a.jpg", 64, 48)], [annotation(bbox=(0, 0, 16, 12))]))
    picture(64, 48).save(tmp_path / "s" / "train" / "a.jpg", exif=tags)
    class_map, splits, report = validated(tmp_path / "s")
    assert "exif-ignored" in report.findings
    write_yolo(tmp_path / "y", class_map, splits)
    _, back = validate(read_folder(tmp_path / "y"), Report())
    assert back["train"].table.boxes.tolist() == [[36, 0, 48, 16]]  # the stored upper left is the displayed upper right


def test_written_coco_has_ids_from_one(tmp_path: Path) -> None:
    write_dataset(tmp_path / "s", document([image_row(7, "x/a.png")], [annotation(0, 7, 2), annotation(5, 7, 1)]))
    class_map, splits, _ = validated(tmp_path / "s")
    write_coco(tmp_path / "c", class_map, splits)
    written = json.loads((tmp_path / "c" / "train" / "_annotations.coco.json").read_text())
    assert [row["id"] for row in written["images"]] == [1]
    assert [row["id"] for row in written["annotations"]] == [1, 2]
    assert written == splits["train"].table.to_coco(class_map)
    assert examine(str(tmp_path / "c" / "train" / "x" / "a.png"), 10**6).remarks == ()
