"""The idle watcher's loop: look, remember when somebody worked last, say so, and end after long enough."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spotune.keeper.signs import (
    Sign,
    cpu_look,
    editor_look,
    gpu_look,
    job_look,
    jupyter_look,
    processes,
    read_file,
    session_look,
    shut_down,
    write_file,
)

# What the keeper is told: by the environment, which is read here and nowhere else on this side.

IDLE = "SPOTUNE_IDLE_MINUTES"  # without work for so long: the keeper ends
LEAD = "SPOTUNE_AUTOSTOP_MINUTES"  # SkyPilot's own autostop, which counts from there; for what `dev ls` says
ENDS = "SPOTUNE_KEEPER_ENDS"  # `scancel`: take the Slurm job down as well, where autostop does not
LOOK = "SPOTUNE_KEEPER_LOOK_S"
CPU = "SPOTUNE_KEEPER_CPU"
GPU = "SPOTUNE_KEEPER_GPU"


@dataclass(frozen=True)
class Settings:
    """How the keeper judges.

    Attributes:
        look_s: seconds between two looks.
        cpu_share: a process that used more than this share of one core since the last look works.
        gpu_percent: a GPU that is used more than this works.
        folder: where the state file is, and the mark of the newest keeper.
        runtime: SkyPilot's folder on this machine; ``job_id`` is the keeper's own job in it.
        slurm_job: the allocation, empty where there is none.
        ends: what the keeper does at the end beside ending.
    """

    idle_s: float
    lead_s: float
    look_s: float
    cpu_share: float
    gpu_percent: float
    home: Path
    runtime: Path
    job_id: int | None
    slurm_job: str
    ends: str
    jupyter_runtime: Path

    @property
    def folder(self) -> Path:
        return self.home / ".spotune"

    @property
    def state_file(self) -> Path:
        return self.folder / "keeper.json"

    @classmethod
    def read(cls, environ: Mapping[str, str], home: Path) -> Settings:
        """Raises ValueError, one line, for a setting that cannot be."""
        own = environ.get("SKYPILOT_INTERNAL_JOB_ID", "")
        jupyter = environ.get("JUPYTER_RUNTIME_DIR") or home / ".local" / "share" / "jupyter" / "runtime"
        return cls(
            idle_s=60 * _number(environ, IDLE, 28),
            lead_s=60 * _number(environ, LEAD, 0),
            look_s=_number(environ, LOOK, 20),
            cpu_share=_number(environ, CPU, 0.25),
            gpu_percent=_number(environ, GPU, 2),
            home=home,
            runtime=Path(environ.get("SKY_RUNTIME_DIR") or home),
            job_id=int(own) if own.isdecimal() else None,
            slurm_job=environ.get("SLURM_JOB_ID", ""),
            ends=environ.get(ENDS, ""),
            jupyter_runtime=Path(jupyter),
        )


def _number(environ: Mapping[str, str], name: str, default: float) -> float:
    text = environ.get(name, "").strip()
    try:
        number = float(text) if text else default
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e6:
        raise ValueError(f"{name}: {text!r} is not a number, 0 or more")
    return number


# The keeper's lines. None of them may end it: it would then hold, or not hold, a cluster for want of a log.


def open_log() -> None:
    """Lets stdout and stderr take any letter; what their encoding lacks becomes ``\\u2705``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def log(text: str, to_stderr: bool = False) -> None:
    """Prints one line, where that can be."""
    try:
        print(f"keeper: {text}", file=sys.stderr if to_stderr else sys.stdout, flush=True)
    except (OSError, ValueError):  # a full disk, a closed pipe
        return


def close_log() -> None:
    """Gives up what could not be printed, so that Python's own exit does not fail by it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# One look at everything.

MOST_SAID = 100
Look = Callable[[float], list[Sign]]


def look(settings: Settings) -> Look:
    """Returns a function from now to all signs of work."""
    cpu = cpu_look(settings.cpu_share)
    said: set[str] = set()

    def everywhere(now: float) -> list[Sign]:
        everybody = processes(settings.slurm_job)
        looks: dict[str, Callable[[], list[Sign]]] = {
            "jobs": lambda: job_look(settings.runtime, settings.job_id, now),
            "GPUs": lambda: gpu_look(settings.gpu_percent, now),
            "processes": lambda: cpu(everybody, now),
            "ssh sessions": lambda: session_look(everybody, now),
            "VS Code": lambda: editor_look(everybody, now),
            "Jupyter": lambda: jupyter_look(settings.jupyter_runtime, now),
        }
        return [sign for name, one in looks.items() for sign in _safely(name, one, said)]

    return everywhere


def _safely(name: str, look: Callable[[], list[Sign]], said: set[str]) -> list[Sign]:
    """The signs of one look. One that fails is logged once: the others must still hold the cluster."""
    try:
        return look()
    except Exception as error:
        line = f"cannot look at {name}: {type(error).__name__}: {error}"
        if line not in said and len(said) < MOST_SAID:
            said.add(line)
            log(line)
        return []


# The loop: look, remember when somebody worked last, say so in a file, and end when that is long enough ago.

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
