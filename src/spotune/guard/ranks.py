"""The ranks of this machine: their command, their processes, their work as /proc has it, and their stacks."""

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
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from spotune.core import environment, protocol
from spotune.core.environment import WORKER
from spotune.core.errors import InfraError, SpotuneError
from spotune.core.io import Damaged, load_as
from spotune.core.keys import Keys
from spotune.core.protocol import STACKS_SIGNAL, Outcome, python_stacks_path, stacks_path
from spotune.core.store import Store
from spotune.guard.journal import Clock, Node, log

PROC = Path("/proc")
PEER_GRACE_S = 20.0  # after one rank failed, the others may hang in a collective: so long they may end by themselves
DIE_S = 30.0  # a process that waits for a disk or a device outlives SIGKILL: how long to wait for it
MOST_BYTES = 1 << 20  # of one rank's stacks
TIMEOUT_S = 30.0  # for the stacks of one machine's ranks
_OWN_S = 3.0
_MOST_THREADS = 500


@dataclass(frozen=True)
class ProcessStat:
    """A line of ``/proc/<pid>/stat``; ``cpu_s`` includes children that have ended."""

    pid: int
    name: str
    state: str
    group: int
    cpu_s: float


def read_stat(folder: Path) -> ProcessStat | None:
    """Returns the facts of a process or thread, None if it is gone."""
    text = read_text(folder / "stat")
    head, separator, rest = text.rpartition(")")  # the name may hold anything
    fields = rest.split()
    if not separator or len(fields) < 15:
        return None
    pid, _, name = head.partition(" (")
    return ProcessStat(
        int(pid), name, fields[0], int(fields[2]), sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    )


def processes_in(groups: Collection[int], proc: Path = PROC) -> list[ProcessStat]:
    return [stat for folder in _numbered(proc) if (stat := read_stat(folder)) and stat.group in groups]


@dataclass(frozen=True)
class Work:
    """The work of processes so far: CPU seconds, bytes read and written; ``stopped``: one is in state T."""

    cpu_s: float = 0.0
    moved_bytes: float = 0.0
    stopped: bool = False


def work_of(groups: Collection[int], proc: Path = PROC) -> Work | None:
    """Returns the work of process groups so far, None without /proc; ``stopped``: of a group's leader, a rank."""
    if not (proc / "self" / "stat").exists():
        return None
    found = processes_in(groups, proc)
    return Work(
        cpu_s=sum(stat.cpu_s for stat in found),
        moved_bytes=sum(moved_bytes(stat.pid, proc) for stat in found),
        stopped=any(stat.state in "Tt" for stat in found if stat.pid == stat.group),
    )


def own_work(proc: Path = PROC) -> Work:
    times = os.times()
    return Work(times.user + times.system, moved_bytes(os.getpid(), proc))


def moved_bytes(pid: int, proc: Path = PROC) -> int:
    """Returns the bytes that a process has read and written, by system calls and as pages; 0 if unreadable."""
    pairs = (line.partition(": ") for line in read_text(proc / str(pid) / "io").splitlines())
    names = ("rchar", "wchar", "read_bytes", "write_bytes")
    return sum(int(value) for name, _, value in pairs if name in names and value.isdigit())


