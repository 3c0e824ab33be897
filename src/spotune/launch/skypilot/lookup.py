"""Which managed jobs are which run: pure."""

from collections.abc import Sequence

from spotune.launch.skypilot.jobs import ManagedJob
from spotune.launch.skypilot.registry import Entry


def is_of(job: ManagedJob, entry: Entry | None) -> bool:
    """Whether a managed job of a run's name is that run; without an entry: whether it is a run of spotune's at all."""
    if entry is None:
        return job.marks is not None
    return job.id in entry.jobs or (job.marks or {}).get("bucket") == entry.bucket


def has_further(jobs: Sequence[ManagedJob], entry: Entry) -> bool:
    """Whether the queue has a job that this entry does not know of: the one that was being submitted."""
    return not {job.id for job in jobs} <= set(entry.jobs)


def of_one_bucket(jobs: Sequence[ManagedJob]) -> list[ManagedJob]:
    """Those of the newest one's bucket: a name may stand for several runs, in several buckets."""
    newest = max(jobs, key=lambda job: job.id, default=None)
    bucket = (newest.marks or {}).get("bucket") if newest else None
    return [job for job in jobs if (job.marks or {}).get("bucket") == bucket]


def needs_events(job: ManagedJob) -> bool:
    """Whether its status alone does not say how each of its machines went."""
    return job.recoveries > 0 or not job.is_ended
