"""Early stopping on validation mAP (training spec 5.4; patience counts evaluations)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class EarlyStopping:
    """Feed it one value per evaluation; it says when to stop."""

    patience: int
    min_delta: float
    best: float = -math.inf
    wait: int = 0

    def should_stop(self, value: float) -> bool:
        """True when `value` is not finite, or the last `patience` values did not beat the best by min_delta.

        Small gains do not raise the best: slow progress adds up until it counts.
        """
        if not math.isfinite(value):
            return True
        if value - self.min_delta > self.best:
            self.best, self.wait = value, 0
            return False
        self.wait += 1
        return self.wait >= self.patience


def monitored_value(raw: float | None, ema: float | None, *, use_ema: bool) -> float:
    """The EMA's metric if asked for and there; else the better of what exists.

    Raises:
        ValueError: neither was evaluated.
    """
    if use_ema and ema is not None:
        return ema
    values = [value for value in (raw, ema) if value is not None]
    return max(values)
