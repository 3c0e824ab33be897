"""One run, attempt after attempt, losing a machine for every kill of its schedule, until it is finished."""

import shutil
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event

from drill.attempt import Course, Zombie, live
from drill.contender import Contender
from drill.machine import DrillError, Machine
from drill.played import Life, Played
from drill.schedule import After, Kill, Run
from drill.timeline import Pace

SPARE_ATTEMPTS = 3  # beyond one for each kill and one to finish
ZOMBIE_END_S = 90.0  # a machine that comes back sees that it is fenced off within seconds
Tell = Callable[[Life], None]


class Play:
    """A contender's run under a schedule, in ``folder``. ``tell`` hears of every life when it is over.

    ``stopped``: to give it up from another thread.
    """

    def __init__(
        self,
        contender: Contender,
        schedule: Run,
        pace: Pace | None,
        folder: Path,
        tell: Tell,
        stopped: Event | None = None,
    ) -> None:
        self._contender, self._folder, self._tell = contender, folder, tell
        self._course = Course(pace, folder / "log", stopped or Event())
        self._pending = deque(schedule)
        self._cap = len(schedule) + 1 + SPARE_ATTEMPTS
        self._lives: list[Life] = []
        self._disks = 0
        self._repairs = 0

    def run(self) -> Played:
        self._folder.mkdir(parents=True, exist_ok=True)
        zombies, log = self._course.zombies, str(self._course.log)
        codes: list[int] = []
        try:
            finished = self._attempts()
            codes = [self._wait_for(zombie) for zombie in zombies]
        finally:
            for zombie in zombies:
                zombie.machine.vanish()
        account = self._contender.account()
        for disk in self._folder.glob("disk-*"):
            shutil.rmtree(disk, ignore_errors=True)
        missed = list(self._pending)
        return Played(self._folder.name, self._lives, finished, account, self._repairs, missed, codes, log)

    def _attempts(self) -> bool:
        """Until the program says that it is done (True), or there is no hope left."""
        while len(self._lives) < self._cap + self._repairs:
            kill = self._pending[0] if self._pending else None
            life, machine = live(self._contender, self._disk, kill, self._course)
            self._lives.append(life)
            self._tell(life)
            if life.landed and kill:
                self._pending.popleft()
                self._after(kill, machine)
            elif life.code == 0:
                return True
            elif life.code != 75 and not self._repair():
                return False
            elif kill and isinstance(kill.when, After):  # the same machine, which will not be there for longer
                self._pending[0] = replace(kill, when=After(max(0.0, kill.when.seconds - life.seconds)))
        return False

    @property
    def _disk(self) -> Path:
        return self._folder / f"disk-{self._disks}"

    def _after(self, kill: Kill, machine: Machine) -> None:
        if kill.kind == "zombie":
            assert self._course.pace
            self._course.zombies.append(Zombie(machine, time.monotonic() + kill.wake * self._course.pace.life_s))
            self._disks += 1
        elif kill.wipe:
            machine.wipe()
        self._course.stopped.wait(kill.down_s)

    def _repair(self) -> bool:
        repaired = self._contender.repair()
        self._repairs += repaired
        return repaired

    def _wait_for(self, zombie: Zombie) -> int:
        """The exit code of a machine that comes back when everything is over, if it has not before."""
        zombie.wake()
        deadline = time.monotonic() + ZOMBIE_END_S
        while (code := zombie.machine.code) is None:
            if time.monotonic() > deadline:
                raise DrillError(f"a machine that was cut off still goes on {ZOMBIE_END_S:.0f} s after it came back")
            time.sleep(0.05)
        return code
