"""The engine and the images that these tests use: `make test-containers` builds them first."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipelines.containers.engine import Engine, container_engine


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    with container_engine() as engine:
        engine.images()  # all are there
        yield engine
