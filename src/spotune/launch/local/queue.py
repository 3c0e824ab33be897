"""The durable queue: one SQLite file (WAL). Verbs add jobs and requests; the supervisor does the rest."""

import fcntl
import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from spotune.contracts.errors import InfraError, Taken
from spotune.launch.infra import ACTIVE, Submission
from spotune.launch.local.rows import Attempt, Job, Request
from spotune.launch.local.verdict import Verdict

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT, run_id TEXT UNIQUE NOT NULL, position INTEGER NOT NULL,
    priority INTEGER NOT NULL, state TEXT NOT NULL, user TEXT NOT NULL, bucket TEXT NOT NULL,
    submission TEXT NOT NULL, interactive INTEGER NOT NULL, submitted_at REAL NOT NULL,
    started_at REAL, ended_at REAL, attempt INTEGER NOT NULL DEFAULT 0, reason TEXT NOT NULL DEFAULT '',
    exit_code INTEGER, not_before REAL NOT NULL DEFAULT 0, restarts INTEGER NOT NULL DEFAULT 0,
    faults INTEGER NOT NULL DEFAULT 0, last_commit TEXT NOT NULL DEFAULT '', fired TEXT NOT NULL DEFAULT '[]',
    cancelling INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS attempts (
    run_id TEXT NOT NULL, attempt INTEGER NOT NULL, marker TEXT NOT NULL, slots TEXT NOT NULL,
    pid INTEGER, created REAL, boot TEXT NOT NULL, accelerators TEXT NOT NULL, use_spot INTEGER NOT NULL,
    started_at REAL NOT NULL, running_at REAL, ended_at REAL, setup_s REAL NOT NULL DEFAULT 0,
    exit_code INTEGER, phase TEXT NOT NULL DEFAULT 'run', end_reason TEXT NOT NULL DEFAULT '',
    taking TEXT NOT NULL DEFAULT '', kill_at REAL, settled INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (run_id, attempt));
CREATE TABLE IF NOT EXISTS requests (
    id INTEGER PRIMARY KEY AUTOINCREMENT, run_id TEXT NOT NULL, kind TEXT NOT NULL, notice_s REAL NOT NULL,
    made_at REAL NOT NULL, done_at REAL);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
_ACTIVE = "(" + ", ".join(f"'{state}'" for state in ACTIVE) + ")"
_NEXT_POSITION = "(SELECT COALESCE(MAX(position), 0) + 1 FROM jobs)"


def _failed(path: Path, error: Exception) -> InfraError:
    """OperationalError is a matter of now: a full disk, a lock. Any other says that the file is no such database."""
    is_broken = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
    return InfraError(f"{path}: {error}" + (" (move it away: what runs have saved is in their bucket)" * is_broken))


