"""The engine behind SkyPilot's managed jobs, its record of the runs it submitted, and how it takes a machine away."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from spotune.core import environment
from spotune.core.errors import AlreadyExists, InfraError, InputError, SpotuneError, SubmissionUnknown
from spotune.core.io import make_room, read_as, set_aside, take_lock, write_state
from spotune.core.keys import Count, Time, build
from spotune.launch.engine import ACTIVE, Agree, JobStatus, PaidInterval, Submission, check_folder, check_secrets
from spotune.launch.settings import SlurmSettings
from spotune.launch.skypilot import client, jobs, task
from spotune.launch.skypilot.jobs import FIELDS, POLL_S, Event, ManagedJob, Usage, managed_job

CANCEL_S = 300.0
_SUBMITTED = ("run_id", "task", "workdir", "user", "infra", "priority")  # fields of Submission that RunEntry keeps
# The cloud's own tools that give the notice of a real interruption.
_NOTICES = {
    "aws": "AWS FIS (aws:ec2:send-spot-instance-interruptions)",
    "gcp": "gcloud compute instances simulate-maintenance-event",
    "azure": "az vm simulate-eviction",
}


# The runs that this SPOTUNE_HOME submitted to SkyPilot, one file each below ``$SPOTUNE_HOME/skypilot/runs``.
#
# ``resume`` launches from it. It also tells a verb, without ``import sky`` (seconds), whether it must ask SkyPilot: how
# an ended run ended is kept here. Secrets are names only.


@dataclass(frozen=True)
class RunEntry:
    """One run, as it was submitted."""

    run_id: str
    infra: str
    bucket: str
    user: str
    priority: int
    submitted_at: Time
    workdir: str
    task: dict[str, Any]  # as the plan has it; task.task_config makes SkyPilot's task from it
    secrets: list[str] = field(default_factory=list)
    jobs: list[Count] = field(default_factory=list)  # its managed jobs: one, and one more for each `resume`
    preemptible: list[str] = field(default_factory=list)  # Slurm's CLUSTER/PARTITION that count as spot
    submitting: bool = False  # a further job was requested, and SkyPilot has not confirmed it yet
    ended: dict[str, Any] | None = None  # SkyPilot's last status of the run; None while it may still change
    history: list[dict[str, Any]] | None = None  # the machines that it got, once all of them are gone

    def status(self) -> JobStatus:
        """Returns how it ended, or how it was submitted."""
        if self.ended is not None:
            return build(JobStatus, self.ended)
        same = {name: getattr(self, name) for name in ("run_id", "priority", "user", "infra", "submitted_at", "bucket")}
        reason = "not in SkyPilot's queue yet" if self.submitting else ""
        return JobStatus(state="PENDING", reason=reason, **same)

    def intervals(self) -> list[PaidInterval] | None:
        """Returns its machines, or None while they are not all known."""
        return None if self.history is None else [build(PaidInterval, row) for row in self.history]

    def check(self, run_id: str) -> None:
        """Raises ValueError, naming the field, if this is not a valid entry of that run."""
        if self.run_id != run_id:
            raise ValueError(f"run_id: not {run_id}")
        for name, read in (("ended", self.status), ("history", self.intervals)):
            try:
                read()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        if self.status().run_id != run_id:
            raise ValueError(f"ended: run_id: not {run_id}")


class Registry:
    """The entries below one SPOTUNE_HOME."""

    def __init__(self, home: Path) -> None:
        self.folder = home / "skypilot" / "runs"

    def entry(self, run_id: str) -> RunEntry | None:
        """Returns the run's entry. A damaged one is set aside and counts as missing: the bucket still has the run."""
        entry = read_as(self._path(run_id), RunEntry)
        try:
            if entry:
                entry.check(run_id)
        except ValueError as error:
            set_aside(self._path(run_id), str(error))
            return None
        return entry

    def entries(self) -> list[RunEntry]:
        """Returns all entries, in order of submission."""
        names = sorted(path.stem for path in self.folder.glob("*.json"))
        found = [entry for name in names if (entry := self.entry(name))]
        return sorted(found, key=lambda entry: entry.submitted_at)

    def write(self, entry: RunEntry) -> None:
        """Writes an entry that only its owner can read."""
        with self._open_folder():
            write_state(self._path(entry.run_id), entry)

    def create(self, entry: RunEntry) -> None:
        """Writes a new run's entry, one process at a time. Raises AlreadyExists if the run has one."""
        path = self.folder / ".lock"
        with self._open_folder():
            make_room(path)
            with open(path, "w") as lock:
                take_lock(lock, path)
                self.check_free(entry.run_id)
                self.write(entry)

    @contextmanager
    def _open_folder(self) -> Iterator[None]:
        """Makes the folder. Raises InputError if it, or a file in it, cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            yield
        except OSError as error:
            what = f"cannot write {self.folder}: {error.strerror}"
            raise InputError(environment.HOME, what) from error

    def check_free(self, run_id: str) -> None:
        """Raises AlreadyExists for a run that has an entry."""
        if kept := self.entry(run_id):
            what = f"{run_id} was submitted from here already, with the bucket {kept.bucket}"
            raise AlreadyExists("--name", what, remedy="another --name")

    def remove(self, run_id: str) -> None:
        self._path(run_id).unlink(missing_ok=True)

    def settle(self, status: JobStatus) -> None:
        """Records how a run has ended."""
        entry = self.entry(status.run_id)
        if entry and status.state not in ACTIVE and entry.ended != asdict(status):
            self.write(replace(entry, ended=asdict(status), submitting=False))

    def keep_history(self, run_id: str, intervals: Sequence[PaidInterval]) -> None:
        """Records the machines of a run that has ended, so that SkyPilot may forget them."""
        entry = self.entry(run_id)
        if entry and entry.ended and intervals and all(row.ended_at is not None for row in intervals):
            self.write(replace(entry, history=[asdict(row) for row in intervals]))

    def _path(self, run_id: str) -> Path:
        return self.folder / f"{run_id}.json"


def is_of(job: ManagedJob, entry: RunEntry | None) -> bool:
    """Returns whether a managed job of a run's name is that run's; without an entry, whether it is spotune's."""
    if entry is None:
        return job.marks is not None
    return job.id in entry.jobs or (job.marks or {}).get("bucket") == entry.bucket


