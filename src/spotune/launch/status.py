"""The state of runs: the engine's word, corrected by the bucket. The certificate rules.

``completed.json``: SUCCEEDED, whatever the engine says. The engine says SUCCEEDED without it: FAILED. ``paused.json``
and the engine has ended: PAUSED. ``cancelled.json``, the engine says FAILED, and there is no ``failed.json``:
CANCELLED. Else the engine's state.
"""

import difflib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from spotune.core.errors import BadRecord, InfraError, InputError, StoreError
from spotune.core.keys import RUN_ID, RUNS, Keys, attempt_number
from spotune.core.protocol import as_number
from spotune.core.records import Certificate, Progress, RunRecord, read_mark
from spotune.core.revisions import record_as_submitted, record_history
from spotune.core.store import Store
from spotune.launch.engine import ACTIVE, ANY, LOCAL, SKYPILOT, Infra, JobStatus, State, infra_of, is_infra
from spotune.launch.settings import Workspace

PATIENCE_S = 300.0
SILENT, ELSEWHERE = "no sign of life, and not in this machine's queue", "runs outside this machine's queue"
LAST_SEEN = "as last seen: "
_COLUMNS = "run_id state priority submitted_at started_at ended_at attempt recoveries step max_steps infra user reason"

Warn = Callable[[str], None]


