"""The gate, as a table: unequal numbers both ways."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from rfdetr_core.config import PromoteConfig
from rfdetr_core.promotion import decide
from tests.evaluation.helpers import random_problem

METRICS = get_args(PromoteConfig.model_fields["metric"].annotation)
OTHERS = {"map": 0.11, "map50": 0.12, "map75": 0.13, "mar": 0.14, "f1": 0.15}


def row(score: float, metric: str = "map", **more: Any) -> dict[str, Any]:
    return {**OTHERS, metric: score, **more}


# candidate, champion, min_value, min_delta -> outcome
TABLE = [
    # no champion yet: the gate is the least value alone
    (0.30, None, 0.0, 0.0, "promote"),
    (0.30, None, 0.3, 0.0, "promote"),
    (0.30, None, 0.31, 0.0, "refuse"),
    (0.00, None, 0.0, 0.0, "promote"),
    (0.30, None, 0.0, 0.5, "promote"),  # nothing to improve on
    # better, worse and equal
    (0.40, 0.30, 0.0, 0.0, "promote"),
    (0.30, 0.40, 0.0, 0.0, "keep"),
    (0.30, 0.30, 0.0, 0.0, "keep"),
    (0.3000001, 0.30, 0.0, 0.0, "promote"),
    (0.30 + 1e-12, 0.30, 0.0, 0.0, "keep"),  # a rounding is no gain
    # a gain that is asked for
    (0.34, 0.30, 0.0, 0.05, "keep"),
    (0.36, 0.30, 0.0, 0.05, "promote"),
    (0.57, 0.54, 0.0, 0.03, "promote"),  # 0.02999999999999992 in floating point
    (0.33, 0.30, 0.0, 0.03, "promote"),
    (0.5699, 0.54, 0.0, 0.03, "keep"),
    (0.30, 0.30, 0.0, 1e-12, "keep"),
    # a loss that is tolerated
    (0.30, 0.30, 0.0, -0.01, "promote"),
    (0.295, 0.30, 0.0, -0.01, "promote"),
    (0.29, 0.30, 0.0, -0.01, "promote"),
    (0.28, 0.30, 0.0, -0.01, "keep"),
    # the least value holds for better ones too
    (0.40, 0.30, 0.5, 0.0, "refuse"),
    (0.60, 0.55, 0.5, 0.0, "promote"),
    (0.52, 0.55, 0.5, 0.0, "keep"),
    (0.10, 0.55, 0.5, 0.0, "refuse"),
    # nothing to measure on
    (-1.0, None, 0.0, 0.0, "refuse"),
    (-1.0, 0.30, 0.0, -1.0, "refuse"),
]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("candidate", "champion", "least", "gain", "outcome"), TABLE)
def test_the_gate(
    metric: str, candidate: float, champion: float | None, least: float, gain: float, outcome: str
) -> None:
    gate = PromoteConfig.parse({"metric": metric, "min_value": least, "min_delta": gain})
    other = None if champion is None else row(champion, metric, version="run-1")
    assert decide(row(candidate, metric), other, gate).outcome == outcome


@pytest.mark.parametrize("metric", METRICS)
def test_only_the_metric_asked_for_decides(metric: str) -> None:
    gate = PromoteConfig.parse({"metric": metric})
    low = dict.fromkeys(OTHERS, 0.1)
    high = dict.fromkeys(OTHERS, 0.9)
    assert decide({**low, metric: 0.6}, {**high, metric: 0.5, "version": "v"}, gate).outcome == "promote"
    assert decide({**high, metric: 0.5}, {**low, metric: 0.6, "version": "v"}, gate).outcome == "keep"


REASONS = [
    (row(0.5), None, {}, "map 0.5000; there is no champion yet"),
    (row(0.5), row(0.4, version="run-1"), {}, "map 0.5000 against 0.4000 of run-1: +0.1000"),
    (
        row(0.4),
        row(0.5, version="run-1"),
        {"min_delta": 0.02},
        "map 0.4000 against 0.5000 of run-1: -0.1000 is not enough (promote.min_delta 0.02)",
    ),
    (row(0.4), None, {"min_value": 0.45}, "map 0.4000 is below promote.min_value 0.45"),
    (row(-1.0), None, {}, "map is not defined: the split has no ground truth"),
]


@pytest.mark.parametrize(("candidate", "champion", "gate", "reason"), REASONS)
def test_the_reason_names_the_numbers(candidate: Any, champion: Any, gate: Any, reason: str) -> None:
    assert decide(candidate, champion, PromoteConfig.parse(gate)).reason == reason


@pytest.mark.parametrize("metric", METRICS)
def test_the_evaluation_gives_every_metric_that_the_gate_may_ask_for(metric: str) -> None:
    from rfdetr_core.evaluation.metrics import coco_metrics

    found = coco_metrics(*random_problem(2), max_dets=100).to_json()
    assert 0 < found[metric] < 1
    gate = PromoteConfig.parse({"metric": metric})
    assert decide(found, {**found, metric: found[metric] - 0.01, "version": "v"}, gate).outcome == "promote"
