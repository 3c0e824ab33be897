"""LocalInfra, the engine of this computer, and the process of the supervisor that it starts."""

import codecs
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from spotune.core import environment
from spotune.core.errors import InfraError, InputError, SubmissionUnknown
from spotune.core.io import LogLines
from spotune.core.protocol import as_number
from spotune.launch.engine import Agree, JobStatus, PaidInterval, Submission, check_folder, check_secrets
from spotune.launch.local.database import JobRow
from spotune.launch.local.layout import MARKER, Gpu, LocalFolders, find_gpus
from spotune.launch.local.machine import REGION, check_kept, keep_environment, zone_of
from spotune.launch.local.queue import Queue
from spotune.launch.task import demand_of, trainer_of

# A shell starts the supervisor in the background, so that it is not a verb's child: no zombie stays in a long verb.
_BACKGROUND = 'exec </dev/null >>"$0" 2>&1; "$@" &'


@contextmanager
def only_one(layout: LocalFolders) -> Iterator[bool]:
    """Takes the supervisor's lock; yields whether it was free. The kernel frees it when the holder dies."""
    descriptor = os.open(layout.lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        yield True
    finally:
        os.close(descriptor)


def is_running(layout: LocalFolders) -> bool:
    """Returns whether a supervisor holds the lock. Tries a shared one: two callers do not mislead each other."""
    try:
        descriptor = os.open(layout.lock, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def start(layout: LocalFolders, environ: Mapping[str, str]) -> None:
    """Starts a supervisor; a second one ends at once. Raises InfraError if none can be started.

    Call it after writing the queue: an idle supervisor reads the queue once more after it has released the lock.
    """
    command = [sys.executable, "-P", "-m", "spotune.launch.local.supervisor", str(layout.home)]
    shell = ["sh", "-c", _BACKGROUND, str(layout.supervisor_log), *command]
    # If a job calls the verb, the supervisor must not become a part of that job's machine.
    own = {name: value for name, value in environ.items() if name != MARKER}
    try:
        subprocess.run(
            shell, cwd=layout.root, env=own, start_new_session=True, stderr=subprocess.PIPE, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", None) or str(error)
        raise InfraError(f"the supervisor cannot be started: {' '.join(why.split())}") from error


POLL_S = 0.1
START_S = 2.0
TAKE_UP_S = 30.0  # for a supervisor that starts on a busy computer
CANCEL_S = 60.0
# Fields that a row of the queue and a status, or a paid interval, have in common.
_STATUS = "run_id state priority user submitted_at started_at ended_at attempt reason exit_code bucket".split()
_PAID = "run_id started_at ended_at accelerators use_spot setup_s end_reason exit_code".split()


class LocalInfra:
    """Managed jobs on this computer, in the queue of one SPOTUNE_HOME.

    ``environ``: the environment that jobs inherit. ``slots``: jobs at a time; default one per GPU, one on CPU.
    """

    name = "local"
    refresh_s = 0.5

    def __init__(
        self,
        home: Path,
        environ: Mapping[str, str],
        slots: int | None = None,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.layout = LocalFolders(home)
        self._environ, self._slots, self._clock, self._sleep = environ, slots, clock, sleep
        self._woken_at = 0.0
        self.layout.make()
        self._queue = Queue(self.layout.database)
        self._queue.create()

    def submit(self, submission: Submission) -> None:
        """Puts the job into the queue and returns. A refused job leaves nothing behind."""
        demand = demand_of(submission.task)
        if demand.num_nodes > 1:
            raise InputError("--num-nodes", f"local is one machine, not {demand.num_nodes}", remedy="--num-nodes 1")
        gpus = find_gpus(self._environ)
        slots = self._slots or len(gpus) or 1
        if gpus and demand.gpus > slots:
            remedy = f"--gpus {gpus[0].name}:{slots}"
            raise InputError("--gpus", f"{demand.gpu}:{demand.gpus} on a machine with {slots}", remedy=remedy)
        python = trainer_of(submission.task, self._environ, Path(submission.workdir))
        self._note_machine(slots, gpus)
        bucket = submission.task.get("envs", {}).get(environment.BUCKET) or f"file://{self.layout.home}/bucket"
        now, is_added = self._clock(), False
        kept = self.layout.environment(submission.run_id)
        try:
            self._queue.add(
                submission, bucket, partial(keep_environment, kept, self._environ, submission.secrets, python), now
            )
            is_added = True
            self._wake()
        except BaseException as error:
            if is_added or not isinstance(error, Exception):  # else it was rolled back
                self._take_back(submission.run_id, now, error)
            raise

    def _note_machine(self, slots: int, gpus: list[Gpu]) -> None:
        self._queue.note("slots", slots)
        self._queue.note("gpus", [vars(gpu) for gpu in gpus])

    def _take_back(self, run_id: str, added_at: float, why: BaseException) -> None:
        """Removes the job. Raises SubmissionUnknown if it has started, or if the queue cannot tell."""

        def forget() -> None:
            with suppress(OSError):
                self.layout.environment(run_id).unlink()

        what, remedy = f"{str(why) or 'interrupted'}; {run_id}", f"(end it: spotune cancel {run_id})"
        try:
            is_gone = self._queue.withdraw(run_id, added_at, forget)
        except BaseException as error:
            raise SubmissionUnknown(f"{what} may be in the queue {remedy}") from error
        if not is_gone:
            raise SubmissionUnknown(f"{what} has begun and goes on {remedy}") from why

    def check_resumable(self, run_id: str) -> None:
        job = self._job(run_id)
        check_secrets(run_id, job.secrets, self._environ)
        if job.task:  # else its row is damaged: the start fails and gives the reason
            check_folder(run_id, job.workdir)
            trainer_of(job.task, self._environ, Path(job.workdir))
        check_kept(self.layout.environment(run_id))

    def workdir(self, run_id: str) -> str:
        return self._job(run_id).workdir

    def resume(self, run_id: str) -> None:
        job = self._job(run_id)
        self.check_resumable(run_id)
        secrets = {name: self._environ[name] for name in job.secrets}
        python = trainer_of(job.task, self._environ, Path(job.workdir))
        keep_environment(self.layout.environment(run_id), self._environ, secrets, python)
        self._queue.requeue(run_id)
        self._wake()

    def cancel(self, run_id: str) -> None:
        if not self._job(run_id).is_active:
            return
        self._ask(run_id, "cancel")
        deadline = self._clock() + CANCEL_S
        while self._job(run_id).is_active:
            self._wake()
            if self._clock() > deadline:
                what = f"{run_id}: being cancelled, for {CANCEL_S:g} s now (spotune queue)"
                raise SubmissionUnknown(f"{what}, see {self.layout.supervisor_log}")
            self._sleep(POLL_S)

    def preempt(self, run_id: str, notice_s: float, agree: Agree = lambda question: None) -> None:
        job = self._job(run_id)
        if all(attempt.ended_at is not None for attempt in self._queue.attempts(run_id)):
            raise InputError(run_id, f"is {job.state}: it has no machine to take away")
        self._ask(run_id, "preempt", notice_s)

    def _ask(self, run_id: str, kind: str, notice_s: float = 0.0) -> None:
        """Adds a request and waits until the supervisor has taken it up. Otherwise removes it and raises InfraError."""
        request = self._queue.ask(run_id, kind, notice_s)
        deadline = self._clock() + TAKE_UP_S
        self._wake()
        while not self._queue.is_done(request):
            if self._clock() > deadline and (self._queue.take_back(request) or not self._queue.is_done(request)):
                what = f"{run_id}: the supervisor does not answer, nothing was done"
                raise InfraError(f"{what}; see {self.layout.supervisor_log}")
            self._sleep(POLL_S)
            self._wake()

    def jobs(self, run_ids: list[str] | None = None, everyone: bool = False) -> list[JobStatus]:
        jobs = self._queue.jobs()
        if any(job.is_active for job in jobs):
            self._wake()
        return [self._status(job) for job in jobs if run_ids is None or job.run_id in run_ids]

    def _status(self, job: JobRow) -> JobStatus:
        seen = self._guard_status(job)
        return JobStatus(
            **{name: getattr(job, name) for name in _STATUS},
            infra=self.name,
            recoveries=max(0, job.attempt - 1),
            step=seen.get("step"),
            max_steps=seen.get("max_steps"),
            loss=as_number(seen.get("loss")),
            phase=seen.get("phase") or "",
        )

    def _guard_status(self, job: JobRow) -> dict[str, Any]:
        """Returns what the guard reported last; from the previous machine until the new one has reported."""
        seen: dict[str, Any] = {}
        for attempt in range(job.attempt, 0, -1):
            status = self.layout.attempt(job.run_id, attempt).read_status()
            seen = {name: value for name, value in status.items() if value} | seen
            if "step" in seen and "max_steps" in seen:
                break
        return seen

    def logs(self, run_id: str, follow: bool) -> Iterator[str]:
        self._job(run_id)
        tail = _Tail(self.layout.log(run_id))
        while True:
            # The state is read before the log: if the job has ended by now, its log is complete.
            is_active = follow and self._job(run_id).is_active
            if is_active:
                self._wake()
            yield from tail.lines()
            if not is_active:
                break
            self._sleep(POLL_S)
        yield from tail.last()

    def history(self, run_id: str) -> list[PaidInterval]:
        return [
            PaidInterval(
                **{name: getattr(attempt, name) for name in _PAID},
                infra=self.name,
                region=REGION,
                zone=zone_of(attempt),
                instance_type="local",
            )
            for attempt in self._queue.attempts(run_id)
            if attempt.is_dated  # the claim and the events have the times of any other attempt
        ]

    def _wake(self) -> None:
        """Starts a supervisor if none runs. One that was started a moment ago gets time to take the lock."""
        if self._clock() - self._woken_at > START_S and not is_running(self.layout):
            if self._queue.fact("slots") is None:  # the queue was made anew
                gpus = find_gpus(self._environ)
                self._note_machine(self._slots or len(gpus) or 1, gpus)
            start(self.layout, self._environ)
            self._woken_at = self._clock()

    def _job(self, run_id: str) -> JobRow:
        job = self._queue.job(run_id)
        if job is None:
            raise InputError(run_id, "no such run in this machine's queue")
        return job


class _Tail:
    """Reads the new lines of a growing text file. Of more than ``most_bytes`` at once it reads only the end."""

    def __init__(self, path: Path, most_bytes: int = 256 << 20) -> None:
        self._path, self._most_bytes, self._position, self._lines = path, most_bytes, 0, LogLines()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may come in two pieces

    def lines(self) -> Iterator[str]:
        if not self._path.is_file():
            return
        with open(self._path, "rb") as file:
            if (left_out := os.fstat(file.fileno()).st_size - self._position - self._most_bytes) > 0:
                yield from self._lines.last()
                yield f"… {left_out} bytes are not shown ({self._path})"
                self._position += left_out
            file.seek(self._position)
            while piece := file.read(1 << 20):
                self._position += len(piece)
                yield from self._lines.add(self._decoder.decode(piece))

    def last(self) -> Iterator[str]:
        """Yields a last line that has no newline."""
        yield from self._lines.last()
