"""gc: old runs and unused datasets go, and nothing that the registry or a run at work needs."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli import main
from pipelines.housekeeping import carry_out, plan
from rfdetr_core.errors import ConfigError
from rfdetr_core.storage import Location, location

NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)


class Store:
    """A store, written file by file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def root(self) -> Location:
        return location(str(self.folder))

    def write(self, name: str, value: Any = "x") -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value))

    def run(
        self, name: str, days: float, *, model: str = "a", dataset: str | None = "d1", state: str = "succeeded"
    ) -> None:
        when = (NOW - timedelta(days=days)).isoformat()
        self.write(f"runs/{name}/config.yaml", f"name: {model}\n")
        self.write(f"runs/{name}/status/train.json", {"state": state, "started": when})
        self.write(f"runs/{name}/train/_SUCCESS.json", {})
        self.write(f"runs/{name}/train/metrics.csv")
        self.write(f"runs/{name}/train/checkpoints/checkpoint.pth", "0" * 1000)
        if dataset is not None:
            self.write(f"runs/{name}/dataset/dataset.json", {"location": f"datasets/{dataset}"})

    def version(self, name: str, *, model: str = "a", dataset: str = "d1") -> None:
        self.write(f"models/{model}/versions/{name}/provenance.json", {"dataset": {"digest": dataset}})

    def files(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()}

    def clean(self, keep: int) -> set[str]:
        """What is gone."""
        before = self.files()
        carry_out(self.root, plan(self.root, keep=keep, now=NOW), lambda line: None)
        assert self.files() <= before
        return {"/".join(name.split("/")[:2]) for name in before} - {"/".join(n.split("/")[:2]) for n in self.files()}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    found = Store(tmp_path / "store")
    found.write("datasets/d1/_SUCCESS.json")
    found.write("datasets/d1/train/images-00000.tar", "0" * 500)
    return found


def test_the_newest_runs_of_each_model_stay(store: Store) -> None:
    for days in range(2, 7):
        store.run(f"a{days}", days)
    store.run("b", 90, model="b")
    assert store.clean(keep=2) == {"runs/a4", "runs/a5", "runs/a6"}
    assert store.clean(keep=2) == set()  # the same once more does nothing


def test_what_the_registry_references_stays(store: Store) -> None:
    """A registered run loses its checkpoints, which the registry has; its reports, logs and dataset stay."""
    store.run("old", 30, dataset="d2")
    store.run("new", 2)
    store.write("datasets/d2/_SUCCESS.json")
    store.version("old", dataset="d2")
    store.write("models/a/champion.json", {"version": "old"})
    before = store.files()
    store.clean(keep=1)
    assert before - store.files() == {"runs/old/train/_SUCCESS.json", "runs/old/train/checkpoints/checkpoint.pth"}


def test_a_dataset_goes_when_nothing_uses_it(store: Store) -> None:
    store.run("old", 30, dataset="d2")
    store.run("new", 2, dataset="d3")
    for name in ("d2", "d3", "d4"):
        store.write(f"datasets/{name}/_SUCCESS.json")
    store.version("gone-long-ago", dataset="d4")
    assert store.clean(keep=1) == {"runs/old", "datasets/d1", "datasets/d2"}


def test_what_is_remembered_of_a_source_goes_with_its_dataset(store: Store) -> None:
    store.run("old", 30, dataset="d2")
    store.run("new", 2, dataset="d3")
    for name in ("d2", "d3"):
        store.write(f"datasets/{name}/_SUCCESS.json")
        store.write(f"datasets/sources/of-{name}/dataset.json", {"location": f"datasets/{name}"})
    store.write("datasets/sources/torn/report.json")
    store.clean(keep=1)
    left = {name for name in store.files() if name.startswith("datasets/")}
    assert left == {"datasets/d3/_SUCCESS.json", "datasets/sources/of-d3/dataset.json"}


@pytest.mark.parametrize(
    ("state", "days", "stays"), [("running", 6, True), ("running", 9, False), ("failed", 0.5, True)]
)
def test_what_may_be_at_work_stays(store: Store, state: str, days: float, stays: bool) -> None:
    store.run("work", days, state=state)
    store.run("newer", days / 2 if days > 1 else 0.1)
    assert ("runs/work" not in store.clean(keep=1)) is stays


def test_a_run_that_has_not_named_its_dataset_yet_protects_all(store: Store) -> None:
    store.run("begun", 0.01, dataset=None, state="running")
    store.write("datasets/fresh/_SUCCESS.json")
    assert store.clean(keep=1) == set()
    assert plan(store.root, keep=1, now=NOW).notes == (
        "datasets are left alone: runs/begun is at work, and has not said yet which one it uses",
    )


def test_what_is_no_run_of_ours_is_left_alone_and_said(store: Store) -> None:
    store.write("runs/mine/notes.txt")
    store.write("weights/abc/w.pth")
    store.write("configs/c.yaml")
    assert store.clean(keep=1) == {"datasets/d1"}
    assert plan(store.root, keep=1, now=NOW).notes == ("runs/mine has no status and is left alone",)


def test_looks_for_changes_that_were_killed_go_without_counting(store: Store) -> None:
    store.run("check-a-0011", 2)
    store.run("a1", 3)
    assert store.clean(keep=1) == {"runs/check-a-0011"}


def test_a_registry_that_is_not_understood_stops_everything(store: Store) -> None:
    store.run("old", 30)
    store.run("new", 2)
    store.write("models/a/versions/v/provenance.json", "[]")
    with pytest.raises(Exception, match=r"not a JSON object \(look at it; nothing was removed\)"):
        plan(store.root, keep=1, now=NOW)


def test_manifests_go_first(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle: what is left has no manifest, so nobody reads it."""
    store.run("old", 30)
    store.run("new", 2)
    order: list[str] = []
    made = plan(store.root, keep=1, now=NOW)
    real = type(store.root).delete_files

    def delete_files(self: Location, names: list[str]) -> None:
        order.extend(names)
        real(self, names)

    monkeypatch.setattr(type(store.root), "delete_files", delete_files)
    carry_out(store.root, made, lambda line: None)
    assert order[0] == "train/_SUCCESS.json" and len(order) == 6


def test_a_dry_run_comes_first(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store.run("old", 30)
    store.run("new", 10)
    before = store.files()
    monkeypatch.setenv("COLUMNS", "200")
    for arguments, words in (
        (["--keep", "1"], "to remove; --delete does it"),
        (["--keep", "1", "--delete"], "removed"),
    ):
        monkeypatch.setattr("sys.argv", ["rfdetr-pipeline", "gc", "--root", str(store.folder), *arguments])
        if "--delete" in arguments:
            assert store.files() == before
        with pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr().out
        assert not ended.value.code
        assert "runs/old: older than the last 1" in output and f"0.000 GB in 1 places {words}" in output
    assert store.files() < before


def test_keeping_none_is_refused(store: Store) -> None:
    with pytest.raises(ConfigError, match="--keep: 0 is not allowed: must be at least 1"):
        plan(store.root, keep=0)
