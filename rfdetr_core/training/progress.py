"""What a person sees while training runs: a line now and then, or a bar."""

from __future__ import annotations

import logging
import time
from typing import Any, Literal

from tqdm import tqdm

LINE_EVERY_SECONDS = 10.0

log = logging.getLogger(__name__)


class Progress:
    """Counts optimizer steps and images, and says loss, mAP, images/s and ETA.

    Args:
        style: "tqdm" or "rich" draws a bar; None logs a line every ten seconds.
    """

    def __init__(self, *, style: Literal["tqdm", "rich"] | None, total_steps: int, done_steps: int) -> None:
        self._total, self._done = total_steps, done_steps
        self._first, self._started = done_steps, time.monotonic()
        self._images, self._last_line = 0, time.monotonic()
        self._map: float | None = None
        self._bar = _bar(style, total_steps, done_steps)

    def step(self, images: int) -> bool:
        """One optimizer step is done; True when a line is due (call `show` then)."""
        self._done += 1
        self._images += images
        if self._bar is not None:
            self._bar.update(1)
        return self._done == self._first + 1 or time.monotonic() - self._last_line >= LINE_EVERY_SECONDS

    def show(self, *, epoch: str, loss: float, lr: float) -> None:
        """Print the line; `epoch` such as "3/30"."""
        self._last_line = time.monotonic()
        score = "-" if self._map is None else f"{self._map:.3f}"
        text = f"loss {loss:.3f}  mAP {score}  lr {lr:.2e}  {self.images_per_second:.1f} images/s"
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        else:
            eta = _duration(self.seconds_left)
            log.info("epoch %s  step %d/%d  %s  ETA %s", epoch, self._done, self._total, text, eta)

    def evaluated(self, score: float) -> None:
        """The newest validation mAP, for the lines to come."""
        self._map = score

    @property
    def images_per_second(self) -> float:
        """Since the start of this process, evaluation and checkpoints included."""
        return self._images / max(1e-9, time.monotonic() - self._started)

    @property
    def seconds_left(self) -> float:
        """At the present pace."""
        elapsed = time.monotonic() - self._started
        return elapsed / max(1, self._done - self._first) * (self._total - self._done)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.close()


def _bar(style: str | None, total: int, done: int) -> Any:
    if style is None:
        return None
    if style == "rich":
        import warnings

        from tqdm import TqdmExperimentalWarning
        from tqdm.rich import tqdm_rich

        warnings.simplefilter("ignore", TqdmExperimentalWarning)  # said of its look, which is what was asked for
        return tqdm_rich(total=total, initial=done, unit="step")
    return tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
