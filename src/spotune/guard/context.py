"""What all parts of one attempt need to know of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spotune.contracts.keys import Keys
from spotune.contracts.records import AttemptRecord, RunRecord
from spotune.contracts.store import Store
from spotune.guard.machine import Machine


@dataclass(frozen=True)
class Context:
    """An attempt: its place in the bucket, its run, its machine.

    Attributes:
        scratch: this run's folder on the local disk, with a folder for each attempt.
        cache: a folder that stays: data sets, and what is known of files.
        status_file: a local file to keep current, empty for none.
        patience_s: for how long training goes on without a bucket before the attempt ends.
        allow_config_change: whether this attempt was started with ``--allow-config-change``.
    """

    store: Store
    keys: Keys
    run: RunRecord
    record: AttemptRecord
    machine: Machine
    environ: Mapping[str, str]
    scratch: Path
    cache: Path
    status_file: str
    patience_s: float
    allow_config_change: bool = False

    @property
    def attempt(self) -> int:
        return self.record.attempt

    @property
    def folder(self) -> Path:
        """The exchange folder with the ranks."""
        return self.scratch / f"{self.record.attempt:04d}"
