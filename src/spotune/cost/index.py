"""Reads what a bucket holds on a run, many requests at a time."""

import hashlib
import os
import re
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from spotune.core.errors import BadRecord, InfraError, InputError
from spotune.core.io import set_aside
from spotune.core.keys import Keys, attempt_of, commit_of
from spotune.core.protocol import Event, number, parse_lines
from spotune.core.records import (
    AttemptRecord,
    Bill,
    Certificate,
    Commit,
    Mark,
    PriceRow,
    Record,
    RunRecord,
    check_paid,
    read_clusters,
)
from spotune.core.revisions import record_in_force
from spotune.core.store import Store
from spotune.cost.account import home_of, price_of_part
from spotune.cost.export import INDEXED as COLUMNS
from spotune.cost.export import RUN as TOTALS
from spotune.cost.machines import Evidence
from spotune.launch.engine import PaidInterval

# Requests to a bucket, many at a time where each takes its time.

AT_A_TIME = 16

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def each(bucket: str, call: Callable[[Item], Answer], items: Sequence[Item]) -> list[Answer]:
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


# What is known of every run's cost, kept on this machine: SQLite below ``$SPOTUNE_HOME/cache``, a file a bucket.
#
# The bucket and the engine are the truth; the file may be deleted at any time. One of an older version is made anew, a
# damaged one set aside, each in a line; one of a newer version is left alone. Where no file can be used the index lives
# in memory, and everything is read each time.

VERSION = 6  # of the tables and of what is in them: raise it when a report's figures are made in another way
BUSY_S = 10.0
_TABLES = f"""
CREATE TABLE IF NOT EXISTS runs (bucket TEXT, stamp TEXT, settled INTEGER, {", ".join(TOTALS)},
                   PRIMARY KEY (bucket, run_id)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS attempts (bucket TEXT, run_id TEXT, {", ".join(COLUMNS)});
CREATE INDEX IF NOT EXISTS attempts_of ON attempts (bucket, run_id);
PRAGMA user_version = {VERSION};
"""

_NOT_THE_FILES_FAULT = (
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
)

Key = tuple[str, str]  # bucket, run id
Result = TypeVar("Result")


@dataclass(frozen=True)
class Entry:
    """A run's totals and its attempts, as rows of the report.

    Attributes:
        stamp: of what it was made from; empty where that cannot change any more.
        settled: whether it stays as it is for as long as the stamp does.
        unread: a line for each of its records that cannot be read; it is not kept.
    """

    bucket: str
    run_id: str
    stamp: str
    settled: bool
    totals: dict[str, Any]
    attempts: Sequence[dict[str, Any]]
    unread: Sequence[str] = ()

    @property
    def key(self) -> Key:
        return self.bucket, self.run_id


class OtherVersion(Exception):
    """The file is of another version of spotune."""

    def __init__(self, version: int) -> None:
        super().__init__(f"made by {'a newer' if version > VERSION else 'an older'} spotune, version {version}")
        self.is_newer = version > VERSION


class Index:
    """Several processes may use one file at a time: each write is one transaction, and what it writes is whole."""

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
        """Of every settled run."""
        found = self._connection.execute("SELECT bucket, run_id, stamp FROM runs WHERE settled")
        return {(bucket, run_id): stamp for bucket, run_id, stamp in found}

    def put(self, entries: Iterable[Entry]) -> None:
        run_places, places = (", ".join("?" * count) for count in (3 + len(TOTALS), 2 + len(COLUMNS)))
        with self._connection as connection:
            for entry in entries:
                self._delete(entry.key)
                run = (entry.bucket, entry.stamp, entry.settled, *(entry.totals[name] for name in TOTALS))
                connection.execute(f"INSERT INTO runs VALUES ({run_places})", run)
                rows = [(*entry.key, *(attempt[name] for name in COLUMNS)) for attempt in entry.attempts]
                connection.executemany(f"INSERT INTO attempts VALUES ({places})", rows)

    def keep_only(self, keys: set[Key]) -> set[Key]:
        """Forgets all other runs; returns those of which something is known."""
        known = set(self._connection.execute("SELECT bucket, run_id FROM runs"))
        if gone := known - keys:
            with self._connection:
                for key in gone:
                    self._delete(key)
        return known & keys

    def runs(self, since: float, names: Sequence[str] = TOTALS) -> list[tuple[Key, dict[str, Any]]]:
        """The totals of the runs that were submitted since then, the newest first; ``names``: those that are wanted."""
        found = self._connection.execute(
            f"SELECT bucket, run_id, {', '.join(names)} FROM runs WHERE submitted_at >= ?"
            " ORDER BY submitted_at DESC, run_id",
            (since,),
        )
        return [((row[0], row[1]), dict(zip(names, row[2:], strict=True))) for row in found]

    def attempts(self, since: float, names: Sequence[str] = COLUMNS) -> list[tuple[Key, dict[str, Any]]]:
        """Every attempt that was paid for since then, of whatever run, in order of time; ``names``: those wanted."""
        found = self._connection.execute(
            f"SELECT bucket, run_id, {', '.join(names)} FROM attempts"
            " WHERE started_at + paid_s > ? OR started_at >= ? ORDER BY started_at",
            (since, since),
        )
        return [((row[0], row[1]), dict(zip(names, row[2:], strict=True))) for row in found]

    def _delete(self, key: Key) -> None:
        for table in ("runs", "attempts"):
            self._connection.execute(f"DELETE FROM {table} WHERE bucket = ? AND run_id = ?", key)


def index_file(cache: Path, bucket: str) -> Path:
    """Each bucket's own: what is listed from one has nothing of another's."""
    return cache / f"cost-{hashlib.sha256(bucket.encode()).hexdigest()[:16]}.sqlite"


def use_index(path: Path, use: Callable[[Index], Result], warn: Callable[[str], None] = lambda message: None) -> Result:
    """What ``use`` makes of the index in that file. It is called again, with an empty one, where that is damaged."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(2):
        try:
            if os.path.lexists(path) and not path.is_file():
                set_aside(path, "not a file", warn)
            return use(Index(str(path)))
        except OtherVersion as error:
            if error.is_newer:
                warn(f"{path}: {error} and not {VERSION}: left alone, everything is read (upgrade spotune)")
                break
            warn(f"{path}: {error}: made anew as version {VERSION}")
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
