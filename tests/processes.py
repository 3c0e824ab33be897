"""The processes of one SPOTUNE_HOME, as tests look for them and put an end to them."""

import time
from pathlib import Path

import psutil

from spotune.contracts.environment import HOME


def processes_of(home: Path) -> list[psutil.Process]:
    """Live processes that work for this home: jobs, ranks, its supervisor."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get(HOME) == str(home) or str(home) in process.cmdline()
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def end_processes_of(home: Path) -> None:
    """Kills what a test has left, a supervisor that is just starting too."""
    deadline = time.monotonic() + 20
    while left := processes_of(home):
        assert time.monotonic() < deadline
        for process in left:
            process.kill()
