"""What a store no longer needs: old runs, datasets that no run uses, checkpoints that the registry has copies of.

Never touched: the registry (models/), weights/, what a registered version was made of, and whatever may still be at
work. The plan is made first and shown; carrying it out removes manifests before files, so that nobody reads a folder
that is half gone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from rfdetr_core.config.yaml_text import read_yaml
from rfdetr_core.errors import ConfigError, RFDETRError
from rfdetr_core.publication import MANIFEST
from rfdetr_core.storage import FileInfo, Location

YOUNG = timedelta(days=1)
"""A run that told something so recently may be between two stages."""
LONGEST = timedelta(days=8)
"""A stage that has been running for longer is dead: profiles give a training seven days."""
CHECKS = "check-"  # runs of submit --if-changed, which removes them unless it is killed
CHECKPOINTS = "train/checkpoints/"
SOURCES = "sources"  # below datasets/: which dataset the files of a source led to (components/validate_dataset)


@dataclass
class Run:
    """What is known of one run."""

    name: str
    model: str | None = None
    told: datetime | None = None  # when one of its stages last said something
    active: bool = False
    dataset: str | None = None
    files: list[FileInfo] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(info.size for info in self.files)


@dataclass(frozen=True)
class Removal:
    """One thing to remove: files below a folder of the store."""

    folder: str
    names: tuple[str, ...]
    size: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """What would be removed, and what was left alone for a reason that people should know."""

    removals: tuple[Removal, ...]
    notes: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(removal.size for removal in self.removals)


def plan(root: Location, *, keep: int, now: datetime | None = None) -> Plan:
    """Decide what may go.

    Args:
        keep: how many of the newest runs of each model stay as they are.

    Raises:
        ConfigError: `keep` is less than one.
        StorageAccessError, StorageUnavailableError: see `Location`.
    """
    if keep < 1:
        raise ConfigError(f"--keep: {keep} is not allowed: must be at least 1", hint="such as 10")
    now = now or datetime.now(UTC)
    runs = _runs(root, now)
    registered, datasets_of_versions = _registered(root)
    kept = _newest(runs.values(), keep)
    removals, notes = [], []
    for run in sorted(runs.values(), key=lambda run: run.name):
        if run.told is None:
            notes.append(f"runs/{run.name} has no status and is left alone")
        elif run.active or run.name in kept:
            continue
        elif run.name in registered:
            removals += _slimmed(run)
        else:
            reason = (
                "left over from a look for changes" if run.name.startswith(CHECKS) else f"older than the last {keep}"
            )
            removals.append(_all_of(f"runs/{run.name}", run.files, reason))
    gone = {removal.folder for removal in removals if not removal.reason.startswith("checkpoints")}
    left = [run for run in runs.values() if f"runs/{run.name}" not in gone]
    unknown = [run.name for run in left if run.dataset is None and run.active]
    if unknown:
        notes.append(f"datasets are left alone: runs/{unknown[0]} is at work, and has not said yet which one it uses")
    else:
        used = {run.dataset for run in left} | datasets_of_versions
        removals += _unused_datasets(root, used)
    return Plan(tuple(removals), tuple(notes))


def carry_out(root: Location, made: Plan, say: Callable[[str], None]) -> None:
    """Remove what the plan names; may be repeated after an interruption.

    Raises:
        StorageAccessError, StorageUnavailableError: see `Location`.
    """
    for removal in made.removals:
        place = root / removal.folder
        place.delete_files([name for name in removal.names if name.rpartition("/")[2] == MANIFEST])
        place.delete_files([name for name in removal.names if name.rpartition("/")[2] != MANIFEST])
        say(f"removed {removal.folder}: {removal.reason}")


def _runs(root: Location, now: datetime) -> dict[str, Run]:
    runs: dict[str, Run] = defaultdict(lambda: Run(""))
    for info in (root / "runs").list_files():
        name, _, below = info.name.partition("/")
        run = runs[name]
        run.name = name
        run.files.append(FileInfo(below, info.size))
    for run in runs.values():
        _read_status(root / "runs" / run.name, run, now)
    return dict(runs)


def _read_status(place: Location, run: Run, now: datetime) -> None:
    names = {info.name for info in run.files}
    for name in sorted(names):
        if not (name.startswith("status/") and name.endswith(".json")):
            continue
        status = _json(place / name)
        moments = [_moment(status.get(key)) for key in ("started", "finished")]
        told = max((moment for moment in moments if moment is not None), default=None)
        if told is None:
            continue
        run.told = told if run.told is None else max(run.told, told)
        run.active |= status.get("state") == "running" and now - told < LONGEST
    run.active |= run.told is not None and now - run.told < YOUNG
    if "config.yaml" in names:
        said = read_yaml((place / "config.yaml").read_bytes(), (place / "config.yaml").uri)
        run.model = str(said.get("name")) if isinstance(said, dict) else None
    if "dataset/dataset.json" in names:
        run.dataset = str(_json(place / "dataset" / "dataset.json").get("location"))


def _registered(root: Location) -> tuple[set[str], set[str]]:
    """Run ids and datasets of everything in the registry."""
    runs: set[str] = set()
    datasets: set[str] = set()
    for info in (root / "models").list_files():
        parts = info.name.split("/")
        if len(parts) >= 4 and parts[1] == "versions":
            runs.add(parts[2])
        if parts[-1] == "provenance.json":
            made = _json(root / "models" / info.name)
            datasets.add(f"datasets/{made['dataset']['digest']}")
        if parts[-1] == "champion.json":
            runs.add(str(_json(root / "models" / info.name)["version"]))
    return runs, datasets


def _newest(runs: Iterable[Run], keep: int) -> set[str]:
    """The newest runs of each model; those that were never resolved are of no model, and count among themselves."""
    by_model: dict[str | None, list[Run]] = defaultdict(list)
    for run in runs:
        if run.told is not None and not run.name.startswith(CHECKS):
            by_model[run.model].append(run)
    ordered = (sorted(rows, key=lambda run: (run.told, run.name), reverse=True) for rows in by_model.values())
    return {run.name for rows in ordered for run in rows[:keep]}


def _slimmed(run: Run) -> list[Removal]:
    """The registry has the weights of this run; its reports and logs stay, its checkpoints are what takes the room."""
    names = [info for info in run.files if info.name.startswith(CHECKPOINTS)]
    if not names:
        return []
    manifest = [info for info in run.files if info.name == f"train/{MANIFEST}"]
    return [_all_of(f"runs/{run.name}", [*manifest, *names], "checkpoints of a registered run")]


def _unused_datasets(root: Location, used: set[str | None]) -> list[Removal]:
    files: dict[str, list[FileInfo]] = defaultdict(list)
    for info in (root / "datasets").list_files():
        first, _, below = info.name.partition("/")
        if first == SOURCES:
            version, _, below = below.partition("/")
            first = f"{SOURCES}/{version}"
        files[f"datasets/{first}"].append(FileInfo(below, info.size))
    removals = []
    for folder, rows in sorted(files.items()):
        if folder.startswith(f"datasets/{SOURCES}/"):
            # What was found of the same files earlier, and the dataset that it led to (components/validate_dataset).
            whole = any(info.name == "dataset.json" for info in rows)
            dataset = _json(root / folder / "dataset.json").get("location") if whole else None
            if dataset not in used:
                removals.append(_all_of(folder, rows, "the dataset that it leads to goes"))
        elif folder not in used:
            removals.append(_all_of(folder, rows, "no run and no version uses it"))
    return removals


def _all_of(folder: str, files: list[FileInfo], reason: str) -> Removal:
    return Removal(folder, tuple(info.name for info in files), sum(info.size for info in files), reason)


def _json(place: Location) -> dict[str, Any]:
    """A file that others wrote; one that is not understood stops the plan instead of being taken for unused."""
    value = place.read_json()
    if not isinstance(value, dict):
        raise RFDETRError(f"{place.uri}: not a JSON object", hint="look at it; nothing was removed")
    return value


def _moment(text: Any) -> datetime | None:
    try:
        moment = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
