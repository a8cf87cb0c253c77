"""Pictures for reports: images with what was annotated, what was found, and what was not."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

from rfdetr_core.data.annotations import ClassMap
from rfdetr_core.data.prepared import PreparedSplit
from rfdetr_core.evaluation.analysis import Outcome

LONGEST_SIDE = 480  # px: small enough that a few dozen fit into a page
ENLARGED = 320  # px of the longest side of a smaller image, or the names would cover it
ANNOTATED, RIGHT, WRONG, MISSED = "white", "#2b8a3e", "#c92a2a", "#f59f00"
LEGEND = "White: annotated. Green: found. Red: found where there is none of that class. Orange: annotated and missed."


def draw_sample(split: PreparedSplit, image: int, seen: Outcome, class_map: ClassMap) -> Image.Image:
    """One image, its longest side from ENLARGED to LONGEST_SIDE: what was annotated, and what the model found."""
    picture = split.decode(image)
    longest = max(picture.size)
    scale = min(max(longest, ENLARGED), LONGEST_SIDE) / longest
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.BILINEAR)
    draw, table, found = ImageDraw.Draw(picture), split.table, seen.detections
    rows = table.rows(image)
    for box, label, missed in zip(table.boxes[rows], table.labels[rows], seen.missed[rows], strict=True):
        corners = [float(v) * scale for v in box]
        draw.rectangle(corners, outline=MISSED if missed else ANNOTATED, width=2 if missed else 1)
        if missed:
            _write(draw, corners, class_map.names[int(label)], MISSED)
    order = [int(i) for i in (found.images == image).nonzero()[0]]
    for i in sorted(order, key=lambda i: float(found.scores[i])):  # the surest on top
        corners, colour = [float(v) * scale for v in found.boxes[i]], RIGHT if seen.hit[i] else WRONG
        draw.rectangle(corners, outline=colour, width=2)
        _write(draw, corners, f"{class_map.names[int(found.labels[i])]} {found.scores[i]:.2f}", colour)
    return picture


def _write(draw: ImageDraw.ImageDraw, corners: list[float], text: str, colour: str) -> None:
    """Above the box, or just inside it where there is no room."""
    font = ImageFont.load_default(size=12)
    place = (corners[0], max(0.0, corners[1] - 14))
    left, top, right, bottom = draw.textbbox(place, text, font=font)
    draw.rectangle([left - 1, top - 1, right + 1, bottom + 1], fill=colour)
    draw.text(place, text, fill="white", font=font)
