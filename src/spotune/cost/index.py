"""Reads what a bucket holds on a run, many requests at a time, and keeps an index of every run's cost."""

import hashlib
import os
import re
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from spotune.core.errors import BadRecord, InfraError, InputError
from spotune.core.io import set_aside
from spotune.core.keys import Keys, attempt_of, commit_of
from spotune.core.protocol import Event, number, parse_lines
from spotune.core.records import AttemptRecord, Bill, Certificate, Commit, Record, RunRecord, TerminalMarker, check_paid
from spotune.core.revisions import record_in_force
from spotune.core.store import Store
from spotune.cost.account import prices_of_parts
from spotune.cost.export import INDEXED, RUN
from spotune.cost.machines import RunData
from spotune.launch.engine import PaidInterval

COUNTS = ("rows", "dropped", "truncated", "empty")
_MOST_SOURCES = 1000
_MOST_ROWS = 2**53  # a larger count is damaged
_FILE = re.compile(r"/attempts/([0-9]{4,})/(attempt|bill|events-0-([0-9]{1,15}))\.jsonl?\Z")
_THREADS = 16

Item = TypeVar("Item")
Result = TypeVar("Result")
Kind = TypeVar("Kind", bound=Record)
Fetched = bytes | str | None  # a record's bytes, why they cannot be read, or None if it is missing


