"""Pictures for reports: images with what was annotated and what was found."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

from rfdetr_core.data.annotations import ClassMap
from rfdetr_core.data.prepared import PreparedSplit
from rfdetr_core.evaluation.detections import Detections
from rfdetr_core.html import COLOURS

LONGEST_SIDE = 480  # px: small enough that a dozen fit into a page
MIN_SCORE = 0.3


def draw_sample(split: PreparedSplit, image: int, detections: Detections, class_map: ClassMap) -> Image.Image:
    """One image: annotated boxes thin and white, detections of score >= MIN_SCORE in the colour of their class."""
    picture = split.decode(image)
    scale = min(1.0, LONGEST_SIDE / max(picture.size))
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.BILINEAR)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    for box in split.table.boxes[split.table.rows(image)]:
        draw.rectangle([float(v) * scale for v in box], outline="white", width=1)
    chosen = (detections.images == image) & (detections.scores >= MIN_SCORE)
    rows = zip(detections.boxes[chosen], detections.labels[chosen], detections.scores[chosen], strict=True)
    for box, label, score in sorted(rows, key=lambda row: float(row[2])):
        colour = COLOURS[int(label) % len(COLOURS)]
        x1, y1, x2, y2 = (float(v) * scale for v in box)
        draw.rectangle([x1, y1, x2, y2], outline=colour, width=2)
        text = f"{class_map.names[int(label)]} {score:.2f}"
        left, top, right, bottom = draw.textbbox((x1, max(0.0, y1 - 14)), text, font=font)
        draw.rectangle([left - 1, top - 1, right + 1, bottom + 1], fill=colour)
        draw.text((x1, max(0.0, y1 - 14)), text, fill="white", font=font)
    return picture
