"""What tests of several folders share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before torch loads: tiny models run no faster on two threads, and results are to the bit those of child processes.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def bccd() -> Path:
    """The blood cell dataset, a real one: its folder holds coco/ and raw_coco/."""
    default = Path(__file__).parents[2] / "shared" / "data" / "bccd"
    folder = Path(os.environ.get("RFDETR_BCCD", default))
    if not (folder / "coco" / "train" / "_annotations.coco.json").is_file():
        pytest.skip(f"the BCCD dataset is missing at {folder}: set RFDETR_BCCD to the folder that holds its coco/")
    return folder
