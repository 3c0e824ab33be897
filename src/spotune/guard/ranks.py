"""The ranks of this machine: their command, their processes, and what /proc says of them."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from spotune.core import environment, protocol
from spotune.core.environment import WORKER
from spotune.core.errors import InfraError
from spotune.core.io import Damaged, load_as
from spotune.core.protocol import Outcome
from spotune.guard.context import Machine
from spotune.guard.journal import say
from spotune.guard.stalls import Work

# Reads what processes do from Linux's /proc. Reads no file that waits for the memory of a hung process.

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


# The commands of the processes that the guard starts on the worker's side: ranks, extras, wandb's rebuild.


def worker_command(environ: Mapping[str, str], module: str, *arguments: str) -> list[str]:
    """Returns the command that runs ``module`` with the guard's own Python.

    ``SPOTUNE_WORKER`` names a program in its place, which gets the module's name as its first argument: tests use a
    worker that needs no torch.
    """
    program = shlex.split(environ.get(WORKER, "")) or ["-m"]
    # -P: the user's folder may hold a `datasets/`; it must not shadow the library.
    return [sys.executable, "-P", *program, module, *arguments]


# The ranks: training's processes, started and ended by the guard, one per GPU.

PEER_GRACE_S = 20.0  # once one rank has failed, the others may hang in a collective: this long to end by themselves
DIE_S = 30.0  # a process that waits for a disk or a device outlives SIGKILL: so long it is waited for


class Ranks:
    """The worker processes of this node. Each leads a process group of its own, with its data loaders in it."""

    def __init__(
        self,
        folder: Path,
        machine: Machine,
        master_port: int,
        environ: Mapping[str, str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._clock = folder, clock
        self._first_rank = machine.node_rank * machine.ranks
        self._processes = [
            subprocess.Popen(
                worker_command(environ, "spotune.sft.worker", str(folder)),
                env={**environ, **rank_environ(machine, local_rank, master_port)},
                stdin=subprocess.DEVNULL,
                process_group=0,
            )
            for local_rank in range(machine.ranks)
        ]
        self._failed_at: float | None = None

    @property
    def pids(self) -> dict[int, int]:
        """rank -> process id; each leads a process group of that number."""
        return {self._first_rank + index: process.pid for index, process in enumerate(self._processes)}

    @property
    def running(self) -> bool:
        """Whether any rank runs. A rank that ended badly takes the others with it, after a grace."""
        codes = [process.poll() for process in self._processes]
        if None not in codes:
            return False
        if any(code not in (None, 0) for code in codes):
            if self._failed_at is None:
                self._failed_at = self._clock()
            if self._clock() - self._failed_at > PEER_GRACE_S:
                self.kill()
        return True

    def kill(self) -> None:
        """SIGKILL to every rank and its children; returns when the ranks are gone, or cannot die."""
        for process in self._processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):  # macOS says the latter of a zombie
                continue
        deadline = self._clock() + DIE_S
        for rank, process in zip(self.pids, self._processes, strict=True):
            try:
                process.wait(max(deadline - self._clock(), 0.0))
            except subprocess.TimeoutExpired:
                say(f"rank {rank} (process {process.pid}) does not die: it waits for a disk or a device, and is left")

    def outcome(self) -> Outcome:
        """How training ended: the worst of what the ranks say, and of those that could not say anything."""
        return worst([self._outcome_of(index, process) for index, process in enumerate(self._processes)])

    def _outcome_of(self, index: int, process: "subprocess.Popen[bytes]") -> Outcome:
        rank = self._first_rank + index
        path = protocol.outcome_path(self._folder, rank)
        try:
            if outcome := load_as(path, Outcome):
                return outcome
        except (Damaged, InfraError) as error:
            return Outcome(how="retry", message=f"rank {rank} left a damaged {path.name}: {error}")
        code = process.returncode
        died = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
        return Outcome(how="retry", message=f"rank {rank} {died} without a word")


def worst(outcomes: list[Outcome]) -> Outcome:
    """The outcome that decides for all ranks: a fault of one is a fault of all."""
    order = ("bad_input", "failed", "retry", "stopped", "completed")
    return min(outcomes, key=lambda outcome: order.index(outcome.how))


def rank_environ(machine: Machine, local_rank: int, master_port: int) -> dict[str, str]:
    """What a rank must find in its environment; as ``torchrun`` and ``accelerate`` name it."""
    rank = machine.node_rank * machine.ranks + local_rank
    found = {
        "PYTHONUNBUFFERED": "1",
        environment.GUARD_PID: str(os.getpid()),
        "HF_HUB_DISABLE_TELEMETRY": os.environ.get("HF_HUB_DISABLE_TELEMETRY", "1"),
        "DO_NOT_TRACK": os.environ.get("DO_NOT_TRACK", "1"),
    }
    if machine.world_size > 1:
        threads = str(max(1, (os.cpu_count() or 1) // machine.ranks))
        found |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(machine.world_size),
            "LOCAL_WORLD_SIZE": str(machine.ranks),
            "MASTER_ADDR": machine.node_ips[0],
            "MASTER_PORT": str(master_port),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
        }
    return found


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        port: int = listener.getsockname()[1]
        return port
