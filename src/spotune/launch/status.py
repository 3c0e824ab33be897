"""What state a run is in: the engine's word, corrected by what the bucket holds. The certificate rules."""

import difflib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from spotune.core.errors import BadRecord, InfraError, InputError, StoreError
from spotune.core.keys import RUN_ID, RUNS, Keys, attempt_number
from spotune.core.protocol import as_number
from spotune.core.records import Certificate, Progress, read_mark
from spotune.core.revisions import record_as_submitted
from spotune.core.store import Store
from spotune.launch.engine import ACTIVE, ANY, LOCAL, SKYPILOT, Infra, JobStatus, State, infra_of, is_infra
from spotune.launch.settings import Workspace

# An engine that does not answer for a while: what it runs goes on without it.

PATIENCE_S = 300.0


class Outage:
    """Counts from the first error since the engine last answered."""

    def __init__(self, patience_s: float = PATIENCE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._patience_s, self._clock = patience_s, clock
        self._since: float | None = None

    def bear(self, error: InfraError) -> bool:
        """Whether this is the first error of the outage; raises it once patience is over."""
        if self._since is None:
            self._since = self._clock()
            return True
        if self._clock() - self._since > self._patience_s:
            raise error
        return False

    def end(self) -> None:
        """It has answered."""
        self._since = None


# What state a run is in: the engine's word, corrected by what the bucket holds. The certificate rules.
#
# ``completed.json`` there: SUCCEEDED whatever the engine says. The engine says SUCCEEDED and there is none:
# FAILED. ``paused.json`` and the engine has ended: PAUSED. ``cancelled.json`` and the engine says FAILED, but the run
# itself does not: CANCELLED. Else the engine's state.

UNCERTIFIED = "ended without a certificate"
SILENT, ELSEWHERE = "no sign of life, and not in this machine's queue", "runs outside this machine's queue"
LOST = "no sign of life, and neither in this machine's queue nor in SkyPilot's"
LAST_SEEN = "as last seen: "
RECENT_S = 86400.0
HEARTBEAT_S = 120.0  # progress.json is rewritten at most every 15 s
_COLUMNS = "run_id state priority submitted_at started_at ended_at attempt recoveries step max_steps infra user reason"


def as_row(status: JobStatus) -> dict[str, Any]:
    """A row of ``queue --format json``."""
    return {name: getattr(status, name) for name in _COLUMNS.split()}


def list_runs(
    workspace: Workspace,
    everything: bool,
    clock: Callable[[], float] = time.time,
    warn: Callable[[str], None] | None = None,
    known: Callable[[list[JobStatus]], None] | None = None,
) -> list[JobStatus]:
    """Runs as ``queue`` shows them, engine by engine in the order that they would run.

    Args:
        everything: also those that ended more than a day ago, those of others, and those that only the bucket knows.
        warn: is told of an engine or a bucket that does not answer, whose runs are then not listed, and of a run whose
            record cannot be read; without it that is an error.
        known: gets what the engines say, before the bucket is asked.
    """
    since = clock() - RECENT_S
    jobs = [job for engine in workspace.engines() for job in jobs_of(engine, everything, warn)]
    shown = [job for job in jobs if everything or job.state in ACTIVE or (job.ended_at or 0.0) >= since]
    if known:
        known(shown)
    with ThreadPoolExecutor(16) as pool:
        rows = list(pool.map(lambda job: _certified(workspace, job), shown))
        if everything:
            names = set(_runs_in_bucket(workspace, warn))
            names -= {job.run_id for job in jobs if job.bucket == workspace.env.bucket}
            found = pool.map(lambda run_id: _read_one(workspace.store(), run_id, clock(), warn), sorted(names))
            rows += heard_of(workspace, [status for status in found if status])
    return rows


def _runs_in_bucket(workspace: Workspace, warn: Callable[[str], None] | None) -> list[str]:
    """Of a bucket that does not answer ``warn`` is told; raises InputError for one that is not there."""
    try:
        return [name for name in workspace.store().folders(RUNS) if RUN_ID.fullmatch(name)]
    except StoreError as error:
        if warn is None:
            raise
        warn(f"runs that only the bucket knows are not listed: {error}")
        return []


def _read_one(store: Store, run_id: str, now: float, warn: Callable[[str], None] | None) -> JobStatus | None:
    try:
        return read_run(store, run_id, now)
    except (InputError, StoreError) as error:  # unreadable, a folder where a file belongs, a link to itself
        if warn is None:
            raise
        warn(f"{run_id} is left out: {error}")
        return None


def _certified(workspace: Workspace, job: JobStatus) -> JobStatus:
    """The engine's word, corrected by the bucket, which may lack the run's folder by now."""
    try:
        store = workspace.store(job.bucket)
        if job.state in ACTIVE and job.attempt and not store.exists(Keys(job.run_id).run):
            return replace(
                job, reason=job.reason or f"its folder is gone from {store.url} (spotune cancel {job.run_id})"
            )
    except (InputError, StoreError) as error:
        return replace(job, reason=job.reason or f"as the queue says: {error}")
    return certify_if_reachable(job, store)


def find_run(workspace: Workspace, run_id: str, clock: Callable[[], float] = time.time) -> JobStatus:
    """One run; raises InputError, naming the nearest known one, when nobody knows it."""
    for engine in workspace.engines():
        for job in engine.jobs([run_id]):
            return certify_if_reachable(job, workspace.store(job.bucket))
    if RUN_ID.fullmatch(run_id) and (status := read_run(workspace.store(), run_id, clock())):
        return heard_of(workspace, [status])[0]
    known = [job.run_id for job in workspace.infra(LOCAL).jobs()]
    names = {*known, *workspace.store().folders(RUNS)} - {run_id}  # a folder of that name may be there, and empty
    near = difflib.get_close_matches(run_id, sorted(names), n=1)
    raise InputError(run_id, "no such run", remedy=f"did you mean {near[0]}?" if near else "spotune queue -a")


def heard_of(workspace: Workspace, rows: list[JobStatus]) -> list[JobStatus]:
    """Runs that only the bucket knows, with SkyPilot's word on those of its that have no end.

    One that waits for a machine, its first or its next, gives no sign of life: where SkyPilot cannot be asked that is
    no verdict, and it stays in the state that it was last seen in.
    """
    unsure = [row for row in rows if row.reason.startswith((SILENT, ELSEWHERE)) and _is_skypilots(row)]
    if not unsure:
        return rows
    try:
        found = workspace.infra(ANY).jobs([row.run_id for row in unsure], everyone=True)
    except InfraError as error:
        said = {row.run_id: _as_last_seen(row, str(error)) for row in unsure}
    else:
        store = workspace.store()
        said = {row.run_id: replace(row, reason=LOST) for row in unsure if row.reason.startswith(SILENT)}
        said |= {job.run_id: certify_if_reachable(job, store) for job in found if job.bucket == store.url}
    return [said.get(row.run_id, row) for row in rows]


def _is_skypilots(row: JobStatus) -> bool:
    return is_infra(row.infra) and infra_of(row.infra) == SKYPILOT


def _as_last_seen(row: JobStatus, why: str) -> JobStatus:
    if row.state in ACTIVE:
        return row
    return replace(row, state="RUNNING" if row.attempt else "PENDING", reason=f"{LAST_SEEN}{why}")


def jobs_of(engine: Infra, everyone: bool, warn: Callable[[str], None] | None) -> list[JobStatus]:
    """An engine's jobs; none of one that does not answer, of which ``warn`` is told. Without it that is an error."""
    try:
        return engine.jobs(everyone=everyone)
    except InfraError as error:
        if warn is None or engine.name == LOCAL:
            raise
        warn(str(error))
        return []


def certify_if_reachable(job: JobStatus, store: Store) -> JobStatus:
    """As ``certify``; where the bucket cannot be read from here, the engine's word with the reason beside it."""
    try:
        return certify(job, store)
    except (InputError, StoreError) as error:
        return replace(job, reason=job.reason or f"as the queue says: {error}")


def certify(job: JobStatus, store: Store) -> JobStatus:
    """The engine's word, corrected by the bucket."""
    keys = Keys(job.run_id)
    if job.step is None and job.attempt:
        job = _with_progress(job, store)
    if (data := store.read(keys.completed)) is not None:
        done = _read_certificate(data, keys.completed)
        ended_at = job.ended_at or (done and done.completed_at) or None
        step = (done and done.step) or job.step
        return replace(job, state="SUCCEEDED", reason="", exit_code=0, by_infra=False, ended_at=ended_at, step=step)
    if job.state == "SUCCEEDED":
        return replace(job, state="FAILED", reason=UNCERTIFIED)
    if job.state not in (*ACTIVE, "CANCELLED") and (mark := read_mark(store, keys.paused)):
        return replace(job, state="PAUSED", reason=mark.reason)
    if job.state == "FAILED" and (mark := read_mark(store, keys.failed)):  # the run's own word, not the engine's
        return replace(job, reason=mark.reason, exit_code=mark.exit_code, by_infra=False)
    if job.state == "FAILED" and (mark := read_mark(store, keys.cancelled)):  # and the engine was not told any more
        return replace(job, state="CANCELLED", reason=mark.reason, by_infra=False)
    return job


def read_run(store: Store, run_id: str, now: float) -> JobStatus | None:
    """A run that no engine of this machine knows, as far as the bucket tells; None when it is not there.

    Raises BadRecord where there is a run, but no record of it that can be read.
    """
    keys = Keys(run_id)
    record = record_as_submitted(store, keys)
    if record is None:
        if store.keys(keys.attempts) or store.keys(keys.lost):
            raise BadRecord(f"{keys.run}: missing, though there are attempts")
        return _never_begun(store, keys)
    attempts = sum(attempt_number(name) is not None for name in store.folders(keys.attempts))
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
    status = certify(_with_progress(status, store), store)
    if status.state == "SUCCEEDED":
        return status
    ends: tuple[tuple[State, str], ...] = (
        ("FAILED", keys.failed),
        ("CANCELLED", keys.cancelled),
        ("PAUSED", keys.paused),
    )
    for state, key in ends:
        if mark := read_mark(store, key):
            ended_at = mark.at or None
            return replace(status, state=state, reason=mark.reason, ended_at=ended_at, exit_code=mark.exit_code)
    seen, why = _progress(store, keys)
    if seen and now - seen.at < HEARTBEAT_S:
        return replace(status, state="RUNNING", reason=ELSEWHERE)
    return replace(status, state="FAILED", reason=f"{SILENT}{why}")


def _never_begun(store: Store, keys: Keys) -> JobStatus | None:
    """A bare launch whose input was bad: it has left a mark, and no record."""
    mark = read_mark(store, keys.failed)
    if mark is None:
        return None
    return JobStatus(
        run_id=keys.run_id,
        state="FAILED",
        priority=0,
        user="",
        infra="by hand",
        submitted_at=mark.at,
        ended_at=mark.at,
        reason=mark.reason,
        exit_code=mark.exit_code,
        bucket=store.url,
    )


def _progress(store: Store, keys: Keys) -> tuple[Progress | None, str]:
    """The heartbeat, or why there is none."""
    try:
        data = store.read(keys.progress)
        return (None if data is None else Progress.from_bytes(data, keys.progress)), ""
    except BadRecord as error:
        return None, f": {error}"


def _with_progress(job: JobStatus, store: Store) -> JobStatus:
    seen, _ = _progress(store, Keys(job.run_id))
    if seen is None:
        return job
    loss = as_number(seen.loss)
    return replace(job, step=seen.step, max_steps=seen.max_steps or None, loss=loss, phase=seen.phase)


def _read_certificate(data: bytes, key: str) -> Certificate | None:
    """A certificate is one by being there: of one that cannot be read nothing else is known."""
    try:
        return Certificate.from_bytes(data, key)
    except BadRecord:
        return None
