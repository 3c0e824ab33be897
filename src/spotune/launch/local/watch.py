"""Watches one machine, asks the bucket about a run whose machine has ended, and decides the job's next state."""

import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from spotune.core import errors
from spotune.core.io import make_room, read_as, write_state
from spotune.launch.local import machine
from spotune.launch.local.database import AttemptRow, JobRow, Verdict
from spotune.launch.local.layout import AttemptFiles, Exit, LocalFolders, Running
from spotune.launch.local.machine import kept_environment, texts
from spotune.launch.local.programs import PROBE, BucketProbe, probe
from spotune.launch.local.queue import Queue

# Decides a job's next state after one of its machines ended. Pure; uses SkyPilot's states.

KILLED = 137  # 128 + SIGKILL: out of memory or a fault of the machine, never an exit code of a program's own
FREE_RETRIES = 3  # exits with 75 without progress before retries are delayed
MAX_BACKOFF_S = 30.0


@dataclass(frozen=True)
class Ending:
    """How a machine ended. ``exit_code`` is None if the machine vanished before its program ended."""

    exit_code: int | None
    phase: str = "run"
    preempted: bool = False
    cancelled: bool = False


@dataclass(frozen=True)
class RestartLimits:
    """What the job may still ask for.

    Attributes:
        max_restarts: ``max_restarts_on_errors`` of the task.
        recover_codes: ``recover_on_exit_codes`` of the task; 75 always is one.
        restarts: how often the job was restarted after its own errors.
        faults: machine-like faults in a row without a new commit.
        commit: the newest commit when the previous machine had ended.
    """

    max_restarts: int = 0
    recover_codes: tuple[int, ...] = (errors.PREEMPTED,)
    restarts: int = 0
    faults: int = 0
    commit: str = ""
    interactive: bool = False


def decide(ending: Ending, seen: BucketProbe, limits: RestartLimits) -> Verdict:
    """Returns the job's next state: by the certificate, then the user's wish, then the marks, then the exit code."""
    code = ending.exit_code
    verdict = partial(Verdict, restarts=limits.restarts, faults=limits.faults)
    if seen.completed:
        return verdict("SUCCEEDED", exit_code=errors.SUCCEEDED)
    if ending.cancelled:
        return verdict("CANCELLED", "cancelled", code)
    if seen.paused is not None and code in (errors.PAUSED, KILLED, None):
        return verdict("PAUSED", seen.paused, errors.PAUSED)
    if seen.failed is not None and code != errors.SUCCEEDED:
        return verdict("FAILED", seen.failed, seen.failed_code)
    if seen.cancelled is not None and code != errors.SUCCEEDED:  # the verb died before it told the queue
        return verdict("CANCELLED", seen.cancelled, code)
    is_fault = _is_machine_fault(ending, limits)
    reason = "ended without a certificate" if code == errors.SUCCEEDED else _describe(ending, seen)
    if limits.interactive:
        if ending.preempted:
            reason = "preempted; an interactive run is not recovered"
        return verdict("FAILED", reason, errors.PREEMPTED if is_fault else code)
    if is_fault:
        return _recover(ending, seen, limits)
    if code != errors.SUCCEEDED and limits.restarts < limits.max_restarts:
        reason = f"{reason}; restart {limits.restarts + 1} of {limits.max_restarts}"
        return verdict("RECOVERING", reason, code, restarts=limits.restarts + 1)
    return verdict("FAILED", reason, code)


def backoff_s(faults: int) -> float:
    """Returns the wait before the attempt after the n-th fault in a row: 0, 1, 2, 4, … 30 seconds."""
    return 0.0 if faults <= 1 else min(MAX_BACKOFF_S, 2.0 ** (faults - 2))


def _is_machine_fault(ending: Ending, limits: RestartLimits) -> bool:
    """Returns whether the machine ended it, or a fault that the program blames on the machine."""
    if ending.exit_code is None or ending.exit_code in (KILLED, errors.PREEMPTED, *limits.recover_codes):
        return True
    return ending.preempted and ending.exit_code != errors.SUCCEEDED


