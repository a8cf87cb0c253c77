"""What tests of several folders share."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes says more about what else the machine does than about the code.
settings.register_profile("here", deadline=None)
settings.load_profile("here")


def pytest_sessionstart() -> None:
    """What is imported and collected stays: to look through it again and again took half of the time of collecting."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Nor is it looked through in tests, a second each time."""
    if not gc.get_freeze_count():
        gc.freeze()
        atexit.register(gc.unfreeze)  # or libraries say that their objects were lost
    gc.enable()


def pytest_sessionfinish() -> None:
    gc.enable()


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
