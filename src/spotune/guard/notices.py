"""Signals. Preemption often signals the whole tree, several times; only the guard decides what they mean."""

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

# SIGURG is how Slurm is asked to say it (SkyPilot's own processes die of SIGTERM and ignore this one).
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGURG, signal.SIGHUP)


class Notices:
    """Remembers the first notice; later ones are harmless. Installed before anything slow happens."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._arrived = threading.Event()
        self.source = ""
        self.at = 0.0

    def install(self) -> "Notices":
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self.give(signal.Signals(number).name)

    def give(self, source: str) -> None:
        """A notice from ``source``; the first one counts."""
        if not self._arrived.is_set():
            self.source, self.at = source, self._clock()
            self._arrived.set()

    @property
    def given(self) -> bool:
        return self._arrived.is_set()

    def wait(self, seconds: float) -> bool:
        """Sleeps, but wakes at once when the first notice comes; returns whether one has come."""
        if self._arrived.is_set():
            time.sleep(seconds)
            return True
        return self._arrived.wait(seconds)
