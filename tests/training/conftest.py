"""One drawn dataset for all tests of training."""

from __future__ import annotations

import pytest

from rfdetr_core.data.prepared import PreparedDataset
from tests.training import tiny


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    folder = tmp_path_factory.mktemp("drawn")
    return tiny.prepare(tiny.draw(folder / "coco"), folder / "prepared")