def parallel_map(bucket: str, call: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Calls in threads if the bucket is far away; a disk answers before a thread has started."""
    if bucket.startswith("file://"):
        return list(map(call, items))
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(call, items))


def read_run_data(
    store: Store, run_id: str, intervals: Sequence[PaidInterval] = (), stand_in: RunRecord | None = None
) -> RunData:
    """Returns all that is known of a run. Raises InputError if the bucket has no such run, StoreError if it fails.

    Leaves out a record of an attempt that cannot be read, with a line in ``unread``.

    Args:
        stand_in: used as the run's record if the run's folder is gone from the bucket.
    """
    keys = Keys(run_id)
    run = record_in_force(store, keys) or stand_in
    if run is None:
        raise InputError(run_id, f"no such run in {store.url}")
    names = [key for key in store.keys(keys.attempts) if _FILE.search(key) and attempt_of(key)]
    commits = [key for key in store.keys(keys.commits) if commit_of(key)]
    lost = [key for key in store.keys(keys.lost) if key.endswith(".json")]
    wanted = [*names, *commits, *lost, keys.completed, keys.cancelled]
    found = dict(zip(wanted, parallel_map(store.url, partial(_read, store), wanted), strict=True))
    unread: list[str] = []

    def records(kind: type[Kind], some: Iterable[str]) -> list[Kind]:
        return [record for key in some if (record := _parse(kind, key, found[key], unread))]

    attempts = records(AttemptRecord, (key for key in names if key.endswith("/attempt.json")))
    return RunData(
        run=run,
        intervals=intervals,
        attempts=attempts,
        events=_events(names, found),
        commits=records(Commit, commits),
        certificate=next(iter(records(Certificate, [keys.completed])), None),
        bills=records(Bill, [*(key for key in names if key.endswith("/bill.json")), *lost]),
        parts={} if run.prices else prices_of_parts(store, attempts, unread.append),
        cancelled_at=next((mark.at for mark in records(TerminalMarker, [keys.cancelled])), None),
        unread=unread,
    )


def _read(store: Store, key: str) -> Fetched:
    """Reads an object. One that cannot be read, such as a link, or without permission, harms no other."""
    try:
        return store.read(key)
    except (BadRecord, InputError) as error:
        return str(error)


def _parse(kind: type[Kind], key: str, data: Fetched, unread: list[str]) -> Kind | None:
    """Returns the record; None if it is missing, or damaged, which adds a line to ``unread``."""
    try:
        if isinstance(data, bytes):
            record = kind.from_bytes(data, key)
            check_paid(record, key)
            return record
        unread += [data] if data else []
    except BadRecord as error:
        unread.append(str(error))
    return None


def _events(names: Sequence[str], found: Mapping[str, Fetched]) -> dict[int, list[Event]]:
    """Returns the events by attempt, their parts in order. Rank 0 writes for the attempt."""
    parts = []
    for key in names:
        match, data = _FILE.search(key), found[key]
        if match and match[3] is not None and isinstance(data, bytes):
            parts.append((int(match[1]), int(match[3]), data))
    events: dict[int, list[Event]] = {}
    for attempt, _, data in sorted(parts):
        events.setdefault(attempt, []).extend(parse_lines(data))
    return events


def data_rows(events: Mapping[int, Sequence[Event]]) -> list[dict[str, Any]]:
    """Returns a row for each source of each set, training first: the counts of the newest attempt that counted them.

    ``rows``, ``dropped``, ``truncated`` and ``empty`` are null for a source that is streamed.
    """
    newest: dict[str, Event] = {}
    for attempt in sorted(events):
        newest |= {str(event.get("set")): event for event in events[attempt] if event.get("event") == "rows"}
    rows = []
    for name in ("training", "evaluation"):
        sources = newest.get(name, {}).get("sources")
        for one in sources[:_MOST_SOURCES] if isinstance(sources, list) else ():
            if isinstance(one, dict) and isinstance(one.get("source"), str):
                rows.append({"source": one["source"], "set": name, **{key: _count(one.get(key)) for key in COUNTS}})
    return rows


def _count(value: Any) -> int | None:
    found = number(value)
    return int(found) if found is not None and 0 <= found < _MOST_ROWS else None


# The index: what is known of every run's cost, kept on this machine as SQLite below ``$SPOTUNE_HOME/cache``, a file a
# bucket.
#
# The bucket and the engine are the truth; the file may be deleted at any time. A file of an older version is made anew
# and a damaged one is set aside, each with a line; a file of a newer version is left alone. If no file can be used the
# index is in memory, and everything is read each time.

VERSION = 6  # of the tables and their contents: raise it when a report's figures are made in another way
BUSY_S = 10.0
_TABLES = f"""
CREATE TABLE IF NOT EXISTS runs (bucket TEXT, stamp TEXT, settled INTEGER, {", ".join(RUN)},
                   PRIMARY KEY (bucket, run_id)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS attempts (bucket TEXT, run_id TEXT, {", ".join(INDEXED)});
CREATE INDEX IF NOT EXISTS attempts_of ON attempts (bucket, run_id);
PRAGMA user_version = {VERSION};
"""
_NOT_THE_FILES_FAULT = {
    getattr(sqlite3, f"SQLITE_{name}") for name in "BUSY LOCKED CANTOPEN READONLY FULL IOERR".split()
}

Key = tuple[str, str]  # bucket, run id


@dataclass(frozen=True)
class IndexEntry:
    """A run's totals and its attempts, as rows of the report.

    Attributes:
        stamp: of the records that it was made from; empty if these cannot change any more.
        settled: whether it stays valid for as long as the stamp does.
        unread: a line for each record that cannot be read; not kept.
    """

    bucket: str
    run_id: str
    stamp: str
    settled: bool
    totals: dict[str, Any]
    attempts: Sequence[dict[str, Any]]
    unread: Sequence[str] = ()


class OtherVersion(Exception):
    """The file is of another version of spotune."""


class Index:
    """An open index. Several processes may use one file at a time: each write is one transaction."""

    def __init__(self, path: str) -> None:
        self._connection = sqlite3.connect(path, timeout=BUSY_S)
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version not in (0, VERSION):
            raise OtherVersion(version)
        if (found := self._connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(found)
        if not version:
            self._connection.executescript(f"BEGIN IMMEDIATE; {_TABLES} COMMIT;")

    def stamps(self) -> dict[Key, str]:
        """Returns the stamp of every settled run."""
        found = self._connection.execute("SELECT bucket, run_id, stamp FROM runs WHERE settled")
        return {(bucket, run_id): stamp for bucket, run_id, stamp in found}

    def put(self, entries: Iterable[IndexEntry]) -> None:
        run_places, places = (", ".join("?" * count) for count in (3 + len(RUN), 2 + len(INDEXED)))
        with self._connection as connection:
            for entry in entries:
                key = (entry.bucket, entry.run_id)
                self._delete(key)
                run = (entry.bucket, entry.stamp, entry.settled, *(entry.totals[name] for name in RUN))
                connection.execute(f"INSERT INTO runs VALUES ({run_places})", run)
                rows = [(*key, *(attempt[name] for name in INDEXED)) for attempt in entry.attempts]
                connection.executemany(f"INSERT INTO attempts VALUES ({places})", rows)

    def keep_only(self, keys: set[Key]) -> set[Key]:
        """Forgets all other runs; returns the keys that are in the index."""
        known = set(self._connection.execute("SELECT bucket, run_id FROM runs"))
        if gone := known - keys:
            with self._connection:
                for key in gone:
                    self._delete(key)
        return known & keys

    def runs(self, since: float, names: Sequence[str] = RUN) -> list[tuple[Key, dict[str, Any]]]:
        """Returns the totals of the runs submitted since then, the newest first; ``names``: the wanted columns."""
        return self._select(names, "runs WHERE submitted_at >= ? ORDER BY submitted_at DESC, run_id", (since,))

    def attempts(self, since: float, names: Sequence[str] = INDEXED) -> list[tuple[Key, dict[str, Any]]]:
        """Returns every run's attempts that were paid for since then, in order of time; ``names``: the columns."""
        return self._select(
            names, "attempts WHERE started_at + paid_s > ? OR started_at >= ? ORDER BY started_at", (since, since)
        )

    def _select(self, names: Sequence[str], rest: str, values: Sequence[Any]) -> list[tuple[Key, dict[str, Any]]]:
        found = self._connection.execute(f"SELECT bucket, run_id, {', '.join(names)} FROM {rest}", values)
        return [((row[0], row[1]), dict(zip(names, row[2:], strict=True))) for row in found]

    def _delete(self, key: Key) -> None:
        for table in ("runs", "attempts"):
            self._connection.execute(f"DELETE FROM {table} WHERE bucket = ? AND run_id = ?", key)


def index_file(cache: Path, bucket: str) -> Path:
    """Returns the index's path; each bucket has its own, so that runs of one bucket are not listed for another."""
    return cache / f"cost-{hashlib.sha256(bucket.encode()).hexdigest()[:16]}.sqlite"


def use_index(path: Path, use: Callable[[Index], Result], warn: Callable[[str], None] = lambda message: None) -> Result:
    """Returns what ``use`` makes of the index in that file. Calls it again, with an empty index, if it is damaged."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(2):
        try:
            if os.path.lexists(path) and not path.is_file():
                set_aside(path, "not a file", warn)
            return use(Index(str(path)))
        except OtherVersion as error:
            (version,) = error.args
            if version > VERSION:
                made = f"made by a newer spotune, version {version} and not {VERSION}"
                warn(f"{path}: {made}: left alone, everything is read (upgrade spotune)")
                break
            warn(f"{path}: made by an older spotune, version {version}: made anew as version {VERSION}")
            with suppress(OSError):
                path.unlink()
        except sqlite3.Error as error:
            if (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF in _NOT_THE_FILES_FAULT:
                break
            with suppress(InfraError):
                set_aside(path, f"damaged: {error}", warn)
        except InfraError as error:
            if not str(error).startswith(str(path)):
                raise
            warn(str(error))
            break
    return use(Index(":memory:"))
