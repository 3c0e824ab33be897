"""Notices ranks that hang: looks at them in a thread of its own, records their stacks, and has the attempt end.

The guard's main loop ends the attempt, as for any other fault. Once the ranks have ended the guard's own calls to the
bucket are watched, until the attempt is closed. Where the main loop hangs itself, on a disk that is gone, the watchdog
ends the attempt and the process.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from spotune.core import errors
from spotune.core.environment import parse_stall_after
from spotune.guard import ranks
from spotune.guard.journal import Context, Journal, say
from spotune.guard.multinode import Leader
from spotune.guard.ranks import append_own_stacks, collect_stacks
from spotune.guard.save_schedule import Toll
from spotune.guard.stalls import Budgets, Sample, SeenTime, Stall, Stalls, Work, boot_time, sample_every_s

TICK_S = 0.5
EXIT_S = 5.0  # an attempt that has ended: how long the process may take to do so
END_S = 300.0  # beyond the bucket's patience: how long the main loop may take to end a stalled attempt
HUNG_END_S = 60.0  # the same where the bucket hangs: uploads are not waited for then


class Watchdog:
    """Watches the ranks of one attempt.

    Args:
        toll: what saves have cost so far.
        uploading: the step whose upload is under way and makes no errors, None for none.
        is_leaving: whether the machine is about to go; then nothing is a stall.
        end_attempt: ends the attempt where the main loop hangs, with this message; returns the exit code.
        leave: ends this process.

    Attributes:
        stall: what was noticed, set once the stacks are recorded.
    """

    def __init__(
        self,
        context: Context,
        journal: Journal,
        leader: Leader,
        toll: Toll,
        uploading: Callable[[], int | None],
        is_leaving: Callable[[], bool],
        end_attempt: Callable[[str], int],
        clock: Callable[[], float] = time.monotonic,
        boot: Callable[[], float] = boot_time,
        leave: Callable[[int], object] = os._exit,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._context, self._journal, self._leader = context, journal, leader
        self._uploading, self._is_leaving, self._leave, self._sleep = uploading, is_leaving, leave, sleep
        self._end_attempt = end_attempt
        self.floor_s = parse_stall_after(context.run.stall_after)
        self._stalls = Stalls(Budgets(self.floor_s, context.patience_s, lambda: toll.record))
        journal.listen(self._stalls.take)
        self._time = SeenTime(clock, boot)
        self._sampled_s: float | None = None
        self._pids: Mapping[int, int] = {}
        self.stall: Stall | None = None
        self._code = errors.PREEMPTED
        self._lock = threading.Lock()
        self._stop, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="watchdog", daemon=True)

    def start(self, pids: Mapping[int, int]) -> None:
        """Begins to watch this machine's ranks (rank -> process id); does nothing where it is off."""
        self._pids = pids
        if self.floor_s > 0:
            self._thread.start()

    def stop(self, has_stalled: bool) -> None:
        """The ranks have ended, or are about to. That the attempt ends is still watched, and calls to the bucket."""
        with self._lock:
            self._stop.set()
            if not has_stalled:  # they ended by themselves, while their stacks were recorded
                self.stall = None

    def close(self, code: int) -> None:
        """The attempt has ended, and the process is about to, with this exit code."""
        self._code = code
        self._stop.set()
        self._closed.set()

    @property
    def message(self) -> str:
        """One line about the stall; empty for none."""
        stall, context = self.stall, self._context
        if stall is None:
            return ""
        place = f"{context.store.url}/{context.keys.stacks(context.attempt, 0)}"
        return f"stalled: {stall.what} for {stall.silent_s:.0f} s (limit {stall.limit_s:.0f} s); stacks: {place}"

    def look(self) -> None:
        """One look at everything."""
        self._tick()
        self._journal.poll()  # the journal's own thread may be waiting for the bucket
        stall = self._stalls.look(self._time.seen_s, self._sample())
        if stall is None or self._is_leaving():
            return
        say(f"{stall.what} for {stall.silent_s:.0f} s: the stacks of all ranks are recorded, then the attempt ends")
        self._leader.ask_for_stacks()
        paths = collect_stacks(self._context.folder, self._pids)
        if stall.phase == "upload":
            paths = [*paths, *self._record_own_stacks()]
        self._leader.wait_for_stacks()
        self._journal.poll()
        if self._stalls.look(self._time.seen_s) is None:
            say("a sign of life has come meanwhile: the attempt goes on")
            for path in paths:
                path.unlink(missing_ok=True)
            self._time.tick()  # that was no time in which the guard did not run
            return
        with self._lock:
            if not self._stop.is_set():
                self._record(stall)

    def look_at_calls(self) -> bool:
        """One look at the guard's own calls to the bucket; ends the process where one hangs, and returns True then."""
        self._tick()
        stall = self._stalls.look(self._time.seen_s, self._sample(has_ranks=False))
        if stall is None or self._is_leaving():
            return False
        with self._lock:
            if self._closed.is_set():
                return False
            self._record(stall)
        say(f"{stall.what} for {stall.silent_s:.0f} s: the attempt ends")
        self._record_own_stacks()
        self._leave(self._end_attempt(self.message))
        return True

    def _tick(self) -> None:
        missed_s = self._time.tick()
        if missed_s:
            say(f"the guard did not run for {missed_s:.0f} s; the watchdog does not count that time")
            self._stalls.forgive(missed_s)

    def _record(self, stall: Stall) -> None:
        facts = {"silent_s": round(stall.silent_s, 1), "limit_s": round(stall.limit_s, 1)}
        self._journal.write("stall", phase=stall.phase, since=round(stall.since, 4), **facts)
        self.stall = stall

    def _record_own_stacks(self) -> list[Path]:
        """Adds the guard's stacks to those of the first rank; they say which call to the bucket hangs."""
        rank = min(self._pids, default=0)
        try:
            path = append_own_stacks(self._context.folder, rank)
        except OSError as error:
            say(f"the guard's stacks are not recorded: {error}")
            return []
        say(f"the guard's stacks are in {path}")
        return [path]

    def _sample(self, has_ranks: bool = True) -> Sample | None:
        """What processes have done; None between two samples."""
        now = self._time.seen_s
        if self._sampled_s is not None and now - self._sampled_s < sample_every_s(self.floor_s):
            return None
        self._sampled_s = now
        calls = self._context.store.calls
        return Sample(
            ranks=self._work_of_ranks() if has_ranks else None,
            guard=ranks.own_work(),
            uploading=self._uploading(),
            sent_bytes=calls.moved_bytes,
            calls=calls.under_way(),
        )

    def _work_of_ranks(self) -> Work | None:
        ours = ranks.work_of(set(self._pids.values()))
        if ours is None:
            return None
        works = [ours, *self._leader.works]
        return Work(
            cpu_s=sum(work.cpu_s for work in works),
            moved_bytes=sum(work.moved_bytes for work in works),
            stopped=any(work.stopped for work in works),
        )

    def _work(self) -> None:
        while self.stall is None and not self._stop.wait(TICK_S):
            self.look()
        if stall := self.stall:
            is_hung = stall.phase == "upload"
            is_closed = self._wait_for_end(HUNG_END_S if is_hung else self._context.patience_s + END_S)
            if self.stall is not None:
                self._end_process(is_closed)
                return
        self._stalls.end_ranks()
        while not self._closed.wait(TICK_S):
            if self.look_at_calls():
                return

    def _wait_for_end(self, seconds: float) -> bool:
        """Waits until a stalled attempt is closed; returns whether it is. Returns at once where it did not stall."""
        left_s = seconds
        while left_s > 0 and self.stall is not None:
            if self._closed.wait(min(TICK_S, left_s)):
                break
            left_s -= TICK_S
        return self._closed.is_set()

    def _end_process(self, is_closed: bool) -> None:
        """Ends the process of an attempt that has stalled and cannot end it."""
        if is_closed:
            self._sleep(EXIT_S)  # Python waits for threads, also for one that uploads for ever; it ends this one if not
        if self._is_leaving():
            return
        say("this process cannot end by itself, since a disk or a bucket does not answer: it is ended")
        self._leave(self._code if is_closed else self._end_attempt(self.message))
