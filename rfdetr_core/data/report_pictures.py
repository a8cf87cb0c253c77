"""Pictures for report.html: images of each class, and those with the most to say about, with their boxes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import numpy as np
from PIL import ImageDraw

from rfdetr_core import html
from rfdetr_core.data.annotations import ClassMap
from rfdetr_core.data.boxes import ValidSplit
from rfdetr_core.data.findings import Report
from rfdetr_core.data.images import decode_image
from rfdetr_core.data.pixels import read_unchanged
from rfdetr_core.errors import DatasetError

SIDE = 320  # longest side of a picture, in pixels
CLASSES = 24  # classes that have pictures
PER_CLASS = 2
WORST = 10

_ROW = re.compile(r"(?P<image>(?:train|valid|test)/.+?)(?:: | = |$)")


def worst_images(report: Report) -> list[list[str | int]]:
    """Image, rows and codes of the images that most warnings and errors are about, the worst first."""
    rows: Counter[str] = Counter()
    codes: dict[str, dict[str, None]] = {}
    for finding in report.worst_first:
        if finding.severity == "note":
            continue
        for row in finding.rows:
            match = _ROW.match(row)
            if match is not None and "." in match["image"]:
                rows[match["image"]] += 1
                codes.setdefault(match["image"], {})[finding.code] = None
    return [[image[:200], count, ", ".join(codes[image])] for image, count in rows.most_common(WORST)]


def pictures(
    class_map: ClassMap, splits: dict[str, ValidSplit], worst: list[list[str | int]], most_bytes: int
) -> Iterator[str]:
    """Sections of pictures, the worst images first, as many as fit into so many bytes."""
    left = most_bytes
    for title, wanted in (
        ("Worst images, as they are now", list(_of_names(splits, [str(row[0]) for row in worst]))),
        ("Samples of each class", list(_of_classes(class_map, splits))),
    ):
        figures = []
        for split, i, caption in wanted:
            figure = _figure(splits[split], i, f"{caption}{split}/{splits[split].table.file_names[i]}", class_map)
            if figure is None or len(figure.encode()) > left:
                continue
            left -= len(figure.encode())
            figures.append(figure)
        if figures:
            yield html.section(title, f'<div class="grid">{"".join(figures)}</div>')


def _of_names(splits: dict[str, ValidSplit], names: list[str]) -> Iterator[tuple[str, int, str]]:
    for name in names:
        split, _, file_name = name.partition("/")
        found = splits[split].table.file_names == file_name if split in splits else np.zeros(0, dtype=np.bool_)
        if found.any():
            yield split, int(found.argmax()), ""


def _of_classes(class_map: ClassMap, splits: dict[str, ValidSplit]) -> Iterator[tuple[str, int, str]]:
    """Images of train with the largest box of each class, from different images: what the label is can be seen."""
    table = splits["train"].table
    image_of = np.repeat(np.arange(len(table)), table.counts)
    used: set[int] = set()
    for label, name in list(enumerate(class_map.names))[:CLASSES]:
        rows = np.flatnonzero((table.labels == label) & ~table.crowd)
        rows = rows[np.argsort(-table.areas[rows], kind="stable")]
        # The median box, not the largest: extremes are what the worst images are for.
        images = [int(i) for i in dict.fromkeys(image_of[np.roll(rows, -(len(rows) // 2))].tolist()) if i not in used]
        for i in images[:PER_CLASS]:
            used.add(i)
            yield "train", i, f"{name}: "


def _figure(split: ValidSplit, i: int, caption: str, class_map: ClassMap) -> str | None:
    """The picture; None where the file is no longer what it was."""
    try:
        image = decode_image(read_unchanged(split.files[i]), split.files[i].orientation, at_least=SIDE)
    except (DatasetError, OSError, ValueError, SyntaxError):
        return None
    table = split.table
    width, height = int(table.widths[i]), int(table.heights[i])
    scale = min(1.0, SIDE / max(width, height))
    image = image.resize((max(1, round(width * scale)), max(1, round(height * scale))))
    draw = ImageDraw.Draw(image)
    for box, label in zip(table.boxes[table.rows(i)][:300], table.labels[table.rows(i)][:300].tolist(), strict=True):
        colour = html.COLOURS[label % len(html.COLOURS)]
        draw.rectangle([float(v) * scale for v in box], outline=colour, width=2)
    names = dict.fromkeys(class_map.names[label] for label in table.labels[table.rows(i)].tolist())
    shown = ", ".join(list(names)[:6])
    boxes = table.rows(i).stop - table.rows(i).start
    return html.image(image.convert("RGB"), f"{caption[:200]} · {boxes} boxes{f' · {shown}' if shown else ''}"[:400])
