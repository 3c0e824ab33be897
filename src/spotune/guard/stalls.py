"""Ends an attempt that hangs: decides whether it has stalled, and watches for that."""

import math
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spotune.core import errors
from spotune.core.environment import parse_stall_after
from spotune.core.store import Call
from spotune.guard import ranks
from spotune.guard.journal import Clock, Context, Journal, Sleep, log
from spotune.guard.multinode import Leader
from spotune.guard.ranks import Work, append_own_stacks, collect_stacks
from spotune.guard.save_schedule import FEWEST, RECENT, SaveCost

# Decides whether an attempt has stalled. Pure: gets events and samples; ``SeenTime`` counts the time.
#
# docs/explanation/checkpoints.md has each phase's limit and other signs of life: bytes moved and, while ranks load, CPU
# time. The floor is ``--stall-after``. While a rank is stopped (state T), CPU time and bytes of others do not count.

TIMES = 6.0  # how many times the median a step may take
LONGEST_TICK_S = 5.0  # in a longer one the guard itself did not run
BYTES_PER_S = 256e3  # less is a trickle: logs, heartbeats, this watchdog's own reading of /proc
FIRST_FLOORS, LOAD_FLOORS = 12.0, 24.0  # how long CPU time alone is believed
_SIGNS = frozenset(("phase", "step", "plan", "rows", "predicted", "save", "log", "restored"))


def boot_time() -> float:
    """Returns seconds that go on while the machine is suspended; not on Linux: ``monotonic``."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class SeenTime:
    """Counts in ``seen_s`` the seconds in which the guard ran: neither it nor the machine was suspended."""

    def __init__(self, clock: Clock = time.monotonic, boot: Clock = boot_time) -> None:
        self._clock, self._boot = clock, boot
        self._at, self._asleep_s = clock(), boot() - clock()
        self.seen_s = 0.0

    def tick(self) -> float:
        """Adds the time since the last tick; returns how many of its seconds were missed, mostly 0."""
        now = self._clock()
        passed_s, asleep_s = max(now - self._at, 0.0), self._boot() - now
        slept_s = max(asleep_s - self._asleep_s, 0.0)
        self._at, self._asleep_s = now, asleep_s
        if passed_s > LONGEST_TICK_S or slept_s > LONGEST_TICK_S:
            return passed_s + slept_s
        self.seen_s += passed_s
        return 0.0


@dataclass(frozen=True)
class Sample:
    """What the guard sees in one probe."""

    ranks: Work | None  # of all ranks and their children, on all machines; None if unknown
    guard: Work
    uploading: int | None = None  # the step whose upload is under way, None while the bucket is known to be away
    sent_bytes: int = 0  # of files moved to and from the bucket so far
    calls: Mapping[int, Call] = field(default_factory=dict)  # to the bucket that have not returned, by number


@dataclass(frozen=True)
class Stall:
    """Nothing has happened for longer than the limit."""

    phase: str  # ``upload``, or the events' name
    silent_s: float  # seen seconds since the last sign of life
    limit_s: float
    since: float  # its time, epoch seconds
    call: str = ""  # the call to the bucket that does not return

    @property
    def what(self) -> str:
        if self.call:
            return f"no answer from the bucket to: {self.call}"
        missing = {"train": "no step", "upload": "no byte of a checkpoint was uploaded"}
        return missing.get(self.phase, f"no sign of life in the phase {self.phase}")


class Stalls:
    """Finds stalls from the events of an attempt and from samples. Thread-safe.

    ``floor_s``: ``--stall-after``, 0 for never. ``patience_s``: how long the bucket may be away. ``known``: returns
    ``SaveCost.record``.
    """

    def __init__(
        self, floor_s: float, patience_s: float, known: Callable[[], dict[str, float]] = dict, now: Clock = time.time
    ) -> None:
        self._floor_s, self._patience_s, self._known, self._now = floor_s, patience_s, known, now
        self._lock = threading.Lock()
        self._phase, self._is_restored, self._has_stepped, self._has_ended = "load", False, False, False
        self._sign_s, self._sign_at = 0.0, now()
        self._seen_s = self._worked_s = self._moved_s = 0.0  # when CPU time was last used, when bytes were last moved
        self._steps: deque[float] = deque(maxlen=RECENT)
        self._longest_step_s = self._longest_eval_s = 0.0
        self._step_s: float | None = None  # when the last step ended, or training began
        self._eval_s: float | None = None
        self._upload: int | None = None
        self._upload_s, self._upload_at = 0.0, now()
        self._last: tuple[float, Sample] | None = None
        self._calls: dict[int, tuple[Call, float, float]] = {}  # and since when silent: seen and epoch seconds

    def end_ranks(self) -> None:
        """Notes that the ranks have ended: from now on only calls to the bucket can stall."""
        with self._lock:
            self._has_ended = True

    def on_event(self, event: dict[str, Any]) -> None:
        if event["event"] not in _SIGNS:
            return
        with self._lock:
            now = self._seen_s
            self._sign_s, self._sign_at = now, self._now()
            match event["event"]:
                case "restored":
                    self._is_restored = True
                case "phase":
                    if self._phase == "eval" and self._eval_s is not None:
                        self._longest_eval_s = max(self._longest_eval_s, now - self._eval_s)
                    self._phase = event["phase"]
                    self._eval_s = now if self._phase == "eval" else None
                    self._step_s = now if self._phase == "train" else None  # the time in between is not a step's
                case "step":
                    if self._step_s is not None:
                        took_s = now - self._step_s
                        self._longest_step_s = max(self._longest_step_s, took_s)
                        if self._has_stepped:  # the first one compiles and warms up
                            self._steps.append(took_s)
                    self._has_stepped, self._step_s = True, now

    def forgive(self, missed_s: float) -> None:
        """Restarts every limit after the guard has missed some time."""
        if missed_s:
            with self._lock:
                self._sign_s = self._worked_s = self._moved_s = self._upload_s = self._seen_s
                self._last, self._calls = None, {}

    def check(self, seen_s: float, sample: Sample | None = None) -> Stall | None:
        """Returns the stall if there is one now; ``sample``: if one was taken in this probe."""
        with self._lock:
            self._seen_s = seen_s
            if sample is not None:
                self._compare(sample)
            if self._floor_s <= 0:
                return None
            known = self._known()
            upload_limit_s = max(self._floor_s, self._patience_s, TIMES * known.get("send_s", 0.0))
            if not self._has_ended and (stall := self._check_ranks(known, upload_limit_s)):
                return stall
            for call, since_s, since in self._calls.values():
                if self._seen_s - since_s > upload_limit_s:
                    return Stall("upload", self._seen_s - since_s, upload_limit_s, since, f"{call.verb} {call.key}")
            return None

    def _compare(self, sample: Sample) -> None:
        now, last = self._seen_s, self._last
        if sample.uploading != self._upload:
            self._upload, self._upload_s, self._upload_at = sample.uploading, now, self._now()
        self._last = (now, sample)
        earlier, self._calls = self._calls, {}
        for number, call in sample.calls.items():
            known = earlier.get(number)
            # A call that has moved something is another one.
            self._calls[number] = known if known and known[0] == call else (call, now, self._now())
        if last is None or now <= last[0]:
            return
        span_s, before = now - last[0], last[1]
        if sample.sent_bytes != before.sent_bytes:
            self._upload_s, self._upload_at = now, self._now()
        if (sample.guard.moved_bytes - before.guard.moved_bytes) / span_s >= BYTES_PER_S:
            if self._upload is not None:
                self._upload_s, self._upload_at = now, self._now()
            if self._phase == "restore" and not self._is_restored:
                self._moved_s = now
        if sample.ranks is None or before.ranks is None or sample.ranks.stopped:
            return
        if (sample.ranks.cpu_s - before.ranks.cpu_s) / span_s >= 0.05:  # of a core: less is a trickle
            self._worked_s = now
        if (sample.ranks.moved_bytes - before.ranks.moved_bytes) / span_s >= BYTES_PER_S:
            self._moved_s = now

    def _check_ranks(self, known: dict[str, float], upload_limit_s: float) -> Stall | None:
        limit_s, believes_cpu_s, believes_bytes = self._limit(known)
        silent_s = self._seen_s - (max(self._sign_s, self._moved_s) if believes_bytes else self._sign_s)
        if believes_cpu_s:
            is_blind = self._last is not None and self._last[1].ranks is None
            limit_s = believes_cpu_s if is_blind else limit_s
            if silent_s <= believes_cpu_s:
                silent_s = min(silent_s, self._seen_s - self._worked_s)
        if silent_s > limit_s:
            return Stall(self._phase, self._seen_s - self._sign_s, limit_s, self._sign_at)
        if self._upload is None:
            return None
        silent_s = self._seen_s - self._upload_s
        return Stall("upload", silent_s, upload_limit_s, self._upload_at) if silent_s > upload_limit_s else None

    def _limit(self, known: dict[str, float]) -> tuple[float, float, bool]:
        """Returns the phase's limit, how long CPU time is believed (0: not), and whether bytes are."""
        floor_s = self._floor_s
        step_s = statistics.median(self._steps) if len(self._steps) >= FEWEST else 0.0
        save_s = known.get("stall_s", 0.0) + known.get("write_s", 0.0)
        match self._phase:
            case "train" if step_s or len(self._steps) >= FEWEST:
                return max(floor_s, TIMES * step_s), 0.0, False
            case "train":
                limit_s = max(3 * floor_s, TIMES * max(self._longest_step_s, known.get("step_s", 0.0)))
                return (limit_s, 0.0, False) if self._has_stepped else (limit_s, FIRST_FLOORS * floor_s, True)
            case "eval":
                least_s = 2 * self._longest_eval_s or 2 * floor_s
                return max(floor_s, TIMES * step_s, least_s), 0.0, False
            case "save" | "teardown":
                return max(2 * floor_s, TIMES * save_s), 0.0, True
        is_patient = self._phase == "extra" or (self._phase == "restore" and not self._is_restored)
        return max(floor_s, self._patience_s if is_patient else 0.0), LOAD_FLOORS * floor_s, True


def sample_every_s(floor_s: float) -> float:
    """Returns the seconds between two probes of processes, of which there may be a thousand: more for a long floor."""
    return min(max(floor_s / 60, 0.5), 10.0) if floor_s > 0 else math.inf


# Detects ranks that hang: probes them in a thread, records their stacks, and has the attempt end.
#
# The guard's main loop ends the attempt, as for any other fault. Once the ranks have ended the watchdog watches the
# guard's own calls to the bucket until the attempt is closed. If the main loop itself hangs, on a disk that is gone,
# the watchdog ends the attempt and the process.

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
