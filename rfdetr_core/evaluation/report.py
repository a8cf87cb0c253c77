"""report.html of an evaluation: verdict first, then tables, curves and pictures; self-contained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from rfdetr_core import html
from rfdetr_core.data.annotations import ClassMap
from rfdetr_core.evaluation.analysis import ERROR_KINDS, condensed
from rfdetr_core.evaluation.f1 import THRESHOLDS
from rfdetr_core.evaluation.measure import Measurement
from rfdetr_core.evaluation.metrics import RECALLS, CocoMetrics
from rfdetr_core.evaluation.samples import LEGEND, draw_sample

CURVES_SHOWN = len(html.COLOURS)  # in one chart: the most frequent classes
CONFUSION_SHOWN = 40  # classes in the matrix; the least frequent of more are one row
PICTURE_BYTES = 6_000_000  # of all pictures together: the page opens in any browser and fits into a mail
NOTHING, LITTLE = 0.0005, 0.1  # mAP that is shown as 0.000; AP50 that helps nobody

TITLES = {"map": "mAP", "map50": "mAP50", "map75": "mAP75", "mar": "mAR", "f1": "F1"}
KINDS = {
    "classification": "right place, another class",
    "localisation": "right class, overlap below 0.5",
    "both": "another class, and overlap below 0.5",
    "duplicate": "found once more",
    "background": "nothing is there",
    "missed": "annotated, and nothing near it found",
}


def evaluation_html(name: str, measured: Measurement, *, sample_images: int) -> str:
    """The page; `sample_images` of the worst pictures and of the best."""
    document, metrics, class_map = measured.document, measured.metrics, measured.class_map
    candidate, champion = document["candidate"], document["champion"]
    return html.page(
        f"Evaluation of {name}",
        verdict(document),
        html.verdict(f"Not the split that was asked for: {document['split_note']}", "warn")
        if document["split_note"]
        else "",
        html.note(
            f"{document['images']} images with {document['boxes']} boxes of the {document['split']} split; "
            f"{candidate['source']} weights of epoch {candidate['epoch'] + 1}, SHA-256 {candidate['weights_sha256']}"
        ),
        _comparison(document) if champion else "",
        html.section("COCO metrics", _coco_table(candidate, champion)),
        html.section("By size", _size_table(document)),
        html.section("Per class", _class_table(candidate, champion)),
        html.section(
            "Curves at IoU 0.5",
            html.beside(_precision_curves(metrics, class_map), _f1_curves(metrics, class_map)),
        ),
        html.section("Confusion", _confusion(measured)),
        html.section("Errors", _errors(candidate)),
        html.section("Latency and size", _latency(candidate, champion)),
        *_pictures(measured, sample_images),
    )


def verdict(document: dict[str, Any]) -> str:
    """The first thing to read: how good it is, and with a champion whether it is better than luck."""
    candidate, champion = document["candidate"], document["champion"]
    found = f"mAP {candidate['map']:.3f}, mAP50 {candidate['map50']:.3f} on {document['split']}"
    useless = candidate["map"] < NOTHING
    if champion is None:
        if useless:
            return html.verdict(f"{found}: the model finds nothing; there is no champion to compare with", "bad")
        kind = "warn" if candidate["map50"] < LITTLE else "good"
        remark = ", too little to be of use" if kind == "warn" else ""
        return html.verdict(f"{found}{remark}; there is no champion to compare with", kind)
    compared = document["comparison"]["metrics"]["map"]
    gain, low, high = compared["difference"], compared["low"], compared["high"]
    word = "better than" if gain > 0 else "worse than" if gain < 0 else "equal to"
    text = f"{found}: {word} the champion {champion['version']} ({gain:+.3f} mAP)"
    if low is not None and gain != 0:
        certain = low > 0 or high < 0
        text += f", 95 % interval {low:+.3f} to {high:+.3f}" + ("" if certain else ": it may be luck")
    sure = gain > 0 and (low is None or low > 0) and not useless
    return html.verdict(text, "bad" if useless else "good" if sure else "warn")


def _comparison(document: dict[str, Any]) -> str:
    compared, champion = document["comparison"], document["champion"]
    rows = [
        [TITLES[name], v["candidate"], v["champion"], _signed(v["difference"]), _interval(v), v["p_value"]]
        for name, v in compared["metrics"].items()
    ]
    header = ["metric", "candidate", "champion", "difference", "95 % interval", "p"]
    parts = [html.table(header, rows)]
    if compared["samples"]:
        parts.append(
            html.note(
                f"Paired bootstrap: {compared['samples']} draws of the {document['images']} images. "
                "p: how often a model that is not better would gain as much by the luck of the images."
            )
        )
    for key, sentence in (("missing_classes", "does not know"), ("dropped_classes", "knows, and this dataset lacks,")):
        if champion[key]:
            parts.append(html.note(f"The champion {sentence} {', '.join(champion[key])}."))
    per_class = [(name, v) for name, v in compared["per_class"].items() if v is not None]
    per_class.sort(key=lambda row: float(row[1]["difference"]))
    own = document["candidate"]["per_class"]
    lines = [
        [name, own[name]["boxes"], v["candidate"], v["champion"], _signed(v["difference"])] for name, v in per_class
    ]
    table = html.table(["class", "boxes", "AP", "champion AP", "difference"], lines)
    return html.section(f"Against the champion {champion['version']}", *parts, table)


def _interval(row: dict[str, float | None]) -> str:
    return "–" if row["low"] is None or row["high"] is None else f"{row['low']:+.3f} to {row['high']:+.3f}"


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def _coco_table(candidate: dict[str, Any], champion: dict[str, Any] | None) -> str:
    rows = {f"{title} at {candidate['max_dets']} detections": key for key, title in TITLES.items()}
    rows |= {"score threshold of that F1": "f1_threshold", "precision there": "precision", "recall there": "recall"}
    lines = [[title, candidate[key], *([champion[key]] if champion else [])] for title, key in rows.items()]
    lines += [[key, value, *([champion["coco"][key]] if champion else [])] for key, value in candidate["coco"].items()]
    return html.table(["metric", "candidate", *(["champion"] if champion else [])], lines)


def _size_table(document: dict[str, Any]) -> str:
    coco, sizes = document["candidate"]["coco"], ("small", "medium", "large")
    borders = ("below 32² px", "32² to 96² px", "above 96² px")
    rows = [
        [f"{size} ({border})", document["boxes_by_size"][size], coco[f"AP_{size}"], coco[f"AR_{size}"]]
        for size, border in zip(sizes, borders, strict=True)
    ]
    return html.table(["annotated area", "boxes", "AP", "recall (AR at 100 detections)"], rows)


def _class_table(candidate: dict[str, Any], champion: dict[str, Any] | None) -> str:
    fields = {"boxes": "boxes", "AP": "ap", "AP50": "ap50", "AP75": "ap75", "AR": "ar", "best F1": "f1"}
    fields |= {"at score": "f1_threshold", "precision": "precision", "recall": "recall"}
    lines = [
        [name, *(v[key] for key in fields.values())] + ([champion["per_class"][name]["ap"]] if champion else [])
        for name, v in candidate["per_class"].items()
    ]
    return html.table(["class", *fields, *(["champion AP"] if champion else [])], lines)


def _most_frequent(metrics: CocoMetrics, class_map: ClassMap, most: int) -> tuple[list[int], str]:
    """Labels to be drawn, and a line about those that are not."""
    boxes = [metrics.per_class[name]["boxes"] for name in class_map.names]
    shown = [int(label) for label in np.argsort(boxes)[::-1][:most] if boxes[int(label)] > 0]
    hidden = sum(n > 0 for n in boxes) - len(shown)
    return shown, html.note(f"{hidden} less frequent classes are not drawn.") if hidden else ""


def _precision_curves(metrics: CocoMetrics, class_map: ClassMap) -> str:
    labels, rest = _most_frequent(metrics, class_map, CURVES_SHOWN)
    series = {
        f"{class_map.names[label]} (AP50 {metrics.per_class[class_map.names[label]]['ap50']:.3f})": (
            RECALLS.tolist(),
            metrics.precision50[:, label].clip(0, 1).tolist(),
        )
        for label in labels
    }
    return html.line_chart(series, x="recall", y="precision") + rest


def _f1_curves(metrics: CocoMetrics, class_map: ClassMap) -> str:
    labels, rest = _most_frequent(metrics, class_map, CURVES_SHOWN - 1)  # and their mean
    sweep = metrics.sweep
    mean = f"mean of all classes (best {metrics.f1:.3f} at {metrics.f1_threshold:.2f})"
    series = {mean: (THRESHOLDS.tolist(), sweep.f1[sweep.defined].mean(axis=0).tolist())}
    for label in labels:
        best = metrics.per_class[class_map.names[label]]
        title = f"{class_map.names[label]} (best {best['f1']:.3f} at {best['f1_threshold']:.2f})"
        series[title] = (THRESHOLDS.tolist(), sweep.f1[label].tolist())
    return html.line_chart(series, x="score threshold", y="F1") + rest


def _confusion(measured: Measurement) -> str:
    document = measured.confusion
    names, matrix = condensed(document, CONFUSION_SHOWN)
    note = (
        f"Rows: annotated; columns: found, with a score of at least {document['score']:.2f} and an overlap of at "
        f"least {document['iou']:.1f}. Last row: found where nothing is; last column: missed."
    )
    return html.note(note) + html.matrix(names, matrix)


def _errors(candidate: dict[str, Any]) -> str:
    errors = candidate["errors"]
    rows = [[kind, KINDS[kind], errors["counts"][kind], errors["delta_ap50"][kind]] for kind in ERROR_KINDS]
    note = "How much AP50 would rise were all errors of a kind mended; counted over all scores, each detection once."
    return html.note(note) + html.table(["kind", "what happened", "number", "costs AP50"], rows)


def _latency(candidate: dict[str, Any], champion: dict[str, Any] | None) -> str:
    roles = {"candidate": candidate, **({"champion": champion} if champion else {})}
    rows = [
        [role, row["variant"], row["resolution"], row["parameters"], row["weights_bytes"] / 2**20]
        + [row["latency"][key] for key in ("milliseconds", "p90_milliseconds", "images_per_second")]
        for role, row in roles.items()
    ]
    header = ["", "variant", "resolution", "parameters", "weights MiB", "ms per image", "90th percentile", "images/s"]
    latency = candidate["latency"]
    threads = f"{latency['threads']} thread{'s' * (latency['threads'] > 1)}"
    where = f"{latency['device']} ({latency['device_name']}), {threads}, {latency['precision']}"
    return html.table(header, rows) + html.note(f"PyTorch on {where}, batch 1, {latency['runs']} runs.")


def _pictures(measured: Measurement, count: int) -> list[str]:
    """The worst images, then the best; as many as fit into the page."""
    seen, left = measured.seen, PICTURE_BYTES
    sections = []
    for title, images in (("Worst images", seen.worst(count)), ("Best images", seen.best(count))):
        if not len(images):
            continue
        figures = list(_figures(measured, images, left if title == "Best images" else left // 2))
        left -= sum(map(len, figures))
        parts = [f'<div class="grid">{"".join(figures)}</div>']
        if len(figures) < len(images):
            parts.append(html.note(f"{len(images) - len(figures)} more are left out: the page would be too large."))
        sections.append(html.section(title, html.note(f"{LEGEND} At a score of {seen.score:.2f} or more."), *parts))
    return sections


def _figures(measured: Measurement, images: Iterable[Any], limit: int) -> Iterable[str]:
    size, seen, split = 0, measured.seen, measured.split
    for i in map(int, images):
        picture = draw_sample(split, i, seen, measured.class_map)
        name, wrong = str(split.table.file_names[i]), int(seen.wrong[i])
        figure = html.image(picture, f"{name} · F1 {seen.f1[i]:.2f} · {wrong} {'error' if wrong == 1 else 'errors'}")
        size += len(figure)
        if size > limit:
            return
        yield figure
