"""The idle watcher: a small job on a dev cluster that tells work from idling, so that an idle cluster goes.

How it holds SkyPilot off. The skylet's StopEvent (sky/skylet/events.py, every 60 s) counts a cluster as idle when
``job_lib.is_cluster_idle()`` finds no job in its queue and, with ``wait_for: jobs_and_ssh``, no terminal has an sshd
above it (``autostop_lib.has_active_ssh_sessions``). VS Code has no terminal and a Jupyter kernel is neither, so the
watcher is the one thing that SkyPilot counts everywhere: a job. It asks for no GPU, stays in the queue for as long as
somebody works and then for the idle time, and ends; autostop, set to a few minutes, does the rest. A process left
behind by ``setup`` would do on a VM, but on Slurm it dies with its step (sky/provision/slurm/instance.py).

Runs with the machine's own ``python3``, 3.9 or newer, from the standard library alone: it must not depend on the
environment whose setup may be what keeps the machine busy. Linux only: it reads /proc.
"""

from __future__ import annotations

import io
import json
import os
import re
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import ProxyHandler, Request, build_opener

# Signs of work on a dev cluster: processes, GPUs, jobs, Jupyter kernels, people who are connected.

# Small files of others, read and written so that none of them can hold up the idle watcher or fill its memory.

MOST_BYTES = 1 << 20


def read_file(path: Path) -> bytes:
    """Returns a file's first MOST_BYTES; raises OSError for what is not a file. Waits for no pipe."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is not a file")
        return file.read(MOST_BYTES)


def write_file(path: Path, text: str) -> None:
    """Replaces a file, or a pipe in its place, at once; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK, 0o666), "w") as file:
            file.write(text)
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink()
        raise


def one_line(text: object) -> str:
    """Returns a text of others for a line of ours: at most 100 characters."""
    return " ".join(str(text).split())[:100]


# What a look returns: signs of work.


@dataclass(frozen=True)
class Sign:
    """Somebody or something worked.

    Attributes:
        what: a few words for people, e.g. ``ssh session on pts/0``.
        at: when, epoch seconds; now for what still goes on.
    """

    what: str
    at: float


# The processes of this machine that are ours to judge, as /proc shows them at one moment.

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


# Processes that compute: the user's, not SkyPilot's own.

# SkyPilot's runtime, Ray below it, the log streams of Slurm, and the watcher: they tick over on an idle cluster too.
_INFRASTRUCTURE = re.compile(
    r"sky\.skylet|skypilot-runtime|sky_job_|spotune\.idle|/ray/|raylet|gcs_server|ray::IDLE|\bsrun\b|slurmstepd|sshd"
)


def cpu_look(share: float) -> Callable[[dict[int, Process], float], list[Sign]]:
    """Returns a function that compares with what it saw the last time; the first time it sees nothing."""
    before: dict[tuple[int, int], float] = {}
    last: list[float] = []

    def look(everybody: dict[int, Process], now: float) -> list[Sign]:
        seen = {(process.pid, process.started): process.cpu_s for process in everybody.values()}
        elapsed = now - last[0] if last else 0.0
        signs = []
        for process in everybody.values():
            # A process that is new has used what it has since the last look, a child that ended is its parent's.
            used = process.cpu_s - before.get((process.pid, process.started), 0.0)
            if elapsed > 0 and used / elapsed > share and not _INFRASTRUCTURE.search(process.command):
                signs.append(Sign(f"{process.name} uses {100 * used / elapsed:.0f} % of a core", now))
        before.clear()
        before.update(seen)
        last[:] = [now]
        return signs

    return look


# GPUs in use, as nvidia-smi says.

_QUERY = ["nvidia-smi", "--query-gpu=index,utilization.gpu", "--format=csv,noheader,nounits"]


