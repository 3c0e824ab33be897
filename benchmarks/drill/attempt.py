"""The life of one attempt: launched, watched, and taken away at its moment."""

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from drill.contender import Contender, Hold
from drill.machine import DrillError, Machine
from drill.played import Life
from drill.schedule import After, Boundary, Instant, Kill
from drill.timeline import Pace
from drill.watch import Watch
from spotune.launch.local.processes import send

POLL_S = 0.004
# An attempt that takes longer than this many undisturbed ones hangs; the first of all has no measure yet.
PATIENCE, PATIENCE_S, FIRST_S = 8.0, 120.0, 24 * 3600.0


@dataclass
class Zombie:
    """A machine that is cut off, and when (monotonic) it comes back."""

    machine: Machine
    wakes_at: float
    awake: bool = False

    def wake(self) -> None:
        if not self.awake:
            self.machine.thaw()
            self.awake = True


def live(
    contender: Contender, disk: Path, kill: Kill | None, pace: Pace | None, log: Path, zombies: Sequence[Zombie]
) -> tuple[Life, Machine]:
    """Launches an attempt and stays with it to its end, by the kill or by itself; zombies wake meanwhile."""
    with TemporaryDirectory() as place:
        hold = Hold(_held_at(kill.when), Path(place, "held")) if kill and isinstance(kill.when, Boundary) else None
        launch = contender.launch(disk, hold)
        machine = Machine(disk, launch.command, launch.environ, log)
        watch = Watch(lambda: contender.event_log(disk, machine.launched_at))
        moment = _Moment(kill, pace, watch, machine, hold) if kill else None
        deadline = time.monotonic() + (PATIENCE * pace.life_s + PATIENCE_S if pace else FIRST_S)
        survivors: list[str] = []
        landed = hung = False
        try:
            while machine.code is None:
                watch.look()
                machine.look_around()
                for zombie in zombies:
                    if time.monotonic() >= zombie.wakes_at:
                        zombie.wake()
                if moment and moment.has_come():
                    landed, survivors = True, moment.strike()
                    break
                if time.monotonic() > deadline:
                    hung = True
                    machine.vanish()
                time.sleep(POLL_S)
        except BaseException:
            machine.vanish()
            raise
        watch.look()
        ended_at = time.time()
        code = -9 if kill and kill.kind == "zombie" and landed else machine.process.wait()
        if hold and not landed and code == 0:
            raise DrillError(f"the boundary {hold.at} was never reached: the run is finished, see {log}")
        if code == 0 and kill and kill.kind in ("vanish", "guard"):
            landed = False  # it had come to its end between the look and the signal
    allowed = _allowed(kill if landed else None, contender, bool(watch.events))
    life = Life(machine.launched_at, ended_at, code, allowed, kill, landed, watch.events, survivors, hung)
    return life, machine


def _allowed(kill: Kill | None, contender: Contender, has_begun: bool) -> tuple[int, ...]:
    """The exit codes of an attempt that is well, lost in this way or left alone."""
    match kill and kill.kind:
        case None:
            return (0,)
        case "worker" | "loader":
            return (75, 0)
        case "notice":
            # While Python itself starts, nobody can heed a signal.
            return (*contender.noticed, 0, -9) if has_begun else (*contender.noticed, 0, -9, -15)
        case _:
            return (-9,)


def _held_at(boundary: Boundary) -> str:
    return f"{boundary.name}:{boundary.nth}"


@dataclass
class _Moment:
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
                self._wait(PATIENCE_S)
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