def has_further(jobs: Sequence[ManagedJob], entry: RunEntry) -> bool:
    """Returns whether the queue has a job that the entry lacks: the one that was being submitted."""
    return not {job.id for job in jobs} <= set(entry.jobs)


def of_one_bucket(jobs: Sequence[ManagedJob]) -> list[ManagedJob]:
    """Returns the jobs in the newest one's bucket: runs in several buckets may have the same name."""
    newest = max(jobs, key=lambda job: job.id, default=None)
    bucket = (newest.marks or {}).get("bucket") if newest else None
    return [job for job in jobs if (job.marks or {}).get("bucket") == bucket]


def take_machine(job: ManagedJob, notice_s: float, environ: Mapping[str, str], agree: Agree) -> None:
    """Takes a job's machine away, as its infrastructure does. Tried on Slurm; the rest follows the documentation.

    Raises InputError if there is no machine, or if spotune cannot take it.
    """
    cloud, name = job.infra.split("/", 1)[0], job.cluster_on_cloud
    if not name:
        raise InputError(job.run_id, f"is {job.status}: it has no machine to take away")
    if cloud == "slurm":
        if task.on_login(job.region, task.taking(name, notice_s), environ).strip() != "taken":
            raise InputError(job.run_id, f"slurm/{job.region} runs no job {name}: it has no machine to take away")
    elif cloud == "kubernetes":
        _delete_pods(job, notice_s, environ)
    elif notice_s:
        by_hand = f", or {_NOTICES[cloud]} for {name}" if cloud in _NOTICES else ""
        what = f"{cloud} gives no notice when spotune terminates a machine"
        raise InputError("--notice", what, remedy=f"--no-notice{by_hand}")
    else:
        _terminate(job, agree)


