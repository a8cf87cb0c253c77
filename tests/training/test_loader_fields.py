"""Fields of `train` that decide how images are fetched: seen at the loaders that a training builds, and at work."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rfdetr_core.data.loading import BatchLoader, EvalImages, TrainImages
from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.training.engine import Engine
from rfdetr_core.training.loop import train
from tests.training import tiny
from tests.training.test_loop import latest, rows

NAMES = ("num_workers", "pin_memory", "persistent_workers", "prefetch_factor")
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # Python 3.12 on any fork
unpinnable = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")  # torch, without a GPU


class EnoughError(Exception):
    """What was to be seen is there."""


class Loaders:
    """Notes with what each loader is built: what it loads, and the keywords of NAMES; ends training after `most`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int = 9) -> None:
        self.built: list[tuple[type, tuple[Any, ...]]] = []
        init = BatchLoader.__init__

        def noted(loader: BatchLoader, images: Any, **words: Any) -> None:
            self.built.append((type(images), tuple(words[name] for name in NAMES)))
            if len(self.built) == most:
                raise EnoughError
            init(loader, images, **words)

        monkeypatch.setattr(BatchLoader, "__init__", noted)


@forks
@unpinnable
@pytest.mark.parameter(*NAMES)
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((0, None, None, None), (0, False, False, None)),
        ((1, None, None, None), (1, False, True, 2)),
        ((1, True, False, 5), (1, True, False, 5)),
        ((2, False, True, 1), (2, False, True, 1)),
        ((0, True, False, None), (0, True, False, None)),
    ],
    ids=["alone", "left open", "all of them", "others", "alone and pinned"],
)
def test_every_loader_of_a_training_is_built_with_them(
    dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Any, expected: Any
) -> None:
    loaders = Loaders(monkeypatch)
    result = train(tiny.job(dataset, tmp_path, epochs=1, run_test=True, **dict(zip(NAMES, settings, strict=True))))
    assert result.optimizer_steps == 5
    assert loaders.built == [(TrainImages, expected), (EvalImages, expected), (EvalImages, expected)]  # valid, test


@pytest.mark.parameter("pin_memory")
@pytest.mark.parametrize(("given", "pinned"), [(None, True), (False, False), (True, True)])
def test_for_a_gpu_batches_are_pinned_unless_told_not_to(
    dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bool | None, pinned: bool
) -> None:
    """What the loaders are built for is the engine's device; here is none, so training ends when they are there."""
    loaders = Loaders(monkeypatch, most=2)
    monkeypatch.setattr(Engine, "device", property(lambda self: torch.device("cuda")))
    with pytest.raises(EnoughError):
        train(tiny.job(dataset, tmp_path, epochs=1, pin_memory=given))
    assert [words[NAMES.index("pin_memory")] for _, words in loaders.built] == [pinned, pinned]


@forks
@pytest.mark.parameter("num_workers", "persistent_workers")
@pytest.mark.parametrize(
    ("settings", "stay"),
    [
        ({"num_workers": 2}, True),
        ({"num_workers": 2, "persistent_workers": True}, True),
        ({"num_workers": 2, "persistent_workers": False}, False),
        ({"num_workers": 0}, True),
    ],
    ids=["left open", "persistent", "not persistent", "alone"],
)
def test_as_many_processes_load_and_stay_for_the_next_epoch(
    dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], stay: bool
) -> None:
    log = tmp_path / "who.txt"
    load = TrainImages.__getitems__

    def noted(self: TrainImages, keys: Sequence[Any]) -> Any:  # in the worker, which is a fork of this process
        with log.open("a") as file:
            file.write(f"{keys[0].epoch} {os.getpid()}\n")
        return load(self, keys)

    monkeypatch.setattr(TrainImages, "__getitems__", noted)
    train(tiny.job(dataset, tmp_path / "out", epochs=2, eval_interval=2, **settings))
    lines = [line.split() for line in log.read_text().splitlines()]
    first, second = ({int(pid) for epoch, pid in lines if epoch == number} for number in ("0", "1"))
    workers = settings["num_workers"]
    assert len(lines) == 2 * 5
    assert len(first) == len(second) == (workers or 1)
    assert (os.getpid() in first | second) is (workers == 0)
    assert (first == second) is stay


@forks
@pytest.mark.parameter(*NAMES)
def test_none_of_them_changes_what_is_trained(dataset: PreparedDataset, tmp_path: Path) -> None:
    train(tiny.job(dataset, tmp_path / "alone", epochs=2))
    alone = latest(tmp_path / "alone")
    for name, settings in {
        "workers": {"num_workers": 2, "prefetch_factor": 1},
        "new ones": {"num_workers": 1, "persistent_workers": False, "prefetch_factor": 4},
    }.items():
        train(tiny.job(dataset, tmp_path / name, epochs=2, **settings))
        found = latest(tmp_path / name)
        assert not [part for part in ("model", "ema_model", "optimizer") if tiny.differing(alone[part], found[part])]
        assert not tiny.differing(rows(tmp_path / "alone"), rows(tmp_path / name))


@pytest.mark.parameter("persistent_workers", "prefetch_factor")
@pytest.mark.parametrize(("name", "value"), [("persistent_workers", True), ("prefetch_factor", 4)])
def test_without_workers_a_training_says_that_they_are_ignored(
    dataset: PreparedDataset, tmp_path: Path, name: str, value: Any
) -> None:
    with pytest.warns(UserWarning, match=rf"{name}={value} is ignored: there are no workers \(num_workers=0\)"):
        result = train(tiny.job(dataset, tmp_path, epochs=1, num_workers=0, **{name: value}))
    assert result.optimizer_steps == 5
