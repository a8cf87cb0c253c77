"""The gate: whether a candidate becomes the champion, as a pure function of measured numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rfdetr_core.config import PromoteConfig

Outcome = Literal["promote", "keep", "refuse"]

EPSILON = 1e-9  # scores closer than this are equal: 0.57 - 0.54 is a little less than 0.03 in floating point


@dataclass(frozen=True)
class Verdict:
    """`promote`: the candidate becomes the champion; `keep`: the champion stays; `refuse`: not fit for use."""

    outcome: Outcome
    reason: str


def decide(candidate: dict[str, Any], champion: dict[str, Any] | None, gate: PromoteConfig) -> Verdict:
    """Compare two rows of metrics.json on `gate.metric`; both were measured on the same images.

    The candidate must reach `min_value`, and beat the champion by `min_improvement`; an equal score keeps the
    champion unless a loss is tolerated, because a swap without a gain is a risk without a reason.
    """
    score = float(candidate[gate.metric])
    if score < 0:
        return Verdict("refuse", f"{gate.metric} is not defined: the split has no ground truth")
    if score < gate.min_value - EPSILON:
        return Verdict("refuse", f"{gate.metric} {score:.4f} is below promote.min_value {gate.min_value:g}")
    if champion is None:
        return Verdict("promote", f"{gate.metric} {score:.4f}; there is no champion yet")
    gain = score - float(champion[gate.metric])
    compared = f"{gate.metric} {score:.4f} against {float(champion[gate.metric]):.4f} of {champion['version']}"
    better = gain > EPSILON or gate.min_improvement < 0
    if better and gain >= gate.min_improvement - EPSILON:
        return Verdict("promote", f"{compared}: {gain:+.4f}")
    return Verdict("keep", f"{compared}: {gain:+.4f} is not enough (promote.min_improvement {gate.min_improvement:g})")
