"""The prepared dataset: shards, index, digest, statistics."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from rfdetr_core.data import shards as module
from rfdetr_core.data.annotations import AnnotationTable, ClassMap
from rfdetr_core.data.pixels import Encoded
from rfdetr_core.data.prepared import PreparedDataset, PreparedSplit
from rfdetr_core.data.preparing import PrepareOptions, dataset_digest, write_prepared
from rfdetr_core.data.statistics import split_statistics
from rfdetr_core.errors import DatasetError
from tests.data.helpers import (
    annotation,
    document,
    grid_dataset,
    image_row,
    prepared,
    validated,
    write_dataset,
    write_split,
)


def bytes_of(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def by_tarfile(split: Path) -> dict[str, bytes]:
    """What any other tool unpacks; the same name twice would show as a missing image."""
    found = {}
    for shard in sorted(split.glob("*.tar")):
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                assert member.isreg() and member.mtime == 0 and member.uid == 0 and member.uname == ""
                content = tar.extractfile(member)
                assert content is not None
                found[member.name] = content.read()
    return found


NAMES = [
    "plain.png",
    "sub/folder/plain.png",
    "名前.png",
    "é" * 60 + ".png",
    "n" * 96 + ".png",  # exactly the 100 bytes of the plain header
    "n" * 97 + ".png",
    "d" * 120 + "/" + "n" * 90 + ".png",  # beyond what a ustar prefix can hold, too
    "with space and 'quotes'.png",
]


def named_dataset(folder: Path) -> Path:
    rows = [image_row(i + 1, name, 20 + i, 12) for i, name in enumerate(NAMES)]
    boxes = [annotation(i + 1, i + 1, bbox=(1, 1, 5, 5)) for i in range(len(NAMES))]
    return write_dataset(folder, document(rows, boxes))


def test_each_image_has_its_bytes_by_one_read_and_by_tarfile(tmp_path: Path) -> None:
    source = named_dataset(tmp_path / "source")
    dataset = prepared(source, tmp_path / "prepared")
    split, unpacked = dataset.split("train"), by_tarfile(tmp_path / "prepared" / "train")
    assert split.table.file_names.tolist() == list(unpacked) == NAMES
    for i, name in enumerate(NAMES):
        original = (source / "train" / name).read_bytes()
        assert split.read_bytes(i) == unpacked[name] == original
        assert split.index.sha256[i] == hashlib.sha256(original).hexdigest()
        assert split.decode(i).size == (20 + i, 12)


@settings(max_examples=40, deadline=None)
@given(
    files=st.dictionaries(
        st.text(
            st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/\\"), min_size=1, max_size=70
        ).filter(lambda name: name not in (".", "..")),
        st.binary(max_size=1500),
        max_size=6,
    ),
    limit=st.sampled_from([10_240, 20_480, 1_000_000]),
)
def test_any_names_and_lengths_are_found_by_their_offsets(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], limit: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    rows: list[module.Row] = []
    with (
        pytest.MonkeyPatch.context() as patch,
        module.ShardWriter(folder, lambda number, path, of_shard: rows.extend(of_shard)) as writer,
    ):
        patch.setattr(module, "SHARD_BYTES", limit)
        for name, data in files.items():
            writer.add(name, Encoded(data, 1, 1, 1, ""))
    index = json.loads(module.index_bytes(len(list(folder.iterdir())), rows))
    columns = index["images"]
    for i, (name, data) in enumerate(files.items()):
        shard = (folder / index["shards"][columns["shard"][i]]).read_bytes()
        assert columns["name"][i] == name
        assert shard[columns["offset"][i] :][: columns["length"][i]] == data
    unpacked = by_tarfile(folder)
    assert {name.rstrip("/"): data for name, data in files.items()} == unpacked
    assert all(path.stat().st_size <= limit for path in folder.glob("*.tar"))


def test_shards_stay_below_their_limit_unless_one_image_is_larger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 40_960)
    monkeypatch.setattr(tarfile, "RECORDSIZE", 10_240)
    rows = [image_row(i + 1, f"{i}.png", 64, 48) for i in range(12)]  # 9.3 kB of noise each
    rows.insert(5, image_row(99, "large.png", 200, 100))  # 60 kB
    write_dataset(tmp_path / "source", document(rows, [annotation()]))
    dataset = prepared(tmp_path / "source", tmp_path / "prepared")
    split = dataset.split("train")
    sizes = [(tmp_path / "prepared" / "train" / shard).stat().st_size for shard in split.index.shards]
    large = int(split.index.shard_of[split.table.file_names.tolist().index("large.png")])
    assert (split.index.shard_of == large).sum() == 1 and sizes[large] > 40_960
    assert all(size <= 40_960 for i, size in enumerate(sizes) if i != large)
    assert len(sizes) == 5  # four images fit into a shard
    assert split.index.shards == tuple(f"images-{i:05d}.tar" for i in range(5))
    for i, name in enumerate(split.table.file_names):
        assert split.read_bytes(i) == (tmp_path / "source" / "train" / str(name)).read_bytes()


def test_the_bytes_are_deterministic_and_know_nothing_of_place_or_time(tmp_path: Path) -> None:
    named_dataset(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "moved" / "deep")
    for path in (tmp_path / "moved").rglob("*.png"):
        os.utime(path, (0, 0))
        path.chmod(0o600)
    one = prepared(tmp_path / "one", tmp_path / "a", short_side=10)
    other = prepared(tmp_path / "moved" / "deep", tmp_path / "b", short_side=10)
    assert one.digest == other.digest
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


# ---- digest -----------------------------------------------------------------------------------------------


def digest_of(folder: Path, options: PrepareOptions = PrepareOptions(None)) -> str:  # noqa: B008
    class_map, splits, _ = validated(folder)
    return dataset_digest(class_map, splits, options)


def base(**changes: Any) -> dict[str, Any]:
    content = document(
        [image_row(1), image_row(2, "b.png")],
        [annotation(1, area=50), annotation(2, 2, 2, area=60, iscrowd=0)],
    )
    for key, value in changes.items():
        table, row, column = key.split("__")
        content[table][int(row)] = {**content[table][int(row)], column: value}
    return content


def test_the_digest_ignores_what_changes_nothing(tmp_path: Path) -> None:
    digest = digest_of(write_dataset(tmp_path, base()))
    extra = {**base(), "info": {"year": 2030}, "licenses": [1]}
    extra["annotations"] = [annotation(9, 1, bbox=(5, 5, 0, 9)), *reversed(base()["annotations"])]
    extra["images"] = [{**row, "license": 3} for row in reversed(base()["images"])]
    write_split(tmp_path, "train", extra)
    (tmp_path / "train" / "unlisted.png").write_bytes(b"")
    assert digest_of(tmp_path) == digest


CHANGES = {
    "another box": base(annotations__0__bbox=[4, 4, 20, 10.5]),
    "another class": base(annotations__0__category_id=2),
    "another area": base(annotations__0__area=51),
    "a crowd": base(annotations__1__iscrowd=1),
    "another image of the box": base(annotations__1__image_id=1),
    "another class name": base(categories__0__name="lion"),
    "another source id": base(categories__1__id=7, annotations__1__category_id=7),
    "another file name": base(images__1__file_name="c.png"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_digest_depends_on_all_that_is_prepared(tmp_path: Path, change: str) -> None:
    write_dataset(tmp_path, base(), base())
    digest = digest_of(tmp_path)
    shutil.copyfile(tmp_path / "train" / "b.png", tmp_path / "train" / "c.png")  # the same pixels, another name
    write_dataset(tmp_path, CHANGES[change], {**CHANGES[change], "images": base()["images"]})
    assert digest_of(tmp_path) != digest


def test_the_digest_depends_on_pixels_options_and_splits(tmp_path: Path) -> None:
    write_dataset(tmp_path, base(), base())
    digests = [digest_of(tmp_path, PrepareOptions(side)) for side in (None, 600, 601)]
    write_split(tmp_path, "test", base(), seed=3)
    digests.append(digest_of(tmp_path))
    (tmp_path / "train" / "a.png").write_bytes((tmp_path / "test" / "a.png").read_bytes())
    digests.append(digest_of(tmp_path))
    class_map, splits, _ = validated(tmp_path)
    file = splits["train"].files[0]
    turned = replace(splits["train"], files=(replace(file, orientation=3), *splits["train"].files[1:]))
    digests.append(dataset_digest(class_map, {**splits, "train": turned}, PrepareOptions(None)))
    assert len(set(digests)) == len(digests) == 6


def test_every_option_is_in_the_digest() -> None:
    """A new field of PrepareOptions without a place in the digest would share one dataset between two options."""
    assert set(PrepareOptions(None).to_json()) == set(PrepareOptions.__dataclass_fields__) == {"train_short_side"}


# ---- reduction --------------------------------------------------------------------------------------------


def test_large_train_images_are_reduced_with_their_boxes(tmp_path: Path) -> None:
    rows = [image_row(1, "wide.png", 200, 100), image_row(2, "fits.png", 90, 50), image_row(3, "tall.jpg", 77, 151)]
    boxes = [
        annotation(1, 1, bbox=(20, 10, 100, 40), area=3000),
        annotation(2, 2),
        annotation(3, 3, bbox=(7, 15.1, 70, 30.2)),
    ]
    write_dataset(tmp_path / "source", document(rows, boxes), document(rows, boxes))
    dataset = prepared(tmp_path / "source", tmp_path / "prepared", short_side=50)
    train, valid = dataset.split("train"), dataset.split("valid")
    assert [train.decode(i).size for i in range(3)] == [(100, 50), (90, 50), (50, 98)]
    assert (train.table.widths.tolist(), train.table.heights.tolist()) == ([100, 90, 50], [50, 50, 98])
    assert train.table.boxes[0].tolist() == [10, 5, 60, 25]
    assert train.table.areas[0] == 3000 / 4
    x, y = 50 / 77, 98 / 151  # 98 is rounded: the sides shrink a little differently
    assert train.table.boxes[2] == pytest.approx([7 * x, 15.1 * y, 77 * x, 45.3 * y])
    assert train.table.areas[2] == pytest.approx(70 * 30.2 * x * y)
    # what fits keeps its bytes, and so does every other split
    assert train.read_bytes(1) == (tmp_path / "source" / "train" / "fits.png").read_bytes()
    for i, row in enumerate(rows):
        assert valid.read_bytes(i) == (tmp_path / "source" / "valid" / row["file_name"]).read_bytes()
    assert dataset.document["options"] == {"train_short_side": 50}
    assert [hashlib.sha256(train.read_bytes(i)).hexdigest() for i in range(3)] == list(train.index.sha256)


def test_a_reduced_image_shows_the_same_and_is_upright(tmp_path: Path) -> None:
    """Left half dark, right half bright, stored turned by 90 degrees."""
    tags = Image.Exif()
    tags[0x0112] = 6
    shown = Image.new("RGB", (200, 120), (20, 20, 20))
    shown.paste((230, 230, 230), (100, 0, 200, 120))
    write_dataset(tmp_path / "source", document([image_row(1, "a.jpg", 200, 120)], [annotation()]))
    shown.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "source" / "train" / "a.jpg", exif=tags)
    dataset = prepared(tmp_path / "source", tmp_path / "prepared", short_side=60)
    image = dataset.split("train").decode(0)
    assert image.size == (100, 60)
    pixels = np.asarray(image)[..., 0]
    assert pixels[:, :48].max() < 60 and pixels[:, 52:].min() > 200
    # whoever unpacks the shard sees it upright too: nothing is left to apply
    [data] = by_tarfile(tmp_path / "prepared" / "train").values()
    assert Image.open(io.BytesIO(data)).getexif().get(0x0112) is None


def test_an_image_that_changed_since_validation_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "source")
    class_map, splits, _ = validated(tmp_path / "source")
    path = tmp_path / "source" / "valid" / "a.png"
    path.write_bytes(path.read_bytes() + b"\0")
    (tmp_path / "changed").mkdir()
    with pytest.raises(DatasetError, match=r"valid/a\.png: changed since it was validated"):
        write_prepared(tmp_path / "changed", class_map, splits, PrepareOptions(None), source="test")
    assert not (tmp_path / "changed" / "dataset.json").exists()
    path.unlink()
    (tmp_path / "gone").mkdir()
    with pytest.raises(DatasetError, match=r"valid/a\.png: cannot be read any more: No such file"):
        write_prepared(tmp_path / "gone", class_map, splits, PrepareOptions(None), source="test")


# ---- what it says about itself ----------------------------------------------------------------------------


def test_annotations_load_in_pycocotools(tmp_path: Path) -> None:
    source = grid_dataset(tmp_path / "source", 4)
    dataset = prepared(source, tmp_path / "prepared")
    table = dataset.split("train").table
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(tmp_path / "prepared" / "train" / "annotations.coco.json"))
    assert [coco.imgs[i]["file_name"] for i in sorted(coco.imgs)] == table.file_names.tolist()
    assert sorted(coco.anns) == list(range(1, len(table.boxes) + 1))  # pycocotools takes id 0 for no match
    assert {c["id"]: c["name"] for c in coco.loadCats(coco.getCatIds())} == {1: "cat", 2: "dog"}
    for i in range(len(table)):
        found = coco.loadAnns(coco.getAnnIds(imgIds=i + 1))
        rows = table.rows(i)
        assert [a["category_id"] - 1 for a in found] == table.labels[rows].tolist()
        xywh = np.array([a["bbox"] for a in found])
        assert np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1) == pytest.approx(table.boxes[rows])
        assert all(a["area"] > 0 and a["iscrowd"] == 0 for a in found)


def test_reading_gives_what_was_written(tmp_path: Path) -> None:
    write_dataset(tmp_path / "source", base(annotations__1__iscrowd=1), base())
    class_map, splits, _ = validated(tmp_path / "source")
    dataset = prepared(tmp_path / "source", tmp_path / "prepared")
    assert dataset.class_map == class_map == ClassMap((1, 2), ("cat", "dog"))
    assert dataset.digest == dataset_digest(class_map, splits, PrepareOptions(None))
    assert dataset.document["source"] == "test"
    for name, split in splits.items():
        read = dataset.split(name)
        assert len(read) == len(split.table) == 2
        for column in AnnotationTable.__dataclass_fields__:
            one, other = getattr(read.table, column), getattr(split.table, column)
            assert np.array_equal(one, other) and one.dtype.kind == other.dtype.kind, column


def test_a_table_without_a_box_survives_the_round_trip() -> None:
    empty = AnnotationTable.from_coco({"images": [{"file_name": "a", "width": 2, "height": 3}], "annotations": []})
    assert empty.boxes.shape == (0, 4) and empty.offsets.tolist() == [0, 0]
    again = AnnotationTable.from_coco(empty.to_coco(ClassMap((1,), ("cat",))))
    assert again.file_names.tolist() == ["a"] and again.boxes.shape == (0, 4)
    assert len(empty.select(np.empty(0, dtype=np.int64))) == 0


def test_statistics_are_counted() -> None:
    table = AnnotationTable(
        file_names=np.array(["a", "b", "c", "d"]),
        widths=np.array([128, 127, 5000, 640]),
        heights=np.array([300, 300, 4096, 480]),
        offsets=np.array([0, 3, 3, 4, 5]),
        boxes=np.array([[5, 7, 9, 23], [5, 7, 13, 14.9], [5, 7, 104, 106], [5, 7, 517, 519], [5, 7, 14, 16]]),
        labels=np.array([0, 2, 0, 2, 1]),
        areas=np.ones(5),
        crowd=np.array([False, False, False, False, True]),
    )
    statistics = split_statistics(table, ClassMap((1, 2, 3), ("x", "y", "z")))
    assert {k: v for k, v in statistics.items() if "histogram" not in k} == {
        "images": 4,
        "boxes": 4,
        "crowd_regions": 1,
        "images_without_boxes": 1,
        "max_boxes_per_image": 3,
        "boxes_per_class": {"x": 2, "y": 0, "z": 2},
        "extreme_images": {"widest": [640, 480], "tallest": [127, 300]},
    }
    filled = {k: v for k, v in statistics["box_side_histogram"].items() if v}
    assert filled == {"0-8": 1, "8-16": 1, "96-128": 1, "512+": 1}  # a side of 8 is in 8-16: sqrt(4 x 16)
    assert sum(statistics["image_short_side_histogram"].values()) == 4
    assert statistics["image_short_side_histogram"]["128-256"] == 1
    assert statistics["image_short_side_histogram"]["0-128"] == 1
    assert statistics["image_short_side_histogram"]["4096+"] == 1


def test_the_largest_number_of_boxes_counts_targets_of_train(tmp_path: Path) -> None:
    boxes = [annotation(i, iscrowd=int(i > 3)) for i in range(1, 9)]
    write_dataset(tmp_path / "source", document(annotations=boxes))
    assert prepared(tmp_path / "source", tmp_path / "prepared").max_boxes_per_image == 3


# ---- wrong folders ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "not a prepared dataset: .*No such file"),
        ("{", "not a prepared dataset: Expecting property name"),
        ("[]", "not a prepared dataset: "),
        ("{}", "not a prepared dataset: 'format_version' is missing"),
        ('{"format_version": 1}', "not a prepared dataset: 'digest' is missing"),
        ('{"format_version": 1, "digest": "x", "classes": [1]}', "not a prepared dataset: "),
        ('{"format_version": 99}', "format version 99, this program reads 1"),
    ],
)
def test_a_folder_that_is_no_prepared_dataset(tmp_path: Path, content: str | None, expected: str) -> None:
    if content is not None:
        (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(DatasetError, match=f"^{tmp_path}: {expected}") as caught:
        PreparedDataset(tmp_path)
    assert "\n" not in str(caught.value)


def cut_index(split: Path) -> None:
    index = json.loads((split / "index.json").read_text())
    index["images"]["sha256"].pop()
    (split / "index.json").write_text(json.dumps(index))


DAMAGES: dict[str, Any] = {
    "No such file": lambda split: (split / "index.json").unlink(),
    "Expecting value": lambda split: (split / "annotations.coco.json").write_text(""),
    "'images' is missing": lambda split: (split / "index.json").write_text("{}"),
    "not a split of a prepared dataset": lambda split: (split / "annotations.coco.json").write_text("[]"),
    "2 annotated images, 1 in the index": cut_index,
}


@pytest.mark.parametrize("expected", DAMAGES)
def test_a_damaged_split_is_named(tmp_path: Path, expected: str) -> None:
    dataset = prepared(grid_dataset(tmp_path / "source", 2), tmp_path / "prepared")
    DAMAGES[expected](tmp_path / "prepared" / "train")
    with pytest.raises(DatasetError, match=expected) as caught:
        dataset.split("train")
    assert str(caught.value).startswith(str(tmp_path / "prepared" / "train")) and "\n" not in str(caught.value)


def test_a_split_of_another_name_is_refused(tmp_path: Path) -> None:
    dataset = prepared(write_dataset(tmp_path / "source"), tmp_path / "prepared")
    with pytest.raises(DatasetError, match=r"val: no such split \(one of train, valid, test\)"):
        dataset.split("val")
    with pytest.raises(DatasetError, match="not a split of a prepared dataset"):
        dataset.split("test")


def test_a_shard_that_is_cut_or_gone_is_named(tmp_path: Path) -> None:
    dataset = prepared(write_dataset(tmp_path / "source"), tmp_path / "prepared")
    shard = tmp_path / "prepared" / "train" / "images-00000.tar"
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(DatasetError, match=r"images-00000\.tar: cut short within image 0"):
        dataset.split("train").read_bytes(0)
    shard.unlink()
    with pytest.raises(DatasetError, match=r"images-00000\.tar: cannot be read: No such file"):
        dataset.split("train").read_bytes(0)


# ---- descriptors and processes ----------------------------------------------------------------------------


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_splits_that_are_dropped_leave_no_file_open(tmp_path: Path) -> None:
    """The training loop opens the valid split anew for every evaluation."""
    dataset = prepared(write_dataset(tmp_path / "source"), tmp_path / "prepared")
    before = open_files()
    for _ in range(5):
        dataset.split("train").read_bytes(0)
    assert open_files() == before
    split = dataset.split("train")
    data = split.read_bytes(0)
    assert open_files() == before + 1
    split.close()
    assert open_files() == before
    assert split.read_bytes(0) == data


def _digest_all(split: PreparedSplit, rounds: int, results: Any) -> None:
    for _ in range(rounds):
        digests = [hashlib.sha256(split.read_bytes(i)).hexdigest() for i in range(len(split))]
    results.put((os.getpid(), digests))


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # Python 3.12 on any fork beside threads
def test_forked_processes_read_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared file position would mix their reads up; a child that ends must not close its parent's files."""
    monkeypatch.setattr(module, "SHARD_BYTES", 40_960)
    split = prepared(grid_dataset(tmp_path / "source", 10), tmp_path / "prepared").split("train")
    split.read_bytes(0)  # the parent has a shard open before the fork
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    children = [context.Process(target=_digest_all, args=(split, 20, results)) for _ in range(3)]
    for child in children:
        child.start()
    _digest_all(split, 20, results)
    found = [results.get() for _ in range(4)]
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert len({process for process, _ in found}) == 4
    assert all(digests == list(split.index.sha256) for _, digests in found)
    assert hashlib.sha256(split.read_bytes(0)).hexdigest() == split.index.sha256[0]
