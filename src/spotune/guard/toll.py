"""What saving costs training: it stands still for a snapshot, and its steps are slower until the commit.

Slower than what: than the median of the steps beside which nothing was saved. All of it is read from the events.
"""

import statistics
from collections import deque
from typing import Any

RECENT = 50  # steps and saves that count
FEWEST = 3  # undisturbed steps, below which nothing can be said


class Toll:
    """Listens to the events of an attempt; ``record`` says what was measured so far, empty before the first commit."""

    def __init__(self, known: dict[str, float] | None = None) -> None:
        self._known = dict(known or {})
        self._calm: deque[float] = deque(maxlen=RECENT)
        self._stalls: deque[float] = deque(maxlen=RECENT)
        self._slowdowns: deque[float] = deque(maxlen=RECENT)
        self._writes: deque[float] = deque(maxlen=RECENT)
        self._sends: deque[float] = deque(maxlen=RECENT)
        self._last_step_at: float | None = None
        self._saved_at: dict[int, float] = {}
        self._written_at: dict[int, float] = {}
        self._disturbed: list[float] = []
        self._bytes = 0.0

    def take(self, event: dict[str, Any]) -> None:
        """One event, in order of time."""
        match event["event"]:
            case "step":
                self._step(event["t"])
            case "phase" if event["phase"] != "train":
                self._last_step_at = None  # what follows is not a step's time
            case "phase":
                self._last_step_at = event["t"]
            case "save":
                self._saved_at[event["step"]] = event["t"]
                self._stalls.append(event["stall_s"])
            case "written" if event["step"] in self._saved_at:
                self._written_at[event["step"]] = event["t"]
                self._writes.append(event["t"] - self._saved_at[event["step"]])
            case "commit" if event["step"] in self._written_at:
                self._commit(event)

    def _step(self, at: float) -> None:
        if self._last_step_at is not None:
            (self._disturbed if self._saved_at else self._calm).append(at - self._last_step_at)
        self._last_step_at = at

    def _commit(self, event: dict[str, Any]) -> None:
        self._sends.append(event["t"] - self._written_at.pop(event["step"]))
        self._bytes = event["bytes"]
        self._saved_at = {step: at for step, at in self._saved_at.items() if step > event["step"]}
        if len(self._calm) >= FEWEST:
            calm = statistics.median(self._calm)
            self._slowdowns.append(max(0.0, sum(seconds - calm for seconds in self._disturbed)))
        self._disturbed = []

    @property
    def step_s(self) -> float | None:
        """The median of a step beside which nothing was saved, None before there were some."""
        return statistics.median(self._calm) if len(self._calm) >= FEWEST else None

    @property
    def record(self) -> dict[str, float]:
        """Medians, and the ``bytes`` of the last save.

        ``stall_s``, ``slowdown_s``: what a save costs training; ``write_s``: from the snapshot to the local disk;
        ``send_s``: from there to the commit; ``step_s``: a step beside which nothing is saved.
        """
        found = dict(self._known)
        measured = {
            "stall_s": self._stalls,
            "slowdown_s": self._slowdowns,
            "write_s": self._writes,
            "send_s": self._sends,
        }
        found |= {name: round(statistics.median(values), 4) for name, values in measured.items() if values}
        if self.step_s is not None:
            found["step_s"] = round(self.step_s, 4)
        if self._bytes:
            found["bytes"] = self._bytes
        return found
