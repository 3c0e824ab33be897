"""The life of one attempt: launched, watched, and taken away at its moment."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event

from drill.contender import Contender, Hold
from drill.machine import DrillError, Machine
from drill.moment import POLL_S, Moment
from drill.played import Life
from drill.schedule import Boundary, Kill
from drill.timeline import Pace
from drill.watch import Watch

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


@dataclass
class Course:
    """What all attempts of a run have in common.

    Attributes:
        stopped: set when the game day is given up.
        zombies: machines of this run that are cut off.
    """

    pace: Pace | None
    log: Path
    stopped: Event
    zombies: list[Zombie] = field(default_factory=list)

    def look(self) -> None:
        """Wakes the zombies whose time has come. Raises DrillError when the day is given up."""
        if self.stopped.is_set():
            raise DrillError("given up")
        for zombie in self.zombies:
            if time.monotonic() >= zombie.wakes_at:
                zombie.wake()


def live(contender: Contender, disk: Path, kill: Kill | None, course: Course) -> tuple[Life, Machine]:
    """Launches an attempt and stays with it to its end, by the kill or by itself."""
    pace = course.pace
    with TemporaryDirectory() as place:
        hold = (
            Hold(f"{kill.when.name}:{kill.when.nth}", Path(place)) if kill and isinstance(kill.when, Boundary) else None
        )
        launch = contender.launch(disk, hold)
        machine = Machine(disk, launch.command, launch.environ, course.log)
        watch = Watch(lambda: contender.event_log(disk, machine.launched_at))
        moment = Moment(kill, pace, watch, machine, hold) if kill else None
        deadline = time.monotonic() + (PATIENCE * pace.life_s + PATIENCE_S if pace else FIRST_S)
        survivors: list[str] = []
        landed = hung = False
        try:
            while machine.code is None:
                watch.look()
                machine.look_around()
                course.look()
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
            raise DrillError(f"the boundary {hold.at} was never reached: the run is finished, see {course.log}")
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
