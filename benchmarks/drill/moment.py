"""The moment at which an attempt is lost: when it has come, and what is done then."""

import signal
import time
from dataclasses import dataclass

from drill.contender import Hold
from drill.machine import Machine
from drill.schedule import After, Boundary, Instant, Kill
from drill.timeline import Pace
from drill.watch import Watch
from spotune.launch.local.machine import send

POLL_S = 0.004
FAULT_S = 120.0  # an attempt whose worker was killed leaves by itself


@dataclass
class Moment:
    """When an attempt is to be lost, and how."""

    kill: Kill
    pace: Pace | None
    watch: Watch
    machine: Machine
    hold: Hold | None
    noticed: bool = False

    def has_come(self) -> bool:
        if isinstance(self.kill.when, Boundary):
            return self._is_held()
        if self.kill.kind in ("worker", "loader", "zombie") and not self.watch.has_begun:
            return False  # there has to be a worker; a machine that never claimed an attempt is no zombie
        at = self._at(self.kill.when)
        return at is not None and time.time() >= at

    def _is_held(self) -> bool:
        assert self.hold
        if self.hold.at.startswith("noticed") and not self.noticed and self.watch.last_step:
            self.noticed = True
            self.machine.notify()
        return self.hold.file.exists()

    def _at(self, when: Instant | After) -> float | None:
        if isinstance(when, After):
            return self.machine.launched_at + when.seconds
        assert self.pace
        begun = self.machine.launched_at if when.stage == "start" else self.watch.reached(when.stage, when.nth)
        return None if begun is None else begun + when.at * self.pace.stage_s(when.stage)

    def strike(self) -> list[str]:
        """Takes the machine away; returns what survived that should not have."""
        match self.kill.kind:
            case "vanish":
                self.machine.vanish()
            case "guard":
                return self.machine.lose_guard()
            case "zombie":
                self.machine.freeze()
            case "worker" | "loader":
                loaders = self.machine.loaders() if self.kill.kind == "loader" else []
                send((loaders or self.machine.ranks())[:1], signal.SIGKILL)
                self._wait(FAULT_S)
            case "notice":
                self.machine.notify()
                self._wait(self.kill.notice_s)
        return []

    def _wait(self, seconds: float) -> None:
        """Lets the attempt leave by itself; what is still there afterwards is taken."""
        deadline = time.monotonic() + seconds
        while self.machine.code is None and time.monotonic() < deadline:
            self.watch.look()
            time.sleep(POLL_S)
        self.machine.vanish()
