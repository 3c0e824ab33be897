"""The processes of one SPOTUNE_HOME, as tests look for them and put an end to them."""

import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from spotune.contracts.environment import HOME


def is_live(process: psutil.Process) -> bool:
    """A zombie is not: its parent may take its time."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def processes_of(home: Path) -> list[psutil.Process]:
    """Live processes that work for this home: jobs, ranks, its supervisor."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get(HOME) == str(home) or str(home) in process.cmdline()
            if ours and is_live(process):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def named(home: Path, *names: str) -> list[psutil.Process]:
    """Those of them that run one of these programs."""
    found = []
    for process in processes_of(home):
        with suppress(psutil.NoSuchProcess):
            if process.name() in names:
                found.append(process)
    return found


def kill(processes: Iterable[psutil.Process]) -> None:
    """Kills them all; one that ended by itself meanwhile (a shell's ``sleep 0.05``) is as good."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def kill_tree(process: psutil.Process) -> None:
    """Kills it and all that it has started, it first: it starts nothing more, and sees no child of its own die."""
    children = process.children(recursive=True)
    kill([process, *children])


def end_processes_of(home: Path) -> None:
    """Kills what a test has left, a supervisor that is just starting too."""
    deadline = time.monotonic() + 300
    while left := processes_of(home):
        assert time.monotonic() < deadline
        kill(left)
