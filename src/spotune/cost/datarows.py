"""What became of the rows of each source: the machine's counts, as the report has them. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from spotune.contracts.events import Event, number

SETS = ("training", "evaluation")
COUNTS = ("rows", "dropped", "truncated", "empty")
_MOST_SOURCES = 1000
_MOST_ROWS = 2**53  # more is no count


def data_rows(events: Mapping[int, Sequence[Event]]) -> list[dict[str, Any]]:
    """A row for each source of each set, training first, as the newest attempt that counted them says.

    ``rows``, ``dropped``, ``truncated`` and ``empty`` are null for a source that is streamed.
    """
    newest: dict[str, Event] = {}
    for attempt in sorted(events):
        newest |= {str(event.get("set")): event for event in events[attempt] if event.get("event") == "rows"}
    return [row for name in SETS if name in newest for row in _rows_of(name, newest[name])]


def _rows_of(name: str, event: Event) -> list[dict[str, Any]]:
    sources = event.get("sources")
    if not isinstance(sources, list):
        return []
    found = [one for one in sources[:_MOST_SOURCES] if isinstance(one, dict) and isinstance(one.get("source"), str)]
    return [{"source": one["source"], "set": name, **{key: _count(one.get(key)) for key in COUNTS}} for one in found]


def _count(value: Any) -> int | None:
    found = number(value)
    return int(found) if found is not None and 0 <= found < _MOST_ROWS else None