def _terminate(job: ManagedJob, agree: Agree) -> None:
    """Terminates all instances of the job's cluster without SkyPilot's knowledge, as a cloud does.

    SkyPilot's provisioner does it for every infrastructure. It needs the cluster's record, which the API server has: so
    that server must be on this machine.
    """
    machine = client.machine(job.cluster)
    if machine is None or machine.name != job.cluster_on_cloud:
        what = f"its cluster {job.cluster} on {job.infra} is not in this machine's records of SkyPilot's"
        remedy = "run it on the API server's machine, or terminate it in the cloud's console"
        raise InputError(job.run_id, what, remedy=remedy)
    nodes = "instance" if machine.nodes == 1 else f"{machine.nodes} instances"
    agree(f"Terminate the {nodes} of cluster {machine.name} on {job.infra}?")
    client.terminate(machine)


def _delete_pods(job: ManagedJob, notice_s: float, environ: Mapping[str, str]) -> None:
    """Deletes a job's pods: they are killed when the grace period is over. kubectl does not wait for that."""
    command = ["kubectl", "delete", "pod", "-l", f"skypilot-cluster={job.cluster_on_cloud}", "--wait=false"]
    command += [f"--grace-period={int(notice_s)}", *(["--force"] if notice_s < 1 else [])]
    command += ["--context", job.region] if job.region else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environ)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InfraError(f"kubectl: {error}") from error
    if done.returncode:
        raise InfraError(f"kubectl: {' '.join(done.stderr.split())}")
    if "deleted" not in done.stdout:
        raise InputError(job.run_id, "has no pod to take away")


