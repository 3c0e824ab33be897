"""The supervisor, a loop over the queue. If it is killed, the next one goes on from the queue."""

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
from spotune.launch.local.database import AttemptRow, JobRow, NewerState, VerbRequest, Verdict
from spotune.launch.local.layout import Gpu, LocalFolders
from spotune.launch.local.machine import start_machine
from spotune.launch.local.programs import cancelled_because
from spotune.launch.local.queue import Queue
from spotune.launch.local.watch import MachineWatcher, Settler
from spotune.launch.task import due

POLL_S = 0.2
IDLE_S = 5.0
CANCEL_GRACE_S = 10.0
FAULT_S = 5.0  # before a failed job is tried again, and between two tries at a queue that fails
MOST_FAULTY_S = 600.0  # the supervisor ends if the queue fails for so long; the next verb starts another one
DISK_S = 30.0  # before a job that this computer could not start gets another try


class Supervisor:
    """Runs the jobs of one SPOTUNE_HOME. ``start`` starts a machine; ``log`` takes one line for people."""

    def __init__(
        self,
        layout: LocalFolders,
        clock: Callable[[], float] = time.time,
        start: Callable[..., "subprocess.Popen[bytes]"] = start_machine,
        log: Callable[[str], None] = print,
    ) -> None:
        self._layout, self._clock, self._start_machine, self._log = layout, clock, start, log
        self._queue = Queue(layout.database)
        self._watcher = MachineWatcher(layout, self._queue, clock)
        self._settler = Settler(layout, self._queue, clock)
        self._children: list[subprocess.Popen[bytes]] = []
        self._faults: dict[str, tuple[str, float]] = {}  # by run id: what went wrong last, and when to try again

    def tick(self) -> bool:
        """Does one round; returns whether anything is left to do."""
        self._children = [child for child in self._children if child.poll() is None]  # reaps
        for request in self._queue.requests():
            with self._one_job(request.run_id):
                self._take_up(request)
        for attempt in self._queue.unsettled():
            if attempt.ended_at is None:
                with self._one_job(attempt.run_id):
                    self._watcher.watch(attempt)
        for attempt in self._queue.unsettled():
            if attempt.ended_at is not None:
                with self._one_job(attempt.run_id):
                    self._settle(attempt)
        for job in self._queue.active():
            if len(job.fired) < len(job.preemptions) and job.started_at is not None:
                with self._one_job(job.run_id):
                    self._fire(job, self._clock() - job.started_at)
        self._start_due()
        return bool(self._queue.active() or self._queue.requests() or self._queue.unsettled())

    @contextmanager
    def _one_job(self, run_id: str) -> Iterator[None]:
        """Keeps a job's fault away from the other jobs: it is logged once, and the job is tried again."""
        try:
            yield
        except Exception as error:
            why = f"{error}" if isinstance(error, (SpotuneError, OSError)) else f"{type(error).__name__}: {error}"
            why = " ".join(why.split())
            if self._faults.get(run_id, ("", 0.0))[0] != why:
                self._log_for(run_id, f"cannot go on, is tried again: {why}")
                with suppress(SpotuneError):
                    job = self._queue.job(run_id)
                    if job and job.is_active and job.state != "RUNNING":
                        self._queue.explain(job, why)
            self._faults[run_id] = why, self._clock() + FAULT_S

    def _take_up(self, request: VerbRequest) -> None:
        job, attempt = self._queue.job(request.run_id), self._live_attempt(request.run_id)
        if job and job.is_active and request.kind == "cancel":
            self._queue.mark_cancelling(job.run_id)
            if attempt and attempt.ended_at is None:
                self._watcher.take_away(attempt, "cancelled", CANCEL_GRACE_S)
            elif attempt is None:
                self._set_state(job, Verdict("CANCELLED", "cancelled"))
        elif request.kind == "preempt" and attempt and attempt.ended_at is None and attempt.taking != "cancelled":
            self._watcher.take_away(attempt, "preempted", request.notice_s)
        self._queue.finish_request(request.id)

    def _live_attempt(self, run_id: str) -> AttemptRow | None:
        return next((attempt for attempt in self._queue.unsettled() if attempt.run_id == run_id), None)

    def _settle(self, attempt: AttemptRow) -> None:
        job = self._queue.job(attempt.run_id)
        if job is None:  # its row is gone or damaged: the machine's slots are free again
            self._queue.update_attempt(attempt, settled=True)
        elif verdict := self._settler.settle(job, attempt):
            self._log_for(job.run_id, f"attempt {attempt.attempt}: {verdict.state} {verdict.reason}".rstrip())
            self._forget_secrets(job.run_id)

    def _fire(self, job: JobRow, elapsed_s: float) -> None:
        """Makes a planned preemption a request if its time has come. It waits until a machine runs the job."""
        attempt = self._live_attempt(job.run_id)
        if attempt is None or attempt.running_at is None or attempt.ended_at is not None or attempt.taking:
            return
        status = self._layout.attempt(job.run_id, job.attempt).read_status()
        ready = due(job.preemptions, job.fired, elapsed_s, status.get("step"))
        if ready is not None:
            notice_s = job.preemptions[ready].get("notice_s", 0.0)
            self._log_for(job.run_id, f"planned preemption {ready + 1}: {notice_s:g} s of notice")
            self._queue.fire(job.run_id, [*job.fired, ready], notice_s)

    def _start_due(self) -> None:
        """Starts jobs: highest priority first, then order of submission. A job that must wait holds back later ones."""
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
        """Returns how many jobs may run at a time, and the GPUs, as the last submission noted them."""
        slots, gpus = self._queue.fact("slots", 1), self._queue.fact("gpus", [])
        gpus = [gpu for gpu in gpus if isinstance(gpu, dict)] if isinstance(gpus, list) else []
        known = [Gpu(str(gpu["device"]), str(gpu["name"])) for gpu in gpus if {"device", "name"} <= gpu.keys()]
        return slots if type(slots) is int and 0 < slots <= 1024 else 1, known  # 1: the note is damaged

    def _start(self, job: JobRow, slots: list[int], gpus: list[Gpu]) -> None:
        if not job.task:
            self._set_state(job, Verdict("FAILED", job.reason, BAD_INPUT))
            return
        if why := cancelled_because(job.bucket, job.run_id):  # the verb died before it told the queue
            self._set_state(job, Verdict("CANCELLED", why))
            return
        attempt = AttemptRow(
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
        self._log_for(job.run_id, f"attempt {attempt.attempt}: started")

    def _not_started(self, job: JobRow, error: Exception) -> None:
        """Settles a job that did not start: its folder is gone, its file is damaged, or nothing can start here now."""
        if is_machine_fault(error) or isinstance(error, InfraError):
            why = f"cannot start: {getattr(error, 'strerror', None) or error}"
            verdict = Verdict("RECOVERING", why, delay_s=DISK_S, restarts=job.restarts, faults=job.faults)
            self._set_state(job, verdict, forget=False)
        elif isinstance(error, Damaged):
            kept = self._layout.environment(job.run_id)
            self._set_state(
                job, Verdict("FAILED", f"{kept}: {error} (spotune resume {job.run_id})", FAILED), forget=False
            )
            set_aside(kept, str(error), self._log)  # last: without the file a job would start without its secrets
        else:
            why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            self._set_state(job, Verdict("FAILED", f"cannot start in {job.workdir}: {why}", FAILED))

    def _set_state(self, job: JobRow, verdict: Verdict, forget: bool = True) -> None:
        self._queue.settle(job.run_id, verdict, job.last_commit, self._clock())
        self._log_for(job.run_id, f"{verdict.state} {verdict.reason}")
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
            except OSError as error:
                if error.errno not in (errno.ENOTDIR, errno.ELOOP):  # else: no folder, so no secrets
                    raise

    def forget_old_secrets(self) -> None:
        """Removes the secrets that a supervisor left because it was killed just after a job's end."""
        for job in self._queue.jobs():
            with self._one_job(job.run_id):
                self._forget_secrets(job.run_id)

    def mend(self) -> None:
        """Makes a damaged queue anew. Raises NewerState if a newer spotune made it."""
        self._queue.create(self._log)

    def _log_for(self, run_id: str, what: str) -> None:
        self._log(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {run_id} {what}")


def serve(
    layout: LocalFolders,
    idle_s: float = IDLE_S,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    log: Callable[[str], None] = print,
) -> None:
    """Runs until there was nothing to do for ``idle_s``. Outlives a queue that fails for less than ten minutes.

    Raises NewerState for a queue of a newer spotune, SpotuneError or OSError if it fails for longer.
    """
    supervisor = Supervisor(layout, log=log)
    last_active, failing_since, logged, is_new = clock(), clock(), "", True
    while clock() - last_active < idle_s:
        try:
            if is_new:
                supervisor.mend()
                supervisor.forget_old_secrets()
                is_new = False
            if supervisor.tick():
                last_active = clock()
            failing_since, logged, wait_s = clock(), "", POLL_S
        except NewerState:
            raise
        except Exception as error:
            if clock() - failing_since > MOST_FAULTY_S or not layout.root.is_dir():
                raise
            logged = _log_once(error, logged, log)
            wait_s, is_new = FAULT_S, True
        sleep(wait_s)
        if is_new:
            last_active = clock()


def _log_once(error: Exception, logged: str, log: Callable[[str], None]) -> str:
    """Logs a fault of the whole queue unless it was logged last; returns it."""
    why = " ".join(f"{error if isinstance(error, SpotuneError) else repr(error)}".split())
    if why != logged:
        log(f"{time.strftime('%Y-%m-%d %H:%M:%S')} the queue fails, is tried again: {why}")
    return why


def main(arguments: list[str]) -> int:
    """Serves one home as its only supervisor; returns the exit code."""
    protect_output()
    signal.signal(signal.SIGTERM, _leave)
    layout = LocalFolders(Path(arguments[0]))
    queue, idle_s = Queue(layout.database), IDLE_S
    try:
        os.chdir(layout.root)
        while True:
            with engine.only_one(layout) as alone:
                if not alone:
                    return 0
                serve(layout, idle_s)
            idle_s = 0.5
            if not (queue.active() or queue.requests()):  # else: a verb wrote while this supervisor was leaving
                return 0
    except Exception as error:
        _log_once(error, "", print)
        return INFRA_FAILED


def _leave(number: int, _: FrameType | None) -> None:
    """Stops watching; the jobs go on, and the next supervisor finds them."""
    sys.exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
