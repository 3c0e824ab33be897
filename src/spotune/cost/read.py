"""Reads what the bucket holds on a run; the parts side by side, since each may be a request."""

import json
import re
from collections.abc import Sequence
from typing import TypeVar

from spotune.contracts.clusters import read_clusters
from spotune.contracts.errors import InputError
from spotune.contracts.keys import Keys
from spotune.contracts.records import AttemptRecord, Bill, Certificate, Commit, PriceRow, Record
from spotune.contracts.revisions import record_in_force
from spotune.contracts.store import Store
from spotune.cost.each import each
from spotune.cost.eventlog import Event, number, parse_lines
from spotune.cost.evidence import Evidence
from spotune.cost.sharing import home_of, price_of_part
from spotune.launch.infra import PaidInterval

_FILE = re.compile(r"/attempts/(\d{4,})/(attempt|bill|events-0-(\d+))\.jsonl?$")
Kind = TypeVar("Kind", bound=Record)


def read_evidence(store: Store, run_id: str, intervals: Sequence[PaidInterval] = ()) -> Evidence:
    """All that is known of a run. Raises InputError when the bucket has no such run, StoreError when it fails.

    A record of an attempt that cannot be read is left out, as if it had never been written.
    """
    keys = Keys(run_id)
    run = record_in_force(store, keys)
    if run is None:
        raise InputError(run_id, f"no such run in {store.url}")
    names = [key for key in store.keys(keys.attempts) if _FILE.search(key)]
    commits = [key for key in store.keys(keys.commits) if key.endswith(".json")]
    lost = store.keys(keys.lost)
    wanted = [*names, *commits, *lost, keys.completed]
    found = dict(zip(wanted, each(store.url, store.read, wanted), strict=True))
    certificate = found[keys.completed]
    attempts = _records(AttemptRecord, [found[key] for key in names if key.endswith("/attempt.json")])
    return Evidence(
        run=run,
        intervals=intervals,
        attempts=attempts,
        events=_events(names, found),
        commits=_records(Commit, [found[key] for key in commits]),
        certificate=next(iter(_records(Certificate, [certificate])), None),
        bills=[bill for bill in _records(Bill, _bills(found)) if _is_closed(bill)],
        parts={} if run.prices else _parts(store, attempts),
    )


def _bills(found: dict[str, bytes | None]) -> list[bytes | None]:
    return [data for key, data in found.items() if key.endswith("/bill.json") or "/lost/" in key]


def _is_closed(bill: Bill) -> bool:
    start, end = number(bill.started_at), number(bill.ended_at)
    return start is not None and end is not None and end >= start


def _parts(store: Store, attempts: Sequence[AttemptRecord]) -> dict[int, PriceRow]:
    """What the parts of dev clusters cost that these attempts ran on; a run on one has no prices of its own."""
    if not (names := {record.cluster_name for record in attempts if record.cluster_name}):
        return {}
    clusters = read_clusters(store, sorted(names))
    parts = {}
    for record in attempts:
        home = home_of(clusters, record.cluster_name, record.claimed_at)
        if home and (price := price_of_part(home, record.gpu_share)):
            parts[record.attempt] = price
    return parts


def _events(names: Sequence[str], found: dict[str, bytes | None]) -> dict[int, list[Event]]:
    """By attempt, its parts in order. Rank 0 speaks for the attempt."""
    parts = []
    for key in names:
        match = _FILE.search(key)
        if match and match[3] is not None:
            parts.append((int(match[1]), int(match[3]), found[key] or b""))
    events: dict[int, list[Event]] = {}
    for attempt, _, data in sorted(parts):
        events.setdefault(attempt, []).extend(parse_lines(data))
    return events


def _records(kind: type[Kind], found: Sequence[bytes | None]) -> list[Kind]:
    records: list[Kind] = []
    for data in found:
        try:
            records.append(kind.from_dict(json.loads(data or b"null")))
        except (ValueError, TypeError, AttributeError):
            continue
    return records