def gpu_look(percent: float, now: float) -> list[Sign]:
    """A sign for each GPU above the threshold. Memory that is held without computing is no work."""
    try:
        listed = subprocess.run(_QUERY, capture_output=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    signs = []
    for line in listed.decode(errors="replace").splitlines():
        index, _, used = (part.strip() for part in line.partition(","))
        if used.isdecimal() and float(used) > percent:  # a MIG slice says [N/A]
            signs.append(Sign(f"GPU {index} at {used} %", now))
    return signs


# What else is in the cluster's queue.

# A job of one of these names only waits for somebody: the idle watcher judges a notebook by its kernels.
WAITING = ("watcher", "notebook")
_ACTIVE = ("INIT", "PENDING", "SETTING_UP", "RUNNING")


def job_look(runtime: Path, own: int | None, now: float) -> list[Sign]:
    """A sign for each job that is not over, from SkyPilot's own table (sky/skylet/job_lib.py).

    Without the table, or with one of another shape, there are no signs: SkyPilot waits for its jobs by itself, this
    only keeps the idle time from running meanwhile.
    """
    path = runtime / ".sky" / "jobs.db"
    if not path.is_file():  # SQLite would wait for a pipe
        return []
    marks = ",".join("?" * len(_ACTIVE))
    try:
        table = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=5)
        try:
            rows = table.execute(f"SELECT job_id, job_name FROM jobs WHERE status IN ({marks})", _ACTIVE).fetchall()
        finally:
            table.close()
    except sqlite3.Error:
        return []
    return [Sign(one_line(f"job {job} ({name})"), now) for job, name in rows if job != own and name not in WAITING]


# Jupyter servers of this user: their kernels through the REST API, and their end.

TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Server:
    """As its file in Jupyter's runtime folder says."""

    url: str
    token: str
    pid: int


def servers(runtime: Path) -> Iterator[Server]:
    """Servers that run; Jupyter leaves the files of killed ones behind."""
    for path in _files(runtime):
        try:
            said = json.loads(read_file(path))
            server = Server(str(said["url"]), str(said.get("token", "")), int(said["pid"]))
            os.kill(server.pid, 0)
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue
        yield server


def _files(runtime: Path) -> list[Path]:
    try:
        return sorted(runtime.glob("jpserver-*.json"))
    except OSError:
        return []


def jupyter_look(runtime: Path, now: float) -> list[Sign]:
    """A busy kernel works now; an idle one worked when it was active last. What answers otherwise is no Jupyter."""
    signs = []
    for server in servers(runtime):
        answer = ask(server, "api/kernels")
        for kernel in answer if isinstance(answer, list) else []:
            if not isinstance(kernel, dict):
                continue
            name = one_line(kernel.get("name", "kernel"))
            if kernel.get("execution_state") == "busy":
                signs.append(Sign(f"Jupyter kernel {name} is busy", now))
            elif at := _time(kernel.get("last_activity")):
                signs.append(Sign(f"Jupyter kernel {name}", min(at, now)))
    return signs


def shut_down(runtime: Path) -> int:
    """Asks every server to end, so that the job it is leaves the queue; returns how many were asked."""
    return sum(ask(server, "api/shutdown", method="POST") is not None for server in servers(runtime))


def ask(server: Server, path: str, method: str = "GET") -> Any | None:
    """The server's answer, an empty list for an empty one, None for none."""
    try:
        request = Request(server.url + path, method=method, headers={"Authorization": f"token {server.token}"})
        with build_opener(ProxyHandler({})).open(request, timeout=TIMEOUT_S) as answer:  # never by way of a proxy
            body = read_answer(answer)
        return json.loads(body) if body.strip() else []
    except (URLError, OSError, ValueError, HTTPException, RecursionError):  # another program may have the port now
        return None


def read_answer(answer: HTTPResponse) -> bytes:
    """The body. Raises ValueError for one without an end: too long, or a few bytes now and then."""
    body, deadline = b"", time.monotonic() + TIMEOUT_S
    while piece := answer.read1(MOST_BYTES):
        body += piece
        if len(body) > MOST_BYTES or time.monotonic() > deadline:
            raise ValueError("an answer without an end")
    return body


def _time(text: Any) -> float | None:
    """Epoch seconds of ``2026-11-25T01:30:00.123456Z``."""
    try:
        return datetime.fromisoformat(str(text).replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError, OSError):  # of the year 1, say, in a time zone before Greenwich
        return None


# People who are connected: ssh with a terminal, ssh without one, and VS Code's server.

