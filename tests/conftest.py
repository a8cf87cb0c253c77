"""What tests of several folders share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes says more about what else the machine does than about the code.
settings.register_profile("here", deadline=None)
settings.load_profile("here")


@pytest.fixture(scope="session", autouse=True)
def _no_power_cut() -> Iterator[None]:
    """No test could tell what `fsync` is for: none waits for the disk. (Whether it is called, some do tell.)"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def bccd() -> Path:
    """The blood cell dataset, a real one: its folder holds coco/ and raw_coco/."""
    default = Path(__file__).parents[2] / "shared" / "data" / "bccd"
    folder = Path(os.environ.get("RFDETR_BCCD", default))
    if not (folder / "coco" / "train" / "_annotations.coco.json").is_file():
        pytest.skip(f"the BCCD dataset is missing at {folder}: set RFDETR_BCCD to the folder that holds its coco/")
    return folder
