"""Asks the ranks to save, in time: the clock's side of cadence.py. And the one hand that writes control.json."""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from spotune.contracts.exchange import CONTROL, write_json
from spotune.guard.cadence import CEILING_S, FLOOR_S, Inputs, explain, interval_s
from spotune.guard.journal import Journal
from spotune.guard.say import say
from spotune.guard.toll import Toll

NOTEWORTHY = 1.5  # an interval that has changed by this factor is said again


class Wishes:
    """What the guard asks of its ranks."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / CONTROL
        self._stop, self._saves = False, 0
        self._write()

    def ask_to_save(self) -> None:
        self._saves += 1
        self._write()

    def ask_to_stop(self) -> None:
        """At the next step boundary, with a checkpoint of that step."""
        self._stop = True
        self._write()

    def _write(self) -> None:
        write_json(self._path, {"stop": self._stop, "save": self._saves})


class Pacer:
    """Asks for a save whenever the interval has passed since the last one.

    Args:
        inputs: as known when training begins; what is measured comes in by ``toll``.
    """

    def __init__(
        self,
        inputs: Inputs,
        toll: Toll,
        wishes: Wishes,
        journal: Journal,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._inputs, self._toll, self._wishes, self._journal, self._clock = inputs, toll, wishes, journal, clock
        self._born_at = clock() - inputs.age_s
        self._saved_at = clock()
        self._asked = False
        self._said_s = 0.0

    def take(self, event: dict[str, Any]) -> None:
        """One event of the attempt: a save was made, or did not come about."""
        if event["event"] in ("save", "unsaved"):
            self._saved_at, self._asked = event["t"], False

    def look(self) -> None:
        """Asks for a save if one is due. To be called often while training runs."""
        inputs = self.inputs()
        interval = interval_s(inputs)
        if not self._said_s or not 1 / NOTEWORTHY < interval / self._said_s < NOTEWORTHY:
            self._said_s = interval
            say(explain(inputs))
            self._journal.write("interval", interval_s=round(interval, 1), floor_s=FLOOR_S, ceiling_s=CEILING_S,
                                **asdict(inputs))  # fmt: skip
        if not self._asked and self._clock() - self._saved_at >= interval:
            self._asked = True
            self._wishes.ask_to_save()

    def inputs(self) -> Inputs:
        """What the interval depends on now."""
        measured = self._toll.record
        return replace(
            self._inputs,
            stall_s=measured.get("stall_s"),
            slowdown_s=measured.get("slowdown_s"),
            upload_s=measured.get("write_s", 0.0) + measured.get("send_s", 0.0),
            age_s=self._clock() - self._born_at,
        )
