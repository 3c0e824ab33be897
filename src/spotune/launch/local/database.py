"""The queue's file and its version. An older file is migrated, a newer one refused, a damaged one set aside."""

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from spotune.contracts.errors import InfraError
from spotune.contracts.localstate import Damaged, Log, log_line, make_room, set_aside
from spotune.launch.locks import take_lock

VERSION = 1  # ``PRAGMA user_version``; 0: from before the file had a version
BUSY_S = 30.0
LEAST_BYTES = 64 << 10  # on the disk: with less a queue cannot even be opened
# What the tables have; a column that an older file lacks is added, with its default or an empty value.
TABLES = {
    "jobs": (
        "id INTEGER PRIMARY KEY AUTOINCREMENT",
        "run_id TEXT UNIQUE NOT NULL",
        "position INTEGER NOT NULL DEFAULT 0",
        "priority INTEGER NOT NULL DEFAULT 0",
        "state TEXT NOT NULL DEFAULT 'FAILED'",
        "user TEXT NOT NULL DEFAULT ''",
        "bucket TEXT NOT NULL DEFAULT ''",
        "submission TEXT NOT NULL DEFAULT '{}'",
        "interactive INTEGER NOT NULL DEFAULT 0",
        "submitted_at REAL NOT NULL DEFAULT 0",
        "started_at REAL",
        "ended_at REAL",
        "attempt INTEGER NOT NULL DEFAULT 0",
        "reason TEXT NOT NULL DEFAULT ''",
        "exit_code INTEGER",
        "not_before REAL NOT NULL DEFAULT 0",
        "restarts INTEGER NOT NULL DEFAULT 0",
        "faults INTEGER NOT NULL DEFAULT 0",
        "last_commit TEXT NOT NULL DEFAULT ''",
        "fired TEXT NOT NULL DEFAULT '[]'",
        "cancelling INTEGER NOT NULL DEFAULT 0",
    ),
    "attempts": (
        "run_id TEXT NOT NULL",
        "attempt INTEGER NOT NULL",
        "marker TEXT NOT NULL DEFAULT ''",
        "slots TEXT NOT NULL DEFAULT '[]'",
        "pid INTEGER",
        "created REAL",
        "boot TEXT NOT NULL DEFAULT ''",
        "accelerators TEXT NOT NULL DEFAULT ''",
        "use_spot INTEGER NOT NULL DEFAULT 0",
        "started_at REAL NOT NULL DEFAULT 0",
        "running_at REAL",
        "ended_at REAL",
        "setup_s REAL NOT NULL DEFAULT 0",
        "exit_code INTEGER",
        "phase TEXT NOT NULL DEFAULT 'run'",
        "end_reason TEXT NOT NULL DEFAULT ''",
        "taking TEXT NOT NULL DEFAULT ''",
        "kill_at REAL",
        "settled INTEGER NOT NULL DEFAULT 0",
        "PRIMARY KEY (run_id, attempt)",
    ),
    "requests": (
        "id INTEGER PRIMARY KEY AUTOINCREMENT",
        "run_id TEXT NOT NULL",
        "kind TEXT NOT NULL",
        "notice_s REAL NOT NULL DEFAULT 0",
        "made_at REAL NOT NULL DEFAULT 0",
        "done_at REAL",
    ),
    "facts": ("name TEXT PRIMARY KEY", "value TEXT NOT NULL"),
}
_KEYS = ("PRIMARY", "UNIQUE")  # no such column can be added
# Faults of now, not of what is in the file: a lock, a full disk, one that fails or cannot be written.
_PASSING = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_AUTH,
    sqlite3.SQLITE_PROTOCOL,
}


Fill = Callable[[sqlite3.Connection, int | None], None]


class NewerState(InfraError):
    """A newer version of spotune made this file: it is left as it is."""


