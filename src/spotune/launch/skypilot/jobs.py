"""SkyPilot's managed jobs as runs: pure. Several jobs of one name, a run and its resumes, are one run."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spotune.launch.infra import JobStatus, State
from spotune.launch.skypilot.logs import deciding

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
