"""The processes of this machine that are ours to judge, as /proc shows them at one moment."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
_JOB = re.compile(r"/job_(\d+)(?:/|$)")


@dataclass(frozen=True)
class Process:
    """One process.

    Attributes:
        started: in clock ticks since boot; with the pid it names a process for good.
        cpu_s: used by it and by its children that have ended, seconds.
        tty: number of its controlling terminal, 0 for none.
    """

    pid: int
    parent: int
    name: str
    command: str
    started: int
    cpu_s: float
    tty: int


def processes(slurm_job: str = "") -> dict[int, Process]:
    """All processes of this user by pid; on Slurm only those of the allocation, where its cgroup shows which.

    Root is a user like any other in a container, which shows nothing but its own.
    """
    own, found = os.getuid(), {}
    inside = slurm_job if slurm_job and _slurm_job_of(os.getpid()) == slurm_job else ""
    for entry in os.listdir(PROC):
        if not entry.isdigit():
            continue
        pid = int(entry)
        try:
            if os.stat(PROC / entry).st_uid != own or (inside and _slurm_job_of(pid) != inside):
                continue
            process = _read(pid)
        except (OSError, ValueError, IndexError):
            continue  # gone meanwhile
        found[pid] = process
    return found


def children(everybody: dict[int, Process]) -> dict[int, list[Process]]:
    """Processes by the pid of their parent."""
    below: dict[int, list[Process]] = {}
    for process in everybody.values():
        below.setdefault(process.parent, []).append(process)
    return below


def _read(pid: int) -> Process:
    folder = PROC / str(pid)
    head, _, tail = (folder / "stat").read_text(errors="replace").rpartition(")")
    fields = tail.split()  # from the third field of proc(5) on
    tick = os.sysconf("SC_CLK_TCK")
    if fields[0] == "Z":
        raise ValueError("a zombie")
    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return Process(
        pid=pid,
        parent=int(fields[1]),
        name=head.partition("(")[2],
        command=command,
        started=int(fields[19]),
        cpu_s=sum(map(int, fields[11:15])) / tick,
        tty=int(fields[4]),
    )


def _slurm_job_of(pid: int) -> str | None:
    try:
        found = _JOB.search((PROC / str(pid) / "cgroup").read_text(errors="replace"))
    except OSError:
        return None
    return found[1] if found else None
