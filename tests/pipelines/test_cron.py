"""Schedules in the grammar of KFP's controller."""

from __future__ import annotations

import itertools
from datetime import datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.cron import parse_cron
from rfdetr_core.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "times"),
    [
        ("0 0 3 * * 1", ["2026-01-05 03:00:00", "2026-01-12 03:00:00"]),
        ("0 0 3 * * MON", ["2026-01-05 03:00:00", "2026-01-12 03:00:00"]),
        ("0 0 0 * * 0", ["2026-01-04 00:00:00", "2026-01-11 00:00:00"]),  # Sunday
        ("*/20 0 0 1 * *", ["2026-01-01 00:00:20", "2026-01-01 00:00:40"]),
        ("0 30 6-7 ? feb *", ["2026-02-01 06:30:00", "2026-02-01 07:30:00"]),
        ("0 0 0 29 2 *", ["2028-02-29 00:00:00", "2032-02-29 00:00:00"]),
        ("0 0 12 13 * fri", ["2026-01-02 12:00:00", "2026-01-09 12:00:00"]),  # the 13th or a Friday
        ("5 10/25 0 2 1 *", ["2026-01-02 00:10:05", "2026-01-02 00:35:05"]),
        ("0 0 0,12 2,3 1-12/6 *", ["2026-01-02 00:00:00", "2026-01-02 12:00:00"]),
    ],
)
def test_when_it_fires(text: str, times: list[str]) -> None:
    found = itertools.islice(parse_cron(text).after(datetime(2026, 1, 1)), 2)
    assert [str(moment) for moment in found] == times


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0 3 * * 1", "has 5 fields; KFP's has six"),
        ("", "has 0 fields"),
        ("@daily", "has 1 fields"),
        ("0 0 3 * * 1 2027", "has 7 fields"),
        ("60 0 3 * * 1", "'60' is no second (0 to 59)"),
        ("0 0 24 * * 1", "'24' is no hour (0 to 23)"),
        ("0 0 3 0 * 1", "'0' is no day of the month (1 to 31)"),
        ("0 0 3 * 13 1", "'13' is no month (1 to 12)"),
        ("0 0 3 * * 7", "'7' is no day of the week (0 to 6)"),  # Sunday is 0
        ("0 0 3 L * *", "'L' is no day of the month"),
        ("0 0 3 * * mon#2", "'mon#2' is no day of the week"),
        ("0 0 5-3 * * *", "'5-3' is no hour"),
        ("0 */0 3 * * *", "'*/0' is no minute"),
        ("0 0 ² * * *", "'²' is no hour"),
        ("0 0 3 31 4,6 *", "never fires: no month of it has such a day"),
        ("garbage in all six of them", "'garbage' is no second"),
    ],
)
def test_what_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_cron(text)
    assert words in str(caught.value) and '("0 0 3 * * 1" is Mondays at 03:00:00)' in str(caught.value)


ranges = st.tuples(st.integers(1, 3), st.integers(3, 6)).map("{0[0]}-{0[1]}".format)
fields = st.one_of(st.just("*"), st.integers(1, 6).map(str), ranges)


@settings(max_examples=25)
@given(minute=fields, hour=fields, day=fields, month=fields, weekday=fields)
def test_the_times_are_those_that_match_minute_by_minute(
    minute: str, hour: str, day: str, month: str, weekday: str
) -> None:
    """Against a clock that is asked every minute."""
    cron = parse_cron(f"0 {minute} {hour} {day} {month} {weekday}")
    begin = datetime(2026, 3, 1)

    def matches(said: str, value: int) -> bool:
        low, _, high = said.partition("-")
        return said == "*" or int(low) <= value <= int(high or low)

    def fires(moment: datetime) -> bool:
        days = (matches(day, moment.day), matches(weekday, moment.isoweekday() % 7))
        on = all(days) if "*" in (day, weekday) else any(days)
        return on and matches(month, moment.month) and matches(hour, moment.hour) and matches(minute, moment.minute)

    wanted = [m for m in (begin + timedelta(minutes=n) for n in range(1, 9 * 24 * 60)) if fires(m)][:5]
    found = [m for m in itertools.islice(cron.after(begin), 5) if m < begin + timedelta(days=9)]
    assert found == wanted


@given(st.text(alphabet="0123456789*/-,? abcmonju", max_size=30))
def test_any_text_is_a_schedule_or_one_clear_line(text: str) -> None:
    try:
        cron = parse_cron(text)
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert next(cron.after(datetime(2026, 1, 1))) > datetime(2026, 1, 1)
