"""The durable queue, one SQLite file (WAL): verbs add jobs and requests, the supervisor writes the rest."""

import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from spotune.core.errors import AlreadyExists, InfraError
from spotune.core.io import Log, log_line
from spotune.launch.engine import ACTIVE, Submission
from spotune.launch.local import database
from spotune.launch.local.database import AttemptRow, JobRow, VerbRequest, Verdict

Value = TypeVar("Value")
_ACTIVE = "(" + ", ".join(f"'{state}'" for state in ACTIVE) + ")"
_NEXT_POSITION = "(SELECT COALESCE(MAX(position), 0) + 1 FROM jobs)"


class Queue:
    """The queue. Every method opens the file and closes it again, since verbs and the supervisor share it.

    Every method raises InfraError if the file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._root = path, path.parent

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(database.connect(self._path)) as connection:
                yield connection
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            remedy = "" if database.is_passing(error) else " (any verb makes it anew: spotune queue)"
            raise InfraError(f"{database.describe(self._path, error)}{remedy}") from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._opened() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                with suppress(sqlite3.Error):  # a full disk has rolled it back already
                    connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    def _write(self, sql: str, *values: Any) -> int:
        with self._transaction() as connection:
            return connection.execute(sql, values).rowcount

    def _rows(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        with self._opened() as connection:
            return [dict(row) for row in connection.execute(sql, values)]

    def create(self, log: Log = log_line) -> None:
        """Creates the queue, migrates an older one, or makes a damaged one anew; logs a line for each.

        Raises NewerState for a queue of a newer spotune.
        """
        database.prepare(self._path, log)

    def _keep(self, run_id: str) -> None:
        """Writes the copy of a job's row. A failure is only logged: the copy is read only if ``queue.db`` is lost."""
        try:
            for row in self._rows("SELECT * FROM jobs WHERE run_id = ?", run_id):
                database.keep_job(self._root, row)
        except (OSError, InfraError) as error:
            log_line(f"{run_id}: its copy of the queue's row is not written: {error}")

    # What the verbs write.

    def add(
        self, submission: Submission, bucket: str, before: Callable[[], None] = lambda: None, at: float | None = None
    ) -> None:
        """Adds a job at the end of its priority, submitted ``at`` (now). Raises AlreadyExists for a known run id.

        ``before`` is called before anybody can see the job, and not if the job is refused.
        """
        stored = {name: getattr(submission, name) for name in ("task", "workdir", "preemptions")}
        text = json.dumps({**stored, "secrets": sorted(submission.secrets)})
        try:
            with self._transaction() as connection:
                connection.execute(
                    "INSERT INTO jobs (run_id, position, priority, state, user, bucket, submission, interactive,"
                    f" submitted_at) VALUES (?, {_NEXT_POSITION}, ?, 'PENDING', ?, ?, ?, ?, ?)",
                    (submission.run_id, submission.priority, submission.user, bucket, text,
                     submission.interactive, time.time() if at is None else at),
                )  # fmt: skip
                before()
            self._keep(submission.run_id)
        except sqlite3.IntegrityError as error:
            what = f"{submission.run_id} is in this machine's queue already"
            raise AlreadyExists("--name", what, remedy="another --name") from error

    def withdraw(self, run_id: str, at: float, forget: Callable[[], None]) -> bool:
        """Removes the job that ``add`` added ``at`` that time, unless it got a machine. Returns whether it is gone.

        ``forget`` is called if the queue has no job of that name, before anybody can add one.
        """
        with self._transaction() as connection:
            connection.execute("DELETE FROM jobs WHERE run_id = ? AND submitted_at = ? AND attempt = 0", (run_id, at))
            left = connection.execute("SELECT submitted_at FROM jobs WHERE run_id = ?", (run_id,)).fetchone()
            if left is None:
                forget()
                with suppress(OSError):
                    database.job_file(self._root, run_id).unlink()
            return left is None or left["submitted_at"] != at

    def requeue(self, run_id: str) -> None:
        """Puts an ended job at the end of its priority, with all of its restarts again."""
        self._write(
            f"UPDATE jobs SET state = 'PENDING', position = {_NEXT_POSITION}, ended_at = NULL, reason = '',"
            " exit_code = NULL, not_before = 0, restarts = 0, faults = 0, cancelling = 0"
            f" WHERE run_id = ? AND state NOT IN {_ACTIVE}",
            run_id,
        )
        self._keep(run_id)

    def ask(self, run_id: str, kind: str, notice_s: float = 0.0) -> int:
        with self._transaction() as connection:
            return _ask(connection, run_id, kind, notice_s)

    def take_back(self, request: int) -> bool:
        """Removes a request; returns False if the supervisor has taken it up."""
        return bool(self._write("DELETE FROM requests WHERE id = ? AND done_at IS NULL", request))

    def note(self, name: str, value: Any) -> None:
        """Writes a fact about this computer: its ``slots`` or its ``gpus``."""
        self._write("INSERT OR REPLACE INTO facts VALUES (?, ?)", name, json.dumps(value))

    # What everybody reads.

    def fact(self, name: str, default: Any = None) -> Any:
        """Returns a fact about this computer, or ``default`` if there is none that can be read."""
        try:
            return json.loads(self._rows("SELECT value FROM facts WHERE name = ?", name)[0]["value"])
        except (IndexError, ValueError, TypeError, RecursionError):
            return default

    def job(self, run_id: str) -> JobRow | None:
        rows = self._rows("SELECT * FROM jobs WHERE run_id = ?", run_id)
        return JobRow.from_row(rows[0]) if rows else None

    def jobs(self) -> list[JobRow]:
        """Returns all jobs: highest priority first, then order of submission. Skips rows without a run id."""
        return _values(JobRow.from_row, self._rows("SELECT * FROM jobs ORDER BY priority DESC, position"))

    def active(self) -> list[JobRow]:
        """Returns the jobs that have not ended, in the order that they would run."""
        sql = f"SELECT * FROM jobs WHERE state IN {_ACTIVE} ORDER BY priority DESC, position"
        return _values(JobRow.from_row, self._rows(sql))

    def attempts(self, run_id: str) -> list[AttemptRow]:
        sql = "SELECT * FROM attempts WHERE run_id = ? ORDER BY attempt"
        return _values(AttemptRow.from_row, self._rows(sql, run_id))

    def unsettled(self) -> list[AttemptRow]:
        """Returns the machines that run, or have ended and are not yet accounted for in their job's state."""
        return _values(AttemptRow.from_row, self._rows("SELECT * FROM attempts WHERE settled = 0 ORDER BY started_at"))

    def requests(self) -> list[VerbRequest]:
        return list(map(VerbRequest.from_row, self._rows("SELECT * FROM requests WHERE done_at IS NULL ORDER BY id")))

    def is_done(self, request: int) -> bool:
        return bool(self._rows("SELECT 1 FROM requests WHERE id = ? AND done_at IS NOT NULL", request))

    # What the supervisor writes.

    def finish_request(self, request: int) -> None:
        self._write("UPDATE requests SET done_at = ? WHERE id = ?", time.time(), request)

    def fire(self, run_id: str, fired: list[int], notice_s: float) -> None:
        """Makes a planned preemption a request, once. ``fired``: the indices of all that have fired."""
        with self._transaction() as connection:
            connection.execute("UPDATE jobs SET fired = ? WHERE run_id = ?", (json.dumps(fired), run_id))
            _ask(connection, run_id, "preempt", notice_s)
        self._keep(run_id)

    def start(self, attempt: AttemptRow) -> bool:
        """Gives a job a machine; returns False if the job was withdrawn meanwhile."""
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

    def update_attempt(self, attempt: AttemptRow, **changes: Any) -> None:
        sql = f"UPDATE attempts SET {', '.join(f'{name} = ?' for name in changes)} WHERE run_id = ? AND attempt = ?"
        self._write(sql, *changes.values(), attempt.run_id, attempt.attempt)

    def run_began(self, attempt: AttemptRow, at: float, setup_s: float) -> None:
        """Notes that the machine is set up and the job's own program runs."""
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

    def explain(self, job: JobRow, reason: str) -> None:
        """Notes why a job waits, for ``spotune queue``."""
        if job.reason != reason:
            self._write("UPDATE jobs SET reason = ? WHERE run_id = ?", reason, job.run_id)

    def mark_cancelling(self, run_id: str) -> None:
        self._write("UPDATE jobs SET cancelling = 1 WHERE run_id = ?", run_id)
        self._keep(run_id)

    def settle(self, run_id: str, verdict: Verdict, commit: str, at: float) -> None:
        """Sets a job's next state and accounts for all of its machines, in one step."""
        ended = None if verdict.state in ACTIVE else at
        with self._transaction() as connection:
            connection.execute("UPDATE attempts SET settled = 1 WHERE run_id = ?", (run_id,))
            connection.execute(
                "UPDATE jobs SET state = ?, reason = ?, exit_code = ?, not_before = ?, restarts = ?, faults = ?,"
                " last_commit = ?, ended_at = ? WHERE run_id = ?",
                (verdict.state, verdict.reason, verdict.exit_code, at + verdict.delay_s, verdict.restarts,
                 verdict.faults, commit, ended, run_id),
            )  # fmt: skip
        self._keep(run_id)


def _values(kind: Callable[[dict[str, Any]], Value | None], rows: list[dict[str, Any]]) -> list[Value]:
    return [value for row in rows if (value := kind(row)) is not None]


def _ask(connection: sqlite3.Connection, run_id: str, kind: str, notice_s: float) -> int:
    cursor = connection.execute(
        "INSERT INTO requests (run_id, kind, notice_s, made_at) VALUES (?, ?, ?, ?)",
        (run_id, kind, notice_s, time.time()),
    )
    return int(cursor.lastrowid or 0)
