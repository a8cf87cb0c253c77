"""The pointer to the champion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rfdetr_core.errors import PublicationError
from rfdetr_core.registry import Champion, Registry
from rfdetr_core.storage import location

POINTER: dict[str, Any] = {
    "version": "run-7",
    "metrics": {"map": 0.5, "per_class": {"cat": {"ap": 0.5}}},
    "test_digest": "abc",
    "promoted": "2030-01-01T00:00:00+00:00",
}


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(location(str(tmp_path)), "cells")


def test_places(registry: Registry, tmp_path: Path) -> None:
    assert registry.base.local_path == tmp_path / "models" / "cells"
    assert registry.pointer.local_path == tmp_path / "models" / "cells" / "champion.json"
    assert registry.version("run-7").local_path == tmp_path / "models" / "cells" / "versions" / "run-7"


def test_no_pointer_is_no_champion(registry: Registry) -> None:
    assert registry.champion() is None


def test_a_champion_is_read_with_its_revision(registry: Registry) -> None:
    first = registry.pointer.write_if(json.dumps(POINTER).encode(), None)
    found = registry.champion()
    assert found == Champion("run-7", POINTER["metrics"], "abc", found.revision if found else "")
    assert found is not None and found.revision == first
    second = registry.pointer.write_if(json.dumps({**POINTER, "version": "run-8"}).encode(), found.revision)
    found = registry.champion()
    assert found is not None and (found.version, found.revision) == ("run-8", second) and first != second


BROKEN = {
    "empty": b"",
    "not JSON": b"{",
    "not UTF-8": b'{"version": "\xff"}',
    "a list": b"[1]",
    "a text": b'"run-7"',
    "null": b"null",
    "no version": json.dumps({k: v for k, v in POINTER.items() if k != "version"}).encode(),
    "no metrics": json.dumps({k: v for k, v in POINTER.items() if k != "metrics"}).encode(),
    "no digest": json.dumps({k: v for k, v in POINTER.items() if k != "test_digest"}).encode(),
    "metrics of no kind": json.dumps({**POINTER, "metrics": 5}).encode(),
    "metrics as a list": json.dumps({**POINTER, "metrics": [5]}).encode(),
    "a version that is no name": json.dumps({**POINTER, "version": None}).encode(),
    "a version that leaves the registry": json.dumps({**POINTER, "version": "../../other"}).encode(),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_pointer_is_no_champion_and_not_passed_over(registry: Registry, case: str) -> None:
    """Taken for absent, any model would be promoted over the lost champion."""
    registry.pointer.write_if(BROKEN[case], None)
    with pytest.raises(PublicationError, match=r"champion\.json: not a champion pointer: .*restore it") as caught:
        registry.champion()
    assert "\n" not in str(caught.value)
