"""The durable queue: one SQLite file (WAL). Verbs add jobs and requests; the supervisor does the rest."""

import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from spotune.core.errors import InfraError, Taken
from spotune.core.io import Log, log_line
from spotune.launch.engine import ACTIVE, Submission
from spotune.launch.local.database import (
    Attempt,
    Job,
    Request,
    Verdict,
    connect,
    describe,
    is_passing,
    job_file,
    keep_all,
    keep_job,
    only_one_prepares,
    prepare,
    restore_jobs,
)

Value = TypeVar("Value")
_ACTIVE = "(" + ", ".join(f"'{state}'" for state in ACTIVE) + ")"
_NEXT_POSITION = "(SELECT COALESCE(MAX(position), 0) + 1 FROM jobs)"


def _failed(path: Path, error: sqlite3.Error) -> InfraError:
    """A full disk or a lock is a matter of now; any other error says that the file is damaged."""
    return InfraError(describe(path, error) + ("" if is_passing(error) else " (any verb makes it anew: spotune queue)"))


class Queue:
    """Every method opens what it needs and leaves nothing open: verbs and the supervisor share the file."""

    def __init__(self, path: Path) -> None:
        self._path, self._root = path, path.parent

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(connect(self._path)) as connection:
                connection.execute("BEGIN IMMEDIATE")
                try:
                    yield connection
                except BaseException:
                    with suppress(sqlite3.Error):  # a full disk has rolled it back already
                        connection.execute("ROLLBACK")
                    raise
                connection.execute("COMMIT")
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            raise _failed(self._path, error) from error

    def create(self, log: Log = log_line) -> None:
        """Makes the queue where there is none, migrates an older one, and makes a damaged one anew, each in a line.

        Raises NewerState for one of a newer spotune.
        """
        with only_one_prepares(self._path):
            prepare(self._path, partial(self._fill, log), log)
            self._path.chmod(0o600)

    def _fill(self, log: Log, connection: sqlite3.Connection, version: int | None) -> None:
        if version is None:
            restore_jobs(self._root, connection, log)
        elif version < 1:
            keep_all(self._root, connection, log)

    def _keep(self, run_id: str) -> None:
        """Writes the job's row a second time. Without it the queue goes on: it is only read if ``queue.db`` is lost."""
        try:
            for row in self._rows("SELECT * FROM jobs WHERE run_id = ?", run_id):
                keep_job(self._root, row)
        except (OSError, InfraError) as error:
            log_line(f"{run_id}: its copy of the queue's row is not written: {error}")

    def _rows(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        try:
            with closing(connect(self._path)) as connection:
                return connection.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise _failed(self._path, error) from error

    # What the verbs write.

    def add(
        self, submission: Submission, bucket: str, before: Callable[[], None] = lambda: None, at: float | None = None
    ) -> None:
        """A new job at the end of its priority, submitted ``at`` (now); raises Taken for a run id that it has.

        ``before`` is called before anybody can see the job, and not for one that is refused.
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
                before()
            self._keep(submission.run_id)
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
                with suppress(OSError):
                    job_file(self._root, run_id).unlink()
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
        self._keep(run_id)

    def ask(self, run_id: str, kind: str, notice_s: float = 0.0) -> int:
        """A request to the supervisor; returns its id."""
        with self._transaction() as connection:
            return _ask(connection, run_id, kind, notice_s)

    def take_back(self, request: int) -> bool:
        """Removes a request that was not taken up; returns False for one that was."""
        with self._transaction() as connection:
            return bool(
                connection.execute("DELETE FROM requests WHERE id = ? AND done_at IS NULL", (request,)).rowcount
            )

    def note(self, name: str, value: Any) -> None:
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    # What everybody reads.

    def fact(self, name: str, default: Any = None) -> Any:
        """A fact of this machine; ``default`` where there is none that can be read."""
        try:
            return json.loads(self._rows("SELECT value FROM facts WHERE name = ?", name)[0]["value"])
        except (IndexError, ValueError, TypeError, RecursionError):
            return default

    def job(self, run_id: str) -> Job | None:
        rows = self._rows("SELECT * FROM jobs WHERE run_id = ?", run_id)
        return Job.from_row(rows[0]) if rows else None

    def jobs(self) -> list[Job]:
        """All jobs: highest priority first, then order of submission. A row without a run id is passed over."""
        return _values(Job.from_row, self._rows("SELECT * FROM jobs ORDER BY priority DESC, position"))

    def active(self) -> list[Job]:
        """Jobs that have not ended, in the order that they would run."""
        sql = f"SELECT * FROM jobs WHERE state IN {_ACTIVE} ORDER BY priority DESC, position"
        return _values(Job.from_row, self._rows(sql))

    def attempts(self, run_id: str) -> list[Attempt]:
        sql = "SELECT * FROM attempts WHERE run_id = ? ORDER BY attempt"
        return _values(Attempt.from_row, self._rows(sql, run_id))

    def unsettled(self) -> list[Attempt]:
        """Machines whose job does not know yet what became of them: running or just ended."""
        return _values(Attempt.from_row, self._rows("SELECT * FROM attempts WHERE settled = 0 ORDER BY started_at"))

    def requests(self) -> list[Request]:
        rows = self._rows("SELECT * FROM requests WHERE done_at IS NULL ORDER BY id")
        return [Request.from_row(row) for row in rows]

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
        self._keep(run_id)

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
        self._keep(run_id)

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
        self._keep(run_id)


def _values(kind: Callable[[sqlite3.Row], Value | None], rows: Sequence[sqlite3.Row]) -> list[Value]:
    return [value for row in rows if (value := kind(row)) is not None]


def _ask(connection: sqlite3.Connection, run_id: str, kind: str, notice_s: float) -> int:
    cursor = connection.execute(
        "INSERT INTO requests (run_id, kind, notice_s, made_at) VALUES (?, ?, ?, ?)",
        (run_id, kind, notice_s, time.time()),
    )
    return int(cursor.lastrowid or 0)
