"""The queue's second copy: each job's row, as ``kept/RUN.json``. A damaged ``queue.db`` is made anew from it.

It is written after each change that decides: a job is added, settled, cancelled or put back. A machine that was
started later has ``attempt.json`` in its own folder, ``jobs/RUN/ATTEMPT``, and is found again by its marker.
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from spotune.contracts.errors import InfraError
from spotune.contracts.keys import RUN_ID
from spotune.contracts.localstate import Log, log_line, read_as, read_object, write_state
from spotune.launch.local.database import TABLES
from spotune.launch.local.layout import AttemptFiles, Exit, Running
from spotune.launch.local.rows import Attempt, Job, sound_attempt

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
    return row if Job.from_row({**_EMPTY, **row}) else None


_EMPTY: dict[str, Any] = dict.fromkeys(_COLUMNS["jobs"])


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
