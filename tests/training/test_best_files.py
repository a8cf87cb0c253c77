"""Which weights are the best: the files, and what the checkpoint says of them, agree."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.evaluation.metrics import CocoMetrics, coco_metrics
from rfdetr_core.training import checkpoint, loop, validation
from rfdetr_core.training.checkpoint import BEST_TOTAL
from rfdetr_core.training.state import Outbox
from tests.training import tiny

SCORES = (0.6, 0.5, 0.4, 0.3)
"""Raw and averaged, twice. With smooth_alpha 0.5 the raw weights of the second evaluation count as the better ones."""


@pytest.mark.parametrize(("dont_save", "source", "epoch"), [(False, "ema", 0), (True, "regular", 1)])
def test_a_smoothed_score_may_cost_the_best_weights_their_place(
    dataset: PreparedDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dont_save: bool,
    source: str,
    epoch: int,
) -> None:
    scores = iter(SCORES)

    def scored(*arguments: Any, **settings: Any) -> CocoMetrics:
        return dataclasses.replace(coco_metrics(*arguments, **settings), map=next(scores))

    monkeypatch.setattr(validation, "coco_metrics", scored)
    job = tiny.job(dataset, tmp_path, epochs=2, smooth_alpha=0.5, dont_save_weights=dont_save)
    result = loop.train(job)
    total = checkpoint.load(tmp_path / BEST_TOTAL)
    assert (result.best_source, result.best_epoch) == (total["source"], total["epoch"]) == (source, epoch)


def test_files_are_published_together_and_the_checkpoint_last(tmp_path: Path) -> None:
    sent: list[str] = []
    outbox = Outbox(lambda path: sent.append(path.name))
    for name in ("checkpoint_best_ema.pth", "checkpoint.pth", "checkpoint_best_total.pth", "checkpoint.pth"):
        outbox.put(tmp_path / name)
    assert sent == []
    outbox.send()
    outbox.send()
    assert sent == ["checkpoint_best_ema.pth", "checkpoint_best_total.pth", "checkpoint.pth"]
