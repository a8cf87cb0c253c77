"""What a probe found, for people: lines for the log, a picture, and a page. All from probe.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from rfdetr_core import html
from rfdetr_core.training.batch_search import Attempt, fit

PICTURE, REPORT = "probe.png", "report.html"
GIB = 2**30

STOPPED = {
    "given": "the batch was given",
    "memory": "a larger batch does not fit",
    "target": "train.auto_batch_target_effective is reached, and a CPU gains nothing beyond it",
    "images": "a device has no more images",
    "limit": "there is no larger batch",
    "time": "the time for the search was over",
}


def summary(found: Mapping[str, Any]) -> list[str]:
    """A few lines: the batch and why, its memory, and the cost."""
    worst, cost = found["worst_case"], found["cost"]
    peaks = f"peak {found['peak_bytes'] / GIB:.2f} GiB"
    if found["predicted_peak_bytes"] is not None:
        peaks += f" (predicted {found['predicted_peak_bytes'] / GIB:.2f})"
    lines = [
        f"batch {found['batch_size']} x {found['grad_accum_steps']} = {found['effective_batch_size']} per device "
        f"({STOPPED[found['stopped_by']]}; safe: {found['safe_batch_size']}) on {found['device']['name']}",
        f"worst step {worst['height']} x {worst['width']} px with {worst['targets_per_image']} boxes per image: "
        f"{peaks} of {found['available_bytes'] / GIB:.2f} GiB",
        f"estimate: {duration(cost['seconds_per_epoch'])} per epoch of {cost['steps_per_epoch']} steps, "
        f"{duration(cost['seconds_per_evaluation'])} per evaluation, {cost['hours']:.2f} h in all, "
        f"{cost['device_hours']:.2f} device-hours{_price(cost)}; loading that is slower than the device comes on top",
    ]
    return lines


def _price(cost: Mapping[str, Any]) -> str:
    return "" if cost["price"] is None else f", price {cost['price']:.2f} at {cost['price_per_hour']:g} per hour"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def report_html(found: Mapping[str, Any]) -> str:
    """The page: verdict, picture, estimate, and every step that was tried."""
    cost, device = found["cost"], found["device"]
    batch, memory, estimated = summary(found)
    parts = [html.verdict(batch, "good"), html.note(memory)]
    if not cost["fits"]:
        parts.append(
            html.verdict(
                f"train.max_hours: {cost['max_hours']:g} will be over after about {cost['epochs_within_max_hours']} "
                f"epochs: all of them take about {cost['hours']:.2g} h",
                "warn",
            )
        )
    caption = "Peak of memory and throughput of worst-case steps against the batch"
    parts.append(html.section("Memory and throughput", html.image(picture(found), caption, quality=None)))
    rows = [
        ("optimizer step, mean over the training scales", duration(cost["seconds_per_optimizer_step"])),
        ("epoch", f"{duration(cost['seconds_per_epoch'])}, {cost['steps_per_epoch']} steps"),
        ("evaluation of the validation split", duration(cost["seconds_per_evaluation"])),
        ("all epochs, with evaluation", duration(3600 * cost["hours"])),
        ("devices", str(cost["devices"])),
        ("device-hours", f"{cost['device_hours']:.2f}"),
        ("price", "no probe.price_per_hour is given" if cost["price"] is None else f"{cost['price']:.2f}"),
    ]
    parts.append(html.section("Estimate", html.table(("", ""), rows), html.note(estimated)))
    tried = [
        (
            one["batch_size"],
            _gib(one["peak_bytes"]),
            "–" if one["seconds"] is None else f"{one['seconds']:.3f}",
            "yes" if one["fits"] else "no",
            _gib(one["left_bytes"]),
        )
        for one in found["attempts"]
    ]
    header = ("batch", "peak, GiB", "seconds per micro-batch", "within the limit", "left behind, GiB")
    evaluation = found["evaluation"]
    evaluated = (
        f"Evaluation at batch {evaluation['batch_size']}: {evaluation['seconds']:.3f} s, "
        f"peak {evaluation['peak_bytes'] / GIB:.2f} GiB."
    )
    parts.append(html.section("Steps", html.table(header, tried), html.note(evaluated)))
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    parts.append(
        html.note(
            f"{device['name']}, {device['memory_bytes'] / GIB:.2f} GiB, driver {device['driver'] or 'none'}, "
            f"{found['precision']}; {versions}"
        )
    )
    return html.page("Batch size", *parts)


def _gib(value: int | None) -> str:
    return "–" if value is None else f"{value / GIB:.2f}"


# ---- the picture ------------------------------------------------------------------------------------------

SCALE = 2  # drawn larger, then reduced: smooth lines
WIDTH, HEIGHT = 900, 620
INK, GRID, BLUE, RED, GREEN, GREY = "#222222", "#dddddd", "#2f6fed", "#c92a2a", "#2b8a3e", "#868e96"


@dataclass(frozen=True)
class _Panel:
    """A plot with linear axes from zero, in pixels of the picture."""

    draw: ImageDraw.ImageDraw
    left: int
    top: int
    width: int
    height: int
    x_max: float
    y_max: float

    def at(self, x: float, y: float) -> tuple[float, float]:
        return (
            SCALE * (self.left + self.width * x / self.x_max),
            SCALE * (self.top + self.height * (1 - y / self.y_max)),
        )

    def axes(self, label: str, x_label: str) -> None:
        for tick in _ticks(self.y_max):
            self.draw.line([self.at(0, tick), self.at(self.x_max, tick)], GRID, SCALE)
            x, y = self.at(0, tick)
            self.draw.text((x - 8 * SCALE, y), f"{tick:g}", INK, _font(13), anchor="rm")
        for tick in _ticks(self.x_max):
            x, y = self.at(tick, 0)
            self.draw.line([(x, y), (x, y + 4 * SCALE)], INK, SCALE)
            self.draw.text((x, y + 7 * SCALE), f"{tick:g}", INK, _font(13), anchor="ma")
        self.draw.line([self.at(0, self.y_max), self.at(0, 0), self.at(self.x_max, 0)], INK, SCALE)
        self.draw.text((SCALE * self.left, SCALE * (self.top - 26)), label, INK, _font(15))
        x, y = self.at(self.x_max, 0)
        self.draw.text((x, y + 24 * SCALE), x_label, INK, _font(13), anchor="ra")

    def level(self, y: float, text: str, colour: str) -> None:
        """A dashed horizontal line with its name."""
        x, row = self.at(0, y)
        end, _ = self.at(self.x_max, y)
        while x < end:
            self.draw.line([(x, row), (min(x + 8 * SCALE, end), row)], colour, 2 * SCALE)
            x += 14 * SCALE
        self.draw.text((self.at(0, y)[0] + 8 * SCALE, row - 4 * SCALE), text, colour, _font(13), anchor="ls")

    def dot(self, x: float, y: float, colour: str, radius: int = 5) -> None:
        cx, cy = self.at(x, y)
        r = radius * SCALE
        self.draw.ellipse([cx - r, cy - r, cx + r, cy + r], fill=colour)

    def cross(self, x: float, y: float, colour: str) -> None:
        cx, cy = self.at(x, y)
        r = 5 * SCALE
        self.draw.line([(cx - r, cy - r), (cx + r, cy + r)], colour, 2 * SCALE)
        self.draw.line([(cx - r, cy + r), (cx + r, cy - r)], colour, 2 * SCALE)


def picture(found: Mapping[str, Any]) -> Image.Image:
    """Memory and throughput of the worst-case steps against the batch, with the limit and the chosen batch."""
    canvas = Image.new("RGB", (SCALE * WIDTH, SCALE * HEIGHT), "white")
    draw = ImageDraw.Draw(canvas)
    names = Attempt.__dataclass_fields__
    attempts = [Attempt(**{name: one[name] for name in names}) for one in found["attempts"]]
    measured = [one for one in attempts if one.peak_bytes is not None and one.seconds is not None]
    chosen, limit, available = found["batch_size"], found["limit_bytes"] / GIB, found["available_bytes"] / GIB
    x_max = _rounded(1.1 * max(one.batch_size for one in attempts))
    peaks = [(one.batch_size, (one.peak_bytes or 0) / GIB) for one in measured]
    # A limit far above all peaks would press them to the axis: then it is told, not drawn.
    highest = max(peak for _, peak in [*peaks, (chosen, found["peak_bytes"] / GIB)])
    near = limit <= 4 * highest
    memory = _Panel(draw, 70, 50, WIDTH - 110, 240, x_max, _rounded(1.15 * (available if near else highest)))
    where = "" if near else f" (limit {limit:.1f} GiB, above the picture)"
    memory.axes(f"peak of memory, GiB{where}", "images per batch")
    line = fit(attempts)
    if line is not None:
        ends = [(x, min(memory.y_max, max(0.0, line.peak(x) / GIB))) for x in (0, round(x_max))]
        draw.line([memory.at(*end) for end in ends], GREY, 2 * SCALE)
    if near:
        memory.level(limit, f"limit {limit:.2f} GiB, 95 % of {available:.2f}", RED)
    for batch_size, peak in peaks:
        memory.dot(batch_size, peak, BLUE)
    for one in attempts:
        if one.peak_bytes is None:
            memory.cross(one.batch_size, min(available, memory.y_max), RED)
    memory.dot(chosen, found["peak_bytes"] / GIB, GREEN, 7)
    rates = sorted((one.batch_size, one.batch_size / (one.seconds or 1e-9)) for one in measured)
    speed = _Panel(draw, 70, 370, WIDTH - 110, 170, x_max, _rounded(1.15 * max(rate for _, rate in rates)))
    speed.axes("images per second, worst case", "images per batch")
    draw.line([speed.at(*point) for point in rates], BLUE, 2 * SCALE)
    for batch_size, rate in rates:
        speed.dot(batch_size, rate, BLUE)
    legend = [(BLUE, "step tried"), (GREEN, f"chosen: {chosen}, as training runs it"), (GREY, "prediction")]
    _legend(draw, [*legend, *([(RED, "out of memory")] if len(measured) < len(attempts) else [])])
    return canvas.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def _legend(draw: ImageDraw.ImageDraw, entries: Sequence[tuple[str, str]]) -> None:
    x, y = 70.0 * SCALE, (HEIGHT - 28) * SCALE
    for colour, text in entries:
        draw.rectangle([x, y + 3 * SCALE, x + 12 * SCALE, y + 11 * SCALE], fill=colour)
        draw.text((x + 18 * SCALE, y), text, INK, _font(13))
        x += 18 * SCALE + draw.textlength(text, _font(13)) + 28 * SCALE


def _font(size: int) -> Any:
    return ImageFont.load_default(size * SCALE)


def _rounded(value: float) -> float:
    """The end of an axis: a round number not below the value."""
    step = 10.0 ** math.floor(math.log10(max(value, 1e-9)))
    return next(factor * step for factor in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if factor * step >= value)


def _ticks(end: float) -> list[float]:
    step = next(s for s in (1, 2, 2.5, 5, 10) if s * 10 ** math.floor(math.log10(end / 5)) >= end / 6)
    step *= 10 ** math.floor(math.log10(end / 5))
    return [step * i for i in range(math.floor(end / step + 1e-9) + 1)]
