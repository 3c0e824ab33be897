"""Restores beside the start of the ranks, and commits what an earlier attempt left on this machine."""

import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Mapping
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
from spotune.guard.journal import Context, Journal, say
from spotune.guard.multinode import Leader
from spotune.guard.restore import Restored, missing_files, newest_commit, restore

# Beside the ranks' imports: what may be continued is checked, fetched and handed to them.

PAUSES_S = (1.0, 4.0, 15.0)
POLL_S = 0.02


@dataclass(frozen=True)
class Ready:
    """What the ranks have been given, and how long that took."""

    found: Restored
    restore_s: float
    other_versions_allowed: bool = False

    @property
    def commit(self) -> Commit | None:
        return self.found.commit


class Restoring:
    """A thread; ``ready`` or ``error`` is set when it has ended."""

    def __init__(
        self, context: Context, journal: Journal, leader: Leader, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._sleep = sleep
        self._context, self._journal, self._leader = context, journal, leader
        self.ready: Ready | None = None
        self.error: SpotuneError | OSError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="restore", daemon=True)
        self._thread.start()

    @property
    def has_died(self) -> bool:
        """Whether it ended by a fault of its own, with nothing to show."""
        return not self._thread.is_alive() and self.ready is None and self.error is None

    def _run(self) -> None:
        began = time.monotonic()
        try:
            claim.check_data(self._context.run)
            claim.check_model(self._context.run, self._context.cache)
            self._adopt()
            unusable: dict[str, str] = {}
            while True:
                found, history = self._fetch(unusable)
                failpoint("restored")
                ready = Ready(found, time.monotonic() - began, self._allows_other_versions(found, history))
                self._have_followers_fetch(ready)
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
        """The ranks have ended: nobody will say any more whether a checkpoint can be loaded."""
        self._stop.set()

    def _allows_other_versions(self, found: Restored, history: list[RunRecord]) -> bool:
        if self._context.allow_config_change:
            return True
        return bool(found.commit and allows_other_versions(found.commit, history))

    def _ask_rank(self, found: Restored, number: int) -> str | None:
        """Asks rank 0 whether it can load a checkpoint: the guard knows no torch.

        Returns why it cannot, empty where it can or where there is nothing to load, None where the ranks have ended.
        """
        if found.checkpoint is None:
            return ""
        folder = self._context.folder
        paths = {"checkpoint": str(found.checkpoint), "best_checkpoint": found.best and str(found.best)}
        protocol.write_json(folder / protocol.CANDIDATE, {"number": number, **paths})
        while not self._stop.is_set():
            verdict = protocol.read_json(folder / protocol.VERDICT)
            if verdict and verdict["number"] == number:
                return str(verdict["fault"])
            self._stop.wait(POLL_S)
        return None

    def _have_followers_fetch(self, ready: Ready) -> None:
        found = ready.found
        told = {"tokens": found.commit.tokens if found.commit else 0}
        told["other_versions_allowed"] = ready.other_versions_allowed
        self._leader.broadcast(fetch=found.key or None, best=found.best_key or None, **told)

    def _adopt(self) -> None:
        """Commits what an earlier attempt left behind on this disk, if it is ahead of the bucket; clears the rest."""
        context = self._context
        newest = newest_commit(context.store, context.keys)
        stranded = find_stranded(context, newest)
        if stranded is not None:
            key = context.keys.commit(newest.attempt, newest.step) if newest else ""
            lineage = Lineage(context.run, context.attempt, key, newest.ordinal if newest else 0)
            try:
                commit_checkpoint(context.store, context.keys, lineage, stranded)
                say(f"step {stranded.step} was still on this machine's disk, and is committed now")
            except StoreError as error:
                say(f"step {stranded.step} is on this machine's disk, and cannot be committed yet: {error}")
                clear(context, but=stranded)
                return
        clear(context)

    def _fetch(self, unusable: Mapping[str, str]) -> tuple[Restored, list[RunRecord]]:
        """The newest good checkpoint and the run's records; raises what went wrong when the bucket could not be read in
        several tries."""
        store, keys, folder = self._context.store, self._context.keys, self._context.folder / protocol.TRAINER

        def fetch() -> tuple[Restored, list[RunRecord]]:
            with for_people(keys):
                history = record_history(store, keys)
            return restore(store, keys, folder, lambda commit: check_commit(commit, history), unusable), history

        for pause_s in PAUSES_S:
            try:
                return fetch()
            except (InputError, Misplaced):  # time does not mend it
                raise
            except (SpotuneError, OSError) as fault:
                say(f"the checkpoint is not fetched yet: {fault}")
                self._sleep(pause_s)
        return fetch()

    def _publish(self, ready: Ready) -> None:
        found, commit = ready.found, ready.commit
        for line in found.rejected:
            say(f"checkpoint rejected: {line}")
        if commit:
            say(f"resumed from the checkpoint of step {commit.step}, attempt {commit.attempt}")
        self._leader.broadcast(resume=True)
        self._journal.write(
            "restored",
            step=commit.step if commit else 0,
            commit=found.key or None,
            rejected=found.rejected,
            restore_s=round(ready.restore_s, 3),
        )
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


# What earlier attempts left on this machine: a sealed checkpoint that never reached the bucket is committed now.
#
# Only what the bucket does not have yet, only what still is what the seal says, and only where one machine holds all of
# a checkpoint. Everything else on this disk is not ours to trust, and goes.


def find_stranded(context: Context, newest: Commit | None) -> Staged | None:
    """The furthest whole checkpoint beyond the newest commit, None when there is none; of this config only."""
    done = newest.step if newest else 0
    found = [staged for folder in context.scratch.glob("[0-9]*") for staged in sealed(folder)]
    for staged in sorted(found, key=lambda staged: -staged.step):
        if staged.step > done and staged.config_sha256 == context.run.config_sha256 and is_whole(staged):
            return staged
    return None


def is_whole(staged: Staged) -> bool:
    """Whether each file is there as sealed, and nothing that a resume needs is missing."""
    if missing_files(staged.files, staged.world_size):
        return False
    source = Path(staged.checkpoint)
    try:
        return all(
            _is_own_file(source, name) and file_facts(source / name) == staged.files[name] for name in staged.files
        )
    except OSError:
        return False


def _is_own_file(source: Path, name: str) -> bool:
    """Whether a name leads to a regular file of this user, without a link on the way: its bytes leave this machine."""
    path, found = source / name, os.lstat(source / name)
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and path.resolve() == source.resolve() / name


def clear(context: Context, but: Staged | None = None) -> None:
    """Removes what earlier attempts left, but for the attempt's folder that holds ``but``."""
    for folder in context.scratch.glob("*"):
        if folder != context.folder and not (but and Path(but.checkpoint).is_relative_to(folder)):
            shutil.rmtree(folder, ignore_errors=True)
