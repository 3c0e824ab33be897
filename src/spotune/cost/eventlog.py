"""A machine's own account of itself, cleaned: what was cut, doubled or out of order does no harm."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

Event = dict[str, Any]


def parse_lines(data: bytes) -> list[Event]:
    """The events of one part; lines that are no JSON object, such as a last one that was cut, are skipped."""
    events: list[Event] = []
    for line in data.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def clean(events: Iterable[Mapping[str, Any]]) -> list[Event]:
    """Events with a time and a name, each once, in order of time (in the given order where times are equal)."""
    seen: dict[str, Event] = {}
    for event in events:
        if number(event.get("t")) is not None and isinstance(event.get("event"), str):
            seen.setdefault(json.dumps(event, sort_keys=True, default=str), dict(event))
    return sorted(seen.values(), key=lambda event: float(event["t"]))


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
