"""Watches the machines: what the bucket says of a run, and what becomes of a job when its machine has ended."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from spotune.core import errors
from spotune.core.errors import BadRecord, SpotuneError, protect_output
from spotune.core.io import log_line, make_room, read_as, write_state
from spotune.core.keys import Keys, commit_of
from spotune.core.records import Progress, read_mark
from spotune.core.store import Store
from spotune.launch.local import machine
from spotune.launch.local.database import Attempt, Job, Verdict
from spotune.launch.local.layout import AttemptFiles, Exit, Layout, Running
from spotune.launch.local.machine import kept_environment, texts
from spotune.launch.local.queue import Queue

# What the bucket says of a run, as far as the engine needs it: certificate, marks, newest commit.
#
# For a bucket far away it runs as a process of its own (``python -m spotune.launch.local.watch``), with the job's
# environment: the supervisor was started by another shell and may lack this bucket's credentials, and it never waits.


@dataclass(frozen=True)
class Look:
    """``failed``, ``cancelled`` and ``paused`` are the marks' reasons, None for none; ``commit`` the newest's key.

    ``stalled``: the watchdog ended the last attempt that wrote its progress.
    """

    completed: bool = False
    failed: str | None = None
    failed_code: int = 1
    cancelled: str | None = None
    paused: str | None = None
    commit: str = ""
    stalled: bool = False
    error: str = ""
    at: float = 0.0


def look(bucket: str, run_id: str, clock: Callable[[], float] = time.time) -> Look:
    """Reads the bucket; a bucket that does not answer is a Look with ``error``."""
    keys = Keys(run_id)
    try:
        store = Store(bucket)
        if store.exists(keys.completed):
            return Look(completed=True, at=clock())
        failed, cancelled, paused = (read_mark(store, key) for key in (keys.failed, keys.cancelled, keys.paused))
        stalled = _has_stalled(store, keys.progress)
        commits = [found for key in store.keys(keys.commits) if (found := commit_of(key))]
    except SpotuneError as error:
        return Look(error=str(error), at=clock())
    return Look(
        failed=failed.reason if failed else None,
        failed_code=failed.exit_code if failed else 1,
        cancelled=cancelled.reason if cancelled else None,
        paused=paused.reason if paused else None,
        commit=keys.commit(*max(commits)) if commits else "",
        stalled=stalled,
        at=clock(),
    )


def cancelled_because(bucket: str, run_id: str) -> str | None:
    """Why a run is cancelled, None where it is not, or its bucket is not on this machine: nobody waits for another."""
    try:
        mark = read_mark(Store(bucket), Keys(run_id).cancelled) if bucket.startswith("file://") else None
    except SpotuneError:
        return None
    return mark.reason if mark else None


def _has_stalled(store: Store, key: str) -> bool:
    """Whether ``progress.json`` says so: once an attempt has ended, its phase is the reason. False where unreadable."""
    try:
        data = store.read(key)
        return data is not None and Progress.from_bytes(data, key).phase == "stalled"
    except BadRecord:
        return False


def main(arguments: list[str]) -> None:
    protect_output()
    bucket, run_id, output = arguments
    try:
        write_state(Path(output), look(bucket, run_id))
    except (OSError, SpotuneError) as error:  # the supervisor asks again
        log_line(f"{run_id}: {error}")


# What becomes of a job when a machine of its has ended: a pure decision, in SkyPilot's terms.

KILLED = 137  # 128 + SIGKILL: nothing that a program does to itself; out of memory, or a machine's fault
FREE_RETRIES = 3  # attempts that say 75 by themselves, without progress, before they are slowed down
MAX_BACKOFF_S = 30.0


@dataclass(frozen=True)
class Ending:
    """How a machine ended. ``exit_code`` None: it vanished before its program ended."""

    exit_code: int | None
    phase: str = "run"
    preempted: bool = False
    cancelled: bool = False


@dataclass(frozen=True)
class Patience:
    """What the job may still ask for.

    Attributes:
        restarts: how often it was restarted after an error of its own.
        max_restarts: ``max_restarts_on_errors`` of the task.
        recover_codes: ``recover_on_exit_codes`` of the task; 75 always is one.
        faults: machine-like faults in a row without a new commit.
        commit: the newest commit when the last machine had ended.
    """

    max_restarts: int = 0
    recover_codes: tuple[int, ...] = (errors.PREEMPTED,)
    restarts: int = 0
    faults: int = 0
    commit: str = ""
    interactive: bool = False


def decide(ending: Ending, seen: Look, patience: Patience) -> Verdict:
    """The certificate first, then what the user wants, then the marks, then the exit code."""
    code = ending.exit_code
    kept = partial(Verdict, restarts=patience.restarts, faults=patience.faults)
    if seen.completed:
        return kept("SUCCEEDED", exit_code=errors.SUCCEEDED)
    if ending.cancelled:
        return kept("CANCELLED", "cancelled", code)
    if seen.paused is not None and code in (errors.PAUSED, KILLED, None):
        return kept("PAUSED", seen.paused, errors.PAUSED)
    if seen.failed is not None and code != errors.SUCCEEDED:
        return kept("FAILED", seen.failed, seen.failed_code)
    if seen.cancelled is not None and code != errors.SUCCEEDED:  # whoever cancelled it was stopped before we were told
        return kept("CANCELLED", seen.cancelled, code)
    if patience.interactive:
        return Verdict(
            "FAILED", _end_of_interactive(ending, seen), errors.PREEMPTED if _is_machines(ending, patience) else code
        )
    if _is_machines(ending, patience):
        return _recover(ending, seen, patience)
    if code == errors.SUCCEEDED:
        return kept("FAILED", "ended without a certificate", code)
    if patience.restarts < patience.max_restarts:
        reason = f"{_spell(ending, seen)}; restart {patience.restarts + 1} of {patience.max_restarts}"
        return Verdict("RECOVERING", reason, code, restarts=patience.restarts + 1, faults=patience.faults)
    return kept("FAILED", _spell(ending, seen), code)


def backoff_s(faults: int) -> float:
    """0, 1, 2, 4, … 30 seconds before the attempt that follows the n-th fault in a row."""
    return 0.0 if faults <= 1 else min(MAX_BACKOFF_S, 2.0 ** (faults - 2))


def _is_machines(ending: Ending, patience: Patience) -> bool:
    """Whether the machine, or a fault that the program thinks is the machine's, ended it."""
    if ending.exit_code is None or ending.exit_code in (KILLED, errors.PREEMPTED, *patience.recover_codes):
        return True
    return ending.preempted and ending.exit_code != errors.SUCCEEDED


