"""The supervisor: a loop over the queue. It may be killed at any time; the next one goes on from the queue."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from uuid import uuid4

from spotune.core.errors import BAD_INPUT, FAILED, INFRA_FAILED, InfraError, SpotuneError, protect_output
from spotune.core.io import Damaged, make_room, set_aside
from spotune.core.store.faults import is_machine_fault
from spotune.launch.local import engine, machine
from spotune.launch.local.database import Attempt, Job, NewerState, Request, Verdict
from spotune.launch.local.layout import Gpu, Layout
from spotune.launch.local.machine import start_machine
from spotune.launch.local.queue import Queue
from spotune.launch.local.watch import Settler, Watcher, cancelled_because
from spotune.launch.task import due

POLL_S = 0.2
MOST_SLOTS = 1024
IDLE_S = 5.0
CANCEL_GRACE_S = 10.0
FAULT_S = 5.0  # before a job whose start failed is tried again, and between two tries at a queue that fails
MOST_FAULTY_S = 600.0  # a queue that fails for so long is left; the next verb starts another supervisor
DISK_S = 30.0  # before a job that the machine could not start gets another try


class Supervisor:
    """Runs the jobs of one SPOTUNE_HOME.

    Args:
        start: starts a machine for an attempt.
        log: takes one line for people.
    """

    def __init__(
        self,
        layout: Layout,
        clock: Callable[[], float] = time.time,
        start: Callable[..., "subprocess.Popen[bytes]"] = start_machine,
        log: Callable[[str], None] = print,
    ) -> None:
        self._layout, self._clock, self._start_machine, self._log = layout, clock, start, log
        self._queue = Queue(layout.database)
        self._watcher = Watcher(layout, self._queue, clock)
        self._settler = Settler(layout, self._queue, clock)
        self._children: list[subprocess.Popen[bytes]] = []
        self._faults: dict[str, tuple[str, float]] = {}  # by run id: what went wrong last, and when to try again

    def tick(self) -> bool:
        """One round; returns whether there is anything left to do."""
        self._children = [child for child in self._children if child.poll() is None]  # reaps
        for request in self._queue.requests():
            with self._one_job(request.run_id):
                self._take_up(request)
        for attempt in self._queue.unsettled():
            if attempt.ended_at is None:
                with self._one_job(attempt.run_id):
                    self._watcher.watch(attempt)
        self._settle_ended()
        self._fire_planned()
        self._start_due()
        return bool(self._queue.active() or self._queue.requests() or self._queue.unsettled())

    @contextmanager
    def _one_job(self, run_id: str) -> Iterator[None]:
        """Keeps what goes wrong with one job from the others: a fault is logged once, and tried again."""
        try:
            yield
        except Exception as error:
            why = f"{error}" if isinstance(error, (SpotuneError, OSError)) else f"{type(error).__name__}: {error}"
            why = " ".join(why.split())
            if self._faults.get(run_id, ("", 0.0))[0] != why:
                self._log(self._line(run_id, f"cannot go on, is tried again: {why}"))
                with suppress(SpotuneError):
                    job = self._queue.job(run_id)
                    if job and job.is_active and job.state != "RUNNING":
                        self._queue.explain(job, why)
            self._faults[run_id] = why, self._clock() + FAULT_S

    def _take_up(self, request: Request) -> None:
        job, attempt = self._queue.job(request.run_id), self._live_attempt(request.run_id)
        if job and job.is_active and request.kind == "cancel":
            self._queue.mark_cancelling(job.run_id)
            if attempt and attempt.ended_at is None:
                self._watcher.take(attempt, "cancelled", CANCEL_GRACE_S)
            elif attempt is None:
                self._end(job, Verdict("CANCELLED", "cancelled"))
        elif request.kind == "preempt" and attempt and attempt.ended_at is None and attempt.taking != "cancelled":
            self._watcher.take(attempt, "preempted", request.notice_s)
        self._queue.finish_request(request.id)

    def _live_attempt(self, run_id: str) -> Attempt | None:
        return next((attempt for attempt in self._queue.unsettled() if attempt.run_id == run_id), None)

    def _settle_ended(self) -> None:
        for attempt in self._queue.unsettled():
            if attempt.ended_at is not None:
                with self._one_job(attempt.run_id):
                    self._settle(attempt)

    def _settle(self, attempt: Attempt) -> None:
        job = self._queue.job(attempt.run_id)
        if job is None:  # its row is gone or damaged: the machine's slots are free again
            self._queue.update_attempt(attempt, settled=True)
        elif verdict := self._settler.settle(job, attempt):
            self._say(job, f"attempt {attempt.attempt}: {verdict.state} {verdict.reason}".rstrip())
            self._forget_secrets(job.run_id)

    def _fire_planned(self) -> None:
        for job in self._queue.active():
            if len(job.fired) < len(job.preemptions) and job.started_at is not None:
                with self._one_job(job.run_id):
                    self._fire(job, self._clock() - job.started_at)

    def _fire(self, job: Job, elapsed_s: float) -> None:
        attempt = self._live_attempt(job.run_id)
        if attempt is None or attempt.running_at is None or attempt.ended_at is not None or attempt.taking:
            return  # nothing to take away right now: it fires when something runs
        status = self._layout.attempt(job.run_id, job.attempt).read_status()
        ready = due(job.preemptions, job.fired, elapsed_s, status.get("step"))
        if ready is not None:
            notice_s = job.preemptions[ready].get("notice_s", 0.0)
            self._say(job, f"planned preemption {ready + 1}: {notice_s:g} s of notice")
            self._queue.fire(job.run_id, [*job.fired, ready], notice_s)

    def _start_due(self) -> None:
        """Highest priority first, then order of submission; a job that must wait holds back those behind it."""
        unsettled = self._queue.unsettled()
        busy = {slot for attempt in unsettled for slot in attempt.slots}
        has_machine = {attempt.run_id for attempt in unsettled}
        count, gpus = self._machine()
        free = [slot for slot in range(count) if slot not in busy]
        blocked = False
        for job in self._queue.active():
            not_before = max(job.not_before, self._faults.get(job.run_id, ("", 0.0))[1])
            if job.run_id in has_machine or not_before > self._clock():
                continue
            with self._one_job(job.run_id):
                needed = max(1, job.demand.gpus) if gpus else 1
                if job.interactive:
                    self._start(job, [], gpus[:needed])
                elif not blocked and len(free) >= needed:
                    slots, free = free[:needed], free[needed:]
                    self._start(job, slots, [gpus[slot % len(gpus)] for slot in slots if gpus])
                else:
                    blocked = True

    def _machine(self) -> tuple[int, list[Gpu]]:
        """How many jobs at a time, and the GPUs, as the last submission found them; one job where that is damaged."""
        slots, gpus = self._queue.fact("slots", 1), self._queue.fact("gpus", [])
        gpus = [gpu for gpu in gpus if isinstance(gpu, dict)] if isinstance(gpus, list) else []
        known = [Gpu(str(gpu["device"]), str(gpu["name"])) for gpu in gpus if {"device", "name"} <= gpu.keys()]
        return slots if type(slots) is int and 0 < slots <= MOST_SLOTS else 1, known

    def _start(self, job: Job, slots: list[int], gpus: list[Gpu]) -> None:
        if not job.task:
            self._end(job, Verdict("FAILED", job.reason, BAD_INPUT))
            return
        if why := cancelled_because(job.bucket, job.run_id):  # whoever did it was stopped before this was told
            self._end(job, Verdict("CANCELLED", why))
            return
        attempt = Attempt(
            run_id=job.run_id,
            attempt=job.attempt + 1,
            marker=f"{job.run_id}/{job.attempt + 1}/{uuid4().hex}",
            boot=machine.boot_id(),
            started_at=self._clock(),
            slots=slots,
            accelerators=f"{gpus[0].name}:{len(gpus)}" if gpus else "",
            use_spot=job.demand.use_spot,
        )
        if not self._queue.start(attempt):
            return
        try:
            child = self._start_machine(self._layout, job, attempt, [gpu.device for gpu in gpus])
            node = machine.Identity.of(child.pid)
        except Exception as error:
            self._queue.update_attempt(attempt, ended_at=self._clock(), end_reason="lost")
            self._not_started(job, error)
            return
        self._children.append(child)
        self._queue.update_attempt(attempt, pid=node.pid, created=node.created)
        self._say(job, f"attempt {attempt.attempt}: started")

    def _not_started(self, job: Job, error: Exception) -> None:
        """The folder of submission is gone, a file of the job is damaged, or the machine can start nothing now."""
        if is_machine_fault(error) or isinstance(error, InfraError):
            why = f"cannot start: {getattr(error, 'strerror', None) or error}"
            verdict = Verdict("RECOVERING", why, delay_s=DISK_S, restarts=job.restarts, faults=job.faults)
            self._queue.settle(job.run_id, verdict, job.last_commit, self._clock())
            self._say(job, f"{why}, is tried again")
        elif isinstance(error, Damaged):
            kept = self._layout.environment(job.run_id)
            self._end(job, Verdict("FAILED", f"{kept}: {error} (spotune resume {job.run_id})", FAILED), forget=False)
            set_aside(kept, str(error), self._log)  # last: a job without the file would start without its secrets
        else:
            why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            self._end(job, Verdict("FAILED", f"cannot start in {job.workdir}: {why}", FAILED))

    def _end(self, job: Job, verdict: Verdict, forget: bool = True) -> None:
        self._queue.settle(job.run_id, verdict, job.last_commit, self._clock())
        self._say(job, f"{verdict.state} {verdict.reason}")
        if forget:
            self._forget_secrets(job.run_id)

    def _forget_secrets(self, run_id: str) -> None:
        job = self._queue.job(run_id)
        if job and not job.is_active:
            kept = self._layout.environment(run_id)
            try:
                kept.unlink(missing_ok=True)
            except (IsADirectoryError, PermissionError):
                make_room(kept, self._log)
            except OSError as error:  # a file where its folder was holds no secrets
                if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                    raise

    def forget_old_secrets(self) -> None:
        """A supervisor that was killed just after a job's end left them."""
        for job in self._queue.jobs():
            with self._one_job(job.run_id):
                self._forget_secrets(job.run_id)

    def mend(self) -> None:
        """Makes the queue anew where its file is damaged. Raises NewerState where a newer spotune made it."""
        self._queue.create(self._log)

    def _say(self, job: Job, what: str) -> None:
        self._log(self._line(job.run_id, what))

    def _line(self, run_id: str, what: str) -> str:
        return f"{time.strftime('%Y-%m-%d %H:%M:%S')} {run_id} {what}"


