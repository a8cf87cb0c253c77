"""Splits that a dataset does not have are taken from train by a hash of the file name (DESIGN section 5)."""

from __future__ import annotations

import hashlib
from pathlib import PurePosixPath

import numpy as np

from rfdetr_core.data.annotations import SPLITS
from rfdetr_core.data.boxes import ValidSplit
from rfdetr_core.data.findings import Report
from rfdetr_core.data.validation import check_leakage
from rfdetr_core.errors import DatasetError


def hash_split(file_name: str) -> str:
    """train, valid or test for a file name: an image never changes its split as the data grows.

    u = first 8 bytes of SHA-256(group) / 2^64, group = the name without folder and extension, cut at `.rf.`
    (Roboflow's augmented copies of one photo share it); u < 0.7 train, < 0.9 valid, else test.
    """
    group = PurePosixPath(file_name).stem.split(".rf.")[0]
    u = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
    return "train" if u < 0.7 else "valid" if u < 0.9 else "test"


def fill_missing_splits(
    splits: dict[str, ValidSplit], report: Report, *, missing_test: str = "hash"
) -> dict[str, ValidSplit]:
    """Take each absent split's images out of train; with `missing_test` "valid", test is valid once more.

    Raises:
        DatasetError: train is too small to give every split an image and keep a box.
    """
    lent = missing_test == "valid" and "test" not in splits
    missing = [split for split in SPLITS if split not in splits and not (lent and split == "test")]
    filled = _taken_from_train(splits, missing, report) if missing else dict(splits)
    if lent:
        filled["test"] = filled["valid"]
        report.add("test-is-valid", [f"test: {len(filled['valid'].table)} images of valid"])
    return {split: filled[split] for split in SPLITS}


def _taken_from_train(splits: dict[str, ValidSplit], missing: list[str], report: Report) -> dict[str, ValidSplit]:
    train = splits["train"]
    wanted = np.array([hash_split(str(name)) for name in train.table.file_names])
    wanted[~np.isin(wanted, missing)] = "train"
    filled = {**splits, "train": train.select(np.flatnonzero(wanted == "train"))}
    for split in missing:
        filled[split] = train.select(np.flatnonzero(wanted == split))
        report.add("split-by-hash", [f"{split}: {len(filled[split].table)} images"])
    for split in ("train", *missing):
        if not len(filled[split].table):
            message = f"train has too few images ({len(train.table)}) to take {' and '.join(missing)} from it"
            report.add("too-few-images", [f"{split}: none left"])
            raise DatasetError(message, hint=f"add images, or a {split}/ folder of your own")
    if filled["train"].table.crowd.all():  # also true of no box at all
        message = f"train has no usable box left after {' and '.join(missing)} were taken from it"
        report.add("no-boxes", [message])
        raise DatasetError(message, hint="annotate more images, or give the splits of your own")
    check_leakage(filled, report, across=True)  # one photo under two names may have gone to two splits
    return filled
