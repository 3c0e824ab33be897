"""SkyPilot's managed jobs as runs, its history of clusters as paid intervals, and its jobs' logs."""

import io
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TextIO

from spotune.core.errors import InfraError
from spotune.core.io import MOST_CHARS
from spotune.core.money import Place
from spotune.core.records import PriceRow
from spotune.launch.engine import JobStatus, PaidInterval, State
from spotune.launch.skypilot import client
from spotune.launch.skypilot.client import attempts_in, exit_code, first_failure, lines_of, program_line, starts_log
from spotune.launch.status import Outage

MARK = "spotune"  # key in a task's metadata: the run's user, place, bucket and priority
# The fields to ask of each job: SkyPilot's default lacks half of them, and all fields would hold whole task files.
FIELDS = (
    "job_id", "task_id", "job_name", "status", "schedule_state", "submitted_at", "start_at", "end_at", "recovery_count",
    "failure_reason", "details", "cloud", "region", "zone", "priority", "user_name", "metadata", "current_cluster_name",
    "cluster_name_on_cloud",
)  # fmt: skip
_STATES: dict[str, State] = {  # any other is RUNNING
    "PENDING": "PENDING",
    "SUBMITTED": "PENDING",
    "STARTING": "STARTING",
    "RECOVERING": "RECOVERING",
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


@dataclass(frozen=True)
class ManagedJob:
    """One managed job of SkyPilot. Times are epoch seconds."""

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
    cluster: str = ""  # SkyPilot's name of its cluster, the same in every attempt
    cluster_on_cloud: str = ""  # the infrastructure's name of it
    marks: Mapping[str, Any] | None = None  # what spotune wrote into its metadata; None if the job is not spotune's

    @property
    def is_ended(self) -> bool:
        return self.status.startswith(("SUCCEEDED", "CANCELLED", "FAILED"))

    @property
    def attempts(self) -> int:
        """The number of machines that it got so far."""
        began = self.start_at is not None or self.status in ("STARTING", "RUNNING", "RECOVERING", "WINDING_DOWN")
        return self.recoveries + 1 if began or self.recoveries else 0

    @property
    def exit_code(self) -> int | None:
        """The program's exit code as SkyPilot reports it; of several machines, the one that failed by itself."""
        return 0 if self.status == "SUCCEEDED" else exit_code_in(self.failure_reason)


def managed_job(record: Any) -> ManagedJob:
    """Reads SkyPilot's ManagedJobRecord."""
    marks = record.metadata.get(MARK) if isinstance(record.metadata, Mapping) else None
    cloud, region, zone = (getattr(record, name, None) for name in ("cloud", "region", "zone"))
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
        infra=infra_text(cloud, region, zone),
        region=_given(region),
        priority=record.priority,
        user=record.user_name or "",
        cluster=record.current_cluster_name or f"{record.job_name}-{record.job_id}",
        cluster_on_cloud=_given(record.cluster_name_on_cloud),
        marks=marks if isinstance(marks, Mapping) else None,
    )


def infra_text(cloud: Any, region: Any, zone: Any) -> str:
    """Returns ``slurm/lab/spot`` from SkyPilot's names; a missing name is None, ``-`` or empty."""
    places = [_given(cloud).lower(), _given(region), _given(zone)]
    return "/".join(place for place in places if place) if places[0] else ""


def run_status(jobs: Sequence[ManagedJob], submitted: JobStatus | None = None) -> JobStatus:
    """Returns the status of a run from its jobs, one for each resume: the newest decides its state, attempts add up.

    ``submitted``: how the run was submitted from here; by default that is read from the jobs' marks.
    """
    ordered = sorted(jobs, key=lambda job: job.id)
    newest = ordered[-1]
    marks = newest.marks or {}
    attempts = sum(job.attempts for job in ordered)
    before = submitted or JobStatus(
        run_id=newest.run_id,
        state="PENDING",
        priority=int(marks.get("priority") or 0),
        user=str(marks.get("user") or newest.user),
        infra=str(marks.get("infra") or ""),
        submitted_at=ordered[0].submitted_at,
        bucket=str(marks.get("bucket") or ""),
    )
    return replace(
        before,
        state="FAILED" if newest.status.startswith("FAILED") else _STATES.get(newest.status, "RUNNING"),
        priority=before.priority if newest.priority is None else newest.priority,
        infra=newest.infra or before.infra,
        started_at=min((job.start_at for job in ordered if job.start_at), default=None),
        ended_at=newest.end_at if newest.is_ended else None,
        attempt=attempts,
        recoveries=max(0, attempts - 1),
        reason=reason_of(newest),
        exit_code=newest.exit_code,
        by_infra=newest.status in _BY_INFRA,
    )


