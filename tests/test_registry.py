"""The pointer to the champion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rfdetr_core.errors import ChampionChangedError, ConfigError, PublicationError
from rfdetr_core.registry import Champion, Registry, model_names
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
    assert found == Champion("run-7", POINTER["metrics"], "abc", found.revision if found else "", POINTER["promoted"])
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


def test_the_pointer_keeps_who_was_before(registry: Registry) -> None:
    for version, by in (("run-1", "gate"), ("run-2", "ann"), ("run-3", "gate")):
        registry.move(registry.champion(), version, metrics={"map": 0.5}, test_digest="abc", by=by)
    found = registry.champion()
    assert found is not None and (found.version, found.by) == ("run-3", "gate")
    assert [(row["version"], row["by"]) for row in found.history] == [("run-1", "gate"), ("run-2", "ann")]


def test_of_two_who_read_the_same_pointer_the_second_is_told(registry: Registry) -> None:
    registry.move(None, "run-1", metrics={}, test_digest="abc", by="gate")
    seen = registry.champion()
    registry.move(seen, "run-2", metrics={}, test_digest="abc", by="gate")
    for before in (seen, None):
        with pytest.raises(ChampionChangedError, match="another run promoted while this one decided") as caught:
            registry.move(before, "run-3", metrics={}, test_digest="abc", by="gate")
        assert caught.value.exit_code == 75
    found = registry.champion()
    assert found is not None and found.version == "run-2"


@pytest.mark.parametrize("name", ["a/b", "../cells", "", "Cells", "x" * 64])
def test_a_name_that_leaves_its_place_is_refused(registry: Registry, name: str) -> None:
    with pytest.raises(ConfigError, match="is no name of a model"):
        Registry(registry.root, name)
    with pytest.raises(ConfigError, match="is no version"):
        registry.version(name)


def test_models_are_found_by_what_they_have(registry: Registry) -> None:
    assert model_names(registry.root) == []
    registry.move(None, "run-1", metrics={}, test_digest="abc", by="gate")
    assert model_names(registry.root) == ["cells"]
    assert registry.versions() == []