def read_text(path: Path) -> str:
    """Returns a file's text; empty if it is gone or unreadable."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _numbered(folder: Path) -> list[Path]:
    """Returns the entries whose name is a number, in order: processes, or threads with the main one first."""
    try:
        names = [name for name in os.listdir(folder) if name.isdigit()]
    except OSError:
        return []
    return [folder / name for name in sorted(names, key=int)]


def worker_command(environ: Mapping[str, str], module: str, *arguments: str) -> list[str]:
    """Returns the command that runs ``module`` with the guard's Python, or a test's program (SPOTUNE_WORKER)."""
    program = shlex.split(environ.get(WORKER, "")) or ["-m"]
    # -P: a `datasets/` in the user's folder must not shadow the library.
    return [sys.executable, "-P", *program, module, *arguments]


class Ranks:
    """The worker processes of this node, one per GPU. Each leads a process group, with its data loaders in it."""

    def __init__(
        self, folder: Path, machine: Node, master_port: int, environ: Mapping[str, str], clock: Clock = time.monotonic
    ) -> None:
        self._folder, self._clock, self._first_rank = folder, clock, machine.node_rank * machine.ranks
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
        """rank -> process id, which is its process group's too."""
        return {self._first_rank + index: process.pid for index, process in enumerate(self._processes)}

    @property
    def running(self) -> bool:
        """Whether any rank runs. After a rank failed, kills the others once their grace is over."""
        codes = [process.poll() for process in self._processes]
        if None not in codes:
            return False
        if any(code not in (None, 0) for code in codes):
            self._failed_at = self._clock() if self._failed_at is None else self._failed_at
            if self._clock() - self._failed_at > PEER_GRACE_S:
                self.kill()
        return True

    def kill(self) -> None:
        """Kills every rank and its children; returns when the ranks are gone, or cannot die."""
        for process in self._processes:
            with suppress(ProcessLookupError, PermissionError):  # macOS raises the latter for a zombie
                os.killpg(process.pid, signal.SIGKILL)
        deadline = self._clock() + DIE_S
        for rank, process in zip(self.pids, self._processes, strict=True):
            try:
                process.wait(max(deadline - self._clock(), 0.0))
            except subprocess.TimeoutExpired:
                log(f"rank {rank} (process {process.pid}) does not die: it waits for a disk or a device, and is left")

    def outcome(self) -> Outcome:
        """Returns how training ended: the worst outcome; a rank that left none counts as ``retry``."""
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
    """Returns the outcome that decides for all ranks: a fault of one is a fault of all."""
    order = ("bad_input", "failed", "retry", "stopped", "completed")
    return min(outcomes, key=lambda outcome: order.index(outcome.how))


