"""A machine's own account of itself, cleaned: what was cut, doubled or out of order does no harm."""

import json
import math
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from spotune.contracts.shapes import YEAR_2000, YEAR_2200

Event = dict[str, Any]


def parse_lines(data: bytes) -> list[Event]:
    """The events of one part. Skipped: what is no JSON object, such as a last line that was cut, and what is dated by
    a clock that nobody had set, or in milliseconds."""
    lines = data.splitlines()
    try:
        found = json.loads(b"[" + b",".join(lines) + b"]")  # whole, as most are: in one go, in half the time
    except (ValueError, RecursionError):
        found = [_parse(line) for line in lines]
    return [event for event in found if isinstance(event, dict) and _is_dated(event)]


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_dated(event: Event) -> bool:
    at = number(event.get("t"))
    return at is not None and YEAR_2000 <= at < YEAR_2200


def clean(events: Iterable[Mapping[str, Any]]) -> list[Event]:
    """Events with a time and a name, each once, in order of time (in the given order where times are equal)."""
    found = [dict(one) for one in events if number(one.get("t")) is not None and isinstance(one.get("event"), str)]
    found.sort(key=lambda event: float(event["t"]))
    return [event for _, same in groupby(found, key=lambda event: float(event["t"])) for event in _once(list(same))]


def _once(events: list[Event]) -> Iterable[Event]:
    if len(events) == 1:
        return events
    seen: dict[str, Event] = {}
    for event in events:
        seen.setdefault(json.dumps(event, sort_keys=True, default=str), event)
    return seen.values()


def number(value: Any) -> float | None:
    """A finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def step_of(event: Mapping[str, Any]) -> int:
    """The step that an event names, 0 where it names none."""
    step = number(event.get("step"))
    return int(step) if step is not None and 0 < step < 1e15 else 0
