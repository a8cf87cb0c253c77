"""The gate, as a table: unequal numbers both ways."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from rfdetr_core.config import PromoteConfig
from rfdetr_core.errors import ChampionChangedError
from rfdetr_core.promotion import Evidence, Verdict, comparable, decide
from rfdetr_core.registry import Champion
from tests.evaluation.helpers import random_problem

METRICS = get_args(PromoteConfig.model_fields["metric"].annotation)
OTHERS = {"map": 0.11, "map50": 0.12, "map75": 0.13, "mar": 0.14, "f1": 0.15}
NAN = float("nan")


def row(score: Any, metric: str = "map", **more: Any) -> dict[str, Any]:
    return {**OTHERS, metric: score, **more}


def evidence(candidate: dict[str, Any], champion: dict[str, Any] | None = None, **more: Any) -> Evidence:
    rows = [
        {"runtime": "onnxruntime", "device": "cpu", "threads": 1, "milliseconds": 40.0},
        {"runtime": "onnxruntime", "device": "cpu", "threads": 4, "milliseconds": 12.5},
        {"runtime": "onnxruntime", "device": "cuda", "threads": 1, "milliseconds": 1.0},
        {"runtime": "pytorch", "device": "cpu", "threads": 4, "milliseconds": 3.0},
    ]
    found: dict[str, Any] = {"comparison": None, "parity": {"passed": True}, "latency": {"rows": rows}}
    return Evidence(candidate, champion, **{**found, "size_bytes": 30_500_000, **more})


def gate(candidate: dict[str, Any], champion: dict[str, Any] | None, **settings: Any) -> Verdict:
    return decide(evidence(candidate, champion), PromoteConfig.parse(settings))


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
    # nothing to measure on, or no number
    (-1.0, None, 0.0, 0.0, "refuse"),
    (-1.0, 0.30, 0.0, -1.0, "refuse"),
    (NAN, None, 0.0, 0.0, "refuse"),
    (NAN, 0.30, 0.0, -1.0, "refuse"),
    (float("inf"), 0.30, 0.0, 0.0, "refuse"),
    (None, 0.30, 0.0, 0.0, "refuse"),
    (True, 0.30, 0.0, 0.0, "refuse"),
    ("0.9", 0.30, 0.0, 0.0, "refuse"),
    # a champion without a number is no reason to give it up
    (0.40, NAN, 0.0, 0.0, "keep"),
    (0.40, -1.0, 0.0, -1.0, "keep"),
]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("candidate", "champion", "least", "gain", "outcome"), TABLE)
def test_the_gate(metric: str, candidate: Any, champion: float | None, least: float, gain: float, outcome: str) -> None:
    other = None if champion is None else row(champion, metric, version="run-1")
    found = gate(row(candidate, metric), other, metric=metric, min_value=least, min_delta=gain)
    assert found.outcome == outcome
    assert found.reason and "\n" not in found.reason


@pytest.mark.parametrize("metric", METRICS)
def test_only_the_metric_asked_for_decides(metric: str) -> None:
    low = dict.fromkeys(OTHERS, 0.1)
    high = dict.fromkeys(OTHERS, 0.9)
    assert gate({**low, metric: 0.6}, {**high, metric: 0.5, "version": "v"}, metric=metric).outcome == "promote"
    assert gate({**high, metric: 0.5}, {**low, metric: 0.6, "version": "v"}, metric=metric).outcome == "keep"


@pytest.mark.parametrize("metric", METRICS)
def test_a_missing_metric_is_refused_and_named(metric: str) -> None:
    lacking = {name: value for name, value in OTHERS.items() if name != metric}
    found = gate(lacking, None, metric=metric)
    assert (found.outcome, found.reason) == ("refuse", f"metrics.json has no {metric}")
    found = gate(OTHERS, {**lacking, "version": "v"}, metric=metric)
    assert (found.outcome, found.reason) == ("keep", f"of the champion v: metrics.json has no {metric}")


PER_CLASS = {
    "cat": {"ap": 0.50, "boxes": 9},
    "dog": {"ap": 0.20, "boxes": 7},
    "emu": {"ap": -1.0, "boxes": 0},  # not in the split
}


@pytest.mark.parametrize(
    ("floors", "outcome", "reason"),
    [
        ({}, "promote", None),
        ({"cat": 0.5}, "promote", None),
        ({"cat": 0.51}, "refuse", "AP of cat 0.5000 does not reach promote.min_class_ap 0.51"),
        ({"*": 0.2}, "promote", None),
        ({"*": 0.3}, "refuse", "AP below promote.min_class_ap 0.3: dog 0.2000"),
        ({"*": 0.3, "dog": 0.1}, "promote", None),
        ({"*": 0.1, "dog": 0.3}, "refuse", "AP of dog 0.2000 does not reach promote.min_class_ap 0.3"),
        ({"emu": 0.1}, "refuse", "AP of emu undefined does not reach promote.min_class_ap 0.1"),
        ({"fox": 0.1}, "refuse", "promote.min_class_ap: the dataset has no class 'fox'"),
    ],
)
def test_floors_per_class(floors: dict[str, float], outcome: str, reason: str | None) -> None:
    found = gate(row(0.5, per_class=PER_CLASS), None, min_class_ap=floors)
    assert found.outcome == outcome
    assert reason is None or found.reason == reason


@pytest.mark.parametrize(
    ("settings", "outcome"),
    [
        ({"max_latency_ms": 12.5}, "promote"),  # of ONNX Runtime on the CPU with all threads
        ({"max_latency_ms": 12.4}, "refuse"),
        ({"max_size_mb": 30.5}, "promote"),
        ({"max_size_mb": 30.4}, "refuse"),
    ],
)
def test_ceilings(settings: dict[str, Any], outcome: str) -> None:
    assert gate(row(0.5), None, **settings).outcome == outcome
    assert gate(row(0.5), row(0.9, version="v"), **settings).outcome == ("keep" if outcome == "promote" else "refuse")


def test_a_ceiling_without_a_measurement_refuses() -> None:
    found = decide(evidence(row(0.5), latency={"rows": []}), PromoteConfig(max_latency_ms=1e9))
    assert (found.outcome, found.reason) == ("refuse", "latency.json has no time of ONNX Runtime on the CPU")


@pytest.mark.parametrize("parity", [{}, {"passed": False}, {"passed": "yes"}, {"logits": 0.0}])
def test_without_proven_parity_there_is_no_champion(parity: dict[str, Any]) -> None:
    assert decide(evidence(row(0.9), parity=parity), PromoteConfig()).outcome == "refuse"


@pytest.mark.parametrize(
    ("classes", "allowed", "outcome"),
    [
        (["cat", "dog"], False, "promote"),
        (["dog", "cat", "emu"], False, "promote"),
        (["cat"], False, "keep"),
        (["cat", "emu", "fox"], False, "keep"),
        (["cat"], True, "promote"),
    ],
)
def test_a_class_of_the_champion_is_not_lost(classes: list[str], allowed: bool, outcome: str) -> None:
    champion = row(0.3, version="v", classes=["cat", "dog"])
    found = gate(row(0.9, classes=classes), champion, allow_fewer_classes=allowed)
    assert found.outcome == outcome
    assert outcome == "promote" or found.reason == "it does not know dog of v (promote.allow_fewer_classes)"


@pytest.mark.parametrize(("most", "outcome"), [(0.05, "keep"), (0.1, "promote"), (None, "promote"), (0.0, "keep")])
def test_what_one_class_may_lose(most: float | None, outcome: str) -> None:
    before = {"cat": {"ap": 0.4}, "dog": {"ap": 0.3}, "emu": {"ap": 0.3}}
    found = gate(row(0.5, per_class=PER_CLASS), row(0.4, version="v", per_class=before), max_class_loss=most)
    assert found.outcome == outcome
    assert outcome == "promote" or found.reason.startswith("AP lost: dog 0.1000 ")


@pytest.mark.parametrize(
    ("p_value", "most", "outcome"),
    [
        (0.01, 0.05, "promote"),
        (0.05, 0.05, "promote"),
        (0.06, 0.05, "keep"),
        (0.9, None, "promote"),
        (None, 0.5, "keep"),
    ],
)
@pytest.mark.parametrize("metric", ["map", "f1"])
def test_significance_where_it_is_asked_for(
    metric: str, p_value: float | None, most: float | None, outcome: str
) -> None:
    comparison = {"metrics": {"map": {"p_value": 0.7}, "f1": {"p_value": 0.7}, metric: {"p_value": p_value}}}
    found = decide(
        evidence(row(0.5, metric), row(0.4, metric, version="v"), comparison=comparison),
        PromoteConfig.parse({"metric": metric, "max_p_value": most}),
    )
    assert found.outcome == outcome


def test_the_first_model_needs_no_significance() -> None:
    assert gate(row(0.5), None, max_p_value=0.01, max_class_loss=0.0).outcome == "promote"


def test_all_reasons_are_told_at_once() -> None:
    found = gate(row(0.2), row(0.9, version="v"), min_value=0.3, max_size_mb=1, max_latency_ms=1)
    assert found.outcome == "refuse"
    assert [check.rule for check in found.checks if not check.passed] == [
        *("min_value", "max_latency_ms", "max_size_mb", "min_delta")
    ]
    assert found.reason.count(";") == 2  # that it is worse as well is no reason to refuse
    assert found.to_json()["checks"][0] == {
        "rule": "min_value",
        "kind": "floor",
        "passed": False,
        "detail": "map 0.2000 is below promote.min_value 0.3",
    }


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
    (row(NAN), None, {}, "map is nan, no number"),
]


@pytest.mark.parametrize(("candidate", "champion", "settings", "reason"), REASONS)
def test_the_reason_names_the_numbers(candidate: Any, champion: Any, settings: Any, reason: str) -> None:
    assert gate(candidate, champion, **settings).reason == reason


@pytest.mark.parametrize("metric", METRICS)
def test_the_evaluation_gives_every_metric_that_the_gate_may_ask_for(metric: str) -> None:
    from rfdetr_core.evaluation.metrics import coco_metrics

    found = coco_metrics(*random_problem(2), max_dets=100).to_json()
    assert 0 < found[metric] < 1
    assert gate(found, {**found, metric: found[metric] - 0.01, "version": "v"}, metric=metric).outcome == "promote"


# Whom to compare with

EVALUATED = {"version": "old", "map": 0.4}
DOCUMENT = {"test_digest": "abc", "champion": EVALUATED, "comparison": {"samples": 5}}


def pointer(version: str, test_digest: str = "abc") -> Champion:
    return Champion(version, {"map": 0.6}, test_digest, "revision")


def test_the_champion_is_compared_as_it_was_measured_now() -> None:
    found = comparable(pointer("old", "recorded on other images"), DOCUMENT, PromoteConfig())
    assert found == (EVALUATED, {"samples": 5})


@pytest.mark.parametrize("document", [DOCUMENT, {**DOCUMENT, "champion": None, "comparison": None}])
def test_a_stale_pointer_is_decided_on_recorded_numbers_of_the_same_images(document: dict[str, Any]) -> None:
    found = comparable(pointer("new"), document, PromoteConfig())
    assert found == ({"version": "new", "map": 0.6}, None)
    with pytest.raises(ChampionChangedError, match="champion changed to new since the evaluation") as caught:
        comparable(pointer("new", "other images"), document, PromoteConfig())
    assert caught.value.exit_code == 75


def test_recorded_numbers_do_not_tell_how_sure_a_gain_is() -> None:
    with pytest.raises(ChampionChangedError):
        comparable(pointer("new"), DOCUMENT, PromoteConfig(max_p_value=0.05))


def test_without_a_champion_there_is_nothing_to_compare() -> None:
    assert comparable(None, {**DOCUMENT, "champion": None}, PromoteConfig()) == (None, None)
