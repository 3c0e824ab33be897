"""LocalInfra, the engine of this machine, and the supervisor's process that it starts."""

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
from spotune.core.errors import InfraError, InputError, Unsettled
from spotune.core.io import LogLines
from spotune.core.protocol import as_number
from spotune.launch.engine import Agree, JobStatus, PaidInterval, Submission, check_folder, check_secrets
from spotune.launch.local.database import Job
from spotune.launch.local.layout import MARKER, Gpu, Layout, find_gpus
from spotune.launch.local.machine import REGION, check_kept, keep_environment
from spotune.launch.local.queue import Queue
from spotune.launch.task import demand_of, trainer_of

# One supervisor at a time, started by the verb that needs it.

# Put in the background by a shell, so that it is nobody's child: no zombie is left in a verb that lives long.
_BACKGROUND = 'exec </dev/null >>"$0" 2>&1; "$@" &'


@contextmanager
def only_one(layout: Layout) -> Iterator[bool]:
    """Holds the supervisor's lock; yields whether it was free. The kernel frees it when the holder dies."""
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


def is_running(layout: Layout) -> bool:
    """Whether somebody holds the lock. A shared lock is tried, so that two who ask do not mislead each other."""
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


def start(layout: Layout, environ: Mapping[str, str]) -> None:
    """Starts a supervisor; one too many leaves at once. Call it after the queue was written: an idle one that is
    about to leave looks at the queue again once it has let go of the lock. Raises InfraError where none can be."""
    command = [sys.executable, "-P", "-m", "spotune.launch.local.supervisor", str(layout.home)]
    shell = ["sh", "-c", _BACKGROUND, str(layout.supervisor_log), *command]
    # A verb that is called by a job must not make the supervisor a part of that job's machine.
    own = {name: value for name, value in environ.items() if name != MARKER}
    try:
        subprocess.run(
            shell, cwd=layout.root, env=own, start_new_session=True, stderr=subprocess.PIPE, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise InfraError(f"the supervisor cannot be started: {' '.join(said.split())}") from error


# What the verbs call: LocalInfra writes to the queue, sees to it that a supervisor runs, and waits where it must.

POLL_S = 0.1
START_S = 2.0
TAKE_UP_S = 30.0  # a supervisor that starts on a busy machine
CANCEL_S = 60.0
MOST_LOG_BYTES = 256 << 20  # of a log at once: what nobody reads to its end
ENDS = "end it: spotune cancel"


class LocalInfra:
    """Managed jobs on this machine, in the queue of one SPOTUNE_HOME.

    Args:
        home: SPOTUNE_HOME.
        environ: the environment that jobs inherit.
        slots: jobs at a time; default one per GPU, one on CPU.
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
        self.layout = Layout(home)
        self._environ, self._slots, self._clock, self._sleep = environ, slots, clock, sleep
        self._woken_at = 0.0
        self.layout.make()
        self._queue = Queue(self.layout.database)
        self._queue.create()

    def submit(self, submission: Submission) -> None:
        """Puts the job into the queue and returns; nothing of it is left behind when it is refused."""
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
        kept, now, is_added = self.layout.environment(submission.run_id), self._clock(), False
        try:
            keep = partial(keep_environment, kept, self._environ, submission.secrets, python)
            self._queue.add(submission, bucket, keep, now)
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
        """Raises Unsettled for a job that has begun, or that nobody can tell of."""

        def forget() -> None:
            with suppress(OSError):
                self.layout.environment(run_id).unlink()

        try:
            is_gone = self._queue.withdraw(run_id, added_at, forget)
        except BaseException as error:
            raise Unsettled(f"{str(why) or 'interrupted'}; {run_id} may be in the queue ({ENDS} {run_id})") from error
        if not is_gone:
            raise Unsettled(f"{str(why) or 'interrupted'}; {run_id} has begun and goes on ({ENDS} {run_id})") from why

    def check_resumable(self, run_id: str) -> None:
        job = self._job(run_id)
        check_secrets(run_id, job.secrets, self._environ)
        if job.task:  # else nobody knows its folder, and when it is started it says why
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
                raise Unsettled(f"{what}, see {self.layout.supervisor_log}")
            self._sleep(POLL_S)

    def preempt(self, run_id: str, notice_s: float, agree: Agree = lambda question: None) -> None:
        job = self._job(run_id)
        if not any(attempt.ended_at is None for attempt in self._queue.attempts(run_id)):
            raise InputError(run_id, f"is {job.state}: it has no machine to take away")
        self._ask(run_id, "preempt", notice_s)

    def _ask(self, run_id: str, kind: str, notice_s: float = 0.0) -> None:
        """Leaves a request and waits until the supervisor has taken it up. One that it does not is taken back."""
        request = self._queue.ask(run_id, kind, notice_s)
        deadline = self._clock() + TAKE_UP_S
        self._wake()
        while not self._queue.is_done(request):
            if self._clock() > deadline and (self._queue.take_back(request) or not self._queue.is_done(request)):
                what = f"{run_id}: the supervisor does not answer, so that nothing was done"
                raise InfraError(f"{what}, see {self.layout.supervisor_log}")
            self._sleep(POLL_S)
            self._wake()

    def jobs(self, run_ids: list[str] | None = None, everyone: bool = False) -> list[JobStatus]:
        jobs = self._queue.jobs()
        if any(job.is_active for job in jobs):
            self._wake()
        return [self._status(job) for job in jobs if run_ids is None or job.run_id in run_ids]

    def _status(self, job: Job) -> JobStatus:
        seen = self._guard_status(job)
        return JobStatus(
            run_id=job.run_id,
            state=job.state,
            priority=job.priority,
            user=job.user,
            infra=self.name,
            submitted_at=job.submitted_at,
            started_at=job.started_at,
            ended_at=job.ended_at,
            attempt=job.attempt,
            recoveries=max(0, job.attempt - 1),
            reason=job.reason,
            exit_code=job.exit_code,
            step=seen.get("step"),
            max_steps=seen.get("max_steps"),
            loss=as_number(seen.get("loss")),
            phase=seen.get("phase") or "",
            bucket=job.bucket,
        )

    def _guard_status(self, job: Job) -> dict[str, Any]:
        """What the guard said last; that of the machine before while a new one has not said anything."""
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
            # Asked before reading: when it has ended by now, all that it wrote is there.
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
                run_id=run_id,
                started_at=attempt.started_at,
                ended_at=attempt.ended_at,
                infra=self.name,
                region=REGION,
                zone=f"local-{attempt.slots[0]}" if attempt.slots else "local-dev",
                instance_type="local",
                accelerators=attempt.accelerators,
                use_spot=attempt.use_spot,
                setup_s=attempt.setup_s,
                end_reason=attempt.end_reason,
                exit_code=attempt.exit_code,
            )
            for attempt in self._queue.attempts(run_id)
            if attempt.is_dated  # of another its claim and events tell
        ]

    def _wake(self) -> None:
        """Sees to it that a supervisor runs; one that was started a moment ago is given time to say so."""
        if self._clock() - self._woken_at > START_S and not is_running(self.layout):
            if self._queue.fact("slots") is None:  # a queue that was made anew does not know its machine
                gpus = find_gpus(self._environ)
                self._note_machine(self._slots or len(gpus) or 1, gpus)
            start(self.layout, self._environ)
            self._woken_at = self._clock()

    def _job(self, run_id: str) -> Job:
        job = self._queue.job(run_id)
        if job is None:
            raise InputError(run_id, "no such run in this machine's queue")
        return job


class _Tail:
    """A growing text file: what it has that was not read yet, as whole lines; of very much, a word and the end."""

    def __init__(self, path: Path, most_bytes: int = MOST_LOG_BYTES) -> None:
        self._path, self._position, self._lines = path, 0, LogLines()
        self._most_bytes = most_bytes
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
        """A last line that was never ended."""
        yield from self._lines.last()