def reason_of(job: ManagedJob) -> str:
    """Returns the reason of a job's status in one line, without SkyPilot's advice to look elsewhere."""
    if job.status == "CANCELLING":
        return "being cancelled"
    if job.status == "CANCELLED":
        return "cancelled"
    if job.status in ("PENDING", "STARTING", "RECOVERING"):
        return _line(job.details)
    if not job.status.startswith("FAILED"):
        return ""
    prefix = _FAILURES.get(job.status, "")
    if job.exit_code is not None:
        return f"{prefix if job.status == 'FAILED_SETUP' else ''}exited with code {job.exit_code}"
    return f"{prefix}{_line(job.failure_reason)}"


def exit_code_in(text: str) -> int | None:
    found = _CODES.search(text)
    return first_failure(int(code) for code in found[1].split(", ")) if found else None


def _line(text: str) -> str:
    """Returns one line, without the exception's name and without ``To see the details, run: …``."""
    text = re.split(r"\.?\s*To (?:see the (?:details|job error)|fix: )", " ".join(text.split()))[0]
    text = re.sub(r"^\[sky\.exceptions\.\w+\] ", "", text)
    return text.removeprefix("Recovering: ").removeprefix("Failure: ")


def _given(value: Any) -> str:
    return "" if value in (None, "-", "") else str(value)


@dataclass(frozen=True)
class Event:
    """A change of a managed job's status; ``at`` in epoch seconds."""

    at: float
    status: str
    reason: str = ""


@dataclass(frozen=True)
class Usage:
    """A time in which a cluster was paid for, epoch seconds; ``ended_at`` None: it still is."""

    cluster: str
    started_at: float
    ended_at: float | None
    place: Place
    nodes: int = 1


def usages(row: Mapping[str, Any]) -> list[Usage]:
    """Reads a row of ``cost_report``."""
    resources = row.get("resources")
    place = Place(
        infra=str(getattr(resources, "cloud", None) or row.get("cloud") or "").lower(),
        region=str(getattr(resources, "region", None) or row.get("region") or ""),
        zone=str(getattr(resources, "zone", None) or ""),
        instance_type=str(getattr(resources, "instance_type", None) or ""),
        accelerators=accelerators_of(getattr(resources, "accelerators", None)),
        use_spot=bool(getattr(resources, "use_spot", False)),
    )
    name, nodes = str(row.get("name") or ""), int(row.get("num_nodes") or 1)
    spans = row.get("usage_intervals") or []
    return [Usage(name, float(began), None if end is None else float(end), place, nodes) for began, end in spans]


def price_row(place: Place, usd_per_hour: float, source: str, at: float) -> PriceRow:
    """Returns a place's price, US dollars an hour of one node. A missing region or zone becomes ``*``."""
    facts = {**vars(place), "region": place.region or "*", "zone": place.zone or "*"}
    return PriceRow(**facts, price_usd_per_hour=usd_per_hour, source=source, at=at)


