"""A machine of a game day: a folder as its disk, one program on it, and the many ways to lose it."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from uuid import uuid4

import psutil

from spotune.launch.local.layout import MARKER
from spotune.launch.local.machine import Identity, members, send

LOOK_S = 0.2  # finding a machine's processes takes longer than what is to be hit: look beforehand, signal at once
GONE_S = 10.0  # SIGKILL is not instant: the kernel has memory to give back
LIFELINE_S = 30.0  # once the guard is gone its workers end by themselves, DataLoader workers after 5 s or so


class DrillError(Exception):
    """The game day itself went wrong, or what it is to prove cannot be."""


class Machine:
    """Runs one command in a session of its own; whatever that starts carries the machine's marker."""

    def __init__(self, disk: Path, command: Sequence[str], environ: Mapping[str, str], log: Path) -> None:
        self.disk = disk
        self._marker = uuid4().hex
        disk.mkdir(parents=True, exist_ok=True)
        self.launched_at = time.time()
        with open(log, "ab") as output:
            self.process = subprocess.Popen(
                command,
                env={**environ, MARKER: self._marker},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._leader = Identity(self.process.pid, psutil.Process(self.process.pid).create_time())
        self._seen: list[psutil.Process] = []
        self._looked_at = 0.0

    @property
    def code(self) -> int | None:
        """The program's exit code, None while it runs."""
        return self.process.poll()

    def members(self) -> list[psutil.Process]:
        """Everything that lives on the machine, whatever group or parent it has."""
        return members(self._leader, self._marker)

    def look_around(self) -> None:
        """Remembers who lives here, every now and then."""
        if time.monotonic() - self._looked_at >= LOOK_S:
            self._seen, self._looked_at = self.members(), time.monotonic()

    def ranks(self) -> list[psutil.Process]:
        """The guard's own children: one for each rank."""
        return _workers_below(self.process.pid)

    def loaders(self) -> list[psutil.Process]:
        """The ranks' own children: their DataLoader workers."""
        return [loader for rank in self.ranks() for loader in _workers_below(rank.pid)]

    def vanish(self) -> None:
        """Ends everything at once; returns when nothing is left. Raises DrillError when something survives."""
        send(self._seen, signal.SIGKILL)
        deadline = time.monotonic() + GONE_S
        while living := self.members():
            send(living, signal.SIGKILL)  # again for what was forked between the look and the signal
            if time.monotonic() > deadline:
                raise DrillError(f"survived SIGKILL: {[process.pid for process in living]}")
            time.sleep(0.005)
        self.process.wait()

    def lose_guard(self) -> list[str]:
        """SIGKILL to the guard alone; what of its workers had to be ended by force is returned, by command line."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        deadline = time.monotonic() + LIFELINE_S
        while (living := self.members()) and time.monotonic() < deadline:
            time.sleep(0.05)
        survivors = [command_of(process) or str(process.pid) for process in living]
        self.vanish()
        return survivors

    def notify(self) -> None:
        """SIGTERM to the guard."""
        self.process.send_signal(signal.SIGTERM)

    def freeze(self) -> None:
        """Cut off, not dead."""
        send(self._seen, signal.SIGSTOP)
        send(self.members(), signal.SIGSTOP)

    def thaw(self) -> None:
        send(self.members(), signal.SIGCONT)

    def wipe(self) -> None:
        shutil.rmtree(self.disk, ignore_errors=True)


def _workers_below(pid: int) -> list[psutil.Process]:
    """Living children that run a worker's command line, as forks of a worker do too."""
    try:
        return [child for child in psutil.Process(pid).children() if _is_worker(child)]
    except psutil.Error:
        return []


def _is_worker(process: psutil.Process) -> bool:
    return "spotune.sft.worker" in command_of(process)  # what is dead already has no command line


def command_of(process: psutil.Process) -> str:
    """Its command line as one string; empty where it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
