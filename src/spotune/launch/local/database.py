"""The queue's rows and the file that keeps them."""

import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from spotune.core.environment import check_bucket
from spotune.core.errors import InfraError, SpotuneError
from spotune.core.io import Damaged, Log, log_line, make_room, read_as, read_object, set_aside, take_lock, write_state
from spotune.core.keys import RUN_ID, YEAR_2000, Time, fits
from spotune.launch.engine import ACTIVE, State
from spotune.launch.local.layout import AttemptFiles, Exit, Running
from spotune.launch.task import Demand, demand_of

if TYPE_CHECKING:
    from spotune.launch.local.machine import Identity

# The queue's rows as values.

_MOST_PID = 2**31 - 1
_SUBMISSION = ("task", "workdir", "secrets", "preemptions")
_EMPTY: dict[str, Any] = {
    "id": 0,
    "state": "FAILED",
    "priority": 0,
    "submitted_at": 0.0,
    "started_at": None,
    "ended_at": None,
    "attempt": 0,
    "exit_code": None,
    "not_before": 0.0,
    "restarts": 0,
    "faults": 0,
    "interactive": False,
    "cancelling": False,
    "fired": [],
    "task": {},
    "secrets": [],
    "preemptions": [],
}


class Row(Protocol):
    """A row of a table, or a mapping."""

    def __getitem__(self, name: str, /) -> Any: ...


@dataclass(frozen=True)
class Job:
    """A job as the queue has it; ``secrets`` are names only, their values are never here.

    One without a ``task`` has a row that cannot be read: ``reason`` says so, and it is never started.
    """

    id: int
    run_id: str
    state: State
    priority: int
    user: str
    bucket: str
    interactive: bool
    submitted_at: float
    started_at: float | None
    ended_at: float | None
    attempt: int
    reason: str
    exit_code: int | None
    not_before: float
    restarts: int
    faults: int
    last_commit: str
    cancelling: bool
    fired: list[int]
    task: dict[str, Any]
    workdir: str
    secrets: list[str]
    preemptions: list[dict[str, float]]

    @classmethod
    def from_row(cls, row: Row) -> "Job | None":
        """The job; None for a row that does not say which run it is of."""
        values: dict[str, Any] = {field.name: _cell(row, field.name) for field in fields(cls)}
        if not isinstance(values["run_id"], str) or not RUN_ID.fullmatch(values["run_id"]):
            return None
        values |= {name: bool(values[name]) for name in ("interactive", "cancelling")}
        why = ""
        try:
            submission = json.loads(_cell(row, "submission") or "{}")
            values |= {"fired": json.loads(values["fired"] or "[]"), **{name: submission[name] for name in _SUBMISSION}}
            demand_of(values["task"])
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError, SpotuneError) as error:
            values |= {"fired": [], "task": {}, "secrets": [], "preemptions": [], "workdir": ""}
            why = f"{error!r}"
        wrong = [name for name, value in values.items() if not fits(cls, name, value)]
        if "bucket" not in wrong and not _is_bucket(values["bucket"]):
            wrong.append("bucket")
        if wrong or why:
            values |= {name: _EMPTY.get(name, "") for name in wrong}
            what = why or f"{wrong[0]} is damaged"
            reason = f"its row in queue.db cannot be read: {what} (train it anew, under another --name)"
            values |= {"task": {}, "reason": reason}
        return cls(**values)

    @property
    def is_active(self) -> bool:
        return self.state in ACTIVE

    @property
    def demand(self) -> Demand:
        return demand_of(self.task)


@dataclass(frozen=True)
class Attempt:
    """A machine that a job was given.

    Attributes:
        marker: in the environment of everything that runs on it.
        slots: which of the machine's slots it has; empty for an interactive job.
        taking: ``preempted`` or ``cancelled`` once it is being taken away, all of it dead by ``kill_at``.
        started_at: 0: not said, by a row that is damaged.
        settled: the job's state accounts for its end.
    """

    run_id: str
    attempt: int
    marker: str
    boot: str
    started_at: Time
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
    def from_row(cls, row: Row) -> "Attempt | None":
        """The machine; None for a row that does not say of which run, and which of its machines it is."""
        values: dict[str, Any] = {field.name: _cell(row, field.name) for field in fields(cls)}
        run_id, number = values["run_id"], values["attempt"]
        if not isinstance(run_id, str) or not RUN_ID.fullmatch(run_id) or not fits(cls, "attempt", number):
            return None
        values |= {name: bool(values[name]) for name in ("use_spot", "settled")}
        try:
            values["slots"] = json.loads(values["slots"])
        except (ValueError, TypeError, RecursionError):
            values["slots"] = []
        return sound_attempt(values, run_id, number)

    @property
    def is_dated(self) -> bool:
        """Whether it says from when to when it was paid for; one that is not settled may have no end yet."""
        return self.started_at >= YEAR_2000 and (self.ended_at is not None or not self.settled)

    @property
    def node(self) -> "Identity | None":
        from spotune.launch.local.machine import Identity  # here: psutil, which only a supervisor needs

        is_pid = self.pid and self.created and 0 < self.pid <= _MOST_PID
        return Identity(self.pid, self.created) if is_pid and self.pid and self.created else None


@dataclass(frozen=True)
class Request:
    """Something that a verb wants done: ``cancel``, or ``preempt`` with so much notice."""

    id: int
    run_id: str
    kind: str
    notice_s: float
    made_at: float

    @classmethod
    def from_row(cls, row: Row) -> "Request":
        """The request; of a value that is damaged nothing is wanted."""
        values = {field.name: _cell(row, field.name) for field in fields(cls)}
        empty: dict[str, Any] = {"id": 0, "run_id": "", "kind": "", "notice_s": 0.0, "made_at": 0.0}
        return cls(**{name: value if fits(cls, name, value) else empty[name] for name, value in values.items()})


