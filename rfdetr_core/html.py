"""Self-contained HTML pages: the look that all reports share. No script, no external file."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from PIL import Image

STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --bad: #cf222e; --warn: #9a6700; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; margin: .6rem 0 }
th, td { padding: .25rem .8rem; border-bottom: 1px solid var(--line) }
th { text-align: left; font-weight: 600 } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
.verdict { font-size: 1.1rem; padding: .6rem 1rem; border-left: 5px solid; margin: 1rem 0 }
.good { border-color: var(--good) } .bad { border-color: var(--bad) } .warn { border-color: var(--warn) }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem }
figure { margin: 0 } figcaption { font-size: .8rem; opacity: .75; overflow-wrap: anywhere }
img { width: 100%; height: auto }
.beside { display: flex; flex-wrap: wrap; gap: 0 2rem } .beside > * { flex: 1 1 26rem; max-width: 34rem }
.wide { overflow-x: auto } .matrix td { text-align: center; min-width: 2rem; padding: .15rem .3rem; font-size: .8rem }
.matrix th { font-size: .8rem; padding: .15rem .4rem; white-space: nowrap }
.turned span { writing-mode: vertical-rl; transform: rotate(180deg) }
details { margin: .4rem 0 } svg { max-width: 34rem; width: 100%; height: auto } .muted { opacity: .7 }
"""


def page(title: str, *parts: str) -> str:
    """A whole document."""
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style>"
    )
    body = f"<h1>{escape(title)}</h1>{''.join(parts)}"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{body}</body></html>\n"


def verdict(text: str, kind: str) -> str:
    """The first thing to read; kind is good, bad or warn."""
    return f'<p class="verdict {kind}">{escape(text)}</p>'


def section(title: str, *parts: str) -> str:
    """A heading and what belongs to it."""
    return f"<h2>{escape(title)}</h2>{''.join(parts)}"


def note(text: str) -> str:
    """A muted line."""
    return f'<p class="muted">{escape(text)}</p>'


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Numbers right-aligned; floats with three decimals; -1 and None as a dash (COCO's "not defined")."""
    body = [list(row) for row in rows]
    numeric = [all(_is_number(row[i]) for row in body) and bool(body) for i in range(len(header))]
    marks = [' class="number"' if is_numeric else "" for is_numeric in numeric]
    head = "".join(f"<th{mark}>{escape(name)}</th>" for name, mark in zip(header, marks, strict=True))
    lines = (
        "<tr>" + "".join(f"<td{mark}>{_cell(v)}</td>" for v, mark in zip(row, marks, strict=True)) + "</tr>"
        for row in body
    )
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def image(picture: Image.Image, caption: str, *, quality: int = 80) -> str:
    """A figure with the picture inlined as JPEG."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/jpeg;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def matrix(names: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """A square table of counts, each cell shaded by its share of its row; zeros stay empty."""
    columns = "".join(f'<th class="turned"><span>{escape(name)}</span></th>' for name in names)
    lines = []
    for i, (name, row) in enumerate(zip(names, counts, strict=True)):
        whole, cells = max(1, sum(row)), []
        for j, count in enumerate(row):
            colour = "26, 127, 55" if i == j else "207, 34, 46"
            shade = f' style="background: rgba({colour}, {0.1 + 0.7 * count / whole:.2f})"' if count else ""
            title = f' title="{escape(name)} → {escape(names[j])}: {count}"' if count else ""
            cells.append(f"<td{shade}{title}>{count or ''}</td>")
        lines.append(f"<tr><th>{escape(name)}</th>{''.join(cells)}</tr>")
    return f'<div class="wide"><table class="matrix"><tr><th></th>{columns}</tr>{"".join(lines)}</table></div>'


def beside(*parts: str) -> str:
    """Parts in one row where the page is wide enough."""
    return f'<div class="beside">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


COLOURS = ("#2f6fed", "#d9480f", "#2b8a3e", "#9c36b5", "#c92a2a", "#0b7285", "#e67700", "#5f3dc4")


def line_chart(series: dict[str, tuple[Sequence[float], Sequence[float]]], *, x: str, y: str) -> str:
    """An SVG of curves in the unit square, with a legend; at most as many as there are colours, then repeated."""
    width, height, left, bottom = 520, 340, 50, 40
    plot_w, plot_h = width - left - 10, height - bottom - 10

    def point(u: float, v: float) -> str:
        return f"{left + u * plot_w:.1f},{10 + (1 - v) * plot_h:.1f}"

    parts = [
        f'<svg viewBox="0 0 {width} {height + 18 * len(series) + 10}" role="img" font-size="12" fill="currentColor">'
    ]
    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1.0):
        ax, ay = left + tick * plot_w, 10 + (1 - tick) * plot_h
        parts.append(f'<line x1="{left}" x2="{left + plot_w}" y1="{ay}" y2="{ay}" stroke="#8884"/>')
        parts.append(f'<text x="{left - 6}" y="{ay + 4}" text-anchor="end">{tick:.1f}</text>')
        parts.append(f'<text x="{ax}" y="{10 + plot_h + 16}" text-anchor="middle">{tick:.1f}</text>')
    for i, (name, (us, vs)) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        points = " ".join(point(u, v) for u, v in zip(us, vs, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        legend = height + 18 * i + 14
        parts.append(f'<rect x="{left}" y="{legend - 9}" width="14" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{left + 22}" y="{legend}">{escape(name)}</text>')
    parts.append(f'<text x="{left + plot_w / 2}" y="{height - 6}" text-anchor="middle">{escape(x)}</text>')
    parts.append(
        f'<text transform="translate(14 {10 + plot_h / 2}) rotate(-90)" text-anchor="middle">{escape(y)}</text>'
    )
    return "".join([*parts, "</svg>"])


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and value == -1.0):
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else escape(f"{value:,}" if _is_number(value) else str(value))
