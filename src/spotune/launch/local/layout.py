"""Where the local infrastructure keeps what, below ``$SPOTUNE_HOME/local``."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spotune.contracts import environment
from spotune.contracts.errors import InfraError, InputError
from spotune.contracts.events import as_number
from spotune.contracts.localstate import Damaged, load_object, make_folder_room
from spotune.contracts.machinefaults import is_machine_fault
from spotune.contracts.shapes import Time, is_whole

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
