"""Splits by the hash of the file name."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rfdetr_core.data.annotations import AnnotationTable
from rfdetr_core.data.boxes import ValidSplit
from rfdetr_core.data.findings import Report
from rfdetr_core.data.splitting import fill_missing_splits, hash_split
from rfdetr_core.data.survey import ImageFile
from rfdetr_core.errors import DatasetError

# SHA-256 of the group, its first 16 hex digits by `printf %s NAME | sha256sum`, as a share of 2^64.
BY_HAND = {
    "a.jpg": (0xCA978112CA1BBDCA, "valid"),  # of "a"; 0.7914
    "b.jpg": (0x3E23E8160039594A, "train"),  # of "b"; 0.2427
    "c.jpg": (0x2E7D2C03A9507AE2, "train"),  # of "c"; 0.1816
    "d.jpg": (0x18AC3E7343F01689, "train"),  # of "d"; 0.0964
    "hello.png": (0x2CF24DBA5FB0A30E, "train"),  # of "hello"; 0.1756
    "abc.webp": (0xBA7816BF8F01CFEA, "valid"),  # of "abc"; 0.7284
}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_formula(name: str) -> None:
    first_bytes, split = BY_HAND[name]
    group = name.split(".")[0]
    assert hashlib.sha256(group.encode()).hexdigest()[:16] == f"{first_bytes:016x}"
    u = first_bytes / 2**64
    assert hash_split(name) == split == ("train" if u < 0.7 else "valid" if u < 0.9 else "test")


def test_the_shares_are_70_20_10() -> None:
    counts = Counter(hash_split(f"image_{i:05d}.jpg") for i in range(20_000))
    assert counts["train"] / 20_000 == pytest.approx(0.7, abs=0.015)
    assert counts["valid"] / 20_000 == pytest.approx(0.2, abs=0.015)
    assert counts["test"] / 20_000 == pytest.approx(0.1, abs=0.015)


def test_augmented_copies_and_other_places_of_a_photo_stay_together() -> None:
    for i in range(200):
        group = {
            f"photo_{i}.jpg", f"photo_{i}.png", f"sub/photo_{i}.jpeg", f"photo_{i}.rf.0a1b2c.jpg",
            f"other/deep/photo_{i}.rf.ffff.rf.00.jpg",
        }  # fmt: skip
        assert len({hash_split(name) for name in group}) == 1
    assert len({hash_split(f"photo_{i}.jpg") for i in range(200)}) == 3
    # Only ".rf." cuts, and only the last suffix is the extension.
    assert hash_split("a.v2.jpg") == split_of("a.v2") and hash_split("a.rfx.jpg") == split_of("a.rfx")
    assert hash_split("a_jpg.rf.77.jpg") == split_of("a_jpg")


def split_of(group: str) -> str:
    u = int(hashlib.sha256(group.encode()).hexdigest()[:16], 16) / 2**64
    return "train" if u < 0.7 else "valid" if u < 0.9 else "test"


def one_box_each(names: list[str]) -> ValidSplit:
    n = len(names)
    table = AnnotationTable(
        file_names=np.array(names, dtype=np.str_),
        widths=np.full(n, 10),
        heights=np.full(n, 10),
        offsets=np.arange(n + 1),
        boxes=np.arange(4 * n, dtype=np.float64).reshape(n, 4),
        labels=np.zeros(n, dtype=np.int64),
        areas=np.ones(n),
        crowd=np.zeros(n, dtype=np.bool_),
    )
    return ValidSplit(table, tuple(ImageFile(Path(name), 10, 10, 1, name, 1) for name in names))


def placed(splits: dict[str, ValidSplit]) -> dict[str, str]:
    return {str(name): split for split, content in splits.items() for name in content.table.file_names}


MANY = [f"photo-{i}.jpg" for i in range(60)]


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(added=st.lists(st.text("abc.rf/", min_size=1, max_size=10), unique=True, max_size=20), seed=st.integers(0, 99))
def test_an_image_never_changes_its_split_when_others_come(added: list[str], seed: int) -> None:
    before = placed(fill_missing_splits({"train": one_box_each(MANY)}, Report()))
    grown = np.random.default_rng(seed).permutation([*MANY, *set(added) - set(MANY)]).tolist()
    after = placed(fill_missing_splits({"train": one_box_each(grown)}, Report()))
    assert set(after) == set(grown)
    assert before.items() <= after.items()


@pytest.mark.parametrize("kept", ["train", "valid"])
def test_a_train_split_left_without_boxes_is_an_error_that_the_report_holds(kept: str) -> None:
    split = one_box_each(MANY)
    crowd = np.array([hash_split(name) != kept for name in MANY])
    report, source = Report(), ValidSplit(replace(split.table, crowd=crowd), split.files)
    if kept == "train":
        assert not fill_missing_splits({"train": source}, report)["train"].table.crowd.any()
        return
    with pytest.raises(DatasetError, match="train has no usable box left after valid and test were taken from it"):
        fill_missing_splits({"train": source}, report)
    assert [error.code for error in report.errors] == ["no-boxes"]


def test_images_keep_their_boxes_files_and_order() -> None:
    source = one_box_each(MANY)
    splits = fill_missing_splits({"train": source}, Report())
    assert list(splits) == ["train", "valid", "test"]
    for split in splits.values():
        positions = [MANY.index(name) for name in split.table.file_names]
        assert positions == sorted(positions)
        assert np.array_equal(split.table.boxes, source.table.boxes[positions])
        assert [file.path.name for file in split.files] == split.table.file_names.tolist()
        assert split.table.offsets.tolist() == list(range(len(positions) + 1))


def test_only_what_is_missing_is_taken_and_reported() -> None:
    report = Report()
    own = one_box_each(["v.jpg"])
    splits = fill_missing_splits({"train": one_box_each(MANY), "valid": own}, report)
    assert splits["valid"] is own
    tests = {name for name in MANY if hash_split(name) == "test"}
    assert set(splits["test"].table.file_names) == tests
    assert set(splits["train"].table.file_names) == set(MANY) - tests  # what would be valid stays
    [finding] = report.findings.values()
    assert (finding.code, finding.severity) == ("split-by-hash", "note")
    assert finding.rows == [f"test: {len(tests)} images"]


def test_a_complete_dataset_is_left_alone() -> None:
    report = Report()
    splits = {split: one_box_each([f"{split}.jpg"]) for split in ("train", "valid", "test")}
    filled = fill_missing_splits(splits, report)
    assert list(filled) == list(splits) and all(filled[name] is split for name, split in splits.items())
    assert not report.findings


@pytest.mark.parametrize(("names", "empty"), [(["b.jpg", "c.jpg"], "valid"), (["a.jpg"], "train")])
def test_too_few_images_are_an_error_that_the_report_holds(names: list[str], empty: str) -> None:
    report = Report()
    with pytest.raises(
        DatasetError, match=rf"train has too few images \({len(names)}\) to take valid and test from it"
    ):
        fill_missing_splits({"train": one_box_each(names)}, report)
    [error] = report.errors
    assert error.rows == [f"{empty}: none left"]
