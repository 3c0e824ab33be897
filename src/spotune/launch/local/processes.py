"""Which processes belong to a machine, told apart from those that got a recycled pid, and how to signal them."""

import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from spotune.launch.local.layout import MARKER

_GONE = (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied)
_CREATED_TOLERANCE_S = 2.0  # create times shift a little when the clock is corrected


def boot_id() -> str:
    """What changes with every boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return str(round(psutil.boot_time() / 60))  # to the minute: clocks are corrected


@dataclass(frozen=True)
class Identity:
    """A process that can be found again: its pid alone may have been recycled."""

    pid: int
    created: float

    @classmethod
    def of(cls, pid: int) -> "Identity":
        """Raises ProcessLookupError when there is no such process."""
        try:
            return cls(pid, psutil.Process(pid).create_time())
        except _GONE as error:
            raise ProcessLookupError(pid) from error

    def process(self) -> psutil.Process | None:
        """The live process, None when it is gone, a zombie, or another one with the same pid."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created) < _CREATED_TOLERANCE_S
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except _GONE:
            return None

    @property
    def alive(self) -> bool:
        return self.process() is not None


def members(node: Identity | None, marker: str) -> list[psutil.Process]:
    """Every live process of a machine: of the node's session, below the node, or with its marker."""
    session = node.pid if node and _session_is_ours(node) else 0
    found: dict[int, psutil.Process] = {}
    leader = node.process() if node else None
    if leader:
        found = {process.pid: process for process in [leader, *_below(leader)]}
    for process in psutil.process_iter():
        if process.pid not in found and _belongs(process, session, marker):
            found[process.pid] = process
    return [process for process in found.values() if is_live(process)]


def find_node(marker: str) -> Identity | None:
    """The node with this marker: the one process of the machine that leads its session."""
    for process in psutil.process_iter():
        if _belongs(process, 0, marker) and _session_of(process.pid) == process.pid:
            return Identity.of(process.pid)
    return None


def send(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except _GONE:
            continue


def _session_is_ours(node: Identity) -> bool:
    """A session keeps its number while it has members, unless the pid now leads somebody else's."""
    try:
        return abs(psutil.Process(node.pid).create_time() - node.created) < _CREATED_TOLERANCE_S
    except _GONE:
        return True


def _below(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except _GONE:
        return []


def _belongs(process: psutil.Process, session: int, marker: str) -> bool:
    if session and _session_of(process.pid) == session:
        return True
    try:
        return process.environ().get(MARKER) == marker
    except (*_GONE, OSError):
        return False


def _session_of(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return -1


def is_live(process: psutil.Process) -> bool:
    """A zombie is not: its parent may take its time."""
    """A zombie is not: its parent may take its time."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except _GONE:
        return False
