"""A checkpoint's way into the bucket: staged by the ranks, sealed, uploaded, committed, pruned."""

import shutil
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spotune.core.errors import BadRecord, Fenced, InfraError, Misplaced, SpotuneError, StoreError
from spotune.core.fingerprint import file_facts
from spotune.core.io import Damaged, failpoint, load_as, load_object, set_aside, write_state
from spotune.core.keys import MOST_RANKS, MOST_STEPS, Keys, checkpoint_of, number_of
from spotune.core.protocol import STAGED, TRAINER, Staged
from spotune.core.records import Commit, RunRecord
from spotune.core.store import Store
from spotune.guard.claim import check_fence
from spotune.guard.journal import Clock, Context, Journal, log
from spotune.guard.restore import THREADS, list_commits
from spotune.guard.save_schedule import SaveCost

SEALED = "sealed"
PAUSES_S = (1.0, 4.0, 15.0, 60.0)
KEEP = 3
# Never only one: the newest may be damaged, and a zombie may prune while its successor restores.
LEAST = 2


class StagingFolder:
    """Finds the checkpoints that all ``ranks`` have staged in an exchange folder; ``collected``: all of them so far."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self._folder, self._ranks = folder, ranks
        self._done: set[int] = set()
        self.collected: list[Staged] = []

    def collect(self) -> list[Staged]:
        """Returns the checkpoints that have become complete since the last call, oldest first."""
        parts: dict[int, dict[int, Path]] = {}
        for path in (self._folder / STAGED).glob("*-*.json"):
            named = path.stem.partition("-")
            step, rank = number_of(named[0], 8, MOST_STEPS), number_of(named[2], 1, MOST_RANKS)
            if step is not None and rank is not None and step not in self._done:
                parts.setdefault(step, {})[rank] = path
        complete = sorted(step for step, paths in parts.items() if len(paths) == self._ranks)
        self._done.update(complete)
        found = [staged for step in complete if (staged := self._merge(step, parts[step]))]
        self.collected += found
        return found

    def _merge(self, step: int, paths: dict[int, Path]) -> Staged | None:
        """Returns the lowest rank's part with the files of all; None if a part is damaged or of another folder.

        That costs only this checkpoint: training goes on, and the next save replaces it.
        """
        own = (self._folder / TRAINER / f"checkpoint-{step}").absolute()  # will be removed
        parts = []
        for _, path in sorted(paths.items()):
            try:
                part = load_as(path, Staged)
                if part is None:
                    raise Damaged("gone")
                if part.step != step or Path(part.checkpoint).absolute() != own:
                    raise Damaged(f"checkpoint: not the one of step {step} in this folder")
                parts.append(part)
            except (Damaged, InfraError) as error:
                where = f"{path}: " if isinstance(error, Damaged) else ""  # an InfraError names it
                log(f"the checkpoint of step {step} is not committed: {where}{error}")
                return None
        return replace(parts[0], files={name: facts for part in parts for name, facts in part.files.items()})


def seal(folder: Path, staged: Staged, config_sha256: str, revision: int = 0) -> Staged:
    """Writes down the facts of a checkpoint's files, for a later attempt here to verify; reads an existing seal."""
    path = seal_path(folder, staged.step)
    if found := _read_seal(path):
        return found
    source = Path(staged.checkpoint)
    files = {}
    for file in sorted(path for path in source.rglob("*") if path.is_file() and not path.is_symlink()):
        name = file.relative_to(source).as_posix()
        files[name] = staged.files.get(name) or file_facts(file)
    whole = replace(staged, files=files, config_sha256=config_sha256, revision=revision)
    write_state(path, whole)
    return whole


def seal_path(folder: Path, step: int) -> Path:
    return folder / SEALED / f"{step:08d}.json"


def sealed(folder: Path) -> list[Staged]:
    """Returns an attempt folder's sealed checkpoints, newest first. Sets damaged seals aside; skips foreign ones."""
    found = (_read_seal(path) for path in (folder / SEALED).glob("*.json"))
    own = (seal for seal in found if seal and Path(seal.checkpoint) == folder / TRAINER / f"checkpoint-{seal.step}")
    return sorted(own, key=lambda staged: -staged.step)


def _read_seal(path: Path) -> Staged | None:
    try:
        found = load_object(path)
        return Staged.from_dict(found) if found else None
    except (Damaged, ValueError) as error:  # of another version, or cut by a crash of this machine
        set_aside(path, str(error))
    except InfraError:  # a disk that fails: nothing is known
        pass
    return None


