"""Uploads what the worker staged, and commits it: data first, the commit object last and create-only.

One upload at a time, in the background; of those waiting the newest wins.
"""

import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spotune.contracts.errors import Fenced, SpotuneError, StoreError
from spotune.contracts.exchange import TRAINER, Staged
from spotune.contracts.fingerprint import file_facts
from spotune.contracts.keys import Keys
from spotune.contracts.records import Commit, RunRecord
from spotune.contracts.store import Store
from spotune.guard.admission import check_fence
from spotune.guard.journal import Journal
from spotune.guard.retention import prune, sweep_orphans
from spotune.guard.say import say

THREADS = 4
RETRIES_S = (1.0, 4.0, 15.0)


@dataclass(frozen=True)
class Lineage:
    """What every commit of an attempt has in common; ``parts`` waits for other machines' files of a step."""

    run: RunRecord
    attempt: int
    parent: str
    keep: int
    parts: Callable[[int], dict[str, Any]]


class Committer:
    """The thread that turns staged checkpoints into commits.

    ``fenced`` is set for good when a later attempt owns the run; ``error`` holds the last upload's failure
    until one succeeds.
    """

    def __init__(self, store: Store, keys: Keys, lineage: Lineage, folder: Path, journal: Journal) -> None:
        self._store, self._keys, self._lineage, self._folder, self._journal = store, keys, lineage, folder, journal
        self._waiting: Staged | None = None
        self._busy = False
        self._closed = False
        self._changed = threading.Condition()
        self._swept = False
        self.fenced: Fenced | None = None
        self.error: SpotuneError | None = None
        self.committed_step = 0
        self.count = 0
        self._thread = threading.Thread(target=self._work, name="committer", daemon=True)
        self._thread.start()

    def submit(self, staged: Staged) -> None:
        """Hands over a complete local checkpoint; one that still waits is dropped for it."""
        with self._changed:
            self._waiting = staged
            self._changed.notify_all()

    def drain(self, timeout_s: float | None = None) -> bool:
        """Waits until nothing is waiting or under way; returns whether the last upload is committed."""
        with self._changed:
            done = self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout_s)
            return done and self.error is None and self.fenced is None

    def close(self) -> None:
        """Ends the thread once what is waiting is done."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                staged, self._waiting, self._busy = self._waiting, None, True
            try:
                self._commit_with_retries(staged)
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _commit_with_retries(self, staged: Staged) -> None:
        for pause_s in (*RETRIES_S, None):
            try:
                self._commit(staged)
                self.error = None
                return
            except Fenced as fenced:
                self.fenced = fenced
                return
            except (SpotuneError, OSError) as error:
                self.error = error if isinstance(error, SpotuneError) else StoreError(str(error))
                say(f"step {staged.step} is not committed yet: {self.error}")
            with self._changed:
                if pause_s is None or self._changed.wait_for(lambda: self._waiting, pause_s):
                    return

    def _commit(self, staged: Staged) -> None:
        started = time.time()
        attempt = self._lineage.attempt
        files = upload_checkpoint(self._store, self._keys, staged, attempt)
        files |= self._lineage.parts(staged.step)  # of the other machines
        check_fence(self._store, self._keys, attempt)
        commit = Commit(
            run_id=self._lineage.run.run_id,
            step=staged.step,
            attempt=attempt,
            parent=self._lineage.parent,
            epoch=staged.epoch,
            tokens=staged.tokens,
            world_size=staged.world_size,
            threads=staged.threads,
            config_sha256=self._lineage.run.config_sha256,
            data_sha256=self._lineage.run.data_sha256,
            versions=staged.versions,
            committed_at=time.time(),
            best_step=staged.best_step,
            files=files,
        )
        key = self._keys.commit(attempt, staged.step)
        if not self._store.create(key, commit.to_bytes()) and self._store.read(key) is None:
            raise StoreError(f"{key}: neither created nor there")
        self.committed_step, self.count = staged.step, self.count + 1
        size = sum(int(file["size"]) for file in files.values())
        self._journal.write("commit", step=staged.step, upload_s=round(time.time() - started, 3), bytes=size)
        self._tidy(staged)

    def _tidy(self, staged: Staged) -> None:
        """Local checkpoints older than the committed one go, but for the best; so do old commits in the bucket."""
        drop_older(self._folder / TRAINER, staged)
        try:
            prune(self._store, self._keys, self._lineage.keep, staged.best_step)
            if not self._swept:
                sweep_orphans(self._store, self._keys, self._lineage.attempt)
                self._swept = True
        except StoreError as error:  # tidying can wait; the checkpoint is safe
            say(f"old checkpoints are not removed yet: {error}")


def drop_older(trainer: Path, staged: Staged) -> None:
    """Removes the local checkpoints before ``staged``, but for the best one, which Trainer loads at the end."""
    for folder in trainer.glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        if step.isdigit() and int(step) < staged.step and int(step) != staged.best_step:
            shutil.rmtree(folder, ignore_errors=True)


def upload_checkpoint(store: Store, keys: Keys, staged: Staged, attempt: int) -> dict[str, dict[str, Any]]:
    """Uploads a local checkpoint's files; returns ``{relative path: {size, sha256}}`` as a commit names them."""
    source = Path(staged.checkpoint)
    target = keys.checkpoint(staged.step, attempt)
    paths = sorted(path for path in source.rglob("*") if path.is_file())

    def put(path: Path) -> tuple[str, dict[str, Any]]:
        name = path.relative_to(source).as_posix()
        facts = file_facts(path)
        store.upload(path, f"{target}/{name}")
        return name, facts

    with ThreadPoolExecutor(THREADS) as pool:
        return dict(pool.map(put, paths))
