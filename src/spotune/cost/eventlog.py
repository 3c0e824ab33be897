"""A machine's own account of itself, cleaned: what was cut, doubled or out of order does no harm."""

import json
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from spotune.contracts.events import Event, number


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


def step_of(event: Mapping[str, Any]) -> int:
    """The step that an event names, 0 where it names none."""
    step = number(event.get("step"))
    return int(step) if step is not None and 0 < step < 1e15 else 0
