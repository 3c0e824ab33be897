"""A run of ``python -m spotune.sft CONFIG``, and what its bucket says about it."""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from drill.contender import Account, Hold, Launch
from drill.servers import Bucket
from spotune.core import environment
from spotune.core.keys import Keys, attempt_of, commit_of
from spotune.core.protocol import Event, parse_lines
from spotune.core.records import AttemptRecord, Certificate
from spotune.core.store import Store
from spotune.cost.machines import clean

FOREIGN = ("SPOTUNE_", "SKYPILOT_", "SLURM_")  # the caller's own run is not this one


class SpotRun:
    """One run; its state is in the bucket, its machines' disks are their ``SPOTUNE_HOME``."""

    noticed: tuple[int, ...] = (75,)

    def __init__(self, run_id: str, arguments: Sequence[str], bucket: Bucket, environ: Mapping[str, str]) -> None:
        self._keys, self._bucket = Keys(run_id), bucket
        self._command = [sys.executable, "-m", "spotune.sft", *arguments]
        kept = {name: value for name, value in environ.items() if not name.startswith(FOREIGN)}
        self._environ = {**kept, environment.RUN_ID: run_id, environment.BUCKET: bucket.url}

    def launch(self, disk: Path, hold: Hold | None) -> Launch:
        held = hold.environ if hold else {}
        return Launch(self._command, {**self._environ, environment.HOME: str(disk), **held})

    def event_log(self, disk: Path, since: float) -> Path | None:
        logs = (disk / "work" / self._keys.run_id).glob("node-0/*/events-0.jsonl")
        return max((log for log in logs if _modified_at(log) >= since), default=None)

    def repair(self) -> bool:
        return False  # the same command, every time

    def account(self) -> Account:
        store, keys = Store(self._bucket.url), self._keys
        certificate = store.read(keys.completed)
        claims: dict[int, float] = {}
        told: dict[int, list[Event]] = {}
        for key in store.keys(keys.attempts):
            number, data = attempt_of(key) or 0, store.read(key) or b""
            if key == keys.attempt(number):
                claims[number] = AttemptRecord.from_bytes(data, key).claimed_at
            elif "/events-0-" in key:
                told.setdefault(number, []).extend(parse_lines(data))
        return Account(
            weights=Certificate.from_bytes(certificate, keys.completed).weights_sha256 if certificate else None,
            attempts={at: clean(told.get(number, [])) for number, at in claims.items()},
            leftovers=self._leftovers(store),
        )

    def _leftovers(self, store: Store) -> dict[str, int]:
        keys = self._keys
        committed = {keys.checkpoint(step, attempt) for key in store.keys(keys.commits) if (number := commit_of(key))
                     for attempt, step in [number]}  # fmt: skip
        folders = {f"{keys.checkpoints}/{name}" for name in store.folders(keys.checkpoints)}
        return {
            "orphan checkpoints": len(folders - committed),
            "commits without data": len(committed - folders),
            "multipart uploads": self._bucket.unfinished_uploads(keys.root),
            "partial files": self._bucket.partial_files(keys.root),
        }


def _modified_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # tidied away since it was listed
        return 0.0


def run_id_of(*parts: object) -> str:
    """A run id from a few words and numbers."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(map(str, parts)).lower())[:25].strip("-")
