"""A checkpoint's way into the bucket: staged by the ranks, uploaded, committed, pruned."""

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
from spotune.guard.journal import Context, Journal, say
from spotune.guard.restore import list_commits
from spotune.guard.save_schedule import Toll

# Checkpoints that pass from the ranks of this machine to the guard: complete, sealed, and findable after a crash.
#
# A checkpoint is complete once each rank has said so of its part. Sealed means that the guard has written down the
# facts of every file: so a later attempt on the same machine can tell whether what lies there is whole.

SEALED = "sealed"


class Handover:
    """What the ``ranks`` processes of one machine stage in an exchange folder; ``taken``: all of it so far."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self._folder, self._ranks = folder, ranks
        self._done: set[int] = set()
        self.taken: list[Staged] = []

    def take(self) -> list[Staged]:
        """The checkpoints that have become complete since the last call, oldest first.

        A damaged file of a rank costs its checkpoint and nothing else: training goes on, and the next save replaces it.
        """
        parts: dict[int, dict[int, Path]] = {}
        for path in (self._folder / STAGED).glob("*-*.json"):
            named = path.stem.partition("-")
            step, rank = number_of(named[0], 8, MOST_STEPS), number_of(named[2], 1, MOST_RANKS)
            if step is not None and rank is not None and step not in self._done:
                parts.setdefault(step, {})[rank] = path
        complete = sorted(step for step, paths in parts.items() if len(paths) == self._ranks)
        self._done.update(complete)
        found = [staged for step in complete if (staged := self._merge(step, parts[step]))]
        self.taken += found
        return found

    def _merge(self, step: int, paths: dict[int, Path]) -> Staged | None:
        """The ranks' parts as one: as the lowest of them tells it, with the files of all. None if one is damaged."""
        try:
            parts = [self._read_part(step, paths[rank]) for rank in sorted(paths)]
        except (Damaged, InfraError) as error:
            say(f"the checkpoint of step {step} is not committed: {error}")
            return None
        files: dict[str, dict[str, Any]] = {}
        for part in parts:
            files |= part.files
        return replace(parts[0], files=files)

    def _read_part(self, step: int, path: Path) -> Staged:
        """Raises Damaged, naming the file, for one that is not about this step's own folder: it will be removed."""
        try:
            part = load_as(path, Staged)
        except Damaged as error:
            raise Damaged(f"{path}: {error}") from error
        if part is None:
            raise Damaged(f"{path}: gone")
        own = (self._folder / TRAINER / f"checkpoint-{step}").absolute()
        if part.step != step or Path(part.checkpoint).absolute() != own:
            raise Damaged(f"{path}: checkpoint: not the one of step {step} in this folder")
        return part


def seal(folder: Path, staged: Staged, config_sha256: str, revision: int = 0) -> Staged:
    """Adds the facts of all files that have none yet, and writes the seal; when it is there already, reads it."""
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
    """What is sealed in an attempt's folder, newest first. A damaged seal is set aside and seals nothing.

    Nor does one of another folder's files.
    """
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


# One upload at a time, in the background; of those waiting the newest wins.
#
# A fault of the store is tried again with growing pauses for as long as nothing newer waits; training goes on.

PAUSES_S = (1.0, 4.0, 15.0, 60.0)


class Uploader:
    """The thread behind ``submit``.

    Args:
        work: uploads a local checkpoint, once; raises Fenced, another SpotuneError or OSError.
        pauses_s: how long to wait after the first, second, … failure in a row; the last one from then on.

    Attributes:
        fenced: set for good when a later attempt owns the run.
        error: the last failure, None once an upload has succeeded.
    """

    def __init__(
        self,
        work: Callable[[Staged], None],
        clock: Callable[[], float] = time.monotonic,
        pauses_s: Sequence[float] = PAUSES_S,
    ) -> None:
        self._work, self._clock, self._pauses_s = work, clock, pauses_s
        self._waiting: list[Staged] = []
        self._current: Staged | None = None
        self._began_at = 0.0
        self._closed = False
        self._is_blocked = False
        self._changed = threading.Condition()
        self._failing_since: float | None = None
        self.fenced: Fenced | None = None
        self.error: SpotuneError | None = None
        self._thread = threading.Thread(target=self._run, name="uploader", daemon=True)
        self._thread.start()

    @property
    def away_s(self) -> float:
        """For how long the store has not taken anything, seconds; 0 when all is well."""
        since = self._failing_since
        return 0.0 if since is None else self._clock() - since

    @property
    def under_way(self) -> tuple[int, float] | None:
        """(step, seconds so far) of the upload that runs, None when there is none."""
        current = self._current
        return None if current is None else (current.step, self._clock() - self._began_at)

    def submit(self, staged: Staged) -> None:
        """Hands over a complete local checkpoint. One that still waits is dropped for it, but for the best one."""
        with self._changed:
            dropped = [other for other in self._waiting if other.step != staged.best_step]
            self._waiting = [*(other for other in self._waiting if other not in dropped), staged]
            self._is_blocked = False
            self._changed.notify_all()
        for other in dropped:
            shutil.rmtree(Path(other.checkpoint), ignore_errors=True)

    def drain(self, timeout_s: float | None = None) -> bool:
        """Waits until nothing is waiting or under way; returns whether the last upload succeeded.

        Nor for one that is tried again in vain: what is in its way only people remove.
        """
        with self._changed:
            done = self._changed.wait_for(lambda: self._is_blocked or not (self._waiting or self._current), timeout_s)
            return done and self.error is None and self.fenced is None

    def close(self, timeout_s: float | None = None) -> None:
        """Ends the thread once the upload under way has ended, well or not; what waits is left as it is.

        ``timeout_s``: for how long to wait for that.
        """
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
                say(f"step {staged.step} is not committed yet: {self.error}")
            pause_s = self._pauses_s[min(failures, len(self._pauses_s) - 1)]
            failures += 1
            with self._changed:
                self._is_blocked = isinstance(self.error, Misplaced) and not self._is_superseded(staged)
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._is_superseded(staged) or self._closed, pause_s)
                if self._is_superseded(staged) or self._closed:
                    return

    def _is_superseded(self, staged: Staged) -> bool:
        return any(other.best_step != staged.step for other in self._waiting)


