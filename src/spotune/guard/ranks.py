"""The ranks of this machine: their command, their processes, and what /proc says of them."""

import faulthandler
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from spotune.core import environment, protocol
from spotune.core.environment import WORKER
from spotune.core.errors import InfraError, SpotuneError
from spotune.core.io import Damaged, load_as
from spotune.core.keys import Keys
from spotune.core.protocol import STACKS_SIGNAL, Outcome, python_stacks_path, stacks_path
from spotune.core.store import Store
from spotune.guard import ranks
from spotune.guard.journal import Machine, say
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


# Writes down what ranks are doing before the guard kills them: ``stacks-<rank>.txt`` for each.
#
# ``py-spy dump --nonblocking`` where it is installed: it reads the memory of a process without stopping it. Else each
# thread's line, and what the kernel says that it waits for. A rank that runs also writes its own Python stacks when it
# gets a signal (sft/worker.py); a stopped rank cannot, and says so here.

MOST_BYTES = 1 << 20  # of one rank
TIMEOUT_S = 30.0  # for the ranks of one machine
_PY_SPY_S = 10.0
_OWN_S = 3.0
_MOST_THREADS = 500
_PIECE_S = 0.1


def collect_stacks(folder: Path, pids: Mapping[int, int], timeout_s: float = TIMEOUT_S) -> list[Path]:
    """Writes the stacks of ranks (rank -> process id) to an exchange folder; returns the files that are there in time.

    A file system or a process that hangs holds up a thread, and not the caller.
    """

    def collect() -> None:
        for rank, pid in pids.items():
            try:
                path = stacks_path(folder, rank)
                part = path.with_name(f".{path.name}")
                part.write_bytes(describe_rank(folder, rank, pid).encode(errors="replace")[:MOST_BYTES])
                part.replace(path)
            except OSError as error:
                say(f"the stacks of rank {rank} are not recorded: {error}")

    thread = threading.Thread(target=collect, name="stacks", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return [path for rank in pids if (path := stacks_path(folder, rank)).exists()]


def upload_stacks(store: Store, keys: Keys, attempt: int, folder: Path) -> None:
    """Uploads what ``collect_stacks`` has left; where the bucket does not take it, says so."""
    for path in sorted(folder.glob("stacks-*.txt")):
        try:
            store.create(keys.stacks(attempt, int(path.stem.rpartition("-")[2])), path.read_bytes())
        except (SpotuneError, OSError) as error:
            say(f"{path.name} is not in the bucket: {error}")


def append_own_stacks(folder: Path, rank: int) -> Path:
    """Adds what the guard's own threads do to the file of a rank; returns the file."""
    path = stacks_path(folder, rank)
    with open(path, "ab") as file:
        file.write(f"\nthe guard, process {os.getpid()}\n\nits Python stacks:\n".encode())
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
        threads = [_thread(folder) for folder in ranks.threads_of(os.getpid())[:_MOST_THREADS]]
        file.write("\n".join(["\nthreads, as the kernel sees them:", *threads, ""]).encode(errors="replace"))
    return path


def describe_rank(folder: Path, rank: int, pid: int) -> str:
    """The text of one rank's file."""
    stat = ranks.read_stat(ranks.PROC / str(pid))
    if stat is None:
        known = ranks.PROC.joinpath("self", "stat").exists()
        return f"rank {rank}, process {pid}: {'is gone' if known else 'this system has no /proc to look into'}\n"
    others = [one for one in ranks.processes_in({pid}) if one.pid != pid]
    parts = [
        f"rank {rank}, process {pid} ({stat.name}), state {_state(stat.state)}",
        _py_spy(pid),
        _python_stacks(folder, rank, pid, stat.state),
        "\n".join(["threads, as the kernel sees them:", *map(_thread, ranks.threads_of(pid)[:_MOST_THREADS])]),
        "\n".join(["its other processes:", *(_thread(ranks.PROC / str(one.pid)) for one in others[:_MOST_THREADS])]),
    ]
    return "\n\n".join(parts) + "\n"


def _state(letter: str) -> str:
    known = {
        "R": "running",
        "S": "sleeping",
        "D": "waiting for a disk or a device",
        "T": "stopped by a signal",
        "t": "stopped by a debugger",
        "Z": "dead",
    }
    return f"{letter} ({known.get(letter, 'see proc(5)')})"


def _py_spy(pid: int) -> str:
    program = shutil.which("py-spy")
    if program is None:
        return "py-spy: not installed on this machine"
    command = [program, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PY_SPY_S, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return f"py-spy: {error}"
    if done.returncode:
        return f"py-spy: exit code {done.returncode}: {done.stderr.strip()[-500:]}"
    return f"py-spy dump --nonblocking:\n{done.stdout}"


def _python_stacks(folder: Path, rank: int, pid: int, state: str) -> str:
    """What the rank itself writes when it is asked to."""
    if state in ("T", "t", "D", "Z"):
        return f"its own Python stacks: it cannot write them in state {state}"
    if not _handles(pid, STACKS_SIGNAL):
        return "its own Python stacks: it does not write them yet (it is still starting)"
    path = python_stacks_path(folder, rank)
    before = len(ranks.read_text(path))
    try:
        os.kill(pid, STACKS_SIGNAL)
    except OSError as error:
        return f"its own Python stacks: {error}"
    _wait_until_settled(lambda: len(ranks.read_text(path)))
    text = ranks.read_text(path)[before:]
    return f"its own Python stacks:\n{text}" if text else f"its own Python stacks: none within {_OWN_S:.0f} s"


def _wait_until_settled(size: Callable[[], int], sleep: Callable[[float], None] = time.sleep) -> None:
    """Returns when a file has grown and grows no more, or after a while."""
    first = last = size()
    for _ in range(int(_OWN_S / _PIECE_S)):
        sleep(_PIECE_S)
        now = size()
        if now == last != first:
            return
        last = now


def _handles(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal; without one it would die of it."""
    lines = ranks.read_text(ranks.PROC / str(pid) / "status").splitlines()
    caught = next((line.partition(":")[2] for line in lines if line.startswith("SigCgt:")), "0")
    return bool(int(caught.strip(), 16) >> (number - 1) & 1)


def _thread(folder: Path) -> str:
    """One line: who it is, its state, what it waits for; then its stack in the kernel, where we may see it."""
    stat = ranks.read_stat(folder)
    if stat is None:
        return f"  {folder.name}: is gone"
    waits = ranks.read_text(folder / "wchan").strip()
    call = ranks.read_text(folder / "syscall").strip().partition(" ")[0]
    parts = [f"  {folder.name} {stat.name}: state {stat.state}, {stat.cpu_s:.1f} s of CPU"]
    parts += [f"waits in {waits}"] if waits not in ("", "0") else []
    parts += [f"system call {call}"] if call else []
    kernel = ranks.read_text(folder / "stack").splitlines()
    return "\n".join([", ".join(parts), *(f"      {line}" for line in kernel)])
