"""The loop: look, remember when somebody worked last, say so in a file, and end when that is long enough ago."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spotune.keeper.files import read_file, write_file
from spotune.keeper.jupyter import shut_down
from spotune.keeper.log import log
from spotune.keeper.look import Look
from spotune.keeper.settings import Settings

SCHEMA_VERSION = 1
NEWEST = "keeper.newest"  # the keeper that holds this machine: the one that came last


def keep(settings: Settings, look: Look, clock: Callable[[], float], sleep: Callable[[float], None]) -> int:
    """Returns the exit code once nothing has worked for the idle time, or a newer keeper has come."""
    newest = settings.folder / NEWEST
    me = _claim(newest, f"{os.uname().nodename}-{os.getpid()}-{clock():.6f}")
    started = last = clock()
    said, what = "", "the start of the keeper"
    log(f"holds this cluster until nothing has worked for {settings.idle_s / 60:g} min")
    while True:
        now = clock()
        signs = sorted(look(now), key=lambda sign: -sign.at)
        if signs and signs[0].at >= last:
            last, what = signs[0].at, signs[0].what
        busy = [sign.what for sign in signs if sign.at >= now]
        idle_s = now - last
        if _read(newest) not in (me, ""):  # gone, unreadable or half written: nobody newer has said so
            log("a newer one holds this cluster now")
            return 0
        is_over = idle_s >= settings.idle_s
        why = "; ".join(busy) if busy else f"idle for {idle_s / 60:.0f} min, the last: {what}"
        state = {
            "schema_version": SCHEMA_VERSION,
            "verdict": "over" if is_over else "busy" if busy else "idle",
            "why": why,
            "busy": busy,
            "started_at": started,
            "looked_at": now,
            "last_active_at": last,
            "idle_minutes": (settings.idle_s + settings.lead_s) / 60,
            "stops_at": None if busy else last + settings.idle_s + settings.lead_s,
        }
        _write(settings.state_file, state)
        said = _tell(busy, said)
        if is_over:
            log(f"{why}: lets this cluster go")
            shut_down(settings.jupyter_runtime)  # a server that only waits would hold it for ever
            _end(settings)
            return 0
        sleep(settings.look_s)


def _tell(busy: list[str], said: str) -> str:
    """Prints a change of mind, which is all that is worth a line; returns what was said."""
    now = "busy" if busy else "idle"
    if now != said:
        log(f"{'busy: ' + '; '.join(busy) if busy else 'idle'}")
    return now


def _end(settings: Settings) -> None:
    """Takes a Slurm allocation down, where SkyPilot may not: of two clusters on one node only one has a skylet, which
    wants a port of its own. The signal goes to the batch script too, as SkyPilot's does (sky/provision/slurm/
    instance.py: _cancel_slurm_job), whose trap cleans up. It ends the keeper as well, so that the time limit is what
    ends an allocation with a process in it that ignores the signal."""
    if settings.ends != "scancel" or not settings.slurm_job:
        return
    for command in (
        ["scontrol", "update", f"JobId={settings.slurm_job}", "EndTime=now+3minutes"],
        ["scancel", "--signal=TERM", "--full", settings.slurm_job],
    ):
        try:
            subprocess.run(command, check=False)
        except OSError as error:  # no Slurm in this container: autostop is left
            log(f"{command[0]}: {error}")


def _claim(path: Path, me: str) -> str:
    """Writes that this keeper is the newest; returns what stands there then, which is another's where it cannot."""
    try:
        write_file(path, me)
    except OSError as error:  # a full disk: both hold
        log(f"{path}: {error}")
        return _read(path)
    return me


def _read(path: Path) -> str:
    try:
        return read_file(path).decode(errors="replace")
    except OSError:
        return ""


def _write(path: Path, state: dict[str, Any]) -> None:
    try:
        write_file(path, json.dumps(state))
    except OSError as error:  # a full disk: holding on matters more than telling
        log(f"{path}: {error}")
