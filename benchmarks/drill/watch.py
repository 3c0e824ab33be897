"""What can be seen of an attempt from outside while it runs: its event log, line by line as it is written."""

from collections.abc import Callable
from pathlib import Path

from spotune.core.protocol import Event, parse_lines


class Watch:
    """Follows the event log of one attempt, which appears some time after the launch.

    Args:
        find: the log's path once there is one.
    """

    def __init__(self, find: Callable[[], Path | None]) -> None:
        self._find = find
        self._path: Path | None = None
        self._offset = 0
        self._saves = 0
        self.events: list[Event] = []

    @property
    def has_begun(self) -> bool:
        """Whether the attempt has said anything yet."""
        return bool(self.events)

    def look(self) -> None:
        """Reads what is new; a last line that is cut off waits for its end."""
        self._path = self._path or self._find()
        if not self._path:
            return
        try:
            with open(self._path, "rb") as log:
                log.seek(self._offset)
                data = log.read()
        except OSError:  # the attempt tidies up when it ends
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        self.events += parse_lines(whole)

    def reached(self, stage: str, nth: int = 1) -> float | None:
        """When the stage began for the ``nth`` time (epoch seconds), None when it has not."""
        times = [event["t"] for event in self.events if begins(event, stage)]
        return times[nth - 1] if len(times) >= nth else None

    @property
    def last_step(self) -> int:
        return max((int(event["step"]) for event in self.events if event["event"] == "step"), default=0)


def begins(event: Event, stage: str) -> bool:
    """Whether a stage of an attempt begins with this event."""
    match stage:
        case "train":
            return bool(event["event"] == "plan")
        case "save":
            return bool(event["event"] == "phase" and event.get("phase") == "save")
        case "end":
            return bool(event["event"] == "phase" and event.get("phase") == "teardown")
    raise ValueError(stage)
