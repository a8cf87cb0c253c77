"""Writing prepared datasets: the same bytes however it is written, continued where it stopped, nothing lost."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rfdetr_core.data import preparing, shards
from rfdetr_core.data.checks import CheckOptions
from rfdetr_core.data.findings import Report
from rfdetr_core.data.formats.coco import read_coco_folder
from rfdetr_core.data.pixels import encode
from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.data.preparing import PrepareOptions, publish_prepared, report_dropped, write_prepared
from rfdetr_core.data.survey import Problem, examine
from rfdetr_core.data.validation import validate
from rfdetr_core.errors import DatasetError, StorageUnavailableError
from rfdetr_core.storage import location
from tests.data.helpers import encoded, grid_dataset, validated
from tests.data.test_prepared import bytes_of

OPTIONS = PrepareOptions(32)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some three images in each."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_480)
    monkeypatch.setattr("tarfile.RECORDSIZE", 10_240)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return grid_dataset(tmp_path / "source", 20)


def publish(source: Path, place: Path, scratch: Path, report: Report | None = None) -> dict[str, Any]:
    class_map, splits, _ = validated(source)
    given = Report() if report is None else report
    target = location(str(place))
    document, _ = publish_prepared(target, scratch, class_map, splits, OPTIONS, source="test", report=given)
    return document


@pytest.mark.usefixtures("small_shards")
def test_sent_or_written_here_it_is_the_same(source: Path, tmp_path: Path) -> None:
    class_map, splits, _ = validated(source)
    written = write_prepared(tmp_path / "here", class_map, splits, OPTIONS, source="test")
    assert publish(source, tmp_path / "store", tmp_path / "scratch") == written
    assert bytes_of(tmp_path / "store") == bytes_of(tmp_path / "here")
    assert len(list((tmp_path / "here" / "train").glob("*.tar"))) > 3
    assert not list((tmp_path / "scratch").rglob("*.tar")), "shards that were sent fill the scratch space"


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interrupted_run_continues_behind_its_last_shard(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    publish(source, tmp_path / "whole", tmp_path / "s0")
    store = preparing._Store
    sent: list[int] = []

    def breaks(self: Any, split: str, number: int, path: Path, part: Any) -> None:
        if len(sent) == after:
            raise StorageUnavailableError("the store went away")
        sent.append(number)
        store_shard(self, split, number, path, part)

    store_shard = store.shard
    monkeypatch.setattr(store, "shard", breaks)
    with pytest.raises(StorageUnavailableError):
        publish(source, tmp_path / "store", tmp_path / "s1")
    monkeypatch.setattr(store, "shard", store_shard)
    left = {path.name for path in (tmp_path / "store").rglob("*.tar")}

    seen: list[str] = []

    def noted(file: Any, short_side: int | None) -> Any:
        seen.append(file.path.name)
        return encode(file, short_side)

    monkeypatch.setattr(preparing, "encode", noted)
    publish(source, tmp_path / "store", tmp_path / "s2")
    assert bytes_of(tmp_path / "store") == bytes_of(tmp_path / "whole")
    held = sum(shard < len(left) for shard in shard_of(tmp_path / "whole"))
    assert len(seen) == 22 - held and (held > 0) == (len(left) > 0)


def shard_of(folder: Path) -> list[int]:
    columns: list[int] = json.loads((folder / "train" / "index.json").read_text())["images"]["shard"]
    return columns


@pytest.mark.usefixtures("small_shards")
def test_sending_begins_before_the_last_image_is_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    shard = preparing._Store.shard

    def noted(self: Any, split: str, number: int, path: Path, part: Any) -> None:
        order.append("sent")
        shard(self, split, number, path, part)

    def read(file: Any, short_side: int | None) -> Any:
        order.append("read")
        return encode(file, short_side)

    monkeypatch.setattr(preparing._Store, "shard", noted)
    monkeypatch.setattr(preparing, "encode", read)
    publish(source, tmp_path / "store", tmp_path / "scratch")
    assert "read" in order[order.index("sent") :]


def corrupt(path: Path) -> None:
    """Break the pixels; header and end stay whole."""
    data = path.read_bytes()
    path.write_bytes(data[:300] + bytes(64) + data[364:])


def test_pixels_that_do_not_decode_stop_it_and_leave_nothing(source: Path, tmp_path: Path) -> None:
    class_map, splits = validate(read_coco_folder(source), Report(), pixels=False)
    corrupt(source / "train" / "train003.png")
    class_map, splits = validate(read_coco_folder(source), Report(), pixels=False)
    report = Report()
    target = location(str(tmp_path / "store"))
    with pytest.raises(DatasetError, match=r"train/train003\.png"):
        publish_prepared(target, tmp_path / "s", class_map, splits, OPTIONS, source="test", report=report)
    assert [f.code for f in report.errors] == ["unreadable-image"]
    assert target.list_files() == []


def test_what_is_tolerated_is_left_out_with_its_boxes_and_reported(source: Path, tmp_path: Path) -> None:
    corrupt(source / "train" / "train003.png")
    options = CheckOptions(tolerate={"unreadable-image": 1})
    report = Report(options)
    class_map, splits = validate(read_coco_folder(source), report, pixels=False)
    boxes = splits["train"].table
    document = write_prepared(tmp_path / "p", class_map, splits, OPTIONS, source="test", report=report)
    finding = report.findings["unreadable-image"]
    assert finding.severity == "warning" and finding.rows[0].startswith("train/train003.png: ")
    split = PreparedDataset(tmp_path / "p").split("train")
    assert len(split) == 19 and "train003.png" not in split.table.file_names
    assert len(split.table.boxes) == len(boxes.boxes) - int(boxes.counts[3])
    assert [split.decode(i).size[1] for i in range(19)] == [32] * 19
    assert document["splits"]["train"]["images"] == 19
    # ... and a later run that takes it over says so too, and may be stricter
    again = Report()
    report_dropped(document, again)
    assert again.findings["unreadable-image"].rows == finding.rows and again.errors


def natural(seed: int, width: int, height: int) -> Image.Image:
    """Patches at several scales and edges: the spectrum of a photo, about."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128.0)
    for cells, strength in ((4, 60), (16, 30), (64, 14), (256, 6)):
        noise = rng.normal(0, strength, (cells * 3 // 4, cells, 3)).clip(-128, 127)
        image = Image.fromarray((noise + 128).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        pixels += np.asarray(image, dtype=np.float64) - 128
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (200, 60, 40)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("side", [384, 560])
def test_reduction_loses_less_than_the_photo_s_own_jpeg_did(tmp_path: Path, side: int) -> None:
    """In the square that the network gets, in levels of 255, beside the way there without reduction.

    A photo at quality 85 has lost some already, which nobody measures in a detector: another JPEG of it, as good, would
    be taken for the same. What reduction changes is below that, below a level, and no shift.
    """
    photo = natural(3, 1280, 960)
    data = encoded(photo, "JPEG", quality=85)
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    file = examine(str(path), 10**8).file
    assert not isinstance(file, Problem)
    stored = encode(file, 600)
    assert not isinstance(stored, Problem) and (stored.width, stored.height) == (800, 600)

    def square(image: Image.Image) -> np.ndarray[Any, Any]:
        return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR), dtype=np.float64)

    exact = square(Image.open(io.BytesIO(data)))
    reduced = square(Image.open(io.BytesIO(stored.data)))
    lost = np.abs(exact - square(photo)).mean()
    assert np.abs(reduced - exact).mean() < min(1.0, 0.75 * lost)
    assert abs((reduced - exact).mean()) < 0.1  # neither brighter nor darker


def test_the_digest_tells_negative_zero_from_nothing(source: Path) -> None:
    class_map, splits, _ = validated(source)
    digest = preparing.dataset_digest(class_map, splits, OPTIONS)
    splits["train"].table.boxes[0, 0] = 0.0
    zero = preparing.dataset_digest(class_map, splits, OPTIONS)
    splits["train"].table.boxes[0, 0] = -0.0
    assert preparing.dataset_digest(class_map, splits, OPTIONS) == zero != digest
