"""Turns staged checkpoints into commits: data first, under a key that holds the attempt; the commit object last.

sealed ─▶ files uploaded ─▶ other machines' files there ─▶ not fenced ─▶ commit created ─▶ tidied up
"""

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spotune.contracts.errors import StoreError
from spotune.contracts.exchange import TRAINER, Staged
from spotune.contracts.failpoints import failpoint
from spotune.contracts.keys import Keys
from spotune.contracts.records import Commit, RunRecord
from spotune.contracts.store import Store
from spotune.guard.admission import check_fence
from spotune.guard.context import Context
from spotune.guard.handover import seal, seal_path
from spotune.guard.journal import Journal
from spotune.guard.retention import Retention
from spotune.guard.say import say
from spotune.guard.toll import Toll
from spotune.guard.uploader import Uploader

THREADS = 4


@dataclass(frozen=True)
class Lineage:
    """What every commit of an attempt has in common.

    Attributes:
        parent: key of the commit that the attempt started from, empty for a fresh start.
        ordinal: that commit's number in the run's line of commits, 0 for a fresh start.
    """

    run: RunRecord
    attempt: int
    parent: str
    ordinal: int


def commit_checkpoint(
    store: Store,
    keys: Keys,
    lineage: Lineage,
    staged: Staged,
    parts: Callable[[int], dict[str, Any]] = lambda step: {},
    saving: dict[str, float] | None = None,
) -> Commit:
    """Uploads a sealed checkpoint and commits it as the next of its line. Raises Fenced or StoreError.

    ``parts`` has the other machines upload their files of a step, and waits for them.
    """
    upload_checkpoint(store, keys, staged, lineage.attempt)
    files = staged.files | parts(staged.step)
    failpoint("uploaded")
    check_fence(store, keys, lineage.attempt)
    commit = Commit(
        run_id=lineage.run.run_id,
        step=staged.step,
        attempt=lineage.attempt,
        parent=lineage.parent,
        ordinal=lineage.ordinal + 1,
        epoch=staged.epoch,
        tokens=staged.tokens,
        world_size=staged.world_size,
        global_batch=staged.global_batch,
        threads=staged.threads,
        config_sha256=lineage.run.config_sha256,
        data_sha256=lineage.run.data_sha256,
        model_sha256=lineage.run.model_sha256,
        versions=staged.versions,
        committed_at=time.time(),
        best_step=staged.best_step,
        saving=saving or {},
        revision=staged.revision,
        files=files,
    )
    key = keys.commit(lineage.attempt, staged.step)
    if not store.create(key, commit.to_bytes()) and store.read(key) is None:
        raise StoreError(f"{key}: neither created nor there")
    return commit


class Committer(Uploader):
    """An uploader whose uploads end in a commit.

    Args:
        parts: see ``commit_checkpoint``.
        toll: what saving has cost so far; goes into the commit, for the machines that follow.
    """

    def __init__(
        self,
        context: Context,
        lineage: Lineage,
        retention: Retention,
        journal: Journal,
        parts: Callable[[int], dict[str, Any]],
        toll: Toll,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._context, self._lineage, self._retention, self._journal = context, lineage, retention, journal
        self._parts, self._toll = parts, toll
        self.committed_step = 0
        super().__init__(self._commit, clock)

    def _commit(self, staged: Staged) -> None:
        began = time.time()
        context = self._context
        staged = seal(context.folder, staged, context.run.config_sha256, context.run.revision)
        failpoint("staged")
        commit = commit_checkpoint(context.store, context.keys, self._lineage, staged, self._parts, self._toll.record)
        self._lineage = replace(self._lineage, ordinal=commit.ordinal)
        self.committed_step = staged.step
        size = sum(int(file["size"]) for file in commit.files.values())
        self._journal.write("commit", step=staged.step, upload_s=round(time.time() - began, 3), bytes=size)
        failpoint("committed")
        seal_path(context.folder, staged.step).unlink(missing_ok=True)
        self._tidy(staged)

    def _tidy(self, staged: Staged) -> None:
        """Local checkpoints older than the committed one go, but for the best; so do old commits in the bucket."""
        drop_older(self._context.folder / TRAINER, staged)
        try:
            self._retention.tidy(staged.best_step)
        except StoreError as error:  # tidying can wait; the checkpoint is safe
            say(f"old checkpoints are not removed yet: {error}")


def drop_older(trainer: Path, staged: Staged) -> None:
    """Removes the local checkpoints before ``staged``, but for the best one, which Trainer loads at the end."""
    for folder in trainer.glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        if step.isdigit() and int(step) < staged.step and int(step) != staged.best_step:
            shutil.rmtree(folder, ignore_errors=True)


def upload_checkpoint(store: Store, keys: Keys, staged: Staged, attempt: int) -> None:
    """Uploads the files of a sealed local checkpoint, several at once, the largest first."""
    source = Path(staged.checkpoint)
    target = keys.checkpoint(staged.step, attempt)

    def put(name: str) -> None:
        store.upload(source / name, f"{target}/{name}")
        failpoint("uploading")

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(put, sorted(staged.files, key=lambda name: -staged.files[name]["size"])))