def _recover(ending: Ending, seen: Look, patience: Patience) -> Verdict:
    progress = seen.commit != patience.commit
    if ending.preempted:
        return Verdict("RECOVERING", "preempted", ending.exit_code, restarts=patience.restarts)
    faults = 1 if progress else patience.faults + 1
    vanished = ending.exit_code in (None, KILLED)
    delay_s = backoff_s(faults if vanished else faults - FREE_RETRIES)
    return Verdict("RECOVERING", _spell(ending, seen), ending.exit_code, delay_s, patience.restarts, faults)


def _end_of_interactive(ending: Ending, seen: Look) -> str:
    if ending.preempted:
        return "preempted; an interactive run is not recovered"
    return "ended without a certificate" if ending.exit_code == 0 else _spell(ending, seen)


def _spell(ending: Ending, seen: Look) -> str:
    if seen.stalled and ending.exit_code == errors.PREEMPTED:
        return "stalled (exit code 75)"
    if ending.exit_code is None:
        return "the machine was lost"
    what = "setup " if ending.phase == "setup" else ""
    return (
        f"{what}killed (exit code 137)" if ending.exit_code == KILLED else f"{what}exited with code {ending.exit_code}"
    )


# One machine, looked at again and again; and what follows when it is gone: look, decide, write it down.

# One machine, looked at again and again: has it started, has its time come, is it gone and with what.

SPAWN_S = 5.0  # a machine without a pid for so long was never started: the supervisor died in between


class Watcher:
    """Keeps the rows of live machines true, and takes machines away."""

    def __init__(self, layout: Layout, queue: Queue, clock: Callable[[], float] = time.time) -> None:
        self._layout, self._queue, self._clock = layout, queue, clock
        self._boot = machine.boot_id()
        self._seen: dict[str, float] = {}

    def take(self, attempt: Attempt, why: str, notice_s: float) -> None:
        """Begins to take a machine away: SIGTERM to all of it now, SIGKILL after the notice."""
        kill_at = min(self._clock() + notice_s, attempt.kill_at or float("inf"))
        self._queue.update_attempt(attempt, taking=why, kill_at=kill_at)
        if notice_s > 0:
            machine.send(self._members(attempt), signal.SIGTERM)
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
            machine.send(left, signal.SIGKILL)  # seen gone at the next look
        else:
            self._close(attempt, files, lost_at=max(_heartbeat(files), attempt.started_at))

    def _members(self, attempt: Attempt) -> list[Any]:
        return machine.members(attempt.node, attempt.marker)

    def _kill(self, attempt: Attempt) -> None:
        """The node first, so that it cannot report how its program ended: the machine is simply gone."""
        members = self._members(attempt)
        members.sort(key=lambda process: process.pid != attempt.pid)
        machine.send(members, signal.SIGKILL)

    def _adopt(self, attempt: Attempt) -> Attempt:
        """Finds the node that a supervisor started and could not write down any more."""
        if attempt.node is None and (node := machine.find_node(attempt.marker)):
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
        command = [sys.executable, "-P", "-m", "spotune.launch.local.watch", job.bucket, job.run_id, str(answer)]
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


if __name__ == "__main__":
    main(sys.argv[1:])