class Outage:
    """An engine that does not answer, counted from the first error; what it runs goes on without it."""

    def __init__(self, patience_s: float = PATIENCE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._patience_s, self._clock = patience_s, clock
        self._since: float | None = None

    def bear(self, error: InfraError) -> bool:
        """Returns True for the first error of an outage. Re-raises once the outage exceeds ``patience_s``."""
        if self._since is None:
            self._since = self._clock()
            return True
        if self._clock() - self._since > self._patience_s:
            raise error
        return False

    def end(self) -> None:
        self._since = None


@dataclass
class Run:
    """One run as a verb found it: its state, and on demand its engine and records, each read once.

    ``found_by``: the engine that has the run, if ``find`` met it there.
    """

    workspace: Workspace
    status: JobStatus
    found_by: Infra | None = None

    @classmethod
    def find(cls, workspace: Workspace, run_id: str, clock: Callable[[], float] = time.time) -> "Run":
        """Finds a run in the engines, else in the bucket. Raises InputError with the nearest name."""
        for engine in workspace.engines():
            for job in engine.jobs([run_id]):
                return cls(workspace, certify_if_reachable(job, workspace.store(job.bucket)), engine)
        if RUN_ID.fullmatch(run_id) and (status := read_run(workspace.store(), run_id, clock())):
            return cls(workspace, heard_of(workspace, [status])[0])
        known = [job.run_id for job in workspace.infra(LOCAL).jobs()]
        names = {*known, *workspace.store().folders(RUNS)} - {run_id}  # the run's folder may exist, and be empty
        near = difflib.get_close_matches(run_id, sorted(names), n=1)
        raise InputError(run_id, "no such run", remedy=f"did you mean {near[0]}?" if near else "spotune queue -a")

    @classmethod
    def find_queued(cls, workspace: Workspace, run_id: str) -> "Run":
        """Finds a run that an engine within reach has. Raises InputError for a run that is only in the bucket."""
        run = cls.find(workspace, run_id)
        if run.engine is None:
            what = "is in the bucket, but not in this machine's queue"
            raise InputError(run_id, what, remedy=f"spotune train --from {run_id}, or go where it was submitted")
        return run

    def refresh(self) -> "Run":
        return Run.find(self.workspace, self.run_id)

    @property
    def run_id(self) -> str:
        return self.status.run_id

    @property
    def keys(self) -> Keys:
        return Keys(self.run_id)

    @property
    def store(self) -> Store:
        return self.workspace.store(self.status.bucket)

    @cached_property
    def engine(self) -> Infra | None:
        """The engine that has the run, or None if no engine within reach has it."""
        if self.found_by or not is_infra(self.status.infra):
            return self.found_by
        engine = self.workspace.infra(self.status.infra)
        return engine if engine.jobs([self.run_id], everyone=True) else None

    @cached_property
    def history(self) -> list[RunRecord]:
        """``run.json`` and all revisions, oldest first; empty if there is no record."""
        return record_history(self.store, self.keys)

    @property
    def record(self) -> RunRecord | None:
        """The record in force."""
        return self.history[-1] if self.history else None


def find_run(workspace: Workspace, run_id: str, clock: Callable[[], float] = time.time) -> JobStatus:
    return Run.find(workspace, run_id, clock).status


def as_row(status: JobStatus) -> dict[str, Any]:
    """Returns a row of ``queue --format json``."""
    return {name: getattr(status, name) for name in _COLUMNS.split()}


def list_runs(
    workspace: Workspace, everything: bool, warn: Warn, known: Callable[[list[JobStatus]], None]
) -> list[JobStatus]:
    """Returns the runs for ``queue``, engine by engine in the order that they would run.

    Args:
        everything: also runs that ended more than a day ago, runs of others, and runs that only the bucket knows.
        warn: gets a line for an engine or a bucket that does not answer, and for a run whose record cannot be read;
            these runs are left out.
        known: gets the engines' jobs before the bucket is read.
    """
    now = time.time()
    jobs = [job for engine in workspace.engines() for job in jobs_of(engine, everything, warn)]
    shown = [job for job in jobs if everything or job.state in ACTIVE or (job.ended_at or 0.0) >= now - 86400]
    known(shown)

    def read(run_id: str) -> JobStatus | None:
        try:
            return read_run(workspace.store(), run_id, now)
        except (InputError, StoreError) as error:  # unreadable, a folder instead of a file, a link to itself
            warn(f"{run_id} is left out: {error}")
            return None

    with ThreadPoolExecutor(16) as pool:
        rows = list(pool.map(lambda job: _certified(workspace, job), shown))
        if everything:
            names: set[str] = set()
            try:
                names = {name for name in workspace.store().folders(RUNS) if RUN_ID.fullmatch(name)}
            except StoreError as error:
                warn(f"runs that only the bucket knows are not listed: {error}")
            names -= {job.run_id for job in jobs if job.bucket == workspace.env.bucket}
            rows += heard_of(workspace, [status for status in pool.map(read, sorted(names)) if status])
    return rows


def _certified(workspace: Workspace, job: JobStatus) -> JobStatus:
    """As ``certify_if_reachable``, for a job whose bucket or folder in it may be gone."""
    try:
        store = workspace.store(job.bucket)
        if job.state in ACTIVE and job.attempt and not store.exists(Keys(job.run_id).run):
            gone = f"its folder is gone from {store.url} (spotune cancel {job.run_id})"
            return replace(job, reason=job.reason or gone)
    except (InputError, StoreError) as error:
        return replace(job, reason=job.reason or f"as the queue says: {error}")
    return certify_if_reachable(job, store)


def heard_of(workspace: Workspace, rows: list[JobStatus]) -> list[JobStatus]:
    """Corrects the state of runs that only the bucket knows, and that have no end, by SkyPilot's word.

    A run that waits for a machine gives no sign of life. If SkyPilot cannot be asked, such a run keeps the state in
    which it was last seen.
    """
    unsure = [
        row
        for row in rows
        if row.reason.startswith((SILENT, ELSEWHERE)) and is_infra(row.infra) and infra_of(row.infra) == SKYPILOT
    ]
    if not unsure:
        return rows
    try:
        jobs = workspace.infra(ANY).jobs([row.run_id for row in unsure], everyone=True)
    except InfraError as error:
        states: dict[bool, State] = {True: "RUNNING", False: "PENDING"}  # with and without an attempt
        heard = {
            row.run_id: replace(row, state=states[row.attempt > 0], reason=f"{LAST_SEEN}{error}")
            for row in unsure
            if row.state not in ACTIVE
        }
    else:
        store = workspace.store()
        lost = "no sign of life, and neither in this machine's queue nor in SkyPilot's"
        heard = {row.run_id: replace(row, reason=lost) for row in unsure if row.reason.startswith(SILENT)}
        heard |= {job.run_id: certify_if_reachable(job, store) for job in jobs if job.bucket == store.url}
    return [heard.get(row.run_id, row) for row in rows]


def jobs_of(engine: Infra, everyone: bool, warn: Warn | None) -> list[JobStatus]:
    """Returns an engine's jobs. If SkyPilot does not answer: none, and a line to ``warn``; without it raises."""
    try:
        return engine.jobs(everyone=everyone)
    except InfraError as error:
        if warn is None or engine.name == LOCAL:
            raise
        warn(str(error))
        return []


def certify_if_reachable(job: JobStatus, store: Store) -> JobStatus:
    """As ``certify``. If the bucket cannot be read from here, returns the engine's word with the reason beside it."""
    try:
        return certify(job, store)
    except (InputError, StoreError) as error:
        return replace(job, reason=job.reason or f"as the queue says: {error}")


def certify(job: JobStatus, store: Store) -> JobStatus:
    """Returns the engine's word, corrected by the bucket."""
    keys = Keys(job.run_id)
    if job.step is None and job.attempt:
        job = _with_progress(job, _progress(store, keys)[0])
    if (data := store.read(keys.completed)) is not None:
        try:
            done = Certificate.from_bytes(data, keys.completed)
            job = replace(job, ended_at=job.ended_at or done.completed_at or None, step=done.step or job.step)
        except BadRecord:
            pass  # an unreadable certificate is a certificate too
        return replace(job, state="SUCCEEDED", reason="", exit_code=0, by_infra=False)
    if job.state == "SUCCEEDED":
        return replace(job, state="FAILED", reason="ended without a certificate")
    if job.state not in (*ACTIVE, "CANCELLED") and (mark := read_mark(store, keys.paused)):
        return replace(job, state="PAUSED", reason=mark.reason)
    if job.state == "FAILED" and (mark := read_mark(store, keys.failed)):  # the run's own word, not the engine's
        return replace(job, reason=mark.reason, exit_code=mark.exit_code, by_infra=False)
    if job.state == "FAILED" and (mark := read_mark(store, keys.cancelled)):  # the verb died before it told the engine
        return replace(job, state="CANCELLED", reason=mark.reason, by_infra=False)
    return job


def read_run(store: Store, run_id: str, now: float) -> JobStatus | None:
    """Returns the state of a run by the bucket alone, or None if it has no such run.

    Raises BadRecord if there is a run, but its record is missing or cannot be read.
    """
    keys = Keys(run_id)
    record = record_as_submitted(store, keys)
    if record is None:
        if store.keys(keys.attempts) or store.keys(keys.lost):
            raise BadRecord(f"{keys.run}: missing, though there are attempts")
        # A bare launch whose input was bad has left a mark and no record.
        status = JobStatus(run_id, "FAILED", 0, user="", infra="by hand", submitted_at=0.0, bucket=store.url)
        failed = _with_mark(status, store, "FAILED", keys.failed)
        return failed and replace(failed, submitted_at=failed.ended_at or 0.0)
    attempts = sum(attempt_number(name) is not None for name in store.folders(keys.attempts))
    seen, why = _progress(store, keys)
    status = JobStatus(
        run_id=run_id,
        state="PENDING",
        priority=record.priority,
        user=record.user,
        infra=record.infra or "by hand",
        submitted_at=record.created_at,
        attempt=attempts,
        recoveries=max(0, attempts - 1),
        bucket=store.url,
    )
    status = certify(_with_progress(status, seen), store)
    if status.state == "SUCCEEDED":
        return status
    ends: dict[State, str] = {"FAILED": keys.failed, "CANCELLED": keys.cancelled, "PAUSED": keys.paused}
    for state, key in ends.items():
        if ended := _with_mark(status, store, state, key):
            return ended
    if seen and now - seen.at < 120:  # progress.json is rewritten at most every 15 s
        return replace(status, state="RUNNING", reason=ELSEWHERE)
    return replace(status, state="FAILED", reason=f"{SILENT}{why}")


def _with_mark(status: JobStatus, store: Store, state: State, key: str) -> JobStatus | None:
    """Returns the status as the mark at ``key`` says, or None if there is no mark."""
    if mark := read_mark(store, key):
        return replace(status, state=state, reason=mark.reason, ended_at=mark.at or None, exit_code=mark.exit_code)
    return None


def _progress(store: Store, keys: Keys) -> tuple[Progress | None, str]:
    """Returns ``progress.json``, None if there is none, and why it cannot be read."""
    try:
        data = store.read(keys.progress)
        return (None if data is None else Progress.from_bytes(data, keys.progress)), ""
    except BadRecord as error:
        return None, f": {error}"


def _with_progress(job: JobStatus, seen: Progress | None) -> JobStatus:
    if seen is None:
        return job
    loss = as_number(seen.loss)
    return replace(job, step=seen.step, max_steps=seen.max_steps or None, loss=loss, phase=seen.phase)
