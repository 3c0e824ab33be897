"""Where the local infrastructure keeps what, below ``$SPOTUNE_HOME/local``."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spotune.contracts import environment
from spotune.contracts.errors import InfraError, InputError
from spotune.contracts.machinefaults import is_machine_fault

MARKER = "SPOTUNE_MACHINE"  # in the environment of everything that a machine runs


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
        """What the guard said last; empty when there is nothing that can be read: a task may write it too."""
        try:
            status = json.loads(self.status.read_bytes())
        except (OSError, ValueError):
            return {}
        return status if isinstance(status, dict) else {}

    @property
    def look(self) -> Path:
        return self.folder / "look.json"
