"""Beside the ranks' imports: what may be continued is checked, fetched and handed to them."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from spotune.contracts import exchange
from spotune.contracts.errors import InputError, Misplaced, SpotuneError, StoreError
from spotune.contracts.failpoints import failpoint
from spotune.contracts.records import Commit, RunRecord
from spotune.contracts.revisions import allows_other_versions, check_commit, record_history
from spotune.guard import admission, adopt
from spotune.guard.committer import Lineage, commit_checkpoint
from spotune.guard.context import Context
from spotune.guard.gang import Leader
from spotune.guard.journal import Journal
from spotune.guard.record import for_people
from spotune.guard.restore import Restored, newest_commit, restore
from spotune.guard.say import say

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
            admission.check_data(self._context.run)
            admission.check_model(self._context.run, self._context.cache)
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
        exchange.write_json(folder / exchange.CANDIDATE, {"number": number, **paths})
        while not self._stop.is_set():
            verdict = exchange.read_json(folder / exchange.VERDICT)
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
        stranded = adopt.find_stranded(context, newest)
        if stranded is not None:
            key = context.keys.commit(newest.attempt, newest.step) if newest else ""
            lineage = Lineage(context.run, context.attempt, key, newest.ordinal if newest else 0)
            try:
                commit_checkpoint(context.store, context.keys, lineage, stranded)
                say(f"step {stranded.step} was still on this machine's disk, and is committed now")
            except StoreError as error:
                say(f"step {stranded.step} is on this machine's disk, and cannot be committed yet: {error}")
                adopt.clear(context, but=stranded)
                return
        adopt.clear(context)

    def _fetch(self, unusable: Mapping[str, str]) -> tuple[Restored, list[RunRecord]]:
        """The newest good checkpoint and the run's records; raises what went wrong when the bucket could not be read in
        several tries."""
        store, keys, folder = self._context.store, self._context.keys, self._context.folder / exchange.TRAINER

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
        exchange.write_json(self._context.folder / exchange.RESTORED, given)
