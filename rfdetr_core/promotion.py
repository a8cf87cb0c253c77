"""The gate: whether a candidate becomes the champion, as a pure function of measured numbers.

Each rule of the gate is a `Check`. One that tells whether the model is fit for use at all (`floor`) refuses it; one
that compares it with the champion (`gain`) keeps the champion. Everything is checked, so that a person sees all reasons
at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rfdetr_core.config import PromoteConfig
from rfdetr_core.errors import ChampionChangedError
from rfdetr_core.registry import Champion

Outcome = Literal["promote", "keep", "refuse"]
Row = Mapping[str, Any]

EPSILON = 1e-9  # scores closer than this are equal: 0.57 - 0.54 is a little less than 0.03 in floating point
OTHERS = "*"


@dataclass(frozen=True)
class Check:
    """One rule of the gate, and how the candidate stands to it."""

    rule: str
    kind: Literal["floor", "gain"]
    passed: bool
    detail: str


@dataclass(frozen=True)
class Evidence:
    """What the gate decides on: rows of metrics.json, measured on the same images, and what export found."""

    candidate: Row
    champion: Row | None
    comparison: Mapping[str, Any] | None
    parity: Mapping[str, Any]
    latency: Mapping[str, Any]
    size_bytes: int


@dataclass(frozen=True)
class Verdict:
    """`promote`: the candidate becomes the champion; `keep`: the champion stays; `refuse`: not fit for use."""

    outcome: Outcome
    checks: tuple[Check, ...]

    @property
    def reason(self) -> str:
        """Why, in one line: what failed, or what was gained."""
        failed = [check for check in self.checks if not check.passed]
        if self.outcome == "refuse":
            failed = [check for check in failed if check.kind == "floor"]
        return "; ".join(check.detail for check in failed or self.checks[-1:])

    def to_json(self) -> dict[str, Any]:
        """For decision.json."""
        return {
            "outcome": self.outcome,
            "reason": self.reason,
            "checks": [asdict(check) for check in self.checks],
        }


def decide(evidence: Evidence, gate: PromoteConfig) -> Verdict:
    """The outcome of every rule.

    The candidate must be fit for use, and beat the champion by `min_delta`; an equal score keeps the champion unless a
    loss is tolerated, because a swap without a gain is a risk without a reason. The first model has its floors alone.
    """
    floors = tuple(_floors(evidence, gate))
    if not all(check.passed for check in floors):
        return Verdict("refuse", (*floors, *_gains(evidence, gate)))
    gains = tuple(_gains(evidence, gate))
    return Verdict("promote" if all(check.passed for check in gains) else "keep", (*floors, *gains))


def comparable(
    champion: Champion | None, metrics: Mapping[str, Any], gate: PromoteConfig
) -> tuple[Row | None, Mapping[str, Any] | None]:
    """The champion's numbers on the candidate's split, and the bootstrap of the difference where there is one.

    Args:
        champion: whom the pointer names now.
        metrics: the content of metrics.json.

    Raises:
        ChampionChangedError: the pointer names another version than the one that was evaluated, and that one's
            recorded numbers are of another split, or do not tell how sure a gain is where the gate asks for it.
    """
    if champion is None:
        return None, None
    evaluated: Row | None = metrics["champion"]
    if evaluated is not None and evaluated["version"] == champion.version:
        return evaluated, metrics.get("comparison")
    changed = f"champion changed to {champion.version} since the evaluation"
    if champion.test_digest != metrics["test_digest"] or gate.max_p_value is not None:
        raise ChampionChangedError(
            changed, hint="start the run again with the same run id to measure it beside that one"
        )
    return {"version": champion.version, **champion.metrics}, None


def _floors(evidence: Evidence, gate: PromoteConfig) -> Iterator[Check]:
    score = _number(evidence.candidate.get(gate.metric))
    if score is None:
        yield Check("metric", "floor", False, _undefined(evidence.candidate, gate.metric))
    else:
        passed = score >= gate.min_value - EPSILON
        relation = "reaches" if passed else "is below"
        yield Check(
            "min_value", "floor", passed, f"{gate.metric} {score:.4f} {relation} promote.min_value {gate.min_value:g}"
        )
    proven = evidence.parity.get("passed") is True
    detail = "model.onnx computes what the trained model does" if proven else "parity.json does not say that it passed"
    yield Check("parity", "floor", proven, detail)
    yield from _class_floors(evidence.candidate, gate)
    if gate.max_latency_ms is not None:
        yield _latency(evidence.latency, gate.max_latency_ms)
    if gate.max_size_mb is not None:
        size = evidence.size_bytes / 1e6
        passed = size <= gate.max_size_mb + EPSILON
        relation = "within" if passed else "above"
        yield Check(
            "max_size_mb",
            "floor",
            passed,
            f"model.onnx has {size:.1f} MB, {relation} promote.max_size_mb {gate.max_size_mb:g}",
        )


def _class_floors(candidate: Row, gate: PromoteConfig) -> Iterator[Check]:
    """AP per class; a class without boxes in the split has none, and passes unless it is named."""
    rows: Mapping[str, Any] = candidate.get("per_class", {})
    rule = "min_class_ap"
    for name, least in gate.min_class_ap.items():
        if name == OTHERS:
            continue
        if name not in rows:
            yield Check(rule, "floor", False, f"promote.min_class_ap: the dataset has no class {name!r}")
            continue
        ap = _number(rows[name].get("ap"))
        passed = ap is not None and ap >= least - EPSILON
        shown = "undefined" if ap is None else f"{ap:.4f}"
        relation = "reaches" if passed else "does not reach"
        yield Check(rule, "floor", passed, f"AP of {name} {shown} {relation} promote.min_class_ap {least:g}")
    if OTHERS in gate.min_class_ap:
        least = gate.min_class_ap[OTHERS]
        found = {name: _number(row.get("ap")) for name, row in rows.items() if name not in gate.min_class_ap}
        low = {name: ap for name, ap in found.items() if ap is not None and ap < least - EPSILON}
        shown = ", ".join(f"{name} {ap:.4f}" for name, ap in sorted(low.items(), key=lambda item: item[1])[:5])
        detail = f"AP below promote.min_class_ap {least:g}: {shown}" if low else f"every other class has AP {least:g}"
        yield Check(rule, "floor", not low, detail)


def _latency(latency: Mapping[str, Any], most: float) -> Check:
    found = served_latency(latency)
    if found is None:
        return Check("max_latency_ms", "floor", False, "latency.json has no time of ONNX Runtime on the CPU")
    passed = found <= most + EPSILON
    relation = "within" if passed else "above"
    detail = f"ONNX Runtime takes {found:.1f} ms per image, {relation} promote.max_latency_ms {most:g}"
    return Check("max_latency_ms", "floor", passed, detail)


def served_latency(latency: Mapping[str, Any]) -> float | None:
    """Milliseconds of ONNX Runtime on the CPU with all threads, from latency.json."""
    rows = [row for row in latency.get("rows", ()) if (row["runtime"], row["device"]) == ("onnxruntime", "cpu")]
    most = max(rows, key=lambda row: int(row["threads"]), default=None)
    return None if most is None else _number(most["milliseconds"])


def _gains(evidence: Evidence, gate: PromoteConfig) -> Iterator[Check]:
    candidate, champion = evidence.candidate, evidence.champion
    score = _number(candidate.get(gate.metric))
    if score is None:
        return
    if champion is None:
        yield Check("min_delta", "gain", True, f"{gate.metric} {score:.4f}; there is no champion yet")
        return
    if not gate.allow_fewer_classes and "classes" in candidate and "classes" in champion:
        lost = sorted(set(champion["classes"]) - set(candidate["classes"]) - {""})
        listed = ", ".join(lost[:5]) + (", …" if len(lost) > 5 else "")
        detail = f"it does not know {listed} of {champion['version']} (promote.allow_fewer_classes)"
        yield Check("allow_fewer_classes", "gain", not lost, detail if lost else "it knows every class of the champion")
    if gate.max_class_loss is not None:
        yield _class_losses(candidate, champion, gate.max_class_loss)
    if gate.max_p_value is not None:
        yield _significance(evidence.comparison, gate)
    yield _delta(score, champion, gate)


def _delta(score: float, champion: Row, gate: PromoteConfig) -> Check:
    other = _number(champion.get(gate.metric))
    if other is None:
        return Check(
            "min_delta", "gain", False, f"of the champion {champion['version']}: {_undefined(champion, gate.metric)}"
        )
    gain = score - other
    compared = f"{gate.metric} {score:.4f} against {other:.4f} of {champion['version']}: {gain:+.4f}"
    better = gain > EPSILON or gate.min_delta < 0
    passed = better and gain >= gate.min_delta - EPSILON
    return Check(
        "min_delta",
        "gain",
        passed,
        compared + ("" if passed else f" is not enough (promote.min_delta {gate.min_delta:g})"),
    )


def _class_losses(candidate: Row, champion: Row, most: float) -> Check:
    before: Mapping[str, Any] = champion.get("per_class", {})
    losses = {}
    for name, row in candidate.get("per_class", {}).items():
        new, old = _number(row.get("ap")), _number(before.get(name, {}).get("ap"))
        if new is not None and old is not None and old - new > most + EPSILON:
            losses[name] = old - new
    worst = ", ".join(f"{name} {loss:.4f}" for name, loss in sorted(losses.items(), key=lambda item: -item[1])[:5])
    detail = (
        f"AP lost: {worst} (promote.max_class_loss {most:g})" if losses else f"no class loses more than {most:g} AP"
    )
    return Check("max_class_loss", "gain", not losses, detail)


def _significance(comparison: Mapping[str, Any] | None, gate: PromoteConfig) -> Check:
    row = ((comparison or {}).get("metrics") or {}).get(gate.metric) or {}
    p_value = _number(row.get("p_value"))
    rule, most = "max_p_value", gate.max_p_value
    if p_value is None:
        detail = "metrics.json has no bootstrap of the difference (evaluate.bootstrap_samples)"
        return Check(rule, "gain", False, detail)
    passed = p_value <= float(most or 0)
    sure = "is" if passed else "may be luck, is not"
    return Check(rule, "gain", passed, f"the gain's p-value {p_value:.4f} {sure} within promote.max_p_value {most:g}")


def _undefined(row: Row, metric: str) -> str:
    if metric not in row:
        return f"metrics.json has no {metric}"
    value = row[metric]
    if isinstance(value, int | float) and value < 0:
        return f"{metric} is not defined: the split has no ground truth"
    return f"{metric} is {value}, no number"


def _number(value: Any) -> float | None:
    """A defined metric; None for what is absent, not finite, or -1, COCO's word for undefined."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        return None
    return float(value)
