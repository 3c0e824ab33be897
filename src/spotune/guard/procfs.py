"""Reads what processes do from Linux's /proc. Reads no file that waits for the memory of a hung process."""

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from spotune.guard.stalls import Work

PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_STOPPED = "Tt"
_MOVED = ("rchar", "wchar", "read_bytes", "write_bytes")


@dataclass(frozen=True)
class ProcessStat:
    """A line of ``/proc/<pid>/stat``; ``cpu_s``: also of its children that have ended."""

    pid: int
    name: str
    state: str
    group: int
    cpu_s: float


def read_stat(folder: Path) -> ProcessStat | None:
    """The facts of a process or thread, None where it is gone."""
    text = read_text(folder / "stat")
    head, separator, rest = text.rpartition(")")  # the name may hold anything
    fields = rest.split()
    if not separator or len(fields) < 15:
        return None
    pid, _, name = head.partition(" (")
    return ProcessStat(int(pid), name, fields[0], int(fields[2]), sum(map(int, fields[11:15])) / _TICKS_PER_S)


def processes_in(groups: Collection[int], proc: Path = PROC) -> list[ProcessStat]:
    """The live processes of some process groups."""
    found = [stat for folder in _numbered(proc) if (stat := read_stat(folder)) and stat.group in groups]
    return sorted(found, key=lambda stat: stat.pid)


def work_of(groups: Collection[int], proc: Path = PROC) -> Work | None:
    """What process groups have done so far, None where the system does not say.

    ``stopped`` speaks of the groups' leaders: those are the ranks.
    """
    if not (proc / "self" / "stat").exists():
        return None
    found = processes_in(groups, proc)
    return Work(
        cpu_s=sum(stat.cpu_s for stat in found),
        moved_bytes=sum(moved_bytes(stat.pid, proc) for stat in found),
        stopped=any(stat.state in _STOPPED for stat in found if stat.pid == stat.group),
    )


def own_work(proc: Path = PROC) -> Work:
    """What this process has done so far."""
    times = os.times()
    return Work(times.user + times.system, moved_bytes(os.getpid(), proc))


def moved_bytes(pid: int, proc: Path = PROC) -> int:
    """Bytes that a process has read and written, by system calls and as pages; 0 where nobody may know."""
    pairs = (line.partition(": ") for line in read_text(proc / str(pid) / "io").splitlines())
    return sum(int(value) for name, _, value in pairs if name in _MOVED and value.isdigit())


def threads_of(pid: int, proc: Path = PROC) -> list[Path]:
    """The folders of a process's threads, the main one first."""
    return sorted(_numbered(proc / str(pid) / "task"), key=lambda folder: int(folder.name))


def read_text(path: Path) -> str:
    """A file's text; empty where it is gone or must not be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _numbered(folder: Path) -> Iterator[Path]:
    try:
        names = os.listdir(folder)
    except OSError:
        return
    yield from (folder / name for name in names if name.isdigit())