def rank_environ(machine: Node, local_rank: int, master_port: int) -> dict[str, str]:
    """Returns what a rank needs in its environment, with ``torchrun``'s and ``accelerate``'s names."""
    found = {
        "PYTHONUNBUFFERED": "1",
        environment.GUARD_PID: str(os.getpid()),
        "HF_HUB_DISABLE_TELEMETRY": os.environ.get("HF_HUB_DISABLE_TELEMETRY", "1"),
        "DO_NOT_TRACK": os.environ.get("DO_NOT_TRACK", "1"),
    }
    if machine.world_size > 1:
        threads = str(max(1, (os.cpu_count() or 1) // machine.ranks))
        found |= {
            "RANK": str(machine.node_rank * machine.ranks + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(machine.world_size),
            "LOCAL_WORLD_SIZE": str(machine.ranks),
            "MASTER_ADDR": machine.node_ips[0],
            "MASTER_PORT": str(master_port),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
        }
    return found


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def collect_stacks(folder: Path, pids: Mapping[int, int], timeout_s: float = TIMEOUT_S) -> list[Path]:
    """Writes ``stacks-<rank>.txt`` for ranks (rank -> process id); returns the files that are there in time."""

    def collect() -> None:
        for rank, pid in pids.items():
            try:
                path = stacks_path(folder, rank)
                part = path.with_name(f".{path.name}")
                part.write_bytes(describe_rank(folder, rank, pid).encode(errors="replace")[:MOST_BYTES])
                part.replace(path)
            except OSError as error:
                log(f"the stacks of rank {rank} are not recorded: {error}")

    thread = threading.Thread(target=collect, name="stacks", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return [path for rank in pids if (path := stacks_path(folder, rank)).exists()]


def upload_stacks(store: Store, keys: Keys, attempt: int, folder: Path) -> None:
    """Uploads the files of ``collect_stacks``; logs what the bucket does not accept."""
    for path in sorted(folder.glob("stacks-*.txt")):
        try:
            store.create(keys.stacks(attempt, int(path.stem.rpartition("-")[2])), path.read_bytes())
        except (SpotuneError, OSError) as error:
            log(f"{path.name} is not in the bucket: {error}")


def append_own_stacks(folder: Path, rank: int) -> Path:
    """Adds the guard's own threads to the file of a rank; returns the file."""
    path = stacks_path(folder, rank)
    with open(path, "ab") as file:
        file.write(f"\nthe guard, process {os.getpid()}\n\nits Python stacks:\n".encode())
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
        threads = [_thread(folder) for folder in _numbered(PROC / str(os.getpid()) / "task")[:_MOST_THREADS]]
        file.write("\n".join(["\nthreads, as the kernel sees them:", *threads, ""]).encode(errors="replace"))
    return path


def describe_rank(folder: Path, rank: int, pid: int) -> str:
    """Returns the text of one rank's file: py-spy's dump, the rank's own Python stacks, and its threads' waits."""
    stat = read_stat(PROC / str(pid))
    if stat is None:
        known = PROC.joinpath("self", "stat").exists()
        return f"rank {rank}, process {pid}: {'is gone' if known else 'this system has no /proc to look into'}\n"
    others = [one for one in processes_in({pid}) if one.pid != pid]
    parts = [
        f"rank {rank}, process {pid} ({stat.name}), state {stat.state} ({_STATES.get(stat.state, 'see proc(5)')})",
        _py_spy(pid),
        _python_stacks(folder, rank, pid, stat.state),
        "\n".join(
            ["threads, as the kernel sees them:", *map(_thread, _numbered(PROC / str(pid) / "task")[:_MOST_THREADS])]
        ),
        "\n".join(["its other processes:", *(_thread(PROC / str(one.pid)) for one in others[:_MOST_THREADS])]),
    ]
    return "\n\n".join(parts) + "\n"


_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "waiting for a disk or a device",
    "T": "stopped by a signal",
    "t": "stopped by a debugger",
    "Z": "dead",
}


def _py_spy(pid: int) -> str:
    if (program := shutil.which("py-spy")) is None:
        return "py-spy: not installed on this machine"
    command = [program, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return f"py-spy: {error}"
    if done.returncode:
        return f"py-spy: exit code {done.returncode}: {done.stderr.strip()[-500:]}"
    return f"py-spy dump --nonblocking:\n{done.stdout}"


def _python_stacks(folder: Path, rank: int, pid: int, state: str) -> str:
    """Asks the rank to write its stacks and returns them. A rank in state T, t, D or Z cannot."""
    if state in ("T", "t", "D", "Z"):
        return f"its own Python stacks: it cannot write them in state {state}"
    lines = read_text(PROC / str(pid) / "status").splitlines()
    caught = next((line.partition(":")[2] for line in lines if line.startswith("SigCgt:")), "0")
    if not int(caught.strip(), 16) >> (STACKS_SIGNAL - 1) & 1:  # without a handler the signal would kill it
        return "its own Python stacks: it does not write them yet (it is still starting)"
    path = python_stacks_path(folder, rank)
    last = before = len(read_text(path))
    try:
        os.kill(pid, STACKS_SIGNAL)
    except OSError as error:
        return f"its own Python stacks: {error}"
    for _ in range(int(_OWN_S / 0.1)):  # until the file has grown and grows no more
        time.sleep(0.1)
        size = len(read_text(path))
        if size == last != before:
            break
        last = size
    text = read_text(path)[before:]
    return f"its own Python stacks:\n{text}" if text else f"its own Python stacks: none within {_OWN_S:.0f} s"


def _thread(folder: Path) -> str:
    """Returns a line with name, state and what it waits for; then its stack in the kernel, if readable."""
    stat = read_stat(folder)
    if stat is None:
        return f"  {folder.name}: is gone"
    waits = read_text(folder / "wchan").strip()
    call = read_text(folder / "syscall").strip().partition(" ")[0]
    parts = [f"  {folder.name} {stat.name}: state {stat.state}, {stat.cpu_s:.1f} s of CPU"]
    parts += [f"waits in {waits}"] if waits not in ("", "0") else []
    parts += [f"system call {call}"] if call else []
    kernel = read_text(folder / "stack").splitlines()
    return "\n".join([", ".join(parts), *(f"      {line}" for line in kernel)])
