"""SkyPilot's managed jobs and their logs."""

import io
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TextIO

from spotune.core.errors import InfraError
from spotune.core.io import MOST_CHARS
from spotune.launch.engine import JobStatus, PaidInterval, State
from spotune.launch.skypilot import client
from spotune.launch.skypilot.client import attempts_in, begins, deciding, exit_code, lines_of, said
from spotune.launch.status import Outage

# SkyPilot's managed jobs as runs, and its history of clusters as paid intervals. Pure.

# SkyPilot's managed jobs as runs: pure. Several jobs of one name, a run and its resumes, are one run.

MARK = "spotune"  # in a task's metadata: whose run it is, and where it keeps its state
# What is asked of each job: SkyPilot's default leaves out the half of it, all of it holds whole task files.
FIELDS = (
    "job_id", "task_id", "job_name", "status", "schedule_state", "submitted_at", "start_at", "end_at", "recovery_count",
    "failure_reason", "details", "cloud", "region", "zone", "priority", "user_name", "metadata", "current_cluster_name",
    "cluster_name_on_cloud",
)  # fmt: skip
_STATES: dict[str, State] = {
    "PENDING": "PENDING",
    "SUBMITTED": "PENDING",
    "STARTING": "STARTING",
    "RUNNING": "RUNNING",
    "WINDING_DOWN": "RUNNING",
    "RECOVERING": "RECOVERING",
    "CANCELLING": "RUNNING",
    "SUCCEEDED": "SUCCEEDED",
    "CANCELLED": "CANCELLED",
}
_FAILURES = {
    "FAILED_SETUP": "setup ",
    "FAILED_NO_RESOURCE": "no machine could be had: ",
    "FAILED_PRECHECKS": "refused: ",
    "FAILED_CONTROLLER": "SkyPilot's controller failed: ",
}
_BY_INFRA = ("FAILED_NO_RESOURCE", "FAILED_PRECHECKS", "FAILED_CONTROLLER")
_CODES = re.compile(r"exit codes? \[?(\d+(?:, \d+)*)\]?")
_ENDED = ("SUCCEEDED", "CANCELLED")


@dataclass(frozen=True)
class ManagedJob:
    """One managed job of SkyPilot, as far as we look at it. Times are epoch seconds."""

    id: int
    run_id: str
    status: str
    submitted_at: float
    start_at: float | None = None
    end_at: float | None = None
    recoveries: int = 0
    failure_reason: str = ""
    details: str = ""
    infra: str = ""  # where it is or was last: slurm/lab/spot
    region: str = ""
    priority: int | None = None
    user: str = ""
    cluster: str = ""  # as SkyPilot calls it; the same in every attempt
    cluster_on_cloud: str = ""  # as the infrastructure calls it
    marks: Mapping[str, Any] | None = None  # what we wrote into its metadata; None: not one of ours

    @property
    def is_ended(self) -> bool:
        return self.status in _ENDED or self.status.startswith("FAILED")

    @property
    def attempts(self) -> int:
        """Machines it was given so far."""
        began = self.start_at is not None or self.status in ("STARTING", "RUNNING", "RECOVERING", "WINDING_DOWN")
        return self.recoveries + 1 if began or self.recoveries else 0

    @property
    def exit_code(self) -> int | None:
        """Of the program, as SkyPilot tells it: of several machines the one that failed by itself."""
        if self.status == "SUCCEEDED":
            return 0
        return exit_code_in(self.failure_reason)


def managed_job(record: Any) -> ManagedJob:
    """From a ManagedJobRecord."""
    places = [_given(getattr(record, name, None)) for name in ("cloud", "region", "zone")]
    metadata = record.metadata if isinstance(record.metadata, Mapping) else {}
    marks = metadata.get(MARK)
    return ManagedJob(
        id=record.job_id,
        run_id=record.job_name or "",
        status=getattr(record.status, "value", str(record.status)),
        submitted_at=record.submitted_at or 0.0,
        start_at=record.start_at,
        end_at=record.end_at,
        recoveries=record.recovery_count or 0,
        failure_reason=record.failure_reason or "",
        details=record.details or "",
        infra="/".join([places[0].lower(), *places[1:]]).rstrip("/") if places[0] else "",
        region=places[1],
        priority=record.priority,
        user=record.user_name or "",
        cluster=record.current_cluster_name or f"{record.job_name}-{record.job_id}",
        cluster_on_cloud=_given(record.cluster_name_on_cloud),
        marks=marks if isinstance(marks, Mapping) else None,
    )


def run_status(jobs: Sequence[ManagedJob], known: JobStatus | None = None) -> JobStatus:
    """The run that these jobs are: the newest decides its state, their attempts add up.

    ``known``: how it was submitted from here; else as the jobs' own marks say.
    """
    ordered = sorted(jobs, key=lambda job: job.id)
    first, newest = ordered[0], ordered[-1]
    marks = newest.marks or {}
    attempts = sum(job.attempts for job in ordered)
    asked = known.priority if known else marks.get("priority")
    return JobStatus(
        run_id=newest.run_id,
        state=state_of(newest),
        priority=newest.priority if newest.priority is not None else int(asked or 0),
        user=known.user if known else str(marks.get("user") or newest.user),
        infra=newest.infra or (known.infra if known else str(marks.get("infra") or "")),
        submitted_at=known.submitted_at if known else first.submitted_at,
        started_at=min((job.start_at for job in ordered if job.start_at), default=None),
        ended_at=newest.end_at if newest.is_ended else None,
        attempt=attempts,
        recoveries=max(0, attempts - 1),
        reason=reason_of(newest),
        exit_code=newest.exit_code,
        by_infra=newest.status in _BY_INFRA,
        bucket=known.bucket if known else str(marks.get("bucket") or ""),
    )


def state_of(job: ManagedJob) -> State:
    return "FAILED" if job.status.startswith("FAILED") else _STATES.get(job.status, "RUNNING")


def reason_of(job: ManagedJob) -> str:
    """Why it stands as it does, in one line without SkyPilot's advice to look elsewhere."""
    if job.status == "CANCELLING":
        return "being cancelled"
    if job.status == "CANCELLED":
        return "cancelled"
    if job.status in ("PENDING", "STARTING", "RECOVERING"):
        return _line(job.details)
    if not job.status.startswith("FAILED"):
        return ""
    prefix = _FAILURES.get(job.status, "")
    code = job.exit_code
    if code is not None:
        return f"{prefix if job.status == 'FAILED_SETUP' else ''}exited with code {code}"
    return f"{prefix}{_line(job.failure_reason)}"


def exit_code_in(text: str) -> int | None:
    found = _CODES.search(text)
    return deciding(int(code) for code in found[1].split(", ")) if found else None


def by_run(jobs: Iterable[ManagedJob]) -> list[list[ManagedJob]]:
    """The jobs of each run together: a name means one run in one bucket, others may use it in theirs."""
    found: dict[tuple[str, str], list[ManagedJob]] = {}
    for job in jobs:
        found.setdefault((job.run_id, str((job.marks or {}).get("bucket"))), []).append(job)
    return list(found.values())


def _line(text: str) -> str:
    """One line, without the name of the exception and without ``To see the details, run: …``."""
    text = re.split(r"\.?\s*To (?:see the (?:details|job error)|fix: )", " ".join(text.split()))[0]
    text = re.sub(r"^\[sky\.exceptions\.\w+\] ", "", text)
    return text.removeprefix("Recovering: ").removeprefix("Failure: ")


def _given(value: Any) -> str:
    return "" if value in (None, "-", "") else str(value)


# SkyPilot's history of clusters as paid intervals: pure. One row a machine that a managed job was given.
#
# What was paid is in ``cost_report``, by the cluster's name ``<job>-<id>``; why each machine went is in the job's
# events, by time. Prices are never taken from here: SkyPilot looks them up anew each time it is asked.

_SLACK_S = 5.0  # a machine's end is noted before or after the event that tells of it


@dataclass(frozen=True)
class Event:
    """A change of a managed job's status, as SkyPilot keeps it."""

    at: float
    status: str
    reason: str = ""


@dataclass(frozen=True)
class Usage:
    """From when to when a cluster was paid for, epoch seconds; ``ended_at`` None: still."""

    cluster: str
    started_at: float
    ended_at: float | None
    nodes: int = 1
    cloud: str = ""
    region: str = ""
    zone: str = ""
    instance_type: str = ""
    accelerators: str = ""
    use_spot: bool = False


def usages(row: Mapping[str, Any]) -> list[Usage]:
    """From a row of ``cost_report``."""
    resources = row.get("resources")
    found = Usage(
        cluster=str(row.get("name") or ""),
        started_at=0.0,
        ended_at=None,
        nodes=int(row.get("num_nodes") or 1),
        cloud=str(getattr(resources, "cloud", None) or row.get("cloud") or "").lower(),
        region=str(getattr(resources, "region", None) or row.get("region") or ""),
        zone=str(getattr(resources, "zone", None) or ""),
        instance_type=str(getattr(resources, "instance_type", None) or ""),
        accelerators=accelerators_of(getattr(resources, "accelerators", None)),
        use_spot=bool(getattr(resources, "use_spot", False)),
    )
    spans = row.get("usage_intervals") or []
    return [replace(found, started_at=float(began), ended_at=_time(ended)) for began, ended in spans]


def accelerators_of(found: Any) -> str:
    """``{"L4": 1}`` -> ``L4:1``; empty for none."""
    if not isinstance(found, Mapping) or not found:
        return ""
    name, count = next(iter(found.items()))
    return f"{name}:{int(count) if float(count).is_integer() else count}"


def intervals(
    run_id: str,
    jobs: Sequence[ManagedJob],
    used: Iterable[Usage],
    events: Mapping[int, Sequence[Event]],
    preemptible: Sequence[str] = (),
) -> list[PaidInterval]:
    """The machines of a run, oldest first.

    Args:
        events: by managed job.
        preemptible: Slurm partitions, ``CLUSTER/PARTITION``, that count as spot: Slurm itself knows no such thing.
    """
    rows: list[PaidInterval] = []
    by_cluster: dict[str, list[Usage]] = {}
    for usage in used:
        by_cluster.setdefault(usage.cluster, []).append(usage)
    for job in jobs:
        spans = sorted(by_cluster.get(job.cluster, ()), key=lambda usage: usage.started_at)
        for index, usage in enumerate(spans):
            following = spans[index + 1].started_at if index + 1 < len(spans) else None
            reason, code = _end(usage, following, job, events.get(job.id, ()))
            partition = f"{usage.region}/{usage.zone}"
            rows.append(
                PaidInterval(
                    run_id=run_id,
                    started_at=usage.started_at,
                    ended_at=usage.ended_at,
                    infra=usage.cloud,
                    region=usage.region,
                    zone=usage.zone,
                    instance_type=usage.instance_type,
                    accelerators=usage.accelerators,
                    use_spot=usage.use_spot or (usage.cloud == "slurm" and partition in preemptible),
                    nodes=usage.nodes,
                    end_reason=reason,
                    exit_code=code,
                )
            )
    return sorted(rows, key=lambda row: row.started_at)


def _end(usage: Usage, following: float | None, job: ManagedJob, events: Sequence[Event]) -> tuple[str, int | None]:
    """(why the machine went, exit code of the program): what the first end within its time says."""
    until = following if following is not None else float("inf")
    for event in sorted(events, key=lambda event: event.at):
        if not usage.started_at <= event.at < until + _SLACK_S:
            continue
        if event.status == "RECOVERING":
            return _of_recovery(event.reason)
        if event.status == "SUCCEEDED":
            return "exited", 0
        if event.status in ("CANCELLED", "CANCELLING"):
            return "cancelled", None
        if event.status.startswith("FAILED"):
            return "exited", exit_code_in(event.reason)
    if usage.ended_at is None:
        return "", None
    if following is None and job.is_ended:
        return ("cancelled", None) if job.status == "CANCELLED" else ("exited", job.exit_code)
    return "lost", None


def _of_recovery(reason: str) -> tuple[str, int | None]:
    code = exit_code_in(reason)
    if code is not None:
        return "exited", code
    return ("preempted" if re.search(r"preempt", reason, re.IGNORECASE) else "lost"), None


def _time(value: Any) -> float | None:
    return None if value is None else float(value)


# Logs of SkyPilot's jobs: followed to their end, and found again after a lost connection.

# The log of a cluster's job as it is written, through losses of the connection.

# Between two tries to see a log again, after SkyPilot's client has tried by itself; anew when there was something new.
WAITS_S = (2, 5, 15, 60)
# What `tail_logs` returns of a job that has ended: sky/exceptions.py, JobExitCode.
_SUCCEEDED, _FAILED, _CANCELLED = 0, 100, 103
_GONE = ("ClusterDoesNotExist", "ClusterNotUpError")


