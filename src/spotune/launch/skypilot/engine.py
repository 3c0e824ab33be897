"""Which runs this SPOTUNE_HOME handed to SkyPilot, and which managed jobs are which run."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from spotune.core import environment
from spotune.core.environment import BUCKET
from spotune.core.errors import InfraError, InputError, SpotuneError, Taken, Unsettled
from spotune.core.io import make_room, read_as, set_aside, take_lock, write_state
from spotune.core.keys import Count, Time, build
from spotune.launch.engine import ACTIVE, Agree, JobStatus, PaidInterval, Submission, check_folder, check_secrets
from spotune.launch.settings import SlurmSettings
from spotune.launch.skypilot import client, task
from spotune.launch.skypilot import jobs as skypilot_jobs
from spotune.launch.skypilot.jobs import (
    FIELDS,
    POLL_S,
    Event,
    ManagedJob,
    Usage,
    by_run,
    intervals,
    managed_job,
    run_status,
    usages,
)
from spotune.launch.skypilot.task import check_submission, preemptible_partitions, task_config

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


# SkyInfra, the engine behind SkyPilot's managed jobs; and how it takes a machine away.

# Taking a managed job's machine away, as its infrastructure does. Tried on Slurm; the rest is by the book.

_TIMEOUT_S = 60.0
# What has a cloud give the notice that it gives of an interruption of its own, with its own tools.
_NOTICES = {
    "aws": "AWS FIS (aws:ec2:send-spot-instance-interruptions)",
    "gcp": "gcloud compute instances simulate-maintenance-event",
    "azure": "az vm simulate-eviction",
}
_CONSOLE = "run it on the API server's machine, or terminate it in the cloud's console"


def take_machine(job: ManagedJob, notice_s: float, environ: Mapping[str, str], agree: Agree) -> None:
    """Raises InputError where there is no machine, or where it is not for spotune to take."""
    cloud, name = job.infra.split("/", 1)[0], job.cluster_on_cloud
    if not name:
        raise InputError(job.run_id, f"is {job.status}: it has no machine to take away")
    if cloud == "slurm":
        if not task.take(job.region, name, notice_s, environ):
            raise InputError(job.run_id, f"slurm/{job.region} runs no job {name}: it has no machine to take away")
    elif cloud == "kubernetes":
        _delete_pods(job, notice_s, environ)
    else:
        if notice_s:
            by_hand = f", or {_NOTICES[cloud]} for {name}" if cloud in _NOTICES else ""
            raise InputError(
                "--notice", f"{cloud} gives none when it is told to terminate", remedy=f"--no-notice{by_hand}"
            )
        terminate(job, agree)


def terminate(job: ManagedJob, agree: Agree) -> None:
    """Terminates all instances of the job's cluster without SkyPilot's knowledge, as a cloud does.

    By SkyPilot's own provisioner, which every infrastructure has, and which needs the cluster's record: the API server
    has it, so that server must be on this machine.
    """
    machine = client.machine(job.cluster)
    if machine is None or machine.name != job.cluster_on_cloud:
        what = f"its cluster {job.cluster} on {job.infra} is not in this machine's records of SkyPilot's"
        raise InputError(job.run_id, what, remedy=_CONSOLE)
    nodes = "instance" if machine.nodes == 1 else f"{machine.nodes} instances"
    agree(f"Terminate the {nodes} of cluster {machine.name} on {job.infra}?")
    client.terminate(machine)


def _delete_pods(job: ManagedJob, notice_s: float, environ: Mapping[str, str]) -> None:
    """The pods get a deletion timestamp and are killed when the grace is over; kubectl does not wait for it."""
    command = ["kubectl", "delete", "pod", "-l", f"skypilot-cluster={job.cluster_on_cloud}", "--wait=false"]
    command += [f"--grace-period={int(notice_s)}", *(["--force"] if notice_s < 1 else [])]
    command += ["--context", job.region] if job.region else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, env=environ)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InfraError(f"kubectl: {error}") from error
    if done.returncode:
        raise InfraError(f"kubectl: {' '.join(done.stderr.split())}")
    if "deleted" not in done.stdout:
        raise InputError(job.run_id, "has no pod to take away")


# What the verbs call: SkyInfra turns them into SkyPilot's managed jobs, and those back into runs.

CANCEL_S = 300.0


class SkyInfra:
    """Managed jobs of SkyPilot, and which of them are runs of one SPOTUNE_HOME.

    Args:
        home: SPOTUNE_HOME.
        environ: where secrets are taken from.
        settings: of Slurm clusters.
        asks: whether SkyPilot is asked of what was not submitted from this home; else it is left alone, since asking
            costs seconds.
    """

    name = "skypilot"
    refresh_s = 15.0  # each takes a second or more; SkyPilot's own controller looks as often

    def __init__(
        self,
        home: Path,
        environ: Mapping[str, str],
        settings: SlurmSettings | None = None,
        asks: bool = False,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._registry = Registry(home)
        self._environ, self._slurm, self._asks = environ, settings or SlurmSettings(), asks
        self._clock, self._sleep = clock, sleep
        self._listed: list[ManagedJob] = []  # at the last listing of all
        self._paid: dict[str, list[Usage]] = {}  # by cluster, since then
        self._spot: dict[str, list[str]] = {}

    def submit(self, submission: Submission) -> None:
        """Launches the managed job and returns; nothing of it is left behind when it is refused."""
        check_submission(submission)
        self._registry.check_free(submission.run_id)
        entry = Entry(
            run_id=submission.run_id,
            infra=submission.infra,
            bucket=str((submission.task.get("envs") or {}).get(BUCKET) or ""),
            user=submission.user,
            priority=submission.priority,
            submitted_at=self._clock(),
            workdir=submission.workdir,
            task=submission.task,
            secrets=sorted(submission.secrets),
            preemptible=self._preemptible(submission.infra),
        )
        self._launch(entry, submission, None)

    def _launch(self, entry: Entry, submission: Submission, before: Entry | None) -> None:
        """Written down first: a job that nobody here knows of would be one that nobody ends.

        ``before``: the entry as it is to be again when the job is refused, or taken back; None for none.
        """
        job = client.task(task_config(submission, self._slurm.nice))
        entry = replace(entry, submitting=True, ended=None, history=None)
        if before:
            self._registry.write(entry)
        else:
            self._registry.create(entry)
        request = None
        try:
            request = client.launch(job, submission.run_id)
            ids, _ = client.ask(request)
            self._registry.write(replace(entry, submitting=False, jobs=[*entry.jobs, *(ids or [])]))
        except BaseException as error:
            self._take_back(entry, error, request is not None)
            if before:
                self._registry.write(before)
            else:
                self._registry.remove(entry.run_id)
            raise

    def _take_back(self, entry: Entry, why: BaseException, is_asked: bool) -> None:
        """A submission that was stopped half way, by Ctrl-C say: nothing of it runs when this returns.

        ``is_asked``: the server has the request. Else a server that does not answer has never heard of it.
        """
        if isinstance(why, KeyboardInterrupt):  # it takes a while, and a second Ctrl-C would leave the job there
            print(f"{entry.run_id}: being taken back from SkyPilot", file=sys.stderr)
        try:
            self._end(entry)
        except BaseException as error:
            if not is_asked and isinstance(error, SpotuneError):
                return
            what = f"{str(why) or 'interrupted'}; whether SkyPilot took {entry.run_id} is not known"
            raise Unsettled(f"{what} (spotune cancel {entry.run_id} ends it once the server answers)") from error

    def _end(self, entry: Entry) -> None:
        """Ends what is being submitted, then what the queue has; returns once nothing of the run is left there."""
        if client.end_launches(entry.run_id):
            self._sleep(POLL_S)  # a request is told to end, and may get its job into the queue before it does
        self._cancel_active(entry.run_id)

    def _preemptible(self, infra: str) -> list[str]:
        """Slurm partitions that count as spot, asked for once."""
        if infra not in self._spot:
            self._spot[infra] = preemptible_partitions(infra, self._slurm, self._environ)
        return self._spot[infra]

    def check_resumable(self, run_id: str) -> None:
        entry = self._entry(run_id)
        check_secrets(run_id, entry.secrets, self._environ)
        if isinstance(entry.task.get("workdir"), str):
            check_folder(run_id, entry.workdir)

    def workdir(self, run_id: str) -> str:
        entry = self._entry(run_id)
        return entry.workdir if isinstance(entry.task.get("workdir"), str) else ""

    def resume(self, run_id: str) -> None:
        """A further managed job of the same name."""
        self.check_resumable(run_id)
        entry = self._entry(run_id)
        submission = Submission(
            run_id=run_id,
            task=entry.task,
            workdir=entry.workdir,
            user=entry.user,
            infra=entry.infra,
            priority=entry.priority,
            secrets={name: self._environ[name] for name in entry.secrets},
        )
        self._launch(entry, submission, entry)

    def cancel(self, run_id: str) -> None:
        entry = self._registry.entry(run_id)
        if not entry or not entry.submitting:
            self._cancel_active(run_id)
            return
        self._end(entry)
        if not has_further(self._jobs_of(run_id, entry), entry):
            now = replace(entry.status(), state="CANCELLED", reason="cancelled", ended_at=self._clock())
            self._registry.settle(now)

    def _cancel_active(self, run_id: str) -> None:
        active = self._active(run_id)
        if not active:
            return
        client.call(client.sdk().jobs.cancel, job_ids=[job.id for job in active])
        deadline = self._clock() + CANCEL_S
        while self._active(run_id):
            if self._clock() > deadline:
                raise Unsettled(
                    f"{run_id}: being cancelled, for {CANCEL_S:g} s now (sky jobs logs --controller says why)"
                )
            self._sleep(POLL_S)

    def preempt(self, run_id: str, notice_s: float, agree: Agree = lambda question: None) -> None:
        active = self._active(run_id)
        if not active:
            raise InputError(run_id, "has no machine to take away")
        take_machine(active[-1], notice_s, self._environ, agree)

    def jobs(self, run_ids: list[str] | None = None, everyone: bool = False) -> list[JobStatus]:
        """SkyPilot is asked only where something may have changed since it was last asked."""
        known = {entry.run_id: entry for entry in self._registry.entries()}
        if run_ids is not None:
            found = [status for run_id in run_ids if (status := self._status(run_id, known.get(run_id)))]
            if everyone and not self._asks:
                found += self._foreign(set(run_ids) - known.keys())
        elif self._asks or (everyone and known) or any(entry.ended is None for entry in known.values()):
            found = self._statuses(known, everyone)
        else:
            found = [entry.status() for entry in known.values()]
        return sorted(found, key=lambda status: (-status.priority, status.submitted_at))

    def _status(self, run_id: str, entry: Entry | None) -> JobStatus | None:
        if entry and entry.ended:
            return entry.status()
        if not entry and not self._asks:
            return None
        jobs = self._jobs_of(run_id, entry)
        if jobs:
            return self._settled(jobs, entry)
        return entry.status() if entry else None

    def _foreign(self, run_ids: Set[str]) -> list[JobStatus]:
        """Runs that were not submitted from here, of a server that is there: none is started for them."""
        if not run_ids:
            return []
        client.check_answers()
        return [one for one in self._statuses({}, True) if one.run_id in run_ids]

    def _statuses(self, known: Mapping[str, Entry], everyone: bool) -> list[JobStatus]:
        self._listed = [job for record in client.managed_jobs(FIELDS, everyone) if (job := managed_job(record)).marks]
        self._paid = {}
        found = by_run(self._listed)
        listed = []
        for jobs in found:
            entry = known.get(jobs[0].run_id)
            is_ours = entry is not None and is_of(jobs[0], entry)
            listed.append(self._settled(jobs, entry if is_ours else None))
            if is_ours:
                known = {run_id: one for run_id, one in known.items() if run_id != jobs[0].run_id}
        return [*listed, *(entry.status() for entry in known.values())]

    def _settled(self, jobs: Sequence[ManagedJob], entry: Entry | None) -> JobStatus:
        if entry and entry.submitting:
            if not has_further(jobs, entry):
                return entry.status()
            entry = replace(entry, submitting=False, jobs=sorted({*entry.jobs, *(job.id for job in jobs)}))
            self._registry.write(entry)
        submitted = replace(entry, ended=None).status() if entry else None
        status = run_status(jobs, submitted)
        if entry and status.state not in ACTIVE:
            self._registry.settle(status)
        return status

    def logs(self, run_id: str, follow: bool) -> Iterator[str]:
        jobs = self._jobs_of(run_id, self._registry.entry(run_id))
        if not jobs:
            raise InputError(run_id, "SkyPilot has no such job")
        for job in jobs:
            look = self._look if follow and job is jobs[-1] else None
            yield from skypilot_jobs.lines(job, look, self._sleep)

    def _look(self, job: ManagedJob) -> ManagedJob | None:
        return next(iter(self._jobs_of(job.run_id, None, [job.id])), None)

    def history(self, run_id: str) -> list[PaidInterval]:
        entry = self._registry.entry(run_id)
        if entry and (kept := entry.intervals()) is not None:
            return kept
        jobs = self._recent(run_id, entry)
        if not jobs:
            return []
        events = {job.id: [Event(*event) for event in client.events(job.id)] for job in jobs if needs_events(job)}
        spot = entry.preemptible if entry else self._preemptible(jobs[-1].infra)
        found = intervals(run_id, jobs, self._usages(jobs), events, spot)
        if jobs[-1].is_ended:
            self._registry.keep_history(run_id, found)
        return found

    def _recent(self, run_id: str, entry: Entry | None) -> list[ManagedJob]:
        """As listed a moment ago, for verbs over all runs: they would ask once for each."""
        if listed := [job for job in self._listed if job.run_id == run_id and is_of(job, entry)]:
            return sorted(of_one_bucket(listed), key=lambda job: job.id)
        return self._jobs_of(run_id, entry) if entry or self._asks else []

    def _usages(self, jobs: Sequence[ManagedJob]) -> list[Usage]:
        """What was paid for these jobs; with them, in one question, for all that are listed."""
        names = {job.cluster for job in jobs}
        if not self._listed or not names <= self._paid.keys():
            names |= {job.cluster for job in self._listed}
            self._paid = {name: [] for name in names}
            for row in client.cost_rows(sorted(names)):
                self._paid.setdefault(str(row["name"]), []).extend(usages(row))
        return [usage for job in jobs for usage in self._paid[job.cluster]]

    def _entry(self, run_id: str) -> Entry:
        entry = self._registry.entry(run_id)
        if entry is None:
            remedy = f"go where it was, or spotune train --from {run_id}"
            raise InputError(run_id, "was not submitted from here", remedy=remedy)
        return entry

    def _active(self, run_id: str) -> list[ManagedJob]:
        entry = self._registry.entry(run_id)
        jobs = self._jobs_of(run_id, entry)
        if not jobs and not entry:
            raise InputError(run_id, "no such run of SkyPilot's")
        return [job for job in jobs if not job.is_ended]

    def _jobs_of(self, run_id: str, entry: Entry | None, ids: Sequence[int] = ()) -> list[ManagedJob]:
        """The managed jobs of a run, in order of submission: by name, since a resume elsewhere is one of them too."""
        records = client.managed_jobs(FIELDS, True, "" if ids else run_id, ids)
        found = [managed_job(record) for record in records]
        found = [job for job in found if job.run_id == run_id and (ids or is_of(job, entry))]
        return sorted(found if ids or entry else of_one_bucket(found), key=lambda job: job.id)