def serve(
    layout: Layout,
    idle_s: float = IDLE_S,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    log: Callable[[str], None] = print,
) -> None:
    """Runs until there has been nothing to do for a while. Outlives a queue that fails for less than ten minutes.

    Raises NewerState for a queue of a newer spotune, SpotuneError or OSError where it fails for longer.
    """
    supervisor = Supervisor(layout, log=log)
    last_active, failing_since, said, is_new = clock(), clock(), "", True
    while clock() - last_active < idle_s:
        try:
            if is_new:
                supervisor.mend()
                supervisor.forget_old_secrets()
                is_new = False
            if supervisor.tick():
                last_active = clock()
            failing_since, said, wait_s = clock(), "", POLL_S
        except NewerState:
            raise
        except Exception as error:
            if clock() - failing_since > MOST_FAULTY_S or not layout.root.is_dir():
                raise
            said = _log_once(error, said, log)
            wait_s, is_new = FAULT_S, True
        sleep(wait_s)
        if is_new:
            last_active = clock()


def _log_once(error: Exception, said: str, log: Callable[[str], None]) -> str:
    """Logs what the whole queue suffers from, unless that was logged last; returns it."""
    why = " ".join(f"{error if isinstance(error, SpotuneError) else repr(error)}".split())
    if why != said:
        log(f"{time.strftime('%Y-%m-%d %H:%M:%S')} the queue fails, is tried again: {why}")
    return why


def main(arguments: list[str]) -> int:
    """Serves one home as its only supervisor; returns the exit code."""
    protect_output()
    signal.signal(signal.SIGTERM, _leave)
    layout = Layout(Path(arguments[0]))
    queue, idle_s = Queue(layout.database), IDLE_S
    try:
        os.chdir(layout.root)
        while True:
            with engine.only_one(layout) as alone:
                if not alone:
                    return 0
                serve(layout, idle_s)
            idle_s = 0.5
            if not (queue.active() or queue.requests()):  # else: a verb wrote while this one was about to leave
                return 0
    except Exception as error:
        _log_once(error, "", print)
        return INFRA_FAILED


def _leave(number: int, _: FrameType | None) -> None:
    """Stops watching; the jobs go on, and the next verb's supervisor adopts them."""
    sys.exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
