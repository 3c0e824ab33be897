"""This machine: its GPUs, and where the local engine keeps what."""

import re
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spotune.core import environment
from spotune.core.errors import InfraError, InputError
from spotune.core.io import Damaged, load_object, make_folder_room
from spotune.core.keys import Time, is_whole
from spotune.core.protocol import as_number
from spotune.core.store.faults import is_machine_fault

# What GPUs this machine has, without importing torch.


@dataclass(frozen=True)
class Gpu:
    """``device`` is what CUDA_VISIBLE_DEVICES takes; ``name`` as SkyPilot spells it, e.g. ``L4``."""

    device: str
    name: str


def find_gpus(environ: Mapping[str, str]) -> list[Gpu]:
    """The GPUs that nvidia-smi lists, of those that CUDA_VISIBLE_DEVICES leaves; empty without a driver."""
    command = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if not command:
        return []
    query = [command, "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return _visible(listed.stdout, environ.get("CUDA_VISIBLE_DEVICES")) if listed.returncode == 0 else []


def _visible(listing: str, visible: str | None) -> list[Gpu]:
    rows = [[cell.strip() for cell in line.split(",")] for line in listing.splitlines() if line.count(",") >= 3]
    names = {row[0]: _sky_name(row[2], row[3]) for row in rows}
    if visible is None:
        return [Gpu(index, name) for index, name in names.items()]
    by_uuid = {row[1]: names[row[0]] for row in rows}
    found: list[Gpu] = []
    for device in (part.strip() for part in visible.split(",")):
        named = [name for uuid, name in by_uuid.items() if device and uuid.startswith(device)]
        name = names.get(device) or (named[0] if named else None)
        if name is None:  # CUDA stops at the first device that is not there
            break
        found.append(Gpu(device, name))
    return found


def _sky_name(name: str, memory_mib: str) -> str:
    """``NVIDIA A100-SXM4-80GB`` -> ``A100-80GB``, ``Tesla T4`` -> ``T4``, ``GeForce RTX 4090`` -> ``RTX4090``."""
    bare = re.sub(r"\b(NVIDIA|Tesla|GeForce|Graphics Device)\b", "", name).strip()
    bare = re.sub(r"^RTX\s+", "RTX", bare)
    model = re.split(r"[\s-]", bare)[0] if bare else "GPU"
    large = model == "A100" and memory_mib.isdigit() and int(memory_mib) > 60_000
    return f"{model}-80GB" if large else model


# Where the local infrastructure keeps what, below ``$SPOTUNE_HOME/local``.

MARKER = "SPOTUNE_MACHINE"  # in the environment of everything that a machine runs


@dataclass(frozen=True)
class Running:
    """``running.json``: the machine is set up, and the job's program runs."""

    at: Time
    setup_s: float


@dataclass(frozen=True)
class Exit:
    """``exit.json``: how the job's ``setup`` or ``run`` ended."""

    exit_code: int
    phase: str
    setup_s: float
    ended_at: Time


@dataclass(frozen=True)
class Layout:
    """Paths below one SPOTUNE_HOME."""

    home: Path

    @property
    def root(self) -> Path:
        return self.home / "local"

    @property
    def database(self) -> Path:
        return self.root / "queue.db"

    @property
    def lock(self) -> Path:
        return self.root / "supervisor.lock"

    @property
    def supervisor_log(self) -> Path:
        return self.root / "supervisor.log"

    def job(self, run_id: str) -> Path:
        return self.root / "jobs" / run_id

    def log(self, run_id: str) -> Path:
        return self.job(run_id) / "log.txt"

    def environment(self, run_id: str) -> Path:
        """The submitter's environment and the secrets: mode 0600, removed when the job ends."""
        return self.job(run_id) / "environment.json"

    def attempt(self, run_id: str, attempt: int) -> "AttemptFiles":
        return AttemptFiles(self.job(run_id) / f"{attempt:04d}")

    def make(self) -> None:
        """Creates the folder, for its owner only: the queue holds what people train on."""
        try:
            if self.home.is_dir():
                make_folder_room(self.root)
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            if is_machine_fault(error):
                raise InfraError(f"{environment.HOME}: cannot make {self.root}: {error.strerror}") from error
            raise InputError(environment.HOME, f"cannot make {self.root}: {error.strerror}") from error


@dataclass(frozen=True)
class AttemptFiles:
    """What a machine writes for the supervisor; each file appears whole, by rename."""

    folder: Path

    @property
    def attempt(self) -> Path:
        """The attempt's row of the queue, as it began."""
        return self.folder / "attempt.json"

    @property
    def machine(self) -> Path:
        return self.folder / "machine.json"

    @property
    def heartbeat(self) -> Path:
        return self.folder / "heartbeat"

    @property
    def running(self) -> Path:
        return self.folder / "running.json"

    @property
    def exit(self) -> Path:
        return self.folder / "exit.json"

    @property
    def status(self) -> Path:
        return self.folder / "status.json"

    def read_status(self) -> dict[str, Any]:
        """What the guard said last; a value that is not what the guard writes is missing: a task may write it too."""
        status: dict[str, Any] = {}
        with suppress(Damaged, InfraError):
            status = load_object(self.status) or {}
        steps = {name: status[name] for name in ("step", "max_steps") if is_whole(status.get(name))}
        loss = {"loss": status["loss"]} if as_number(status.get("loss")) is not None else {}
        return steps | loss | ({"phase": status["phase"]} if isinstance(status.get("phase"), str) else {})

    @property
    def look(self) -> Path:
        return self.folder / "look.json"
