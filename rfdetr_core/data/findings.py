"""What the checks found: rows under stable codes, and whether they stop the stage."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rfdetr_core.data.checks import CHECKS, SEVERITIES, CheckOptions, Severity
from rfdetr_core.data.formats.source import UNPRINTABLE
from rfdetr_core.errors import DatasetError

WORST = 10  # findings in the log when they stop the stage


@dataclass
class Finding:
    """One kind of thing found: how often, where (every row), and what was done about it."""

    code: str
    limit: int | None  # rows that are tolerated; None: any number
    rows: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many rows."""
        return len(self.rows)

    @property
    def message(self) -> str:
        """What a row is."""
        return CHECKS[self.code].message

    @property
    def severity(self) -> Severity:
        """error where there are more rows than are tolerated; else what the check says, an error being a warning."""
        if self.limit is not None and self.count > self.limit:
            return "error"
        usual = CHECKS[self.code].severity
        return "warning" if usual == "error" else usual


@dataclass
class Report:
    """Findings in order of first appearance."""

    options: CheckOptions = field(default_factory=CheckOptions)
    findings: dict[str, Finding] = field(default_factory=dict)

    def add(self, code: str, rows: Iterable[str]) -> None:
        """Record rows under a code of `checks.CHECKS`; no rows, no finding."""
        rows = [_printable(row) for row in rows]
        if rows:
            found = self.findings.get(code)
            if found is None:
                found = self.findings[code] = Finding(code, self.options.limit(code))
            found.rows.extend(rows)

    @property
    def errors(self) -> list[Finding]:
        """The findings that stop the stage."""
        return [finding for finding in self.findings.values() if finding.severity == "error"]

    @property
    def worst_first(self) -> list[Finding]:
        """Errors, warnings, notes; of one severity the most frequent first."""
        return sorted(self.findings.values(), key=lambda f: (SEVERITIES.index(f.severity), -f.count))

    def to_json(self) -> list[dict[str, Any]]:
        """Findings with all their rows."""
        return [
            {
                "code": f.code,
                "severity": f.severity,
                "message": f.message,
                "count": f.count,
                "tolerated": f.limit,
                "rows": f.rows,
            }
            for f in self.findings.values()
        ]

    def tell(self, log: logging.Logger) -> None:
        """A line of log for each of the ten worst findings: what it is, how often, and the first one."""
        worst = self.worst_first
        for f in worst[:WORST]:
            level = {"error": logging.ERROR, "warning": logging.WARNING, "note": logging.INFO}[f.severity]
            log.log(level, "%s: %s (%s, %d, first: %s)", f.severity, f.message, f.code, f.count, f.rows[0])
        if len(worst) > WORST:
            log.info("… and %d more kinds of findings: see the report", len(worst) - WORST)

    def raise_errors(self, where: str) -> None:
        """Raise one DatasetError that sums up all errors, if there are any."""
        if not self.errors:
            return
        parts = [f"{f.message}: {f.rows[0]}{f' and {f.count - 1} more' if f.count > 1 else ''}" for f in self.errors]
        shown = "; ".join(parts[:3]) + (f"; and {len(parts) - 3} more kinds" if len(parts) > 3 else "")
        raise DatasetError(f"{where}: {shown}", hint="report.html lists every row; mend the dataset and run again")


def _printable(text: str) -> str:
    """One line that can be written as UTF-8: names on a disk may hold line breaks and stray bytes."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