def sound_attempt(values: Mapping[str, Any], run_id: str, number: int) -> Attempt:
    """The machine of these values; one that is damaged counts as not said."""
    found: dict[str, Any] = {"marker": "unknown", "boot": "", "started_at": 0.0}
    for one in fields(Attempt):
        if one.name in values and fits(Attempt, one.name, values[one.name]):
            found[one.name] = values[one.name]
    return Attempt(**found | {"run_id": run_id, "attempt": number})


def _is_bucket(url: str) -> bool:
    try:
        return bool(check_bucket(url, "bucket"))
    except SpotuneError:
        return False


def _cell(row: Row, name: str) -> Any:
    """A value of a row, None where it has no such column."""
    try:
        return row[name]
    except LookupError:
        return None


@dataclass(frozen=True)
class Verdict:
    """The job's next state; for RECOVERING after how many seconds, and what was used up."""

    state: State
    reason: str = ""
    exit_code: int | None = None
    delay_s: float = 0.0
    restarts: int = 0
    faults: int = 0


# The queue's file, its version, and its second copy.

# The queue's file and its version. An older file is migrated, a newer one refused, a damaged one set aside.

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


# The queue's second copy: each job's row, as ``kept/RUN.json``. A damaged ``queue.db`` is made anew from it.
#
# It is written after each change that decides: a job is added, settled, cancelled or put back. A machine that was
# started later has ``attempt.json`` in its own folder, ``jobs/RUN/ATTEMPT``, and is found again by its marker.

SCHEMA_VERSION = 1
_COLUMNS = {name: [column.split()[0] for column in TABLES[name] if "(" not in column] for name in ("jobs", "attempts")}


def job_file(root: Path, run_id: str) -> Path:
    """Where a job's row is, below the queue's folder."""
    return root / "kept" / f"{run_id}.json"


def keep_job(root: Path, row: sqlite3.Row) -> None:
    """Writes a job's row a second time. Raises OSError."""
    columns = {name: row[name] for name in _COLUMNS["jobs"]}
    write_state(job_file(root, columns["run_id"]), {"schema_version": SCHEMA_VERSION, **columns}, mode=0o600)


def keep_all(root: Path, connection: sqlite3.Connection, log: Log = log_line) -> None:
    """Writes all rows of a queue that has no copy yet; what cannot be written is logged."""
    running = [Attempt.from_row(row) for row in connection.execute("SELECT * FROM attempts WHERE settled = 0")]
    try:
        for row in connection.execute("SELECT * FROM jobs"):
            if RUN_ID.fullmatch(str(row["run_id"])):
                keep_job(root, row)
        for attempt in running:
            if attempt:
                write_state(_files(root, attempt.run_id, attempt.attempt).attempt, attempt)
    except (OSError, InfraError) as error:
        log(f"{root}: the queue's copy cannot be written: {error}")


def restore_jobs(root: Path, connection: sqlite3.Connection, log: Log = log_line) -> None:
    """Fills an empty queue from the second copy, and says how many jobs it has again."""
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
    """A job's row, None where there is none that can be read."""
    found = read_object(job_file(root, run_id), log)
    if found is None or found.get("run_id") != run_id:
        return None
    row = {name: found[name] for name in _COLUMNS["jobs"] if isinstance(found.get(name), (str, int, float))}
    return row if Job.from_row({**_EMPTY_ROW, **row}) else None


_EMPTY_ROW: dict[str, Any] = dict.fromkeys(_COLUMNS["jobs"])


def _attempts(root: Path, job: dict[str, Any], log: Log) -> Iterator[Attempt]:
    """A job's machines; the newest is open where the job's row does not account for it."""
    folders = [path for path in _entries(root / "jobs" / job["run_id"]) if path.name.isascii() and path.name.isdigit()]
    numbers = sorted(int(path.name) for path in folders if len(path.name) < 10)
    accounted = job.get("attempt") or 0
    for number in numbers:
        files = _files(root, job["run_id"], number)
        known = sound_attempt(read_object(files.attempt, log) or {}, job["run_id"], number)
        running, left = read_as(files.running, Running, log), read_as(files.exit, Exit, log)
        is_open = number == numbers[-1] and (number > accounted or job.get("state") in ("STARTING", "RUNNING"))
        attempt = replace(known, running_at=running.at if running else None, settled=not is_open)
        if not is_open:
            ended_at = left.ended_at if left else _last_sign(files.heartbeat) or known.started_at
            code = left.exit_code if left else None
            ended = replace(attempt, ended_at=ended_at, exit_code=code, setup_s=running.setup_s if running else 0.0)
            attempt = replace(ended, end_reason="exited" if left and code != 137 else "lost")
        yield attempt


def _files(root: Path, run_id: str, attempt: int) -> AttemptFiles:
    return AttemptFiles(root / "jobs" / run_id / f"{attempt:04d}")


def _last_sign(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _insert(connection: sqlite3.Connection, table: str, row: dict[str, Any]) -> None:
    names = [name for name in _COLUMNS[table] if row.get(name) is not None]
    values = [row[name] for name in names]
    places = ", ".join("?" * len(names))
    connection.execute(f"INSERT OR IGNORE INTO {table} ({', '.join(names)}) VALUES ({places})", values)


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []
