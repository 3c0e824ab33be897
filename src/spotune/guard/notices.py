"""What says that the machine will be taken: signals here, clouds' own notices from ``metadata``, other nodes.

Preemption often signals the whole tree, several times, and a cloud's notice is followed by the SIGTERM of the
system's shutdown. The first one is what happened; a later one changes nothing, but for an earlier deadline.
"""

import queue
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

from spotune.guard.grace import prior_s

# SIGURG is how Slurm is asked to say it (SkyPilot's own processes die of SIGTERM and ignore this one).
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGURG, signal.SIGHUP)
# A signal that arrives just before the wait blocks does not end it: its handler runs when the slice is over.
SLICE_S = 0.5


@dataclass(frozen=True)
class Notice:
    """The machine goes: who said so (``SIGTERM``, ``aws spot/instance-action``), when, and how long is left then."""

    source: str
    at: float  # epoch seconds
    grace_s: float

    @property
    def deadline(self) -> float:
        return self.at + self.grace_s


class Notices:
    """Collects notices from the signal handler and other threads. Installed before anything slow happens.

    ``infra`` and ``told_grace_s`` (see grace.py) are set once the machine is known, which may be after a signal.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        # Both may be touched by a signal handler in the middle of anything, so there is no lock: an Event would be
        # taken twice by one thread when a signal meets it in its own ``wait``, and never come back.
        self._given: list[tuple[str, float, float | None]] = []
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.infra = ""
        self.told_grace_s: float | None = None

    def install(self) -> "Notices":
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self.give(signal.Signals(number).name)

    def give(self, source: str, grace_s: float | None = None) -> None:
        """A notice from ``source``, which may know how many seconds are left; to repeat it is harmless."""
        if grace_s is None and any(source == earlier for earlier, _, _ in self._given[:]):
            return  # its deadline would only be later
        self._given.append((source, self._clock(), grace_s))
        self._wake.put(None)

    @property
    def notice(self) -> Notice | None:
        """The first notice, with the earliest deadline of all; None when there is none."""
        if not self._given:
            return None
        source, at, _ = self._given[0]
        deadline = min(at_ + self._grace_s(source_, grace_s) for source_, at_, grace_s in self._given[:])
        return Notice(source, at, max(deadline - at, 0.0))

    def _grace_s(self, source: str, grace_s: float | None) -> float:
        return prior_s(self.infra, source, self.told_grace_s) if grace_s is None else grace_s

    @property
    def given(self) -> bool:
        return bool(self._given)

    @property
    def source(self) -> str:
        return self._given[0][0] if self._given else ""

    @property
    def at(self) -> float:
        return self._given[0][1] if self._given else 0.0

    @property
    def left_s(self) -> float:
        """Seconds until the machine goes, never below 0; infinite without a notice."""
        notice = self.notice
        return max(notice.deadline - self._clock(), 0.0) if notice else float("inf")

    def wait(self, seconds: float) -> bool:
        """Sleeps, but wakes at once when the first notice comes; returns whether one has come."""
        if self._given:
            time.sleep(seconds)
            return True
        left_s = seconds
        while True:
            slice_s = min(left_s, SLICE_S)
            try:
                self._wake.get(timeout=slice_s)
            except queue.Empty:
                left_s -= slice_s
                if self._given or left_s <= 0:
                    return self.given
            else:
                self._wake.put(None)  # for whoever else waits
                return True
