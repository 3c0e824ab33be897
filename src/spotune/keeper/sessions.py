"""People who are connected: ssh with a terminal, ssh without one, and VS Code's server."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from spotune.keeper.processes import PROC, Process, children
from spotune.keeper.signs import Sign

_SSHD = re.compile(r"sshd(-session)?$|dropbear$")
_EDITOR = re.compile(r"/\.(vscode|cursor|windsurf|vscodium|positron)-server(-insiders)?/")
# A session in which SkyPilot itself asks something (its runner's own preamble, sky/utils/command_runner.py), or
# `spotune dev ls` does.
_ASKING = re.compile(r"sky\.skylet|skypilot-runtime|SKY_RUNTIME_DIR|PYTHONWARNINGS=ignore|\.spotune/keeper\.json")
_ESTABLISHED = "01"


def session_look(everybody: dict[int, Process], now: float) -> list[Sign]:
    """A session is an sshd with something of the user's below it.

    One with nothing below it only forwards ports: SkyPilot holds such a tunnel to its skylet open for as long as the
    cluster is there, and who forwards a notebook's port is seen by what the notebook does.
    """
    below = children(everybody)
    signs = []
    for process in everybody.values():
        if not _SSHD.match(process.name):
            continue
        users = [child for child in below.get(process.pid, []) if not _SSHD.match(child.name)]
        users = [child for child in users if not _only_asks(child, below)]
        if users:
            terminal = "with a terminal" if any(child.tty for child in users) else "without a terminal"
            signs.append(Sign(f"ssh session {terminal} ({users[0].name})", now))
    return signs


def editor_look(everybody: dict[int, Process], now: float) -> list[Sign]:
    """VS Code's server (or a sister's) with a window connected: it goes on for hours after the window is closed."""
    servers = [process for process in everybody.values() if _EDITOR.search(process.command)]
    if not servers:
        return []
    established = set(_established())
    for process in servers:
        if established & _sockets(process.pid):
            return [Sign("VS Code is connected", now)]
    return []


def _only_asks(process: Process, below: dict[int, list[Process]]) -> bool:
    """Whether nobody works here: SkyPilot's own command, or one below a plain shell."""
    return any(_ASKING.search(each.command) for each in (process, *below.get(process.pid, [])))


def _sockets(pid: int) -> set[str]:
    found = set()
    folder = PROC / str(pid) / "fd"
    try:
        for name in os.listdir(folder):
            target = os.readlink(folder / name)
            if target.startswith("socket:["):
                found.add(target[8:-1])
    except OSError:
        pass  # gone meanwhile, or not ours to read
    return found


def _established() -> Iterator[str]:
    """Inodes of TCP connections that are up."""
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(PROC / "self" / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _ESTABLISHED:
                yield fields[9]
