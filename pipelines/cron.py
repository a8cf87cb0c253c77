"""Schedules as KFP's controller reads them: cron with the seconds first, exactly six fields.

KFP itself refuses almost nothing: the usual five fields of `0 3 * * 1` are taken for "every hour at minute 3 in
January", since its reader (robfig/cron v1) puts seconds first and lets the weekday be left out. So six are required
here, in that reader's own grammar: `*`, `?`, `a`, `a-b`, each with `/step`, in lists; names of months and weekdays;
Sunday is 0.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from rfdetr_core.errors import ConfigError

EXAMPLE = '"0 0 3 * * 1" is Mondays at 03:00:00'
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_FIELDS: tuple[tuple[str, int, int, dict[str, int]], ...] = (
    ("second", 0, 59, {}),
    ("minute", 0, 59, {}),
    ("hour", 0, 23, {}),
    ("day of the month", 1, 31, {}),
    ("month", 1, 12, {name: number for number, name in enumerate(_MONTHS, 1)}),
    ("day of the week", 0, 6, {name: number for number, name in enumerate(_DAYS)}),
)
_HORIZON_DAYS = 366 * 8  # 29 February comes every eight years at the latest, around 2100


@dataclass(frozen=True)
class Cron:
    """A schedule; `parse_cron` makes it."""

    text: str
    values: tuple[frozenset[int], ...]
    any_day: bool  # one of the two fields of days is a star: then both must match, otherwise either

    def after(self, moment: datetime) -> Iterator[datetime]:
        """The times at which it fires after a moment, in the clock of that moment."""
        second, minute, hour, *_ = self.values
        times = [(h, m, s) for h in sorted(hour) for m in sorted(minute) for s in sorted(second)]
        midnight = moment.replace(hour=0, minute=0, second=0, microsecond=0)
        for day in (midnight + timedelta(days=n) for n in range(_HORIZON_DAYS)):
            if self._on(day):
                for h, m, s in times:
                    found = day.replace(hour=h, minute=m, second=s)
                    if found > moment:
                        yield found

    def _on(self, day: datetime) -> bool:
        month_day, month, week_day = self.values[3:]
        if day.month not in month:
            return False
        matches = (day.day in month_day, day.isoweekday() % 7 in week_day)
        return all(matches) if self.any_day else any(matches)


def parse_cron(text: str) -> Cron:
    """Read a schedule.

    Raises:
        ConfigError: not exactly six fields, a value that is out of range, or a day that no year has.
    """
    fields = text.split()
    if len(fields) != 6:
        raise ConfigError(
            f"--cron: {text!r} has {len(fields)} fields; KFP's has six: second, minute, hour, day, month, weekday",
            hint=EXAMPLE,
        )
    values = tuple(_field(text, said, *facts) for said, facts in zip(fields, _FIELDS, strict=True))
    cron = Cron(text, values, any_day=any(said[0] in "*?" for said in (fields[3], fields[5])))
    if not list(itertools.islice(cron.after(datetime(2024, 1, 1)), 1)):
        raise ConfigError(f"--cron: {text!r} never fires: no month of it has such a day", hint=EXAMPLE)
    return cron


def _field(text: str, said: str, name: str, low: int, high: int, names: dict[str, int]) -> frozenset[int]:
    found: set[int] = set()
    for part in said.split(","):
        match = re.fullmatch(r"(?:(?P<star>[*?])|(?P<a>\w+)(?:-(?P<b>\w+))?)(?:/(?P<step>[0-9]+))?", part)
        if match is None:
            raise _wrong(text, part, name, low, high)
        first, last = low, high
        if match["star"] is None:
            first = _value(match["a"], names)
            last = _value(match["b"], names) if match["b"] else high if match["step"] else first
        step = int(match["step"] or 1)
        if not (low <= first <= last <= high and step >= 1):
            raise _wrong(text, part, name, low, high)
        found |= set(range(first, last + 1, step))
    return frozenset(found)


def _value(said: str, names: dict[str, int]) -> int:
    return int(said) if said.isascii() and said.isdigit() else names.get(said.lower(), -1)


def _wrong(text: str, part: str, name: str, low: int, high: int) -> ConfigError:
    return ConfigError(f"--cron: {text!r}: {part!r} is no {name} ({low} to {high})", hint=EXAMPLE)