def _recover(ending: Ending, seen: BucketProbe, limits: RestartLimits) -> Verdict:
    progress = seen.commit != limits.commit
    if ending.preempted:
        return Verdict("RECOVERING", "preempted", ending.exit_code, restarts=limits.restarts)
    faults = 1 if progress else limits.faults + 1
    vanished = ending.exit_code in (None, KILLED)
    delay_s = backoff_s(faults if vanished else faults - FREE_RETRIES)
    return Verdict("RECOVERING", _describe(ending, seen), ending.exit_code, delay_s, limits.restarts, faults)


def _describe(ending: Ending, seen: BucketProbe) -> str:
    if seen.stalled and ending.exit_code == errors.PREEMPTED:
        return "stalled (exit code 75)"
    if ending.exit_code is None:
        return "the machine was lost"
    how = "killed (exit code 137)" if ending.exit_code == KILLED else f"exited with code {ending.exit_code}"
    return f"setup {how}" if ending.phase == "setup" else how


SPAWN_S = 5.0  # a machine without a pid for so long was never started: the supervisor died in between


class MachineWatcher:
    """Keeps the rows of live machines up to date, and takes machines away."""

    def __init__(self, layout: LocalFolders, queue: Queue, clock: Callable[[], float]) -> None:
        self._layout, self._queue, self._clock = layout, queue, clock
        self._boot = machine.boot_id()
        self._seen: dict[str, float] = {}

    def take_away(self, attempt: AttemptRow, why: str, notice_s: float) -> None:
        """Sends SIGTERM to every process of a machine now, and SIGKILL after the notice."""
        kill_at = min(self._clock() + notice_s, attempt.kill_at or float("inf"))
        self._queue.update_attempt(attempt, taking=why, kill_at=kill_at)
        if notice_s > 0:
            machine.send(self._members(attempt), signal.SIGTERM)
        else:
            self._kill(attempt)

    def watch(self, attempt: AttemptRow) -> None:
        """Checks a machine that has not ended yet: whether it runs, has to be killed, or is gone."""
        files = self._layout.attempt(attempt.run_id, attempt.attempt)
        if attempt.boot != self._boot:
            self._close(attempt, files, lost_at=files.last_heartbeat() or attempt.started_at)
            return
        attempt = self._with_node(attempt)
        now = self._clock()
        if attempt.node is None and now < attempt.started_at + SPAWN_S:
            return
        if attempt.node and attempt.node.alive:
            self._seen[attempt.marker] = now
            self._note_running(attempt, files)
            if attempt.kill_at is not None and now >= attempt.kill_at:
                self._kill(attempt)
        elif left := self._members(attempt):
            self._seen[attempt.marker] = now
            if attempt.kill_at is not None and now < attempt.kill_at:
                return  # the notice holds for the processes that are left
            machine.send(left, signal.SIGKILL)  # the next check finds them gone
        else:
            self._close(attempt, files, lost_at=max(files.last_heartbeat(), attempt.started_at))

    def _members(self, attempt: AttemptRow) -> list[psutil.Process]:
        return machine.members(attempt.node, attempt.marker)

    def _kill(self, attempt: AttemptRow) -> None:
        """Kills the node first, so that it cannot report how its program ended: the machine is simply gone."""
        machine.send(sorted(self._members(attempt), key=lambda process: process.pid != attempt.pid), signal.SIGKILL)

    def _with_node(self, attempt: AttemptRow) -> AttemptRow:
        """Finds the node if the supervisor that started it died before it wrote the pid."""
        if attempt.node is None and (node := machine.find_node(attempt.marker)):
            self._queue.update_attempt(attempt, pid=node.pid, created=node.created)
            return next(row for row in self._queue.attempts(attempt.run_id) if row.attempt == attempt.attempt)
        return attempt

    def _note_running(self, attempt: AttemptRow, files: AttemptFiles) -> None:
        if attempt.running_at is None and (running := read_as(files.running, Running)):
            self._queue.run_began(attempt, running.at, running.setup_s)

    def _close(self, attempt: AttemptRow, files: AttemptFiles, lost_at: float) -> None:
        """Ends the paid interval of a machine of which nothing is left."""
        self._note_running(attempt, files)
        left = read_as(files.exit, Exit)  # None if it is damaged: then the machine is lost, and the bucket decides
        seen_at = self._seen.pop(attempt.marker, 0.0)
        if left is None:
            reason = attempt.taking or "lost"
            self._queue.update_attempt(attempt, ended_at=max(seen_at, lost_at), end_reason=reason)
            return
        reason = "exited"
        if left.exit_code != 0:
            reason = attempt.taking or ("lost" if left.exit_code == KILLED else "exited")
        ended_at = max(seen_at, left.ended_at)
        self._queue.update_attempt(attempt, **{**vars(left), "ended_at": ended_at, "end_reason": reason})


