"""SkyPilot's job controllers on this machine: as it wrote them down, and as they are."""

from dataclasses import dataclass
from pathlib import Path

import psutil

PIDS = ".sky/job_controller_pid"  # a line each, ``PID,STARTED_AT``; those that have gone stay in it
_SLACK_S = 1.0
_MB = 2**20


@dataclass(frozen=True)
class Controllers:
    """How many run, and what memory they and their children hold."""

    count: int
    memory_mb: float


def find_controllers(home: Path) -> Controllers:
    """Those below ``~``; a process that has got the number of one that has gone is none."""
    try:
        lines = (home / PIDS).read_text().split()
    except OSError:
        return Controllers(0, 0.0)
    held = [mb for line in lines if (mb := _memory_mb(*line.partition(",")[::2])) is not None]
    return Controllers(len(held), sum(held))


def _memory_mb(pid: str, started_at: str) -> float | None:
    try:
        process = psutil.Process(int(pid))
        if started_at and abs(process.create_time() - float(started_at)) > _SLACK_S:
            return None
        family = [process, *process.children(recursive=True)]
        return sum(one.memory_info().rss for one in family) / _MB
    except (ValueError, psutil.Error):
        return None


def free_memory_mb() -> float:
    """What this machine has left for further processes."""
    return psutil.virtual_memory().available / _MB