_SSHD = re.compile(r"sshd(-session)?$|dropbear$")
_EDITOR = re.compile(r"/\.(vscode|cursor|windsurf|vscodium|positron)-server(-insiders)?/")
# A session in which SkyPilot itself asks something (its runner's own preamble, sky/utils/command_runner.py), or
# `spotune dev ls` does.
_ASKING = re.compile(r"sky\.skylet|skypilot-runtime|SKY_RUNTIME_DIR|PYTHONWARNINGS=ignore|\.spotune/watcher\.json")
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


# The idle watcher's loop: look, remember when somebody worked last, say so, and end after long enough.

# What the idle watcher is told: by the environment, which is read here and nowhere else on this side.

IDLE = "SPOTUNE_IDLE_MINUTES"  # without work for so long: the idle watcher ends
LEAD = "SPOTUNE_AUTOSTOP_MINUTES"  # SkyPilot's own autostop, which counts from there; for what `dev ls` says
ENDS = "SPOTUNE_WATCHER_ENDS"  # `scancel`: take the Slurm job down as well, where autostop does not
LOOK = "SPOTUNE_WATCHER_LOOK_S"
CPU = "SPOTUNE_WATCHER_CPU"
GPU = "SPOTUNE_WATCHER_GPU"


@dataclass(frozen=True)
class Settings:
    """How the idle watcher judges.

    Attributes:
        look_s: seconds between two looks.
        cpu_share: a process that used more than this share of one core since the last look works.
        gpu_percent: a GPU that is used more than this works.
        folder: where the state file is, and the mark of the newest idle watcher.
        runtime: SkyPilot's folder on this machine; ``job_id`` is the idle watcher's own job in it.
        slurm_job: the allocation, empty where there is none.
        ends: what the idle watcher does at the end beside ending.
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
        return self.folder / "watcher.json"

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


# The idle watcher's lines. None of them may end it: it would then hold, or not hold, a cluster for want of a log.


def open_log() -> None:
    """Lets stdout and stderr take any letter; what their encoding lacks becomes ``\\u2705``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def log(text: str, to_stderr: bool = False) -> None:
    """Prints one line, where that can be."""
    try:
        print(f"watcher: {text}", file=sys.stderr if to_stderr else sys.stdout, flush=True)
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
NEWEST = "watcher.newest"  # the idle watcher that holds this machine: the one that came last


def keep(settings: Settings, look: Look, clock: Callable[[], float], sleep: Callable[[float], None]) -> int:
    """Returns the exit code once nothing has worked for the idle time, or a newer idle watcher has come."""
    newest = settings.folder / NEWEST
    me = _claim(newest, f"{os.uname().nodename}-{os.getpid()}-{clock():.6f}")
    started = last = clock()
    said, what = "", "the start of the idle watcher"
    log(f"holds this cluster until nothing has worked for {settings.idle_s / 60:g} min")
    while True:
        now = clock()
        signs = sorted(look(now), key=lambda sign: -sign.at)
        if signs and signs[0].at >= last:
            last, what = signs[0].at, signs[0].what
        busy = [sign.what for sign in signs if sign.at >= now]
        idle_s = now - last
        if _read_text(newest) not in (me, ""):  # gone, unreadable or half written: nobody newer has said so
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
    instance.py: _cancel_slurm_job), whose trap cleans up. It ends the watcher as well, so that the time limit is what
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
    """Writes that this watcher is the newest; returns what stands there then, which is another's where it cannot."""
    try:
        write_file(path, me)
    except OSError as error:  # a full disk: both hold
        log(f"{path}: {error}")
        return _read_text(path)
    return me


def _read_text(path: Path) -> str:
    try:
        return read_file(path).decode(errors="replace")
    except OSError:
        return ""


def _write(path: Path, state: dict[str, Any]) -> None:
    try:
        write_file(path, json.dumps(state))
    except OSError as error:  # a full disk: holding on matters more than telling
        log(f"{path}: {error}")


# ``python3 -m spotune.idle``: environment in, exit code out.


def main() -> int:
    try:
        settings = Settings.read(dict(os.environ), Path.home())
    except ValueError as error:
        log(str(error), to_stderr=True)
        return 2  # nothing that another start would mend
    return keep(settings, look(settings), time.time, time.sleep)


if __name__ == "__main__":
    open_log()
    code = main()
    close_log()
    sys.exit(code)
