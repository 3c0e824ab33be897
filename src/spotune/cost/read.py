"""Reads what a bucket holds on a run, many requests at a time."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from spotune.core.clusters import read_clusters
from spotune.core.errors import BadRecord, InputError
from spotune.core.keys import Keys, attempt_of, commit_of
from spotune.core.protocol import Event, number, parse_lines
from spotune.core.records import AttemptRecord, Bill, Certificate, Commit, Mark, PriceRow, Record, RunRecord, check_paid
from spotune.core.revisions import record_in_force
from spotune.core.store import Store
from spotune.cost.machines import Evidence
from spotune.cost.sharing import home_of, price_of_part
from spotune.launch.engine import PaidInterval

# Requests to a bucket, many at a time where each takes its time.

AT_A_TIME = 16

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(bucket: str, call: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """In threads where the bucket is far away; a disk has answered before a thread would."""
    if bucket.startswith("file://"):
        return list(map(call, items))
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        return list(pool.map(call, items))


# What became of the rows of each source: the machine's counts, as the report has them. Pure.

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


# Reads what the bucket holds on a run; the parts side by side, since each may be a request.

_FILE = re.compile(r"/attempts/([0-9]{4,})/(attempt|bill|events-0-([0-9]{1,15}))\.jsonl?\Z")
Kind = TypeVar("Kind", bound=Record)


def read_evidence(
    store: Store, run_id: str, intervals: Sequence[PaidInterval] = (), without: RunRecord | None = None
) -> Evidence:
    """All that is known of a run. Raises InputError when the bucket has no such run, StoreError when it fails.

    A record of an attempt that cannot be read is left out, as if it had never been written, and said in ``unread``.

    Args:
        without: stands for the run's record where the run's folder is gone from the bucket.
    """
    keys = Keys(run_id)
    run = record_in_force(store, keys) or without
    if run is None:
        raise InputError(run_id, f"no such run in {store.url}")
    names = [key for key in store.keys(keys.attempts) if _FILE.search(key) and attempt_of(key)]
    commits = [key for key in store.keys(keys.commits) if commit_of(key)]
    lost = [key for key in store.keys(keys.lost) if key.endswith(".json")]
    wanted = [*names, *commits, *lost, keys.completed, keys.cancelled]
    records = _Records(dict(zip(wanted, each(store.url, partial(_read, store), wanted), strict=True)))
    attempts = records.read(AttemptRecord, (key for key in names if key.endswith("/attempt.json")))
    return Evidence(
        run=run,
        intervals=intervals,
        attempts=attempts,
        events=_events(names, records.found),
        commits=records.read(Commit, commits),
        certificate=next(iter(records.read(Certificate, [keys.completed])), None),
        bills=records.read(Bill, [*(key for key in names if key.endswith("/bill.json")), *lost]),
        parts={} if run.prices else _parts(store, attempts, records.unread.append),
        cancelled_at=next((mark.at for mark in records.read(Mark, [keys.cancelled])), None),
        unread=records.unread,
    )


@dataclass(frozen=True)
class _Records:
    """What was fetched, by key; a line is kept for each that is no record."""

    found: Mapping[str, bytes | BadRecord | None]
    unread: list[str] = field(default_factory=list)

    def read(self, kind: type[Kind], keys: Iterable[str]) -> list[Kind]:
        records: list[Kind] = []
        for key in keys:
            try:
                if isinstance(data := self.found[key], BadRecord):
                    raise data
                if data is not None:
                    record = kind.from_bytes(data, key)
                    check_paid(record, key)
                    records.append(record)
            except BadRecord as error:
                self.unread.append(str(error))
        return records


def _read(store: Store, key: str) -> bytes | BadRecord | None:
    """One that cannot be read, such as a link, or for lack of a right, costs nothing but itself."""
    try:
        return store.read(key)
    except BadRecord as error:
        return error
    except InputError as error:
        return BadRecord(str(error))


def _parts(store: Store, attempts: Sequence[AttemptRecord], warn: Callable[[str], None]) -> dict[int, PriceRow]:
    """What the parts of dev clusters cost that these attempts ran on; a run on one has no prices of its own."""
    if not (names := {record.cluster_name for record in attempts if record.cluster_name}):
        return {}
    clusters = read_clusters(store, sorted(names), warn)
    parts = {}
    for record in attempts:
        home = home_of(clusters, record.cluster_name, record.claimed_at)
        if home and (price := price_of_part(home, record.gpu_share)):
            parts[record.attempt] = price
    return parts


def _events(names: Sequence[str], found: Mapping[str, bytes | BadRecord | None]) -> dict[int, list[Event]]:
    """By attempt, its parts in order. Rank 0 speaks for the attempt."""
    parts = []
    for key in names:
        match, data = _FILE.search(key), found[key]
        if match and match[3] is not None and isinstance(data, bytes):
            parts.append((int(match[1]), int(match[3]), data))
    events: dict[int, list[Event]] = {}
    for attempt, _, data in sorted(parts):
        events.setdefault(attempt, []).extend(parse_lines(data))
    return events
