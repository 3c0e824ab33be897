"""Decides whether an attempt has stalled. Pure: gets events and samples; ``SeenTime`` counts the time.

docs/explanation/checkpoints.md has each phase's limit and other signs of life: bytes moved and, while ranks load, CPU
time.
The floor is ``--stall-after``. While a rank is stopped (state T), CPU time and bytes of others do not count.
"""

import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from spotune.core.store import Call
from spotune.guard.journal import Clock
from spotune.guard.save_schedule import FEWEST, RECENT

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
class Work:
    """The work of processes so far: CPU seconds, bytes read and written; ``stopped``: one is in state T."""

    cpu_s: float = 0.0
    moved_bytes: float = 0.0
    stopped: bool = False


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