def follow(name: str, job_id: int, sleep: Callable[[float], None] = time.sleep, out: TextIO | None = None) -> int:
    """Prints a job's log until it ends; returns its script's exit code, 1 where SkyPilot does not tell it.

    Raises InfraError when the log is not to be had any more, and BrokenPipeError when nobody reads it here; the job
    goes on.
    """
    log = JobLog(out or sys.stdout)
    waits = list(WAITS_S)
    while True:
        try:
            with client.translated():
                code = client.sdk().tail_logs(name, job_id, follow=True, output_stream=log)
            if code in (_SUCCEEDED, _FAILED, _CANCELLED):
                return (log.exit_code or 1) if code else 0
            trouble = "the log ended before the job did"
        except InfraError as error:
            if isinstance(error.__cause__, BrokenPipeError):
                raise error.__cause__ from None  # whoever read this log has left, and not the cluster
            if type(error.__cause__).__name__ in _GONE:
                raise
            trouble = str(error)
        waits = list(WAITS_S) if log.has_news else waits
        if not waits:
            ways = f"sky logs {name} {job_id}; sky cancel {name} {job_id}"
            raise InfraError(f"{name}: job {job_id} may go on, but cannot be seen from here: {trouble} ({ways})")
        wait_s = waits.pop(0)
        print(f"{name}: {trouble}; looking again in {wait_s} s", file=sys.stderr)
        sleep(wait_s)
        log.rewind()


class JobLog(io.TextIOBase):
    """Passes a log on, once, however often it is told from its start; and keeps what it says of the job's end, since
    SkyPilot's client hands out no exit code of a job.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._line = ""  # what has come of a line that has not ended
        self._told = self._passed = 0  # whole lines of the program: since the last rewind, and in all
        self._end = ""
        self.has_news = False  # since the last rewind

    def rewind(self) -> None:
        """What was passed on comes again."""
        if self._line and self._told >= self._passed:
            self._out.write("\n")
        self._line, self._told, self.has_news = "", 0, False

    def write(self, text: str) -> int:
        self._end = (self._end + text)[-4096:]
        for piece in text.splitlines(keepends=True):
            is_again = self._told < self._passed
            if not is_again:
                self._out.write(piece)
            self._line = (self._line + piece)[:MOST_CHARS]  # enough to tell whose it is
            if piece.endswith("\n"):
                self._told += said(self._line.rstrip("\n")) is not None
                self._line = ""
            if not is_again:
                self.has_news = self.has_news or self._told > self._passed
                self._passed = max(self._passed, self._told)
        return len(text)

    def flush(self) -> None:
        self._out.flush()

    @property
    def exit_code(self) -> int | None:
        return exit_code(self._end)


# The log of a managed job as its program wrote it: all attempts, and on to its end.

POLL_S = 2.0

Look = Callable[[ManagedJob], ManagedJob | None]  # how the job stands now, None where it is gone


def lines(job: ManagedJob, look: Look | None, sleep: Callable[[float], None] = time.sleep) -> Iterator[str]:
    """Of one managed job, its earlier attempts first; with ``look`` it ends when the job does."""
    earlier = _earlier(job) if job.recoveries else []
    if job.is_ended or look is None:
        last = _last(job)
        for attempt in earlier[:-1] if earlier and earlier[-1] == last else earlier:
            yield from attempt
        yield from last
        return
    for attempt in earlier[: job.recoveries]:
        yield from attempt
    yield from _followed(job, look, sleep)


def _earlier(job: ManagedJob) -> list[list[str]]:
    return attempts_in(lines_of(client.log_pieces(job.id, False, controller=True)))


def _last(job: ManagedJob) -> list[str]:
    texts = lines_of(client.log_pieces(job.id, False))
    return [line for text in texts if (line := said(text)) is not None]


def _followed(job: ManagedJob, look: Look, sleep: Callable[[float], None]) -> Iterator[str]:
    """SkyPilot ends its stream early now and then, at a recovery say; this one ends with the job.

    Nor is it the end when the server does not answer for a while.
    """
    shown: list[str] = []  # of the machine that it is on
    outage = Outage()
    while True:
        fresh = 0
        try:
            for text in lines_of(client.log_pieces(job.id, True)):
                if begins(text) and fresh:
                    shown, fresh = [], 0
                if (line := said(text)) is None:
                    continue
                fresh += 1
                if fresh > len(shown):
                    shown.append(line)
                    yield line
            now = look(job) or replace(job, status="CANCELLED")
            last = _last(now) if now.is_ended else []  # it may have ended before the stream came to it
        except InfraError as error:
            outage.bear(error)
            sleep(POLL_S)
            continue
        outage.end()
        if now.is_ended:
            yield from last[len(shown) :] if last[: len(shown)] == shown else last
            return
        shown = shown if now.attempts == job.attempts else []
        job = now
        sleep(POLL_S)