class SkyInfra:
    """The engine that runs SkyPilot's managed jobs as runs of one SPOTUNE_HOME, ``home``.

    ``asks``: whether to ask SkyPilot, which takes seconds, about runs that were not submitted from this home.
    """

    name = "skypilot"
    refresh_s = 15.0  # a refresh takes a second or more; SkyPilot's own controller polls as often

    def __init__(
        self,
        home: Path,
        environ: Mapping[str, str],
        settings: SlurmSettings | None = None,
        asks: bool = False,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._registry = Registry(home)
        self._environ, self._slurm, self._asks = environ, settings or SlurmSettings(), asks
        self._sleep = sleep
        self._listed: list[ManagedJob] = []  # by the last listing of all jobs
        self._paid: dict[str, list[Usage]] = {}  # by cluster, since that listing
        self._spot: dict[str, list[str]] = {}  # preemptible partitions by infra

    def submit(self, submission: Submission) -> None:
        """Launches the managed job. On failure its writes are rolled back."""
        task.check_submission(submission)
        self._registry.check_free(submission.run_id)
        entry = RunEntry(
            **{name: getattr(submission, name) for name in _SUBMITTED},
            bucket=str((submission.task.get("envs") or {}).get(environment.BUCKET) or ""),
            submitted_at=time.time(),
            secrets=sorted(submission.secrets),
            preemptible=self._preemptible(submission.infra),
        )
        self._launch(entry, submission, None)

    def _launch(self, entry: RunEntry, submission: Submission, before: RunEntry | None) -> None:
        """Launches a job. Its entry is written first: a job without an entry is a job that nobody ends.

        ``before``: the entry to restore if the job is refused or taken back; None: remove the entry.
        """
        job = client.task(task.task_config(submission, self._slurm.nice))
        entry = replace(entry, submitting=True, ended=None, history=None)
        (self._registry.write if before else self._registry.create)(entry)
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

    def _take_back(self, entry: RunEntry, why: BaseException, is_asked: bool) -> None:
        """Ends everything of an interrupted submission before it returns.

        ``is_asked``: the server has the request. If it does not, a server that does not answer has no job either.
        """
        if isinstance(why, KeyboardInterrupt):  # this takes a while, and a second Ctrl-C would leave the job there
            print(f"{entry.run_id}: being taken back from SkyPilot", file=sys.stderr)
        try:
            self._end(entry)
        except BaseException as error:
            if not is_asked and isinstance(error, SpotuneError):
                return
            what = f"{str(why) or 'interrupted'}; whether SkyPilot took {entry.run_id} is not known"
            remedy = f"spotune cancel {entry.run_id} ends it once the server answers"
            raise SubmissionUnknown(f"{what} ({remedy})") from error

    def _end(self, entry: RunEntry) -> None:
        """Cancels the submission's requests, then the jobs in the queue. Returns once nothing of the run is left."""
        if client.end_launches(entry.run_id):
            self._sleep(POLL_S)  # a cancelled request may still get its job into the queue
        self._cancel_active(entry.run_id)

    def _preemptible(self, infra: str) -> list[str]:
        """Returns the Slurm partitions that count as spot; asks once."""
        if infra not in self._spot:
            self._spot[infra] = task.preemptible_partitions(infra, self._slurm, self._environ)
        return self._spot[infra]

    def check_resumable(self, run_id: str) -> None:
        check_secrets(run_id, self._entry(run_id).secrets, self._environ)
        if folder := self.workdir(run_id):
            check_folder(run_id, folder)

    def workdir(self, run_id: str) -> str:
        entry = self._entry(run_id)
        return entry.workdir if isinstance(entry.task.get("workdir"), str) else ""

    def resume(self, run_id: str) -> None:
        """Launches a further managed job of the same name."""
        self.check_resumable(run_id)
        entry = self._entry(run_id)
        secrets = {name: self._environ[name] for name in entry.secrets}
        submission = Submission(**{name: getattr(entry, name) for name in _SUBMITTED}, secrets=secrets)
        self._launch(entry, submission, entry)

    def cancel(self, run_id: str) -> None:
        entry = self._registry.entry(run_id)
        if not entry or not entry.submitting:
            self._cancel_active(run_id)
            return
        self._end(entry)
        if not has_further(self._jobs_of(run_id, entry), entry):
            ended = replace(entry.status(), state="CANCELLED", reason="cancelled", ended_at=time.time())
            self._registry.settle(ended)

    def _cancel_active(self, run_id: str) -> None:
        if not (active := self._active(run_id)):
            return
        client.call(client.sdk().jobs.cancel, job_ids=[job.id for job in active])
        deadline = time.time() + CANCEL_S
        while self._active(run_id):
            if time.time() > deadline:
                what = f"{run_id}: still being cancelled after {CANCEL_S:g} s"
                raise SubmissionUnknown(f"{what} (sky jobs logs --controller says why)")
            self._sleep(POLL_S)

    def preempt(self, run_id: str, notice_s: float, agree: Agree = lambda question: None) -> None:
        if not (active := self._active(run_id)):
            raise InputError(run_id, "has no machine to take away")
        take_machine(active[-1], notice_s, self._environ, agree)

    def jobs(self, run_ids: list[str] | None = None, everyone: bool = False) -> list[JobStatus]:
        """Lists runs. Asks SkyPilot only if something may have changed since the last time."""
        known = {entry.run_id: entry for entry in self._registry.entries()}
        if run_ids is not None:
            found = [status for run_id in run_ids if (status := self._status(run_id, known.get(run_id)))]
            foreign = set(run_ids) - known.keys()
            if everyone and foreign and not self._asks:
                client.check_answers()  # starts no API server
                found += [one for one in self._statuses({}, True) if one.run_id in foreign]
        elif self._asks or (everyone and known) or any(entry.ended is None for entry in known.values()):
            found = self._statuses(known, everyone)
        else:
            found = [entry.status() for entry in known.values()]
        return sorted(found, key=lambda status: (-status.priority, status.submitted_at))

    def _status(self, run_id: str, entry: RunEntry | None) -> JobStatus | None:
        if entry and entry.ended:
            return entry.status()
        if (entry or self._asks) and (found := self._jobs_of(run_id, entry)):
            return self._settled(found, entry)
        return entry.status() if entry else None

    def _statuses(self, known: Mapping[str, RunEntry], everyone: bool) -> list[JobStatus]:
        self._listed = [job for record in client.managed_jobs(FIELDS, everyone) if (job := managed_job(record)).marks]
        self._paid = {}
        runs: dict[tuple[str, str], list[ManagedJob]] = {}  # a run is a name and a bucket
        for job in self._listed:
            runs.setdefault((job.run_id, str((job.marks or {}).get("bucket"))), []).append(job)
        listed, left = [], dict(known)
        for found in runs.values():
            entry = left.get(found[0].run_id)
            if entry and is_of(found[0], entry):
                del left[entry.run_id]
            else:
                entry = None
            listed.append(self._settled(found, entry))
        return [*listed, *(entry.status() for entry in left.values())]

    def _settled(self, found: Sequence[ManagedJob], entry: RunEntry | None) -> JobStatus:
        """Returns the status of a run's jobs, and records what is new in its entry."""
        if entry and entry.submitting:
            if not has_further(found, entry):
                return entry.status()
            entry = replace(entry, submitting=False, jobs=sorted({*entry.jobs, *(job.id for job in found)}))
            self._registry.write(entry)
        status = jobs.run_status(found, replace(entry, ended=None).status() if entry else None)
        if entry and status.state not in ACTIVE:
            self._registry.settle(status)
        return status

    def logs(self, run_id: str, follow: bool) -> Iterator[str]:
        found = self._jobs_of(run_id, self._registry.entry(run_id))
        if not found:
            raise InputError(run_id, "SkyPilot has no such job")
        for job in found:
            yield from jobs.lines(job, self._probe if follow and job is found[-1] else None, self._sleep)

    def _probe(self, job: ManagedJob) -> ManagedJob | None:
        return next(iter(self._jobs_of(job.run_id, None, [job.id])), None)

    def history(self, run_id: str) -> list[PaidInterval]:
        entry = self._registry.entry(run_id)
        if entry and (kept := entry.intervals()) is not None:
            return kept
        found = self._recent(run_id, entry)
        if not found:
            return []
        # A job that ended on its first machine needs no events: its status says how that machine went.
        asked = [job for job in found if job.recoveries or not job.is_ended]
        events = {job.id: [Event(*event) for event in client.events(job.id)] for job in asked}
        spot = entry.preemptible if entry else self._preemptible(found[-1].infra)
        machines = jobs.intervals(run_id, found, self._usages(found), events, spot)
        if found[-1].is_ended:
            self._registry.keep_history(run_id, machines)
        return machines

    def _recent(self, run_id: str, entry: RunEntry | None) -> list[ManagedJob]:
        """Returns the run's jobs from the last listing, if there is one: verbs over all runs would ask for each run."""
        if listed := [job for job in self._listed if job.run_id == run_id and is_of(job, entry)]:
            return sorted(of_one_bucket(listed), key=lambda job: job.id)
        return self._jobs_of(run_id, entry) if entry or self._asks else []

    def _usages(self, found: Sequence[ManagedJob]) -> list[Usage]:
        """Returns what was paid for these jobs. One request also fetches it for all listed jobs."""
        names = {job.cluster for job in found}
        if not self._listed or not names <= self._paid.keys():
            names |= {job.cluster for job in self._listed}
            self._paid = {name: [] for name in names}
            for row in client.cost_rows(sorted(names)):
                self._paid.setdefault(str(row["name"]), []).extend(jobs.usages(row))
        return [usage for job in found for usage in self._paid[job.cluster]]

    def _entry(self, run_id: str) -> RunEntry:
        entry = self._registry.entry(run_id)
        if entry is None:
            remedy = f"go to the machine that submitted it, or spotune train --from {run_id}"
            raise InputError(run_id, "was not submitted from here", remedy=remedy)
        return entry

    def _active(self, run_id: str) -> list[ManagedJob]:
        entry = self._registry.entry(run_id)
        found = self._jobs_of(run_id, entry)
        if not found and not entry:
            raise InputError(run_id, "SkyPilot has no such run")
        return [job for job in found if not job.is_ended]

    def _jobs_of(self, run_id: str, entry: RunEntry | None, ids: Sequence[int] = ()) -> list[ManagedJob]:
        """Returns a run's managed jobs, in order of submission: by name, so that a resume elsewhere is included."""
        records = client.managed_jobs(FIELDS, True, "" if ids else run_id, ids)
        found = [managed_job(record) for record in records]
        found = [job for job in found if job.run_id == run_id and (ids or is_of(job, entry))]
        return sorted(found if ids or entry else of_one_bucket(found), key=lambda job: job.id)