class Uploader:
    """Uploads one checkpoint at a time in the background; of those waiting the newest wins. Training goes on.

    Retries after a fault of the store, while nothing newer waits, with pauses of which the last repeats.
    ``work`` uploads a local checkpoint, once; it raises Fenced, another SpotuneError or OSError.
    """

    def __init__(
        self, work: Callable[[Staged], None], clock: Clock = time.monotonic, pauses_s: Sequence[float] = PAUSES_S
    ) -> None:
        self._work, self._clock, self._pauses_s = work, clock, pauses_s
        self._waiting: list[Staged] = []
        self._current: Staged | None = None
        self._began_at = 0.0
        self._closed = self._is_blocked = False
        self._changed = threading.Condition()
        self._failing_since: float | None = None
        self.fenced: Fenced | None = None  # set for good when a later attempt owns the run
        self.error: SpotuneError | None = None  # the last failure, None once an upload has succeeded
        self._thread = threading.Thread(target=self._run, name="uploader", daemon=True)
        self._thread.start()

    @property
    def away_s(self) -> float:
        """Seconds since the store's first failure in a row; 0 when all is well."""
        since = self._failing_since
        return 0.0 if since is None else self._clock() - since

    @property
    def under_way(self) -> tuple[int, float] | None:
        """(step, seconds so far) of the running upload, None when there is none."""
        current = self._current
        return None if current is None else (current.step, self._clock() - self._began_at)

    def submit(self, staged: Staged) -> None:
        """Queues a complete local checkpoint. Drops one that still waits, except the best one."""
        with self._changed:
            dropped = [other for other in self._waiting if other.step != staged.best_step]
            self._waiting = [*(other for other in self._waiting if other not in dropped), staged]
            self._is_blocked = False
            self._changed.notify_all()
        for other in dropped:
            shutil.rmtree(Path(other.checkpoint), ignore_errors=True)

    def drain(self, timeout_s: float | None = None) -> bool:
        """Waits until no upload waits, runs, or needs people; returns whether the last one succeeded."""
        with self._changed:
            done = self._changed.wait_for(lambda: self._is_blocked or not (self._waiting or self._current), timeout_s)
            return done and self.error is None and self.fenced is None

    def close(self, timeout_s: float | None = None) -> None:
        """Waits at most ``timeout_s`` for the running upload and ends the thread; leaves waiting checkpoints alone."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                self._current, self._began_at = self._waiting.pop(0), self._clock()
            try:
                self._try_until_newer(self._current)
            finally:
                with self._changed:
                    self._current = None
                    self._changed.notify_all()

    def _try_until_newer(self, staged: Staged) -> None:
        failures = 0

        def is_superseded() -> bool:
            return any(other.best_step != staged.step for other in self._waiting)

        while not self.fenced:
            began_at, self._is_blocked = self._clock(), False
            try:
                self._work(staged)
                self.error = self._failing_since = None
                return
            except Fenced as fenced:
                self.fenced = fenced
                return
            except (SpotuneError, OSError) as error:
                self.error = error if isinstance(error, SpotuneError) else StoreError(str(error))
                self._failing_since = self._failing_since or began_at
                log(f"step {staged.step} is not committed yet: {self.error}")
            pause_s = self._pauses_s[min(failures, len(self._pauses_s) - 1)]
            failures += 1
            with self._changed:
                self._is_blocked = isinstance(self.error, Misplaced) and not is_superseded()
                self._changed.notify_all()
                if self._changed.wait_for(lambda: is_superseded() or self._closed, pause_s):
                    return


class Retention:
    """Prunes after each commit: keeps the newest commits, every k-th, and the best. Removes a commit before its data.

    ``keep``: how many of the newest, at least two. ``keep_every``: multiples of this ordinal stay for good, 0: none.
    ``bad``: keys of commits that did not verify; they neither protect nor displace another one.
    """

    def __init__(
        self, store: Store, keys: Keys, attempt: int, keep: int = KEEP, keep_every: int = 0, bad: Collection[str] = ()
    ) -> None:
        self._store, self._keys, self._attempt = store, keys, attempt
        self._keep, self._keep_every, self._bad = max(LEAST, keep), keep_every, set(bad)
        self._swept = False
        self._kept_for_good: set[str] = set()

    def tidy(self, best_step: int | None = None) -> None:
        """Removes what need not stay. Raises StoreError; call it again then."""
        listed = list_commits(self._store, self._keys)
        good = [(number, key) for number, key in listed if key not in self._bad]
        for (attempt, step), key in good[self._keep :]:
            if step != best_step and not self._is_kept_for_good(key):
                self._remove(key, step, attempt)
        if len(good) >= LEAST:  # then nobody needs a damaged one
            for (attempt, step), key in listed:
                if key in self._bad:
                    self._remove(key, step, attempt)
        if not self._swept:
            self._sweep()
            self._swept = True

    def _is_kept_for_good(self, key: str) -> bool:
        if self._keep_every and key not in self._kept_for_good:
            try:
                data = self._store.read(key)
                if data is not None and Commit.from_bytes(data, key).ordinal % self._keep_every == 0:
                    self._kept_for_good.add(key)
            except BadRecord:  # it has no number that would keep it
                return False
        return key in self._kept_for_good

    def _remove(self, key: str, step: int, attempt: int) -> None:
        self._store.delete([key])
        failpoint("pruning")
        self._store.delete(self._store.keys(self._keys.checkpoint(step, attempt)))

    def _sweep(self) -> None:
        """Removes what earlier attempts uploaded and never committed, unfinished uploads included."""
        listed = list_commits(self._store, self._keys)
        committed = {self._keys.checkpoint(step, attempt) for (attempt, step), _ in listed}
        for name in self._store.folders(self._keys.checkpoints):
            folder = f"{self._keys.checkpoints}/{name}"
            number = checkpoint_of(name)
            if folder not in committed and number and number[0] < self._attempt:
                self._store.delete(self._store.keys(folder))
        # Right after a commit this attempt uploads nothing: what is unfinished belongs to earlier ones.
        self._store.abort_uploads(self._keys.checkpoints, 0.0)
        self._store.abort_uploads(self._keys.root, 3600.0)  # an upload of an hour belongs to nobody


@dataclass(frozen=True)
class Lineage:
    """What every commit of an attempt has in common."""

    run: RunRecord
    attempt: int
    parent: str  # key of the commit that the attempt started from, empty for a fresh start
    ordinal: int  # that commit's number in the run's line of commits, 0 for a fresh start


def commit_checkpoint(
    store: Store,
    keys: Keys,
    lineage: Lineage,
    staged: Staged,
    parts: Callable[[int], dict[str, Any]] = lambda step: {},
    saving: dict[str, float] | None = None,
) -> Commit:
    """Uploads a sealed checkpoint and commits it as the next of its line. Raises Fenced or StoreError.

    Data first, under a key that holds the attempt; then other machines' files; then the fence; the commit object last.
    ``parts`` has the other machines upload their files of a step, and waits for them.
    """
    upload_checkpoint(store, keys, staged, lineage.attempt)
    files = staged.files | parts(staged.step)
    failpoint("uploaded")
    check_fence(store, keys, lineage.attempt)
    of_run = ("run_id", "config_sha256", "data_sha256", "model_sha256")
    of_staged = (
        "step",
        "epoch",
        "tokens",
        "world_size",
        "global_batch",
        "threads",
        "versions",
        "best_step",
        "revision",
    )
    commit = Commit(
        attempt=lineage.attempt,
        parent=lineage.parent,
        ordinal=lineage.ordinal + 1,
        committed_at=time.time(),
        saving=saving or {},
        files=files,
        **{name: getattr(lineage.run, name) for name in of_run},
        **{name: getattr(staged, name) for name in of_staged},
    )
    key = keys.commit(lineage.attempt, staged.step)
    if not store.create(key, commit.to_bytes()) and store.read(key) is None:
        raise StoreError(f"{key}: neither created nor there")
    return commit


class Committer(Uploader):
    """An uploader whose uploads end in a commit, which keeps ``save_cost`` for later machines."""

    def __init__(
        self,
        context: Context,
        lineage: Lineage,
        retention: Retention,
        journal: Journal,
        parts: Callable[[int], dict[str, Any]],
        save_cost: SaveCost,
        clock: Clock = time.monotonic,
    ) -> None:
        self._context, self._lineage, self._retention, self._journal = context, lineage, retention, journal
        self._parts, self._save_cost = parts, save_cost
        self.committed_step = 0
        super().__init__(self._commit, clock)

    def _commit(self, staged: Staged) -> None:
        began, context = time.time(), self._context
        staged = seal(context.folder, staged, context.run.config_sha256, context.run.revision)
        failpoint("staged")
        commit = commit_checkpoint(
            context.store, context.keys, self._lineage, staged, self._parts, self._save_cost.record
        )
        self._lineage = replace(self._lineage, ordinal=commit.ordinal)
        self.committed_step = staged.step
        size = sum(int(file["size"]) for file in commit.files.values())
        self._journal.write("commit", step=staged.step, upload_s=round(time.time() - began, 3), bytes=size)
        failpoint("committed")
        seal_path(context.folder, staged.step).unlink(missing_ok=True)
        drop_older(context.folder / TRAINER, staged)
        try:
            self._retention.tidy(staged.best_step)
        except StoreError as error:  # pruning can wait; the checkpoint is safe
            log(f"old checkpoints are not removed yet: {error}")


def drop_older(trainer: Path, staged: Staged) -> None:
    """Removes the local checkpoints before ``staged``, except the best, which Trainer loads at the end."""
    for folder in trainer.glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        if step.isdigit() and int(step) < staged.step and int(step) != staged.best_step:
            shutil.rmtree(folder, ignore_errors=True)


def upload_checkpoint(store: Store, keys: Keys, staged: Staged, attempt: int) -> None:
    """Uploads the files of a sealed local checkpoint, several at once, the largest first."""

    def put(name: str) -> None:
        store.upload(Path(staged.checkpoint, name), f"{keys.checkpoint(staged.step, attempt)}/{name}")
        failpoint("uploading")

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(put, sorted(staged.files, key=lambda name: -staged.files[name]["size"])))
