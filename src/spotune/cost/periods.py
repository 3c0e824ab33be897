"""Days, weeks and months of the calendar, UTC, and what part of an interval lies in each. Times are epoch seconds."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Literal

Period = Literal["day", "week", "month"]

DAY_S = 86400.0
_MONDAYS = 3  # days from the Monday before the epoch, a Thursday, to it


def start_of(period: Period, at: float) -> float:
    """The beginning of the period that ``at`` lies in; a week begins on Monday, as in ISO 8601."""
    day = at // DAY_S
    if period == "month":
        date = datetime.fromtimestamp(day * DAY_S, UTC)
        return date.replace(day=1).timestamp()
    return (day if period == "day" else (day + _MONDAYS) // 7 * 7 - _MONDAYS) * DAY_S


def end_of(period: Period, start: float) -> float:
    """The beginning of the next one."""
    if period == "month":
        return start_of("month", start + timedelta(days=32).total_seconds())
    return start + (7 if period == "week" else 1) * DAY_S


def cut(period: Period, started_at: float, ended_at: float) -> Iterator[tuple[float, float, float]]:
    """``(period's start, from, to)`` for each period that the interval touches; one piece for an empty interval."""
    start = start_of(period, started_at)
    while True:
        end = end_of(period, start)
        until = min(ended_at, end)
        yield start, started_at, until
        if until >= ended_at:
            return
        start = started_at = end


@lru_cache(4096)
def name_of(period: Period, start: float) -> str:
    """``2026-11-25``, ``2026-W48``, ``2026-11``."""
    return datetime.fromtimestamp(start, UTC).strftime({"day": "%Y-%m-%d", "week": "%G-W%V", "month": "%Y-%m"}[period])
