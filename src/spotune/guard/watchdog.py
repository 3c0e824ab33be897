"""Detects ranks that hang: probes them in a thread, records their stacks, and has the attempt end.

The guard's main loop ends the attempt, as for any other fault. Once the ranks have ended the watchdog watches the
guard's own calls to the bucket until the attempt is closed. If the main loop itself hangs, on a disk that is gone, the
watchdog ends the attempt and the process.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from spotune.core import errors
from spotune.core.environment import parse_stall_after
from spotune.guard import ranks
from spotune.guard.journal import Clock, Context, Journal, Sleep, log
from spotune.guard.multinode import Leader
from spotune.guard.ranks import append_own_stacks, collect_stacks
from spotune.guard.save_schedule import SaveCost
from spotune.guard.stalls import Sample, SeenTime, Stall, Stalls, Work, boot_time, sample_every_s

TICK_S = 0.5
EXIT_S = 5.0  # how long the process may take to exit after its attempt has ended
END_S = 300.0  # beyond the bucket's patience: how long the main loop may take to end a stalled attempt
HUNG_END_S = 60.0  # the same if the bucket hangs: nothing waits for uploads then


class Watchdog:
    """Watches the ranks of one attempt. Nothing is a stall while the machine is about to go (``is_leaving``).

    ``uploading`` returns the step whose upload is under way without errors, None for none. ``end_attempt`` ends the
    attempt with a message if the main loop hangs, and returns the exit code; ``leave`` ends this process.
    """

    def __init__(
        self,
        context: Context,
        journal: Journal,
        leader: Leader,
        save_cost: SaveCost,
        uploading: Callable[[], int | None],
        is_leaving: Callable[[], bool],
        end_attempt: Callable[[str], int],
        clock: Clock = time.monotonic,
        boot: Clock = boot_time,
        leave: Callable[[int], object] = os._exit,
        sleep: Sleep = time.sleep,
    ) -> None:
        self._context, self._journal, self._leader = context, journal, leader
        self._uploading, self._is_leaving, self._end_attempt = uploading, is_leaving, end_attempt
        self._leave, self._sleep = leave, sleep
        self.floor_s = parse_stall_after(context.run.stall_after)
        self._stalls = Stalls(self.floor_s, context.patience_s, lambda: save_cost.record)
        journal.listen(self._stalls.on_event)
        self._time = SeenTime(clock, boot)
        self._sampled_s: float | None = None
        self._pids: Mapping[int, int] = {}
        self.stall: Stall | None = None  # set once the stacks are recorded
        self._code, self._lock = errors.PREEMPTED, threading.Lock()
        self._stop, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="watchdog", daemon=True)

    def start(self, pids: Mapping[int, int]) -> None:
        """Begins to watch this machine's ranks (rank -> process id); does nothing if ``--stall-after`` is 0."""
        self._pids = pids
        if self.floor_s > 0:
            self._thread.start()

    def stop(self, has_stalled: bool) -> None:
        """Stops watching the ranks, which have ended or will; still watches the attempt's end and its calls."""
        with self._lock:
            self._stop.set()
            if not has_stalled:  # they ended by themselves, while their stacks were recorded
                self.stall = None

    def close(self, code: int) -> None:
        """Notes that the attempt has ended, and that the process will, with this exit code."""
        self._code = code
        self._stop.set()
        self._closed.set()

    @property
    def message(self) -> str:
        """One line about the stall; empty for no stall."""
        stall, context = self.stall, self._context
        if stall is None:
            return ""
        place = f"{context.store.url}/{context.keys.stacks(context.attempt, 0)}"
        return f"stalled: {stall.what} for {stall.silent_s:.0f} s (limit {stall.limit_s:.0f} s); stacks: {place}"

    def probe(self) -> None:
        self._tick()
        self._journal.poll()  # its own thread may be waiting for the bucket
        stall = self._stalls.check(self._time.seen_s, self._sample())
        if stall is None or self._is_leaving():
            return
        log(f"{stall.what} for {stall.silent_s:.0f} s: the stacks of all ranks are recorded, then the attempt ends")
        self._leader.broadcast(stacks=True)
        paths = collect_stacks(self._context.folder, self._pids)
        if stall.phase == "upload":
            paths += self._record_own_stacks()
        self._leader.wait_for_stacks()
        self._journal.poll()
        if self._stalls.check(self._time.seen_s) is None:
            log("a sign of life has come meanwhile: the attempt goes on")
            for path in paths:
                path.unlink(missing_ok=True)
            self._time.tick()  # the guard did run in that time
            return
        with self._lock:
            if not self._stop.is_set():
                self._record(stall)

    def probe_calls(self) -> bool:
        """Checks the guard's own calls to the bucket once; ends the process and returns True if one hangs."""
        self._tick()
        stall = self._stalls.check(self._time.seen_s, self._sample(has_ranks=False))
        if stall is None or self._is_leaving():
            return False
        with self._lock:
            if self._closed.is_set():
                return False
            self._record(stall)
        log(f"{stall.what} for {stall.silent_s:.0f} s: the attempt ends")
        self._record_own_stacks()
        self._leave(self._end_attempt(self.message))
        return True

    def _tick(self) -> None:
        if missed_s := self._time.tick():
            log(f"the guard did not run for {missed_s:.0f} s; the watchdog does not count that time")
            self._stalls.forgive(missed_s)

    def _record(self, stall: Stall) -> None:
        facts = {"silent_s": round(stall.silent_s, 1), "limit_s": round(stall.limit_s, 1)}
        self._journal.write("stall", phase=stall.phase, since=round(stall.since, 4), **facts)
        self.stall = stall

    def _record_own_stacks(self) -> list[Path]:
        """Adds the guard's stacks to the first rank's; they show which call to the bucket hangs."""
        rank = min(self._pids, default=0)
        try:
            path = append_own_stacks(self._context.folder, rank)
        except OSError as error:
            log(f"the guard's stacks are not recorded: {error}")
            return []
        log(f"the guard's stacks are in {path}")
        return [path]

    def _sample(self, has_ranks: bool = True) -> Sample | None:
        """Returns the work of all processes; None between two samples."""
        now = self._time.seen_s
        if self._sampled_s is not None and now - self._sampled_s < sample_every_s(self.floor_s):
            return None
        self._sampled_s = now
        calls, work = self._context.store.calls, None
        if has_ranks and (ours := ranks.work_of(set(self._pids.values()))):
            works = [ours, *self._leader.works]
            cpu_s, moved_bytes = sum(work.cpu_s for work in works), sum(work.moved_bytes for work in works)
            work = Work(cpu_s, moved_bytes, any(work.stopped for work in works))
        return Sample(work, ranks.own_work(), self._uploading(), calls.moved_bytes, calls.under_way())

    def _work(self) -> None:
        while self.stall is None and not self._stop.wait(TICK_S):
            self.probe()
        if stall := self.stall:
            left_s = HUNG_END_S if stall.phase == "upload" else self._context.patience_s + END_S
            while left_s > 0 and self.stall is not None and not self._closed.wait(min(TICK_S, left_s)):
                left_s -= TICK_S
            is_closed = self._closed.is_set()
            if self.stall is not None:
                if is_closed:
                    self._sleep(EXIT_S)  # Python waits for threads, even for an endless upload; else it ends this one
                if not self._is_leaving():
                    log("a disk or a bucket does not answer, so this process cannot end by itself: it is ended")
                    self._leave(self._code if is_closed else self._end_attempt(self.message))
                return
        self._stalls.end_ranks()
        while not self._closed.wait(TICK_S):
            if self.probe_calls():
                return
