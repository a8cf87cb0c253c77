"""report.html of an evaluation: verdict first, then tables, curves and pictures; self-contained."""

from __future__ import annotations

from typing import Any

import numpy as np

from rfdetr_core import html
from rfdetr_core.data.annotations import ClassMap
from rfdetr_core.data.prepared import PreparedSplit
from rfdetr_core.evaluation.metrics import RECALLS, CocoMetrics, Detections
from rfdetr_core.evaluation.samples import draw_sample

CURVES_SHOWN = 8  # classes drawn in one chart, the most frequent ones


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
    found = f"mAP {candidate['map']:.3f}, mAP50 {candidate['map50']:.3f} on {split}"
    if champion is None:
        return html.verdict(f"{found}; there is no champion to compare with", "good")
    gain = candidate["map"] - champion["map"]
    word = "better than" if gain > 0 else "worse than" if gain < 0 else "equal to"
    return html.verdict(
        f"{found}: {word} the champion {champion['version']} ({gain:+.3f} mAP)", "good" if gain > 0 else "warn"
    )


def _coco_table(candidate: dict[str, Any], champion: dict[str, Any] | None) -> str:
    rows = {f"{key} at {candidate['max_dets']} detections": key for key in ("map", "map50", "map75", "mar")}
    lines = [[title, candidate[key], *([champion[key]] if champion else [])] for title, key in rows.items()]
    lines += [[key, value, *([champion["coco"][key]] if champion else [])] for key, value in candidate["coco"].items()]
    return html.table(["metric", "candidate", *(["champion"] if champion else [])], lines)


def _class_table(candidate: dict[str, Any], champion: dict[str, Any] | None) -> str:
    header = ["class", "boxes", "AP", "AP50", "AR", *(["champion AP"] if champion else [])]
    lines = [
        [name, v["boxes"], v["ap"], v["ap50"], v["ar"]]
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
    return html.line_chart(series, x="recall", y="precision")


def _samples(split: PreparedSplit, class_map: ClassMap, detections: Detections, count: int) -> str:
    """Evenly spread over the split: the same images every time, so that two reports can be laid side by side."""
    chosen = np.unique(np.linspace(0, len(split) - 1, min(count, len(split))).round().astype(int))
    figures = (
        html.image(draw_sample(split, int(i), detections, class_map), str(split.table.file_names[i])) for i in chosen
    )
    return f'<div class="grid">{"".join(figures)}</div>'