@contextmanager
def only_one_prepares(path: Path) -> Iterator[None]:
    """One process at a time looks at the file as a whole. SQLite waits for no lock to change to WAL."""
    lock = path.with_suffix(".lock")
    try:
        make_room(lock)
        with open(lock, "w") as file:
            take_lock(file, lock)
            yield
    except OSError as error:
        raise InfraError(f"{error.filename or lock}: {error.strerror or error}") from error


def connect(path: Path) -> sqlite3.Connection:
    """Opens the queue. Raises NewerState, sqlite3.Error."""
    connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
    try:
        refuse_newer(connection, path, VERSION)
        connection.row_factory = sqlite3.Row
    except BaseException:
        connection.close()
        raise
    return connection


def refuse_newer(connection: sqlite3.Connection, path: Path, most: int) -> int:
    """Returns the file's version; raises NewerState for one above ``most``."""
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version > most:
        raise NewerState(f"{path}: made by a newer spotune, version {version} and not {most} (upgrade spotune)")
    return version


def is_passing(error: sqlite3.Error) -> bool:
    """Whether an error says nothing against what is in the file."""
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF in _PASSING


def describe(path: Path, error: Exception) -> str:
    """Returns what is wrong with the queue in one line. SQLite itself calls a full disk ``disk I/O error``."""
    with suppress(OSError):
        found = os.statvfs(path.parent)
        if isinstance(error, sqlite3.Error) and is_passing(error) and found.f_bavail * found.f_frsize < LEAST_BYTES:
            return f"{path}: {error}: the disk is full"
    return f"{path}: {error}"


def prepare(path: Path, fill: Fill, log: Log = log_line) -> None:
    """Brings the file to this version; a damaged one is set aside, and made anew.

    ``fill`` is called in the same transaction with the version that the file had, None where it has no jobs yet.
    Raises NewerState, InfraError.
    """
    for name in ("", "-wal", "-shm", "-journal"):
        make_room(path.with_name(path.name + name), log)
    with suppress(OSError):
        if path.exists() and not path.stat().st_mode & 0o200:
            path.chmod(0o600)
    for is_last in (False, True):
        try:
            with closing(sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)) as connection:
                _bring_up(connection, path, fill, log)
                return
        except (sqlite3.Error, Damaged) as error:
            if is_last or (isinstance(error, sqlite3.Error) and is_passing(error)):
                raise InfraError(describe(path, error)) from error
            why = str(error)
        set_aside(path, f"damaged: {why}", log)
        for name in ("-wal", "-shm", "-journal"):
            path.with_name(path.name + name).unlink(missing_ok=True)  # parts of what is damaged


def _bring_up(connection: sqlite3.Connection, path: Path, fill: Fill, log: Log) -> None:
    version = refuse_newer(connection, path, VERSION)
    if (found := connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
        raise Damaged(str(found))
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("BEGIN IMMEDIATE")
    version = refuse_newer(connection, path, VERSION)
    known = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    added = [name for table in TABLES for name in _complete(connection, table)]
    if version < VERSION:
        connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.row_factory = sqlite3.Row
    fill(connection, version if "jobs" in known else None)
    connection.execute("COMMIT")
    if "jobs" in known and (version < VERSION or added):
        which = f", with {', '.join(added)} added" if added else ""
        log(f"{path}: migrated from version {version} to {VERSION}{which}")


def _complete(connection: sqlite3.Connection, table: str) -> Iterator[str]:
    """Makes a table, or the columns that it lacks; yields the names of these. Raises Damaged where that cannot be."""
    columns = TABLES[table]
    connection.execute(f"CREATE TABLE IF NOT EXISTS {table} ({', '.join(columns)})")
    known = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
    for column in columns:
        name = column.split()[0]
        if name in (*known, "PRIMARY"):
            continue
        if any(key in column for key in _KEYS) or ("NOT NULL" in column and "DEFAULT" not in column):
            raise Damaged(f"table {table} has no {name}")
        connection.execute(f"ALTER TABLE {table} ADD COLUMN {column}")
        yield f"{table}.{name}"
