"""What is known of every run's cost, kept on this machine: SQLite below ``$SPOTUNE_HOME/cache``, a file a bucket.

The bucket and the engine are the truth; the file may be deleted at any time. One of an older version is made anew, a
damaged one set aside, each in a line; one of a newer version is left alone. Where no file can be used the index lives
in memory, and everything is read each time.
"""

import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from spotune.core.errors import InfraError
from spotune.core.io import set_aside
from spotune.cost.rows import INDEXED as COLUMNS
from spotune.cost.rows import RUN as TOTALS

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