PROBE_TIMEOUT_S = 120.0
CANCEL_TIMEOUT_S = 20.0  # of a job that is cancelled: somebody waits, and little depends on the answer
RETRY_S = 3.0  # between two probes of a bucket that does not answer


class Settler:
    """Settles jobs whose machine has ended: probes the bucket, decides, writes it down. Never waits for a bucket."""

    def __init__(self, layout: LocalFolders, queue: Queue, clock: Callable[[], float]) -> None:
        self._layout, self._queue, self._clock = layout, queue, clock
        self._helpers: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
        self._not_before: dict[str, float] = {}

    def settle(self, job: JobRow, attempt: AttemptRow) -> Verdict | None:
        """Sets and returns the job's next state; returns None until the bucket has answered."""
        seen = self._probe(job, attempt)
        if seen is None:
            return None
        ending = Ending(attempt.exit_code, attempt.phase, attempt.taking == "preempted", job.cancelling)
        demand = job.demand
        limits = RestartLimits(
            max_restarts=demand.max_restarts,
            recover_codes=demand.recover_codes,
            restarts=job.restarts,
            faults=job.faults,
            commit=job.last_commit,
            interactive=job.interactive,
        )
        verdict = decide(ending, seen, limits)
        self._queue.settle(job.run_id, verdict, seen.commit, self._clock())
        return verdict

    def _probe(self, job: JobRow, attempt: AttemptRow) -> BucketProbe | None:
        """Returns what the bucket says, or None while it is asked. A bucket that does not answer is asked again."""
        output = self._layout.attempt(attempt.run_id, attempt.attempt).probe
        if self._is_helper_busy(job, attempt, output):
            return None
        seen = read_as(output, BucketProbe)
        is_open = seen is None or (seen.error and not job.cancelling)
        if is_open and self._clock() >= self._not_before.get(attempt.marker, 0.0):
            self._not_before[attempt.marker] = self._clock() + RETRY_S
            if not job.bucket.startswith("file://"):
                self._start_helper(job, attempt, output)
                return None
            seen = probe(job.bucket, job.run_id)  # answers at once, and needs no credentials
            write_state(output, seen)
        if seen and seen.error and not job.cancelling:  # of a cancelled job, the verbs see the certificate later
            self._queue.explain(job, f"waiting for its bucket: {seen.error}")
            return None
        return seen

    def _start_helper(self, job: JobRow, attempt: AttemptRow, output: Path) -> None:
        """Starts a process that probes the bucket in the job's environment."""
        make_room(output)
        command = [
            sys.executable,
            "-P",
            "-m",
            "spotune.launch.local.programs",
            PROBE,
            job.bucket,
            job.run_id,
            str(output),
        ]
        environ = kept_environment(self._layout, job.run_id) | texts(job.task.get("envs"))
        helper = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL)
        self._helpers[attempt.marker] = (helper, self._clock())

    def _is_helper_busy(self, job: JobRow, attempt: AttemptRow, output: Path) -> bool:
        """Returns whether a helper runs; ends one that exceeds its time."""
        helper, since = self._helpers.get(attempt.marker, (None, 0.0))
        if helper is None:
            return False
        if helper.poll() is None:
            limit_s = CANCEL_TIMEOUT_S if job.cancelling else PROBE_TIMEOUT_S
            if self._clock() - since <= limit_s:
                return True
            helper.kill()
            helper.wait()
            write_state(output, BucketProbe(error=f"it has not answered for {limit_s:g} s"))
        del self._helpers[attempt.marker]
        return False
