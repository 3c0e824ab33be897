"""The rows of the local queue, the SQLite file that keeps them, and the second copy of each row."""

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spotune.core.environment import check_bucket
from spotune.core.errors import InfraError, SpotuneError
from spotune.core.io import Damaged, Log, make_room, read_as, read_object, set_aside, take_lock, write_state
from spotune.core.keys import RUN_ID, YEAR_2000, Time, fits
from spotune.launch.engine import ACTIVE, State
from spotune.launch.local.layout import AttemptFiles, Exit, Running
from spotune.launch.task import Demand, demand_of

if TYPE_CHECKING:
    from spotune.launch.local.machine import Identity

# Rows as values. A damaged value of a row counts as missing, so that its field gets its default.

_SUBMISSION = ("task", "workdir", "secrets", "preemptions")


@dataclass(frozen=True)
class JobRow:
    """A job of the queue. ``secrets`` has only the names: the queue never holds a secret's value.

    A job whose row cannot be read has an empty ``task`` and a ``reason`` that says so. It is never started.
    """

    id: int = 0
    run_id: str = ""
    state: State = "FAILED"
    priority: int = 0
    user: str = ""
    bucket: str = ""
    interactive: bool = False
    submitted_at: float = 0.0
    started_at: float | None = None
    ended_at: float | None = None
    attempt: int = 0
    reason: str = ""
    exit_code: int | None = None
    not_before: float = 0.0
    restarts: int = 0
    faults: int = 0
    last_commit: str = ""
    cancelling: bool = False
    fired: list[int] = field(default_factory=list)
    task: dict[str, Any] = field(default_factory=dict)
    workdir: str = ""
    secrets: list[str] = field(default_factory=list)
    preemptions: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "JobRow | None":
        """Returns the job, or None if the row has no valid run id."""
        if not _has_run_id(row):
            return None
        values: dict[str, Any] = {field.name: row.get(field.name) for field in fields(cls)}
        values |= {name: bool(values[name]) for name in ("interactive", "cancelling")}
        why = ""
        try:
            submission = json.loads(row.get("submission") or "{}")
            values |= {"fired": json.loads(values["fired"] or "[]"), **{name: submission[name] for name in _SUBMISSION}}
            demand_of(values["task"])
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError, SpotuneError) as error:
            values |= dict.fromkeys(("fired", *_SUBMISSION))
            why = f"{error!r}"
        sound = _sound(cls, values)
        if "bucket" in sound:
            try:
                check_bucket(sound["bucket"])
            except SpotuneError:
                del sound["bucket"]
        if len(sound) < len(values):
            what = why or f"{next(name for name in values if name not in sound)} is damaged"
            reason = f"its row in queue.db cannot be read: {what} (train it anew, under another --name)"
            sound |= {"task": {}, "reason": reason}
        return cls(**sound)

    @property
    def is_active(self) -> bool:
        return self.state in ACTIVE

    @property
    def demand(self) -> Demand:
        return demand_of(self.task)


@dataclass(frozen=True)
class AttemptRow:
    """A machine that a job was given.

    Attributes:
        marker: an environment variable that every process of the machine has.
        slots: the machine's slots; empty for an interactive job.
        taking: ``preempted`` or ``cancelled`` once the machine is being taken away; all of it is dead by ``kill_at``.
        started_at: epoch seconds; 0 if the row is damaged.
        settled: the job's state accounts for the machine's end.
    """

    run_id: str
    attempt: int
    marker: str = "unknown"
    boot: str = ""
    started_at: Time = 0.0
    slots: list[int] = field(default_factory=list)
    accelerators: str = ""
    use_spot: bool = False
    pid: int | None = None
    created: float | None = None
    running_at: Time | None = None
    ended_at: Time | None = None
    setup_s: float = 0.0
    exit_code: int | None = None
    phase: str = "run"
    end_reason: str = ""
    taking: str = ""
    kill_at: Time | None = None
    settled: bool = False

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "AttemptRow | None":
        """Returns the machine, or None if the row does not say of which run and which attempt it is."""
        if not _has_run_id(row) or not fits(cls, "attempt", row.get("attempt")):
            return None
        values = {**row, **{name: bool(row.get(name)) for name in ("use_spot", "settled")}}
        try:
            values["slots"] = json.loads(row.get("slots") or "")
        except (ValueError, TypeError, RecursionError):
            values["slots"] = []
        return cls(**_sound(cls, values))

    @property
    def is_dated(self) -> bool:
        """Whether the row says when the machine was paid for. A machine that is not settled may have no end yet."""
        return self.started_at >= YEAR_2000 and (self.ended_at is not None or not self.settled)

    @property
    def node(self) -> "Identity | None":
        from spotune.launch.local.machine import Identity  # here: psutil, which only a supervisor needs

        if self.pid and self.created and 0 < self.pid <= 2**31 - 1:
            return Identity(self.pid, self.created)
        return None


