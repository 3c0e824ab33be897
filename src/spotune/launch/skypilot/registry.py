"""Which runs this SPOTUNE_HOME handed to SkyPilot, and which managed jobs are which run."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from spotune.core import environment
from spotune.core.errors import InputError, Taken
from spotune.core.fields import Count, Time, build
from spotune.core.io import make_room, read_as, set_aside, take_lock, write_state
from spotune.launch.engine import ACTIVE, JobStatus, PaidInterval
from spotune.launch.skypilot.jobs import ManagedJob

# What this SPOTUNE_HOME handed to SkyPilot, one file a run below ``$SPOTUNE_HOME/skypilot/runs``.
#
# It is what ``resume`` launches again, and what lets every verb tell without ``import sky``, which costs seconds,
# whether SkyPilot has anything to say: of a run that has ended, how it did is kept here. Secrets are names only.


@dataclass(frozen=True)
class Entry:
    """One run, as it was submitted.

    Attributes:
        task: as the plan has it; how SkyPilot gets it is ``task.py``'s business.
        jobs: the managed jobs that were launched for it, in order: one, and one more for each ``resume``.
        preemptible: Slurm partitions, ``CLUSTER/PARTITION``, whose jobs may be thrown out.
        submitting: a further job was asked for, and SkyPilot has not said yet that it took it.
        ended: how it ended, as SkyPilot said; None while it may still change.
        history: the machines it was given, once all of them are gone.
    """

    run_id: str
    infra: str
    bucket: str
    user: str
    priority: int
    submitted_at: Time
    workdir: str
    task: dict[str, Any]
    secrets: list[str] = field(default_factory=list)
    jobs: list[Count] = field(default_factory=list)
    preemptible: list[str] = field(default_factory=list)
    submitting: bool = False
    ended: dict[str, Any] | None = None
    history: list[dict[str, Any]] | None = None

    def status(self) -> JobStatus:
        """As it ended, or as it was submitted."""
        if self.ended is not None:
            return build(JobStatus, self.ended)
        return JobStatus(
            run_id=self.run_id,
            state="PENDING",
            priority=self.priority,
            user=self.user,
            infra=self.infra,
            submitted_at=self.submitted_at,
            reason="not in SkyPilot's queue yet" if self.submitting else "",
            bucket=self.bucket,
        )

    def intervals(self) -> list[PaidInterval] | None:
        """Its machines, where they are all known; else None."""
        if self.history is None:
            return None
        return [build(PaidInterval, row) for row in self.history]

    def check(self, run_id: str) -> None:
        """Raises ValueError, naming the field, for what is not an entry of this run."""
        if self.run_id != run_id:
            raise ValueError(f"run_id: not {run_id}")
        try:
            ended = self.status()
        except ValueError as error:
            raise ValueError(f"ended: {error}") from error
        if ended.run_id != run_id:
            raise ValueError(f"ended: run_id: not {run_id}")
        try:
            self.intervals()
        except ValueError as error:
            raise ValueError(f"history: {error}") from error


class Registry:
    """The entries below one SPOTUNE_HOME."""

    def __init__(self, home: Path) -> None:
        self.folder = home / "skypilot" / "runs"

    def entry(self, run_id: str) -> Entry | None:
        """The run's entry; a damaged one is set aside, and counts as missing: the bucket still has the run."""
        entry = read_as(self._path(run_id), Entry)
        try:
            if entry:
                entry.check(run_id)
        except ValueError as error:
            set_aside(self._path(run_id), str(error))
            return None
        return entry

    def entries(self) -> list[Entry]:
        """All of them, in order of submission."""
        names = sorted(path.stem for path in self.folder.glob("*.json"))
        found = [entry for name in names if (entry := self.entry(name))]
        return sorted(found, key=lambda entry: entry.submitted_at)

    def write(self, entry: Entry) -> None:
        """For its owner only: what people train on is nobody else's business."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_state(self._path(entry.run_id), entry)
        except OSError as error:
            raise self._unwritable(error) from error

    def create(self, entry: Entry) -> None:
        """As ``write``, for a run that has none yet; raises Taken where it has: one process at a time looks."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            path = self.folder / ".lock"
            make_room(path)
            with open(path, "w") as lock:
                take_lock(lock, path)
                self.check_free(entry.run_id)
                self.write(entry)
        except OSError as error:
            raise self._unwritable(error) from error

    def check_free(self, run_id: str) -> None:
        """Raises Taken for a run that has an entry."""
        if kept := self.entry(run_id):
            what = f"{run_id} was submitted from here already, with the bucket {kept.bucket}"
            raise Taken("--name", what, remedy="another --name")

    def remove(self, run_id: str) -> None:
        self._path(run_id).unlink(missing_ok=True)

    def settle(self, status: JobStatus) -> None:
        """Keeps how a run has ended."""
        entry = self.entry(status.run_id)
        if entry and status.state not in ACTIVE and entry.ended != asdict(status):
            self.write(replace(entry, ended=asdict(status), submitting=False))

    def keep_history(self, run_id: str, intervals: Sequence[PaidInterval]) -> None:
        """Keeps the machines of a run that has ended, so that SkyPilot may forget them."""
        entry = self.entry(run_id)
        if entry and entry.ended and intervals and all(row.ended_at is not None for row in intervals):
            self.write(replace(entry, history=[asdict(row) for row in intervals]))

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(environment.HOME, f"cannot write {self.folder}: {error.strerror}")

    def _path(self, run_id: str) -> Path:
        return self.folder / f"{run_id}.json"


# Which managed jobs are which run: pure.


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