class Queue:
    """Every method opens what it needs and leaves nothing open: verbs and the supervisor share the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self._path, timeout=30, isolation_level=None)) as connection:
                connection.row_factory = sqlite3.Row
                connection.execute("BEGIN IMMEDIATE")
                try:
                    yield connection
                except BaseException:
                    connection.execute("ROLLBACK")
                    raise
                connection.execute("COMMIT")
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            raise _failed(self._path, error) from error

    def create(self) -> None:
        """Makes the tables where there are none. One process at a time: SQLite waits for no lock to change to WAL."""
        try:
            with open(self._path.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                with closing(sqlite3.connect(self._path, timeout=30)) as connection:
                    connection.execute("PRAGMA journal_mode=WAL")
                    connection.executescript(_SCHEMA)
        except (sqlite3.Error, OSError) as error:
            raise _failed(self._path, error) from error
        self._path.chmod(0o600)

    def _rows(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        try:
            with closing(sqlite3.connect(self._path, timeout=30)) as connection:
                connection.row_factory = sqlite3.Row
                return connection.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise _failed(self._path, error) from error

    # What the verbs write.

    def add(
        self, submission: Submission, bucket: str, prepare: Callable[[], None] = lambda: None, at: float | None = None
    ) -> None:
        """A new job at the end of its priority, submitted ``at`` (now); raises Taken for a run id that it has.

        ``prepare`` is called before anybody can see the job, and not for one that is refused.
        """
        stored: dict[str, Any] = {"task": submission.task, "workdir": submission.workdir}
        stored["secrets"] = sorted(submission.secrets)
        stored["preemptions"] = list(submission.preemptions)
        text = json.dumps(stored)
        try:
            with self._transaction() as connection:
                connection.execute(
                    "INSERT INTO jobs (run_id, position, priority, state, user, bucket, submission, interactive,"
                    f" submitted_at) VALUES (?, {_NEXT_POSITION}, ?, 'PENDING', ?, ?, ?, ?, ?)",
                    (submission.run_id, submission.priority, submission.user, bucket, text,
                     submission.interactive, time.time() if at is None else at),
                )  # fmt: skip
                prepare()
        except sqlite3.IntegrityError as error:
            what = f"{submission.run_id} is in this machine's queue already"
            raise Taken("--name", what, remedy="another --name") from error

    def withdraw(self, run_id: str, at: float, forget: Callable[[], None]) -> bool:
        """Takes out what ``add`` has added ``at`` that time, unless it has had a machine; returns whether it is gone.

        ``forget`` is called where the queue has no job of that name, before anybody can add one.
        """
        with self._transaction() as connection:
            connection.execute("DELETE FROM jobs WHERE run_id = ? AND submitted_at = ? AND attempt = 0", (run_id, at))
            left = connection.execute("SELECT submitted_at FROM jobs WHERE run_id = ?", (run_id,)).fetchone()
            if left is None:
                forget()
            return left is None or left["submitted_at"] != at

    def requeue(self, run_id: str) -> None:
        """An ended job goes to the end of its priority, with everything it may ask for restored."""
        with self._transaction() as connection:
            connection.execute(
                f"UPDATE jobs SET state = 'PENDING', position = {_NEXT_POSITION}, ended_at = NULL, reason = '',"
                " exit_code = NULL, not_before = 0, restarts = 0, faults = 0, cancelling = 0"
                f" WHERE run_id = ? AND state NOT IN {_ACTIVE}",
                (run_id,),
            )

    def ask(self, run_id: str, kind: str, notice_s: float = 0.0) -> int:
        """A request to the supervisor; returns its id."""
        with self._transaction() as connection:
            return _ask(connection, run_id, kind, notice_s)

    def note(self, name: str, value: Any) -> None:
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    # What everybody reads.

    def fact(self, name: str, default: Any = None) -> Any:
        rows = self._rows("SELECT value FROM facts WHERE name = ?", name)
        return json.loads(rows[0]["value"]) if rows else default

    def job(self, run_id: str) -> Job | None:
        rows = self._rows("SELECT * FROM jobs WHERE run_id = ?", run_id)
        return Job.from_row(rows[0]) if rows else None

    def jobs(self) -> list[Job]:
        """All jobs: highest priority first, then order of submission."""
        return [Job.from_row(row) for row in self._rows("SELECT * FROM jobs ORDER BY priority DESC, position")]

    def active(self) -> list[Job]:
        """Jobs that have not ended, in the order that they would run."""
        sql = f"SELECT * FROM jobs WHERE state IN {_ACTIVE} ORDER BY priority DESC, position"
        return [Job.from_row(row) for row in self._rows(sql)]

    def attempts(self, run_id: str) -> list[Attempt]:
        sql = "SELECT * FROM attempts WHERE run_id = ? ORDER BY attempt"
        return [Attempt.from_row(row) for row in self._rows(sql, run_id)]

    def unsettled(self) -> list[Attempt]:
        """Machines whose job does not know yet what became of them: running or just ended."""
        return [
            Attempt.from_row(row) for row in self._rows("SELECT * FROM attempts WHERE settled = 0 ORDER BY started_at")
        ]

    def requests(self) -> list[Request]:
        return [Request.from_row(row) for row in self._rows("SELECT * FROM requests WHERE done_at IS NULL ORDER BY id")]

    def is_done(self, request: int) -> bool:
        return bool(self._rows("SELECT 1 FROM requests WHERE id = ? AND done_at IS NOT NULL", request))

    # What the supervisor writes.

    def finish_request(self, request: int) -> None:
        with self._transaction() as connection:
            connection.execute("UPDATE requests SET done_at = ? WHERE id = ?", (time.time(), request))

    def fire(self, run_id: str, fired: list[int], notice_s: float) -> None:
        """A planned preemption becomes a request, once."""
        with self._transaction() as connection:
            connection.execute("UPDATE jobs SET fired = ? WHERE run_id = ?", (json.dumps(fired), run_id))
            _ask(connection, run_id, "preempt", notice_s)

    def start(self, attempt: Attempt) -> bool:
        """A job gets a machine; returns False for one that was withdrawn meanwhile."""
        with self._transaction() as connection:
            found = connection.execute(
                "UPDATE jobs SET attempt = ?, state = CASE WHEN state = 'PENDING' THEN 'STARTING' ELSE state END"
                " WHERE run_id = ?",
                (attempt.attempt, attempt.run_id),
            )
            if not found.rowcount:
                return False
            connection.execute(
                "INSERT INTO attempts (run_id, attempt, marker, slots, boot, accelerators, use_spot, started_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (attempt.run_id, attempt.attempt, attempt.marker, json.dumps(attempt.slots), attempt.boot,
                 attempt.accelerators, attempt.use_spot, attempt.started_at),
            )  # fmt: skip
        return True

    def update_attempt(self, attempt: Attempt, **changes: Any) -> None:
        """Sets columns of one machine's row."""
        names = ", ".join(f"{name} = ?" for name in changes)
        with self._transaction() as connection:
            values = (*changes.values(), attempt.run_id, attempt.attempt)
            connection.execute(f"UPDATE attempts SET {names} WHERE run_id = ? AND attempt = ?", values)

    def run_began(self, attempt: Attempt, at: float, setup_s: float) -> None:
        """The machine is set up: the job's own program runs from now on."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE attempts SET running_at = ?, setup_s = ? WHERE run_id = ? AND attempt = ?",
                (at, setup_s, attempt.run_id, attempt.attempt),
            )
            connection.execute(
                "UPDATE jobs SET state = 'RUNNING', started_at = COALESCE(started_at, ?), reason = '', exit_code = NULL"
                " WHERE run_id = ?",
                (at, attempt.run_id),
            )

    def explain(self, job: Job, reason: str) -> None:
        """Says why a job does not move, for those who look at the queue."""
        if job.reason != reason:
            with self._transaction() as connection:
                connection.execute("UPDATE jobs SET reason = ? WHERE run_id = ?", (reason, job.run_id))

    def mark_cancelling(self, run_id: str) -> None:
        with self._transaction() as connection:
            connection.execute("UPDATE jobs SET cancelling = 1 WHERE run_id = ?", (run_id,))

    def settle(self, run_id: str, verdict: Verdict, commit: str, at: float) -> None:
        """The job takes its next state, and all of its machines are accounted for, in one step."""
        ended = None if verdict.state in ACTIVE else at
        with self._transaction() as connection:
            connection.execute("UPDATE attempts SET settled = 1 WHERE run_id = ?", (run_id,))
            connection.execute(
                "UPDATE jobs SET state = ?, reason = ?, exit_code = ?, not_before = ?, restarts = ?, faults = ?,"
                " last_commit = ?, ended_at = ? WHERE run_id = ?",
                (verdict.state, verdict.reason, verdict.exit_code, at + verdict.delay_s, verdict.restarts,
                 verdict.faults, commit, ended, run_id),
            )  # fmt: skip


def _ask(connection: sqlite3.Connection, run_id: str, kind: str, notice_s: float) -> int:
    cursor = connection.execute(
        "INSERT INTO requests (run_id, kind, notice_s, made_at) VALUES (?, ?, ?, ?)",
        (run_id, kind, notice_s, time.time()),
    )
    return int(cursor.lastrowid or 0)