@dataclass(frozen=True)
class VerbRequest:
    """A verb's request to the supervisor: ``cancel``, or ``preempt`` with ``notice_s`` of warning.

    A damaged value has its default here, so that a damaged request does nothing.
    """

    id: int = 0
    run_id: str = ""
    kind: str = ""
    notice_s: float = 0.0

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "VerbRequest":
        return cls(**_sound(cls, row))


def _has_run_id(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("run_id"), str) and bool(RUN_ID.fullmatch(row["run_id"]))


def _sound(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values that are valid for the fields of ``kind``."""
    names = [one.name for one in fields(kind) if one.name in values]
    return {name: values[name] for name in names if fits(kind, name, values[name])}


@dataclass(frozen=True)
class Verdict:
    """A job's next state; for RECOVERING the wait in seconds before it, and the restarts and faults so far."""

    state: State
    reason: str = ""
    exit_code: int | None = None
    delay_s: float = 0.0
    restarts: int = 0
    faults: int = 0


# The queue's file and its version. An older file is migrated, a newer one refused, a damaged one set aside.

VERSION = 1  # ``PRAGMA user_version``; 0: from before the file had a version
BUSY_S = 30.0
# A column that an older file lacks is added, with its default or an empty value.
TABLES = {
    "jobs": (
        *("id INTEGER PRIMARY KEY AUTOINCREMENT", "run_id TEXT UNIQUE NOT NULL"),
        *("position INTEGER NOT NULL DEFAULT 0", "priority INTEGER NOT NULL DEFAULT 0"),
        *("state TEXT NOT NULL DEFAULT 'FAILED'", "user TEXT NOT NULL DEFAULT ''"),
        *("bucket TEXT NOT NULL DEFAULT ''", "submission TEXT NOT NULL DEFAULT '{}'"),
        *("interactive INTEGER NOT NULL DEFAULT 0", "submitted_at REAL NOT NULL DEFAULT 0"),
        *("started_at REAL", "ended_at REAL", "attempt INTEGER NOT NULL DEFAULT 0"),
        *("reason TEXT NOT NULL DEFAULT ''", "exit_code INTEGER"),
        *("not_before REAL NOT NULL DEFAULT 0", "restarts INTEGER NOT NULL DEFAULT 0"),
        *("faults INTEGER NOT NULL DEFAULT 0", "last_commit TEXT NOT NULL DEFAULT ''"),
        *("fired TEXT NOT NULL DEFAULT '[]'", "cancelling INTEGER NOT NULL DEFAULT 0"),
    ),
    "attempts": (
        *("run_id TEXT NOT NULL", "attempt INTEGER NOT NULL", "marker TEXT NOT NULL DEFAULT ''"),
        *("slots TEXT NOT NULL DEFAULT '[]'", "pid INTEGER", "created REAL"),
        *("boot TEXT NOT NULL DEFAULT ''", "accelerators TEXT NOT NULL DEFAULT ''"),
        *("use_spot INTEGER NOT NULL DEFAULT 0", "started_at REAL NOT NULL DEFAULT 0"),
        *("running_at REAL", "ended_at REAL", "setup_s REAL NOT NULL DEFAULT 0", "exit_code INTEGER"),
        *("phase TEXT NOT NULL DEFAULT 'run'", "end_reason TEXT NOT NULL DEFAULT ''"),
        *("taking TEXT NOT NULL DEFAULT ''", "kill_at REAL", "settled INTEGER NOT NULL DEFAULT 0"),
        "PRIMARY KEY (run_id, attempt)",
    ),
    "requests": (
        *("id INTEGER PRIMARY KEY AUTOINCREMENT", "run_id TEXT NOT NULL", "kind TEXT NOT NULL"),
        *("notice_s REAL NOT NULL DEFAULT 0", "made_at REAL NOT NULL DEFAULT 0", "done_at REAL"),
    ),
    "facts": ("name TEXT PRIMARY KEY", "value TEXT NOT NULL"),
}
# Faults that pass and say nothing about the file: a lock, a full or failing disk, no permission.
_PASSING = {
    *(sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_NOMEM),
    *(sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN),
    *(sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH),
}


class NewerState(InfraError):
    """A newer version of spotune made this file. The file is left as it is."""


def connect(path: Path) -> sqlite3.Connection:
    """Opens the queue. Raises NewerState, sqlite3.Error."""
    connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
    try:
        _refuse_newer(connection, path)
        connection.row_factory = sqlite3.Row
    except BaseException:
        connection.close()
        raise
    return connection


def _refuse_newer(connection: sqlite3.Connection, path: Path) -> int:
    """Returns the file's version. Raises NewerState for a newer one than ours."""
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version > VERSION:
        raise NewerState(f"{path}: made by a newer spotune, version {version} and not {VERSION} (upgrade spotune)")
    return version


def is_passing(error: Exception) -> bool:
    """Returns whether an error says nothing against the file's content."""
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF in _PASSING


def describe(path: Path, error: Exception) -> str:
    """Returns what is wrong with the queue in one line. SQLite itself calls a full disk ``disk I/O error``."""
    with suppress(OSError):
        found = os.statvfs(path.parent)
        if is_passing(error) and found.f_bavail * found.f_frsize < 64 << 10:  # SQLite needs about so much
            return f"{path}: {error}: the disk is full"
    return f"{path}: {error}"


def prepare(path: Path, log: Log) -> None:
    """Creates the file, migrates an older one, and replaces a damaged one by a new one, one process at a time.

    The lock is needed because SQLite does not wait for a lock to change to WAL. A new file is filled from the second
    copy. Raises NewerState, InfraError.
    """
    lock = path.with_suffix(".lock")
    try:
        make_room(lock)
        with open(lock, "w") as file:
            take_lock(file, lock)
            _prepare_alone(path, log)
    except OSError as error:
        raise InfraError(f"{error.filename or lock}: {error.strerror or error}") from error


def _prepare_alone(path: Path, log: Log) -> None:
    for name in ("", "-wal", "-shm", "-journal"):
        make_room(path.with_name(path.name + name), log)
    with suppress(OSError):
        if path.exists() and not path.stat().st_mode & 0o200:
            path.chmod(0o600)
    for is_last in (False, True):
        try:
            with closing(sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)) as connection:
                _bring_up(connection, path, log)
            path.chmod(0o600)
            return
        except (sqlite3.Error, Damaged) as error:
            if is_last or is_passing(error):
                raise InfraError(describe(path, error)) from error
            why = str(error)
        set_aside(path, f"damaged: {why}", log)
        for name in ("-wal", "-shm", "-journal"):
            path.with_name(path.name + name).unlink(missing_ok=True)  # parts of what is damaged


def _bring_up(connection: sqlite3.Connection, path: Path, log: Log) -> None:
    """Brings the tables to our version and fills empty ones, in one transaction. Raises Damaged."""
    _refuse_newer(connection, path)
    if (found := connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
        raise Damaged(str(found))
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("BEGIN IMMEDIATE")
    version = _refuse_newer(connection, path)
    is_known = bool(connection.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'jobs'").fetchone())
    added = [name for table in TABLES for name in _complete(connection, table)]
    if version < VERSION:
        connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.row_factory = sqlite3.Row
    if not is_known:
        _restore_jobs(path.parent, connection, log)
    elif version < 1:
        _keep_all(path.parent, connection, log)
    connection.execute("COMMIT")
    if is_known and (version < VERSION or added):
        which = f", with {', '.join(added)} added" if added else ""
        log(f"{path}: migrated from version {version} to {VERSION}{which}")


def _complete(connection: sqlite3.Connection, table: str) -> Iterator[str]:
    """Creates a table, or its missing columns, and yields these columns' names. Raises Damaged if that cannot be."""
    columns = TABLES[table]
    connection.execute(f"CREATE TABLE IF NOT EXISTS {table} ({', '.join(columns)})")
    known = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
    for column in columns:
        name = column.split()[0]
        if name in (*known, "PRIMARY"):
            continue
        is_key = "PRIMARY" in column or "UNIQUE" in column  # SQLite cannot add such a column
        if is_key or ("NOT NULL" in column and "DEFAULT" not in column):
            raise Damaged(f"table {table} has no {name}")
        connection.execute(f"ALTER TABLE {table} ADD COLUMN {column}")
        yield f"{table}.{name}"


# The queue's second copy: each job's row, as ``kept/RUN.json``. A damaged ``queue.db`` is made anew from it.
#
# The copy is written when a job is added, settled, cancelled or put back. A machine that started later has
# ``attempt.json`` in its own folder, ``jobs/RUN/ATTEMPT``, and is found again by its marker.

_COLUMNS = {name: [column.split()[0] for column in TABLES[name] if "(" not in column] for name in ("jobs", "attempts")}


def job_file(root: Path, run_id: str) -> Path:
    """Returns the path of a job's copy; ``root`` is the queue's folder."""
    return root / "kept" / f"{run_id}.json"


def keep_job(root: Path, row: Mapping[str, Any]) -> None:
    """Writes the copy of a job's row. Raises OSError."""
    columns = {name: row[name] for name in _COLUMNS["jobs"]}
    write_state(job_file(root, columns["run_id"]), {"schema_version": 1, **columns}, mode=0o600)


def _keep_all(root: Path, connection: sqlite3.Connection, log: Log) -> None:
    """Writes the copies for a queue of before there were any, and logs what cannot be written."""
    try:
        for row in connection.execute("SELECT * FROM jobs"):
            if RUN_ID.fullmatch(str(row["run_id"])):
                keep_job(root, dict(row))
        for row in connection.execute("SELECT * FROM attempts WHERE settled = 0"):
            if attempt := AttemptRow.from_row(dict(row)):
                write_state(_files(root, attempt.run_id, attempt.attempt).attempt, attempt)
    except (OSError, InfraError) as error:
        log(f"{root}: the queue's copy cannot be written: {error}")


def _restore_jobs(root: Path, connection: sqlite3.Connection, log: Log) -> None:
    """Fills an empty queue from the copies, and logs how many jobs were restored."""
    known = {path.stem for path in _entries(root / "kept") if path.suffix == ".json"}
    known |= {path.name for path in _entries(root / "jobs") if path.is_dir()}
    run_ids = sorted(filter(RUN_ID.fullmatch, known))
    rows = [row for run_id in run_ids if (row := _kept(root, run_id, log))]
    for row in rows:
        _insert(connection, "jobs", row)
        for attempt in _attempts(root, row, log):
            _insert(connection, "attempts", {**asdict(attempt), "slots": json.dumps(attempt.slots)})
            if not attempt.settled:
                connection.execute(
                    "UPDATE jobs SET attempt = ?, state = 'RUNNING' WHERE run_id = ?", (attempt.attempt, attempt.run_id)
                )
    if run_ids:
        lost = len(run_ids) - len(rows)
        others = f"; {lost} others are known to their bucket alone (spotune queue -a)" if lost else ""
        log(f"{root / 'queue.db'}: made anew, with {len(rows)} jobs from {root / 'kept'}{others}")


def _kept(root: Path, run_id: str, log: Log) -> dict[str, Any] | None:
    """Returns a job's row from its copy, or None if there is none that can be read."""
    found = read_object(job_file(root, run_id), log)
    if found is None or found.get("run_id") != run_id:
        return None
    return {name: found[name] for name in _COLUMNS["jobs"] if isinstance(found.get(name), (str, int, float))}


def _attempts(root: Path, job: dict[str, Any], log: Log) -> Iterator[AttemptRow]:
    """Yields a job's machines. The newest one is open if the job's row does not account for its end."""
    folders = [path for path in _entries(root / "jobs" / job["run_id"]) if path.name.isascii() and path.name.isdigit()]
    numbers = sorted(int(path.name) for path in folders if len(path.name) < 10)
    for number in numbers:
        files = _files(root, job["run_id"], number)
        stored = {**(read_object(files.attempt, log) or {}), "run_id": job["run_id"], "attempt": number}
        attempt = AttemptRow(**_sound(AttemptRow, stored))
        running, left = read_as(files.running, Running, log), read_as(files.exit, Exit, log)
        is_newer = number > (job.get("attempt") or 0)
        is_open = number == numbers[-1] and (is_newer or job.get("state") in ("STARTING", "RUNNING"))
        attempt = replace(attempt, running_at=running.at if running else None, settled=not is_open)
        if not is_open:
            attempt = replace(
                attempt,
                ended_at=left.ended_at if left else files.last_heartbeat() or attempt.started_at,
                exit_code=left.exit_code if left else None,
                setup_s=running.setup_s if running else 0.0,
                end_reason="exited" if left and left.exit_code != 137 else "lost",
            )
        yield attempt


def _files(root: Path, run_id: str, attempt: int) -> AttemptFiles:
    return AttemptFiles(root / "jobs" / run_id / f"{attempt:04d}")


def _insert(connection: sqlite3.Connection, table: str, row: dict[str, Any]) -> None:
    names = [name for name in _COLUMNS[table] if row.get(name) is not None]
    places = ", ".join("?" * len(names))
    connection.execute(
        f"INSERT OR IGNORE INTO {table} ({', '.join(names)}) VALUES ({places})", [row[name] for name in names]
    )


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []
