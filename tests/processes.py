"""The processes of one SPOTUNE_HOME, as tests look for them and put an end to them."""

import signal
from contextlib import suppress
from pathlib import Path

import psutil

from spotune.core.environment import HOME
from spotune.launch.local.machine import is_live, send
from tests.waiting import until


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


def kill_tree(process: psutil.Process) -> None:
    """Kills it and all that it has started, it first: it starts nothing more, and sees no child of its own die."""
    children = process.children(recursive=True)
    send([process, *children], signal.SIGKILL)  # one that ended by itself (a shell's ``sleep 0.05``) is as good


def end_processes_of(home: Path) -> None:
    """Kills what a test has left, a supervisor that is just starting too."""

    def are_gone() -> bool:
        left = processes_of(home)
        send(left, signal.SIGKILL)
        return not left

    until(are_gone, lambda: processes_of(home))
