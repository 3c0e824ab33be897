"""One machine, looked at again and again; and what follows when it is gone: look, decide, write it down."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from spotune.core.io import make_room, read_as, write_state
from spotune.launch.local import processes
from spotune.launch.local.layout import AttemptFiles, Exit, Layout, Running
from spotune.launch.local.machine import kept_environment, texts
from spotune.launch.local.probe import Look, look
from spotune.launch.local.queue import Queue
from spotune.launch.local.rows import Attempt, Job
from spotune.launch.local.verdict import Ending, Patience, Verdict, decide

# One machine, looked at again and again: has it started, has its time come, is it gone and with what.

SPAWN_S = 5.0  # a machine without a pid for so long was never started: the supervisor died in between


class Watcher:
    """Keeps the rows of live machines true, and takes machines away."""

    def __init__(self, layout: Layout, queue: Queue, clock: Callable[[], float] = time.time) -> None:
        self._layout, self._queue, self._clock = layout, queue, clock
        self._boot = processes.boot_id()
        self._seen: dict[str, float] = {}

    def take(self, attempt: Attempt, why: str, notice_s: float) -> None:
        """Begins to take a machine away: SIGTERM to all of it now, SIGKILL after the notice."""
        kill_at = min(self._clock() + notice_s, attempt.kill_at or float("inf"))
        self._queue.update_attempt(attempt, taking=why, kill_at=kill_at)
        if notice_s > 0:
            processes.send(self._members(attempt), signal.SIGTERM)
        else:
            self._kill(attempt)

    def watch(self, attempt: Attempt) -> None:
        """One look at a machine that has not ended yet."""
        files = self._layout.attempt(attempt.run_id, attempt.attempt)
        if attempt.boot != self._boot:
            self._close(attempt, files, lost_at=_heartbeat(files) or attempt.started_at)
            return
        attempt = self._adopt(attempt)
        if attempt.node is None and self._clock() < attempt.started_at + SPAWN_S:
            return
        now = self._clock()
        if attempt.node and attempt.node.alive:
            self._seen[attempt.marker] = now
            self._note_running(attempt, files)
            if attempt.kill_at is not None and now >= attempt.kill_at:
                self._kill(attempt)
        elif left := self._members(attempt):
            self._seen[attempt.marker] = now
            if attempt.kill_at is not None and now < attempt.kill_at:
                return  # the notice holds for what is still there
            processes.send(left, signal.SIGKILL)  # seen gone at the next look
        else:
            self._close(attempt, files, lost_at=max(_heartbeat(files), attempt.started_at))

    def _members(self, attempt: Attempt) -> list[Any]:
        return processes.members(attempt.node, attempt.marker)

    def _kill(self, attempt: Attempt) -> None:
        """The node first, so that it cannot report how its program ended: the machine is simply gone."""
        members = self._members(attempt)
        members.sort(key=lambda process: process.pid != attempt.pid)
        processes.send(members, signal.SIGKILL)

    def _adopt(self, attempt: Attempt) -> Attempt:
        """Finds the node that a supervisor started and could not write down any more."""
        if attempt.node is None and (node := processes.find_node(attempt.marker)):
            self._queue.update_attempt(attempt, pid=node.pid, created=node.created)
            return next(row for row in self._queue.attempts(attempt.run_id) if row.attempt == attempt.attempt)
        return attempt

    def _note_running(self, attempt: Attempt, files: AttemptFiles) -> None:
        if attempt.running_at is None and (running := read_as(files.running, Running)):
            self._queue.run_began(attempt, running.at, running.setup_s)

    def _close(self, attempt: Attempt, files: AttemptFiles, lost_at: float) -> None:
        """Nothing of the machine is left: its paid interval ends."""
        self._note_running(attempt, files)
        left = read_as(files.exit, Exit)  # one that is damaged: the machine is lost, and the bucket decides
        seen_at = self._seen.pop(attempt.marker, 0.0)
        if left is None:
            reason = attempt.taking or "lost"
            self._queue.update_attempt(attempt, ended_at=max(seen_at, lost_at), end_reason=reason)
            return
        finished = left.exit_code == 0
        self._queue.update_attempt(
            attempt,
            ended_at=max(seen_at, left.ended_at),
            exit_code=left.exit_code,
            phase=left.phase,
            setup_s=left.setup_s,
            end_reason="exited" if finished else attempt.taking or ("lost" if left.exit_code == 137 else "exited"),
        )


def _heartbeat(files: AttemptFiles) -> float:
    try:
        return files.heartbeat.stat().st_mtime
    except OSError:  # missing, or a file where its folder was
        return 0.0


# What follows when a machine is gone: look at the bucket, decide, write it down.

LOOK_TIMEOUT_S = 120.0
CANCEL_TIMEOUT_S = 20.0  # of a job that is cancelled: somebody waits, and little hangs on the answer
RETRY_S = 3.0  # between two tries at a bucket that does not answer


class Settler:
    """Decides about jobs whose machine has ended; never waits for a bucket."""

    def __init__(self, layout: Layout, queue: Queue, clock: Callable[[], float] = time.time) -> None:
        self._layout, self._queue, self._clock = layout, queue, clock
        self._helpers: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
        self._not_before: dict[str, float] = {}

    def settle(self, job: Job, attempt: Attempt) -> Verdict | None:
        """The job's next state, None while the bucket has not answered."""
        seen = self._look(job, attempt)
        if seen is None:
            return None
        ending = Ending(
            exit_code=attempt.exit_code,
            phase=attempt.phase,
            preempted=attempt.taking == "preempted",
            cancelled=job.cancelling,
        )
        demand = job.demand
        patience = Patience(
            max_restarts=demand.max_restarts,
            recover_codes=demand.recover_codes,
            restarts=job.restarts,
            faults=job.faults,
            commit=job.last_commit,
            interactive=job.interactive,
        )
        verdict = decide(ending, seen, patience)
        self._queue.settle(job.run_id, verdict, seen.commit, self._clock())
        return verdict

    def _look(self, job: Job, attempt: Attempt) -> Look | None:
        """What the bucket says, None while it is being asked; one that does not answer is asked again."""
        if self._is_helper_busy(job, attempt):
            return None
        files = self._layout.attempt(attempt.run_id, attempt.attempt)
        seen = read_as(files.look, Look)
        is_open = seen is None or (seen.error and not job.cancelling)
        if is_open and self._clock() >= self._not_before.get(attempt.marker, 0.0):
            self._not_before[attempt.marker] = self._clock() + RETRY_S
            if not job.bucket.startswith("file://"):
                self._ask(job, attempt)
                return None
            seen = look(job.bucket, job.run_id)  # answers at once, and needs no credentials
            write_state(files.look, seen)
        if seen is None:
            return None
        if seen.error and not job.cancelling:  # a cancelled one that is certified is found to be so when it is listed
            self._queue.explain(job, f"waiting for its bucket: {seen.error}")
            return None
        return seen

    def _ask(self, job: Job, attempt: Attempt) -> None:
        """Lets a helper ask, in the job's environment."""
        answer = self._layout.attempt(attempt.run_id, attempt.attempt).look
        make_room(answer)
        command = [sys.executable, "-P", "-m", "spotune.launch.local.probe", job.bucket, job.run_id, str(answer)]
        environ = kept_environment(self._layout, job.run_id) | texts(job.task.get("envs"))
        helper = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL)
        self._helpers[attempt.marker] = (helper, self._clock())

    def _is_helper_busy(self, job: Job, attempt: Attempt) -> bool:
        helper, since = self._helpers.get(attempt.marker, (None, 0.0))
        if helper is None:
            return False
        if helper.poll() is None:
            now, limit_s = self._clock(), CANCEL_TIMEOUT_S if job.cancelling else LOOK_TIMEOUT_S
            if now - since <= limit_s:
                return True
            helper.kill()
            helper.wait()
            silent = Look(error=f"it has not answered for {limit_s:g} s", at=now)
            write_state(self._layout.attempt(attempt.run_id, attempt.attempt).look, silent)
        del self._helpers[attempt.marker]
        return False
