"""The dataset report: everything found, row by row (DESIGN section 5)."""

from __future__ import annotations

from html import escape
from typing import Any

from rfdetr_core import html
from rfdetr_core.data.validation import Finding, Report

ROWS_SHOWN = 200  # per finding, in the page; report.json has all


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


def report_html(source: str, report: Report, document: dict[str, Any] | None) -> str:
    """report.html, self-contained."""
    findings = sorted(report.findings.values(), key=lambda f: ("error", "warning", "note").index(f.severity))
    parts = [_verdict(report, document), html.note(f"Source: {source}")]
    if document:
        parts += [_splits(document), _classes(document)]
    parts.append(html.section("Findings", *(map(_finding, findings))))
    if not findings:
        unread = "The annotations could not be read: the log and the status of this stage say why."
        parts.append(html.note("Nothing to remark." if document else unread))
    return html.page("Dataset report", *parts)


def _verdict(report: Report, document: dict[str, Any] | None) -> str:
    kinds = dict.fromkeys(("error", "warning", "note"), 0)
    for finding in report.findings.values():
        kinds[finding.severity] += finding.count
    counts = f"{kinds['error']} errors, {kinds['warning']} warnings, {kinds['note']} notes"
    if report.errors or document is None:
        return html.verdict(f"Not usable: {counts}", "bad")
    return html.verdict(f"Usable: {counts}", "warn" if kinds["warning"] else "good")


def _splits(document: dict[str, Any]) -> str:
    columns = ("images", "boxes", "images_without_boxes", "crowd_regions", "max_boxes_per_image")
    rows = [[name, *(split[c] for c in columns)] for name, split in document["splits"].items()]
    return html.section("Splits", html.table(["split", *(c.replace("_", " ") for c in columns)], rows))


def _classes(document: dict[str, Any]) -> str:
    splits = document["splits"]
    rows = [
        [c["label"], c["name"], c["source_id"], *(s["boxes_per_class"][c["name"]] for s in splits.values())]
        for c in document["classes"]
    ]
    header = ["label", "class", "source id", *(f"boxes in {name}" for name in splits)]
    return html.section("Classes", html.table(header, rows))


def _finding(finding: Finding) -> str:
    rows = "".join(f"<li>{escape(row)}</li>" for row in finding.rows[:ROWS_SHOWN])
    more = f"<li>… {finding.count - ROWS_SHOWN} more in report.json</li>" if finding.count > ROWS_SHOWN else ""
    summary = f"<b>{finding.severity}</b> · {escape(finding.message)} · {finding.count} · <code>{finding.code}</code>"
    opened = " open" if finding.severity == "error" else ""
    return f"<details{opened}><summary>{summary}</summary><ul>{rows}{more}</ul></details>"