def accelerators_of(found: Any) -> str:
    """Returns ``L4:1`` for ``{"L4": 1}``; empty for no accelerators."""
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
    """Returns the machines of a run, oldest first.

    ``used`` is from ``cost_report``, where the cluster ``<job>-<id>`` is a job's. ``events``, by the job's id, tell why
    each machine ended. SkyPilot's prices are not used: it looks them up again each time.
    ``preemptible``: Slurm partitions, ``CLUSTER/PARTITION``, that count as spot; Slurm itself has no spot machines.
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
            place = usage.place
            if place.infra == "slurm" and f"{place.region}/{place.zone}" in preemptible:
                place = replace(place, use_spot=True)
            facts = {**vars(place), "nodes": usage.nodes, "end_reason": reason, "exit_code": code}
            rows.append(PaidInterval(run_id, usage.started_at, usage.ended_at, **facts))
    return sorted(rows, key=lambda row: row.started_at)


def _end(usage: Usage, following: float | None, job: ManagedJob, events: Sequence[Event]) -> tuple[str, int | None]:
    """Returns (why a machine ended, the program's exit code), from the first ending event within its time."""
    until = following if following is not None else float("inf")
    for event in sorted(events, key=lambda event: event.at):
        # SkyPilot notes a machine's end some seconds before or after the event that reports it.
        if not usage.started_at <= event.at < until + 5:
            continue
        if event.status == "RECOVERING":
            if (code := exit_code_in(event.reason)) is not None:
                return "exited", code
            return ("preempted" if re.search(r"preempt", event.reason, re.IGNORECASE) else "lost"), None
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


# Pauses between two tries to read a log, after the tries of SkyPilot's client; they start over once there is news.
WAITS_S = (2, 5, 15, 60)
_SUCCEEDED, _FAILED, _CANCELLED = 0, 100, 103  # `tail_logs` of a job that has ended: sky/exceptions.py, JobExitCode


def follow(name: str, job_id: int, sleep: Callable[[float], None] = time.sleep, out: TextIO | None = None) -> int:
    """Prints a cluster job's log until the job ends; returns its script's exit code, 1 if that is unknown.

    Raises InfraError if the log cannot be read any more, and BrokenPipeError if the reader of our output has left. The
    job goes on.
    """
    log = JobLog(out or sys.stdout)
    waits = list(WAITS_S)
    while True:
        try:
            with client.translated():
                code = client.sdk().tail_logs(name, job_id, follow=True, output_stream=log)
            if code in (_SUCCEEDED, _FAILED, _CANCELLED):
                return (exit_code(log.end) or 1) if code else 0
            trouble = "the log ended before the job did"
        except InfraError as error:
            if isinstance(error.__cause__, BrokenPipeError):
                raise error.__cause__ from None  # the reader of our output has left; the cluster is there
            if type(error.__cause__).__name__ in ("ClusterDoesNotExist", "ClusterNotUpError"):
                raise
            trouble = str(error)
        waits = list(WAITS_S) if log.has_news else waits
        if not waits:
            ways = f"sky logs {name} {job_id}; sky cancel {name} {job_id}"
            raise InfraError(f"{name}: job {job_id} may go on, but cannot be seen from here: {trouble} ({ways})")
        wait_s = waits.pop(0)
        print(f"{name}: {trouble}; reading the log again in {wait_s} s", file=sys.stderr)
        sleep(wait_s)
        log.rewind()


class JobLog(io.TextIOBase):
    """Passes each line of a log on once, however often the log starts over.

    It keeps the log's end, which alone has the job's exit code: SkyPilot's client does not return it.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._line = ""  # the start of an unfinished line
        self._read = self._passed = 0  # the program's whole lines: since the last rewind, and passed on in all
        self.end = ""
        self.has_news = False  # since the last rewind

    def rewind(self) -> None:
        """Expects the log from its start again."""
        if self._line and self._read >= self._passed:
            self._out.write("\n")
        self._line, self._read, self.has_news = "", 0, False

    def write(self, text: str) -> int:
        self.end = (self.end + text)[-4096:]
        for piece in text.splitlines(keepends=True):
            is_again = self._read < self._passed
            if not is_again:
                self._out.write(piece)
            self._line = (self._line + piece)[:MOST_CHARS]  # enough to tell whether the program wrote it
            if piece.endswith("\n"):
                self._read += program_line(self._line.rstrip("\n")) is not None
                self._line = ""
            if not is_again:
                self.has_news = self.has_news or self._read > self._passed
                self._passed = max(self._passed, self._read)
        return len(text)

    def flush(self) -> None:
        self._out.flush()


POLL_S = 2.0

Probe = Callable[[ManagedJob], ManagedJob | None]  # returns the job as it is now, None if it is gone


def lines(job: ManagedJob, probe: Probe | None, sleep: Callable[[float], None] = time.sleep) -> Iterator[str]:
    """Yields a managed job's log as its program wrote it, earlier attempts first; with ``probe`` until the job ends."""
    earlier: list[list[str]] = []
    if job.recoveries:
        earlier = attempts_in(lines_of(client.log_pieces(job.id, False, controller=True)))
    if job.is_ended or probe is None:
        last = _last(job)
        for attempt in earlier[:-1] if earlier and earlier[-1] == last else earlier:
            yield from attempt
        yield from last
        return
    for attempt in earlier[: job.recoveries]:
        yield from attempt
    yield from _followed(job, probe, sleep)


def _last(job: ManagedJob) -> list[str]:
    texts = lines_of(client.log_pieces(job.id, False))
    return [line for text in texts if (line := program_line(text)) is not None]


def _followed(job: ManagedJob, probe: Probe, sleep: Callable[[float], None]) -> Iterator[str]:
    """Yields lines until the job ends. SkyPilot's own stream may end earlier, for example at a recovery.

    A server that does not answer for a while does not end it either.
    """
    shown: list[str] = []  # lines of the present machine
    outage = Outage()
    while True:
        fresh = 0
        try:
            for text in lines_of(client.log_pieces(job.id, True)):
                if starts_log(text) and fresh:
                    shown, fresh = [], 0
                if (line := program_line(text)) is None:
                    continue
                fresh += 1
                if fresh > len(shown):
                    shown.append(line)
                    yield line
            now = probe(job) or replace(job, status="CANCELLED")
            last = _last(now) if now.is_ended else []  # the stream may lack its last lines
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
