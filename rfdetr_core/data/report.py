"""The dataset report: everything found, row by row (DESIGN section 5)."""

from __future__ import annotations

from html import escape
from typing import Any

from rfdetr_core import html
from rfdetr_core.data.annotations import ClassMap
from rfdetr_core.data.boxes import ValidSplit
from rfdetr_core.data.checks import CheckOptions
from rfdetr_core.data.findings import Finding, Report
from rfdetr_core.data.report_pictures import pictures, worst_images
from rfdetr_core.data.statistics import shape_histograms

ROWS_SHOWN = 200  # per finding, in the page; report.json has all
ROW_LENGTH = 300  # characters of a row that the page shows
CLASSES_SHOWN = 500
PAGE_BYTES = 5_000_000


def report_json(source: str, report: Report, document: dict[str, Any] | None) -> dict[str, Any]:
    """report.json: the verdict, all findings with all rows, and the dataset's numbers if it is usable.

    `document` is the content of dataset.json; None where the dataset could not be prepared.
    """
    return {
        "source": source,
        "usable": document is not None and not report.errors,
        "findings": report.to_json(),
        "classes": document["classes"] if document else None,
        "splits": document["splits"] if document else None,
    }


def report_html(
    source: str,
    report: Report,
    document: dict[str, Any] | None,
    class_map: ClassMap | None = None,
    splits: dict[str, ValidSplit] | None = None,
) -> str:
    """report.html, self-contained and below 5 MB.

    With the class map and the splits it also has histograms, and pictures of the images where they lie.
    """
    findings = report.worst_first
    parts = [_verdict(report, document), html.note(f"Source: {source}")]
    found = html.section("Findings", *(map(_finding, findings)))
    if not findings:
        unread = "The annotations could not be read: the log and the status of this stage say why."
        found += html.note("Nothing to remark." if document else unread)
    parts.append(found)
    worst = worst_images(report)
    if worst:
        parts.append(html.section("Worst images", html.table(["image", "rows", "codes"], worst)))
    if document:
        parts += [_splits(document), _classes(document)]
    if splits is not None:
        parts.append(_shapes(splits, report.options))
    page = html.page("Dataset report", *parts)
    if class_map is None or splits is None:
        return page
    shown = pictures(class_map, splits, worst, PAGE_BYTES - len(page.encode()) - 1000)
    return html.page("Dataset report", *parts, *shown)


def _verdict(report: Report, document: dict[str, Any] | None) -> str:
    kinds = dict.fromkeys(("error", "warning", "note"), 0)
    for finding in report.findings.values():
        kinds[finding.severity] += finding.count
    counts = ", ".join(f"{count} {kind}{'' if count == 1 else 's'}" for kind, count in kinds.items())
    if report.errors or document is None:
        return html.verdict(f"Not usable: {counts}", "bad")
    return html.verdict(f"Usable: {counts}", "warn" if kinds["warning"] else "good")


def _splits(document: dict[str, Any]) -> str:
    columns = ("images", "boxes", "images_without_boxes", "crowd_regions", "max_boxes_per_image")
    rows = [[name, *(split[c] for c in columns)] for name, split in document["splits"].items()]
    return html.section("Splits", html.table(["split", *(c.replace("_", " ") for c in columns)], rows))


def _classes(document: dict[str, Any]) -> str:
    splits, classes = document["splits"], document["classes"]
    rows = [
        [c["label"], c["name"], c["source_id"], *(s["boxes_per_class"][c["name"]] for s in splits.values())]
        for c in classes[:CLASSES_SHOWN]
    ]
    header = ["label", "class", "source id", *(f"boxes in {name}" for name in splits)]
    more = len(classes) - CLASSES_SHOWN
    return html.section(
        "Classes", html.table(header, rows), html.note(f"… {more} more in report.json") if more > 0 else ""
    )


def _shapes(splits: dict[str, ValidSplit], options: CheckOptions) -> str:
    histograms = {name: shape_histograms(split.table, options) for name, split in splits.items()}
    charts = [
        html.bar_chart(labels, {name: histograms[name][title][1] for name in splits}, x=title)
        for title, (labels, _) in next(iter(histograms.values())).items()
    ]
    return html.section(
        "Shapes",
        html.note(
            f"Shares of each split's boxes or images. The model sees an image as {options.resolution} x "
            f"{options.resolution} pixels in patches of {options.patch_size}, and finds {options.num_queries} boxes "
            "in it at most."
        ),
        f'<div class="charts">{"".join(charts)}</div>',
    )


def _finding(finding: Finding) -> str:
    rows = "".join(f"<li>{escape(_short(row))}</li>" for row in finding.rows[:ROWS_SHOWN])
    more = f"<li>… {finding.count - ROWS_SHOWN} more in report.json</li>" if finding.count > ROWS_SHOWN else ""
    limit = f" · {finding.limit} tolerated" if finding.limit else ""
    summary = (
        f"<b>{finding.severity}</b> · {escape(finding.message)} · {finding.count}{limit} · <code>{finding.code}</code>"
    )
    opened = " open" if finding.severity == "error" else ""
    return f"<details{opened}><summary>{summary}</summary><ul>{rows}{more}</ul></details>"


def _short(row: str) -> str:
    return row if len(row) <= ROW_LENGTH else f"{row[:ROW_LENGTH]} …"
