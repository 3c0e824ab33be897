"""Restores while the ranks start, and commits what an earlier attempt left on this machine."""

import os
import shutil
import stat
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spotune.core import protocol
from spotune.core.errors import InputError, Misplaced, SpotuneError, StoreError
from spotune.core.fingerprint import file_facts
from spotune.core.io import failpoint
from spotune.core.protocol import Staged
from spotune.core.records import Commit, RunRecord
from spotune.core.revisions import allows_other_versions, check_commit, record_history
from spotune.guard import claim
from spotune.guard.checkpoints import Lineage, commit_checkpoint, sealed
from spotune.guard.claim import for_people
from spotune.guard.journal import Context, Journal, Sleep, log
from spotune.guard.multinode import Leader
from spotune.guard.restore import Restored, missing_files, newest_commit, restore

PAUSES_S = (1.0, 4.0, 15.0)


@dataclass(frozen=True)
class Ready:
    """What the ranks get, and how long the restore took."""

    found: Restored
    restore_s: float
    other_versions_allowed: bool = False


class RestoreThread:
    """Checks what may be continued, fetches it and gives it to the ranks. Sets ``ready`` or ``error`` at its end."""

    def __init__(self, context: Context, journal: Journal, leader: Leader, sleep: Sleep = time.sleep) -> None:
        self._context, self._journal, self._leader, self._sleep = context, journal, leader, sleep
        self.ready: Ready | None = None
        self.error: SpotuneError | OSError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="restore", daemon=True)
        self._thread.start()

    @property
    def has_died(self) -> bool:
        """Whether the thread ended by a bug of its own, without a result."""
        return not self._thread.is_alive() and self.ready is None and self.error is None

    def _run(self) -> None:
        began = time.monotonic()
        try:
            claim.check_data(self._context.run)
            claim.check_model(self._context.run, self._context.cache)
            recover_local_checkpoint(self._context)
            unusable: dict[str, str] = {}
            while True:
                found, history = self._fetch(unusable)
                failpoint("restored")
                commit = found.commit
                is_allowed = bool(commit and allows_other_versions(commit, history))
                ready = Ready(found, time.monotonic() - began, self._context.allow_config_change or is_allowed)
                best, tokens = found.best_key or None, commit.tokens if commit else 0
                facts = {"tokens": tokens, "other_versions_allowed": ready.other_versions_allowed}
                self._leader.broadcast(fetch=found.key or None, best=best, **facts)
                fault = self._ask_rank(found, len(unusable))
                if fault is None:
                    return
                if not fault:
                    break
                unusable[found.key] = fault
            self.ready = ready
            self._publish(ready)
        except (SpotuneError, OSError) as error:
            self.error = error

    def stop(self) -> None:
        """Ends the wait for rank 0's verdict: the ranks have ended."""
        self._stop.set()

    def _ask_rank(self, found: Restored, number: int) -> str | None:
        """Returns why rank 0 cannot load a checkpoint; empty if it can or need not; None if the ranks have ended."""
        if found.checkpoint is None:
            return ""
        folder = self._context.folder
        paths = {"checkpoint": str(found.checkpoint), "best_checkpoint": found.best and str(found.best)}
        protocol.write_json(folder / protocol.CANDIDATE, {"number": number, **paths})
        while not self._stop.is_set():
            verdict = protocol.read_json(folder / protocol.VERDICT)
            if verdict and verdict["number"] == number:
                return str(verdict["fault"])
            self._stop.wait(0.02)
        return None

    def _fetch(self, unusable: Mapping[str, str]) -> tuple[Restored, list[RunRecord]]:
        """Returns the newest good checkpoint and the run's records; raises the error of the last of several tries."""
        store, keys, folder = self._context.store, self._context.keys, self._context.folder / protocol.TRAINER

        def fetch() -> tuple[Restored, list[RunRecord]]:
            with for_people(keys):
                history = record_history(store, keys)
            return restore(store, keys, folder, lambda commit: check_commit(commit, history), unusable), history

        for pause_s in PAUSES_S:
            try:
                return fetch()
            except (InputError, Misplaced):  # only people can mend that
                raise
            except (SpotuneError, OSError) as fault:
                log(f"the checkpoint is not fetched yet: {fault}")
                self._sleep(pause_s)
        return fetch()

    def _publish(self, ready: Ready) -> None:
        found, commit = ready.found, ready.found.commit
        for line in found.rejected:
            log(f"checkpoint rejected: {line}")
        if commit:
            log(f"resumed from the checkpoint of step {commit.step}, attempt {commit.attempt}")
        self._leader.broadcast(resume=True)
        facts = {"step": commit.step if commit else 0, "restore_s": round(ready.restore_s, 3)}
        self._journal.write("restored", commit=found.key or None, rejected=found.rejected, **facts)
        given: dict[str, Any] = {
            "checkpoint": found.checkpoint and str(found.checkpoint),
            "best_checkpoint": found.best and str(found.best),
            "error": None,
            "versions": commit.versions if commit else {},
            "global_batch": commit.global_batch if commit else 0,
            "tokens": commit.tokens if commit else 0,
            "other_versions_allowed": ready.other_versions_allowed,
        }
        protocol.write_json(self._context.folder / protocol.RESTORED, given)


def recover_local_checkpoint(context: Context) -> None:
    """Commits what an earlier attempt left on this disk if the bucket does not have it; clears the rest."""
    newest = newest_commit(context.store, context.keys)
    stranded, kept = find_stranded(context, newest), None
    if stranded is not None:
        key = context.keys.commit(newest.attempt, newest.step) if newest else ""
        lineage = Lineage(context.run, context.attempt, key, newest.ordinal if newest else 0)
        try:
            commit_checkpoint(context.store, context.keys, lineage, stranded)
            log(f"step {stranded.step} was still on this machine's disk, and is committed now")
        except StoreError as error:
            kept = stranded
            log(f"step {stranded.step} is on this machine's disk, and cannot be committed yet: {error}")
    for folder in context.scratch.glob("*"):
        if folder != context.folder and not (kept and Path(kept.checkpoint).is_relative_to(folder)):
            shutil.rmtree(folder, ignore_errors=True)


def find_stranded(context: Context, newest: Commit | None) -> Staged | None:
    """Returns the furthest whole, sealed checkpoint of this config beyond the newest commit, None if there is none."""
    done = newest.step if newest else 0
    found = [staged for folder in context.scratch.glob("[0-9]*") for staged in sealed(folder)]
    for staged in sorted(found, key=lambda staged: -staged.step):
        if staged.step > done and staged.config_sha256 == context.run.config_sha256 and is_whole(staged):
            return staged
    return None


def is_whole(staged: Staged) -> bool:
    """Returns whether each file is there as sealed, and nothing that a resume needs is missing."""
    if missing_files(staged.files, staged.world_size):
        return False
    source = Path(staged.checkpoint)
    try:
        return all(
            _is_own_file(source, name) and file_facts(source / name) == facts for name, facts in staged.files.items()
        )
    except OSError:
        return False


def _is_own_file(source: Path, name: str) -> bool:
    """Returns whether a name leads to a regular file of this user, through no link: its bytes leave this machine."""
    path, found = source / name, os.lstat(source / name)
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and path.resolve() == source.resolve() / name
