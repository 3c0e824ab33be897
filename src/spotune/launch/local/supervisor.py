"""The supervisor: a loop over the queue. It may be killed at any time; the next one goes on from the queue."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from uuid import uuid4

from spotune.contracts.exits import BAD_INPUT, FAILED
from spotune.contracts.output import protect_output
from spotune.launch.local import daemon, processes
from spotune.launch.local.gpus import Gpu
from spotune.launch.local.layout import Layout
from spotune.launch.local.look import cancelled_because
from spotune.launch.local.machine import start_machine
from spotune.launch.local.queue import Queue
from spotune.launch.local.rows import Attempt, Job, Request
from spotune.launch.local.settle import Settler
from spotune.launch.local.verdict import Verdict
from spotune.launch.local.watch import Watcher
from spotune.launch.preemptions import due

POLL_S = 0.2
IDLE_S = 5.0
CANCEL_GRACE_S = 10.0


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

    def tick(self) -> bool:
        """One round; returns whether there is anything left to do."""
        self._children = [child for child in self._children if child.poll() is None]  # reaps
        for request in self._queue.requests():
            self._take_up(request)
        for attempt in self._queue.unsettled():
            if attempt.ended_at is None:
                self._watcher.watch(attempt)
        self._settle_ended()
        self._fire_planned()
        self._start_due()
        return bool(self._queue.active() or self._queue.requests() or self._queue.unsettled())

    def _take_up(self, request: Request) -> None:
        job, attempt = self._queue.job(request.run_id), self._live_attempt(request.run_id)
        if job and job.is_active and request.kind == "cancel":
            self._queue.mark_cancelling(job.run_id)
            if attempt and attempt.ended_at is None:
                self._watcher.take(attempt, "cancelled", CANCEL_GRACE_S)
            elif attempt is None:
                self._end(job, Verdict("CANCELLED", "cancelled"))
        elif attempt and attempt.ended_at is None and attempt.taking != "cancelled":
            self._watcher.take(attempt, "preempted", request.notice_s)
        self._queue.finish_request(request.id)

    def _live_attempt(self, run_id: str) -> Attempt | None:
        return next((attempt for attempt in self._queue.unsettled() if attempt.run_id == run_id), None)

    def _settle_ended(self) -> None:
        for attempt in self._queue.unsettled():
            job = self._queue.job(attempt.run_id)
            if attempt.ended_at is not None and job:
                verdict = self._settler.settle(job, attempt)
                if verdict:
                    self._say(job, f"attempt {attempt.attempt}: {verdict.state} {verdict.reason}".rstrip())
                    self._forget_secrets(job.run_id)

    def _fire_planned(self) -> None:
        now = self._clock()
        for job in self._queue.active():
            if len(job.fired) == len(job.preemptions) or job.started_at is None:
                continue
            attempt = self._live_attempt(job.run_id)
            if attempt is None or attempt.running_at is None or attempt.ended_at is not None or attempt.taking:
                continue  # nothing to take away right now: it fires when something runs
            status = self._layout.attempt(job.run_id, job.attempt).read_status()
            ready = due(job.preemptions, job.fired, now - job.started_at, status.get("step"))
            if ready is not None:
                notice_s = job.preemptions[ready].get("notice_s", 0.0)
                self._say(job, f"planned preemption {ready + 1}: {notice_s:g} s of notice")
                self._queue.fire(job.run_id, [*job.fired, ready], notice_s)

    def _start_due(self) -> None:
        """Highest priority first, then order of submission; a job that must wait holds back those behind it."""
        unsettled = self._queue.unsettled()
        busy = {slot for attempt in unsettled for slot in attempt.slots}
        has_machine = {attempt.run_id for attempt in unsettled}
        free = [slot for slot in range(self._queue.fact("slots", 1)) if slot not in busy]
        blocked = False
        for job in self._queue.active():
            if job.run_id in has_machine or job.not_before > self._clock():
                continue
            gpus = [Gpu(**gpu) for gpu in self._queue.fact("gpus", [])]
            needed = max(1, job.demand.gpus) if gpus else 1
            if job.interactive:
                self._start(job, [], gpus[:needed])
            elif not blocked and len(free) >= needed:
                slots, free = free[:needed], free[needed:]
                self._start(job, slots, [gpus[slot % len(gpus)] for slot in slots if gpus])
            else:
                blocked = True

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
            boot=processes.boot_id(),
            started_at=self._clock(),
            slots=slots,
            accelerators=f"{gpus[0].name}:{len(gpus)}" if gpus else "",
            use_spot=job.demand.use_spot,
        )
        if not self._queue.start(attempt):
            return
        try:
            child = self._start_machine(self._layout, job, attempt, [gpu.device for gpu in gpus])
            node = processes.Identity.of(child.pid)
        except OSError as error:  # the folder of submission is gone, or nothing can be started
            self._queue.update_attempt(attempt, ended_at=self._clock(), end_reason="lost")
            self._end(job, Verdict("FAILED", f"cannot start in {job.workdir}: {error.strerror or error}", FAILED))
            return
        self._children.append(child)
        self._queue.update_attempt(attempt, pid=node.pid, created=node.created)
        self._say(job, f"attempt {attempt.attempt}: started")

    def _end(self, job: Job, verdict: Verdict) -> None:
        self._queue.settle(job.run_id, verdict, job.last_commit, self._clock())
        self._say(job, f"{verdict.state} {verdict.reason}")
        self._forget_secrets(job.run_id)

    def _forget_secrets(self, run_id: str) -> None:
        job = self._queue.job(run_id)
        if job and not job.is_active:
            self._layout.environment(run_id).unlink(missing_ok=True)

    def forget_old_secrets(self) -> None:
        """A supervisor that was killed just after a job's end left them."""
        for job in self._queue.jobs():
            self._forget_secrets(job.run_id)

    def _say(self, job: Job, what: str) -> None:
        self._log(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {job.run_id} {what}")


def serve(
    layout: Layout,
    idle_s: float = IDLE_S,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Runs until there has been nothing to do for a while."""
    supervisor = Supervisor(layout)
    supervisor.forget_old_secrets()
    last_active = clock()
    while clock() - last_active < idle_s:
        if supervisor.tick():
            last_active = clock()
        sleep(POLL_S)


def main(arguments: list[str]) -> None:
    """Serves one home as its only supervisor."""
    protect_output()
    signal.signal(signal.SIGTERM, _leave)
    layout = Layout(Path(arguments[0]))
    os.chdir(layout.root)
    queue = Queue(layout.database)
    idle_s = IDLE_S
    while True:
        with daemon.only_one(layout) as alone:
            if not alone:
                return
            serve(layout, idle_s)
        idle_s = 0.5
        if not (queue.active() or queue.requests()):  # else: a verb wrote while this one was about to leave
            return


def _leave(number: int, _: FrameType | None) -> None:
    """Stops watching; the jobs go on, and the next verb's supervisor adopts them."""
    sys.exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
