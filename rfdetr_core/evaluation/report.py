"""report.html of an evaluation: verdict first, then tables, curves and pictures; self-contained."""

from __future__ import annotations

from typing import Any

import numpy as np

from rfdetr_core import html
from rfdetr_core.data.annotations import ClassMap
from rfdetr_core.data.prepared import PreparedSplit
from rfdetr_core.evaluation.detections import Detections
from rfdetr_core.evaluation.metrics import RECALLS, CocoMetrics
from rfdetr_core.evaluation.samples import draw_sample

CURVES_SHOWN = 8  # classes drawn in one chart, the most frequent ones
PICTURE_BYTES = 6_000_000  # of all pictures together: the page opens in any browser and fits into a mail


def evaluation_html(
    *,
    name: str,
    document: dict[str, Any],
    metrics: CocoMetrics,
    split: PreparedSplit,
    class_map: ClassMap,
    detections: Detections,
    sample_images: int,
) -> str:
    """The page; `document` is the content of metrics.json."""
    candidate, champion = document["candidate"], document["champion"]
    return html.page(
        f"Evaluation of {name}",
        _verdict(candidate, champion, document["split"]),
        html.note(
            f"{document['images']} images of the {document['split']} split, "
            f"{candidate['source']} weights of epoch {candidate['epoch'] + 1}"
        ),
        html.section("COCO metrics", _coco_table(candidate, champion)),
        html.section("Per class", _class_table(candidate, champion)),
        html.section("Precision over recall at IoU 0.5", _curves(metrics, class_map)),
        html.section(
            "Samples",
            html.note("White: annotated. In colour: detected with a score of at least 0.3."),
            _samples(split, class_map, detections, sample_images),
        ),
    )


def _verdict(candidate: dict[str, Any], champion: dict[str, Any] | None, split: str) -> str:
    if candidate["map"] < 0:
        return html.verdict(f"No metric is defined: the {split} split has no boxes", "bad")
    found = f"mAP {candidate['map']:.3f}, mAP50 {candidate['map50']:.3f} on {split}"
    if champion is None:
        return html.verdict(f"{found}; there is no champion to compare with", "good")
    gain = candidate["map"] - champion["map"]
    word = "better than" if gain > 0 else "worse than" if gain < 0 else "equal to"
    return html.verdict(
        f"{found}: {word} the champion {champion['version']} ({gain:+.3f} mAP)", "good" if gain > 0 else "warn"
    )


def _coco_table(candidate: dict[str, Any], champion: dict[str, Any] | None) -> str:
    rows = {f"{key} at {candidate['max_dets']} detections": key for key in ("map", "map50", "map75", "mar", "f1")}
    rows |= {"score threshold of that f1": "f1_threshold", "precision there": "precision", "recall there": "recall"}
    lines = [[title, candidate[key], *([champion[key]] if champion else [])] for title, key in rows.items()]
    lines += [[key, value, *([champion["coco"][key]] if champion else [])] for key, value in candidate["coco"].items()]
    return html.table(["metric", "candidate", *(["champion"] if champion else [])], lines)


def _class_table(candidate: dict[str, Any], champion: dict[str, Any] | None) -> str:
    header = ["class", "boxes", "AP", "AP50", "AR", "F1", "at score", *(["champion AP"] if champion else [])]
    lines = [
        [name, v["boxes"], v["ap"], v["ap50"], v["ar"], v["f1"], v["f1_threshold"]]
        + ([champion["per_class"].get(name, {}).get("ap")] if champion else [])
        for name, v in candidate["per_class"].items()
    ]
    return html.table(header, lines)


def _curves(metrics: CocoMetrics, class_map: ClassMap) -> str:
    boxes = [metrics.per_class[name]["boxes"] for name in class_map.names]
    most_frequent = [int(label) for label in np.argsort(boxes)[::-1][:CURVES_SHOWN] if boxes[int(label)] > 0]
    series = {
        f"{class_map.names[label]} (AP50 {metrics.per_class[class_map.names[label]]['ap50']:.3f})": (
            RECALLS.tolist(),
            metrics.precision50[:, label].clip(0, 1).tolist(),
        )
        for label in most_frequent
    }
    hidden = sum(n > 0 for n in boxes) - len(series)
    chart = html.line_chart(series, x="recall", y="precision")
    return chart + html.note(f"{hidden} less frequent classes are not drawn.") if hidden else chart


def _samples(split: PreparedSplit, class_map: ClassMap, detections: Detections, count: int) -> str:
    """Evenly spread over the split: the same images every time, so that two reports can be laid side by side."""
    chosen = np.unique(np.linspace(0, len(split) - 1, min(count, len(split))).round().astype(int))
    figures: list[str] = []
    for i in chosen:
        figures.append(html.image(draw_sample(split, int(i), detections, class_map), str(split.table.file_names[i])))
        if sum(map(len, figures)) > PICTURE_BYTES:
            break
    left_out = f"{len(chosen) - len(figures)} more are left out: the page would be too large."
    grid = f'<div class="grid">{"".join(figures)}</div>'
    return grid if len(figures) == len(chosen) else grid + html.note(left_out)
