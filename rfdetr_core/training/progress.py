"""What a person sees while training runs: a line now and then, or a bar."""

from __future__ import annotations

import logging
import time
import warnings
from types import TracebackType
from typing import Any, Literal, Self

from tqdm import TqdmExperimentalWarning, tqdm

LINE_EVERY_SECONDS = 10.0
BAR_EVERY_SECONDS = 1.0  # its text: the loss waits for the device

log = logging.getLogger(__name__)


class Progress:
    """Counts optimizer steps and images, and says loss, mAP, images/s and ETA.

    Used as a context, it leaves the terminal as it was.

    Args:
        style: "tqdm" or "rich" draws a bar on stderr; None logs a line every ten seconds.
    """

    def __init__(self, *, style: Literal["tqdm", "rich"] | None, total_steps: int, done_steps: int) -> None:
        self._total, self._done = total_steps, done_steps
        self._first, self._started = done_steps, time.monotonic()
        self._images, self._last_line = 0, time.monotonic()
        self._map: float | None = None
        self._rich = style == "rich"
        self._every = LINE_EVERY_SECONDS if style is None else BAR_EVERY_SECONDS
        self._bar = _bar(style, total_steps, done_steps)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self, images: int) -> bool:
        """One optimizer step is done; True when a line is due (call `show` then)."""
        self._done += 1
        self._images += images
        if self._bar is not None:
            self._bar.update(1)
        return self._done == self._first + 1 or time.monotonic() - self._last_line >= self._every

    def show(self, *, epoch: str, loss: float, lr: float) -> None:
        """Print the line; `epoch` such as "3/30"."""
        self._last_line = time.monotonic()
        score = "-" if self._map is None else f"{self._map:.3f}"
        text = f"loss {loss:.3f}  mAP {score}  lr {lr:.2e}  {self.images_per_second:.1f} images/s"
        if self._bar is None:
            eta = _duration(self.seconds_left)
            log.info("epoch %s  step %d/%d  %s  ETA %s", epoch, self._done, self._total, text, eta)
        elif self._rich:
            self._bar.set_description_str(f"epoch {epoch}  {text}")  # rich's bar shows nothing else
        else:
            self._bar.set_postfix_str(f"epoch {epoch}  {text}")

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


def _bar(style: str | None, total: int, done: int) -> Any:
    if style is None:
        return None
    if style == "rich":
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.table import Column
        from tqdm.rich import tqdm_rich

        columns = (
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            BarColumn(bar_width=16, table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.description}", table_column=Column(no_wrap=False)),  # a narrow terminal wraps it
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TqdmExperimentalWarning)  # of its look, which is given here
            options = {"console": Console(stderr=True)}
            return tqdm_rich(total=total, initial=done, unit="step", progress=columns, options=options)
    return tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
