"""The GPUs of this computer, and the files of the local engine below ``$SPOTUNE_HOME/local``."""

import re
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spotune.core import environment
from spotune.core.errors import InfraError, InputError, SpotuneError
from spotune.core.io import Damaged, load_object, make_folder_room
from spotune.core.keys import Time, is_whole
from spotune.core.protocol import as_number
from spotune.core.store.faults import is_machine_fault


@dataclass(frozen=True)
class Gpu:
    """``device``: as in CUDA_VISIBLE_DEVICES. ``name``: as SkyPilot spells it, e.g. ``L4``."""

    device: str
    name: str


def find_gpus(environ: Mapping[str, str]) -> list[Gpu]:
    """Returns the GPUs that nvidia-smi lists and CUDA_VISIBLE_DEVICES allows; empty without a driver."""
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


MARKER = "SPOTUNE_MACHINE"  # in the environment of everything that a machine runs


@dataclass(frozen=True)
class Running:
    """``running.json``: the machine is set up and the job's program runs."""

    at: Time
    setup_s: float


@dataclass(frozen=True)
class Exit:
    """``exit.json``: how the job's ``setup`` or ``run`` ended."""

    exit_code: int
    phase: str
    setup_s: float
    ended_at: Time


class LocalFolders:
    """Paths below one SPOTUNE_HOME."""

    def __init__(self, home: Path) -> None:
        self.home, self.root = home, home / "local"
        self.database = self.root / "queue.db"
        self.lock = self.root / "supervisor.lock"
        self.supervisor_log = self.root / "supervisor.log"

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
        """Creates the folder with mode 0700, since the queue holds what people train on."""
        try:
            if self.home.is_dir():
                make_folder_room(self.root)
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise home_error(error, f"cannot make {self.root}") from error


def home_error(error: OSError, what: str) -> SpotuneError:
    """Returns InfraError if the disk fails, else InputError: the home is not a place to write to."""
    if is_machine_fault(error):
        return InfraError(f"{environment.HOME}: {what}: {error.strerror}")
    return InputError(environment.HOME, f"{what}: {error.strerror}")


class AttemptFiles:
    """The files of one machine in its folder. Each file appears whole, by rename.

    Attributes:
        attempt: the attempt's row of the queue, as it began.
        machine: what the machine runs.
        status: what the guard reported last.
        probe: what the bucket said of the run after the machine's end.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.attempt = folder / "attempt.json"
        self.machine = folder / "machine.json"
        self.heartbeat = folder / "heartbeat"
        self.running = folder / "running.json"
        self.exit = folder / "exit.json"
        self.status = folder / "status.json"
        self.probe = folder / "look.json"

    def last_heartbeat(self) -> float:
        """Returns when the machine was last alive, epoch seconds; 0 if there is no such file."""
        with suppress(OSError):
            return self.heartbeat.stat().st_mtime
        return 0.0

    def read_status(self) -> dict[str, Any]:
        """Returns what the guard reported last. A wrong value is left out: a task may write the file too."""
        status: dict[str, Any] = {}
        with suppress(Damaged, InfraError):
            status = load_object(self.status) or {}
        is_sound = {
            "step": is_whole(status.get("step")),
            "max_steps": is_whole(status.get("max_steps")),
            "loss": as_number(status.get("loss")) is not None,
            "phase": isinstance(status.get("phase"), str),
        }
        return {name: status[name] for name, sound in is_sound.items() if sound}
