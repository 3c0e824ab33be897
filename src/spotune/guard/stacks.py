"""Writes down what ranks are doing before the guard kills them: ``stacks-<rank>.txt`` for each.

``py-spy dump --nonblocking`` where it is installed: it reads the memory of a process without stopping it. Else each
thread's line, and what the kernel says that it waits for. A rank that runs also writes its own Python stacks when it
gets a signal (sft/worker.py); a stopped rank cannot, and says so here.
"""

import faulthandler
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from spotune.core.errors import SpotuneError
from spotune.core.keys import Keys
from spotune.core.protocol import STACKS_SIGNAL, python_stacks_path, stacks_path
from spotune.core.store import Store
from spotune.guard import ranks
from spotune.guard.journal import say

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