# What the bucket keeps: the last few commits, every k-th, and the best one. The commit goes first, then its data.
#
# A commit that did not verify counts for nothing: it neither protects nor displaces another one.

KEEP = 3
# Never one alone: the newest may turn out to be damaged, and a zombie may tidy up while its successor restores.
LEAST = 2
UNFINISHED_S = 3600.0  # an upload that has been going on for so long is nobody's any more


class Retention:
    """Tidies up after each commit of one attempt.

    Args:
        keep: how many of the newest commits stay (at least two do).
        keep_every: every commit whose ordinal is a multiple stays for good; 0: none does.
        bad: keys of commits that did not verify when this attempt restored.
    """

    def __init__(
        self, store: Store, keys: Keys, attempt: int, keep: int = KEEP, keep_every: int = 0, bad: Collection[str] = ()
    ) -> None:
        self._store, self._keys, self._attempt = store, keys, attempt
        self._keep, self._keep_every, self._bad = max(LEAST, keep), keep_every, set(bad)
        self._swept = False
        self._kept_for_good: set[str] = set()

    def tidy(self, best_step: int | None = None) -> None:
        """Removes what need not stay. Raises StoreError; to be called again then."""
        listed = list_commits(self._store, self._keys)
        good = [(number, key) for number, key in listed if key not in self._bad]
        for (attempt, step), key in good[self._keep :]:
            if step != best_step and not self._is_kept_for_good(key):
                self._remove(key, step, attempt)
        if len(good) >= LEAST:  # a damaged one is of no use to anybody once there is enough else
            for (attempt, step), key in listed:
                if key in self._bad:
                    self._remove(key, step, attempt)
        if not self._swept:
            self._sweep()
            self._swept = True

    def _is_kept_for_good(self, key: str) -> bool:
        if not self._keep_every:
            return False
        if key not in self._kept_for_good:
            try:
                data = self._store.read(key)
                if data is None or Commit.from_bytes(data, key).ordinal % self._keep_every:
                    return False
            except BadRecord:  # no number that would keep it
                return False
            self._kept_for_good.add(key)
        return True

    def _remove(self, key: str, step: int, attempt: int) -> None:
        self._store.delete([key])
        failpoint("pruning")
        self._store.delete(self._store.keys(self._keys.checkpoint(step, attempt)))

    def _sweep(self) -> None:
        """Removes what attempts before this one uploaded and never committed, unfinished uploads included."""
        listed = list_commits(self._store, self._keys)
        committed = {self._keys.checkpoint(step, attempt) for (attempt, step), _ in listed}
        for name in self._store.folders(self._keys.checkpoints):
            folder = f"{self._keys.checkpoints}/{name}"
            number = checkpoint_of(name)
            if folder not in committed and number and number[0] < self._attempt:
                self._store.delete(self._store.keys(folder))
        # Right after a commit this attempt uploads nothing, so that what is unfinished is of those before it.
        self._store.abort_uploads(self._keys.checkpoints, 0.0)
        self._store.abort_uploads(self._keys.root, UNFINISHED_S)


# Turns staged checkpoints into commits: data first, under a key that holds the attempt; the commit object last.
#
# sealed ─▶ files uploaded ─▶ other machines' files there ─▶ not fenced ─▶ commit created ─▶ tidied up

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
