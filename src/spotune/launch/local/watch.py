"""One machine, looked at again and again: has it started, has its time come, is it gone and with what."""

import signal
import time
from collections.abc import Callable
from typing import Any

from spotune.contracts.localstate import read_as
from spotune.launch.local import processes
from spotune.launch.local.layout import AttemptFiles, Exit, Layout, Running
from spotune.launch.local.queue import Queue
from spotune.launch.local.rows import Attempt

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
