"""The ranks: training's processes, started and ended by the guard, one per GPU."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from spotune.contracts import environment, exchange
from spotune.contracts.errors import InfraError
from spotune.contracts.exchange import Outcome
from spotune.contracts.localstate import Damaged, load_as
from spotune.guard.machine import Machine
from spotune.guard.say import say
from spotune.guard.worker_command import worker_command

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
        path = exchange.outcome_path(self._folder, rank)
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
