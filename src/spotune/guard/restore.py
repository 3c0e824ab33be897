"""Restore: the newest commit whose files verify, else the one before, saying so."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from spotune.contracts.errors import StoreError
from spotune.contracts.keys import Keys, commit_of
from spotune.contracts.records import Commit
from spotune.contracts.store import Store

# Without these a resume would silently be another training run.
NEEDED = ("optimizer", "scheduler.pt", "rng_state", "trainer_state.json")
THREADS = 4


class BadCheckpoint(Exception):
    """A committed checkpoint that does not verify."""


@dataclass
class Restored:
    """What was found: ``commit`` None for a fresh start; ``rejected`` has a line for each that failed."""

    commit: Commit | None = None
    key: str = ""
    checkpoint: Path | None = None
    best: Path | None = None
    best_key: str = ""
    rejected: list[str] = field(default_factory=list)


def list_commits(store: Store, keys: Keys) -> list[tuple[tuple[int, int], str]]:
    """((attempt, step), key) of every commit, newest first: the highest (attempt, step)."""
    return sorted(((number, key) for key in store.keys(keys.commits) if (number := commit_of(key))), reverse=True)


def newest_commit(store: Store, keys: Keys) -> Commit | None:
    """The newest readable commit, without a look at its files."""
    for _, key in list_commits(store, keys):
        try:
            return Commit.from_bytes(store.read(key) or b"", key)
        except StoreError:
            continue
    return None


def restore(store: Store, keys: Keys, folder: Path) -> Restored:
    """Downloads the newest commit that verifies to ``folder/checkpoint-N``; raises StoreError if the store fails.

    Where the commit names a best checkpoint that is another one, that is fetched too.
    """
    result = Restored()
    for (attempt, step), key in list_commits(store, keys):
        data = store.read(key)
        if data is None:  # pruned by another attempt since it was listed
            continue
        try:
            try:
                commit = Commit.from_bytes(data, key)
            except StoreError as error:
                raise BadCheckpoint(str(error)) from error
            result.checkpoint = download_checkpoint(store, keys, commit, folder)
        except BadCheckpoint as error:
            result.rejected.append(f"step {step} of attempt {attempt}: {error}")
            continue
        result.commit, result.key = commit, key
        if commit.best_step is not None and commit.best_step != commit.step:
            result.best = _restore_best(store, keys, commit, folder, result)
        return result
    return result


def download_checkpoint(store: Store, keys: Keys, commit: Commit, folder: Path) -> Path:
    """Fetches and verifies one commit's files; raises BadCheckpoint when one is missing or not as committed."""
    for needed in NEEDED:
        if not any(Path(name).name.startswith(needed) or name.startswith(needed) for name in commit.files):
            raise BadCheckpoint(f"holds no {needed}")
    target = folder / f"checkpoint-{commit.step}"
    part = folder / f".part-{commit.step}"
    shutil.rmtree(part, ignore_errors=True)
    source = keys.checkpoint(commit.step, commit.attempt)

    def fetch(name: str) -> None:
        committed, local = commit.files[name], part / name
        try:
            found = store.download(f"{source}/{name}", local)
        except FileNotFoundError as error:
            raise BadCheckpoint(f"{name} is missing") from error
        if found["size"] != committed["size"]:
            raise BadCheckpoint(f"{name} has {found['size']} bytes, {committed['size']} were committed")
        if found["sha256"] != committed["sha256"]:
            raise BadCheckpoint(f"{name} is not what was committed (sha256)")

    try:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(fetch, sorted(commit.files)))
    except BadCheckpoint:
        shutil.rmtree(part, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    return target


def _restore_best(store: Store, keys: Keys, newest: Commit, folder: Path, result: Restored) -> Path | None:
    for (attempt, step), key in list_commits(store, keys):
        data = store.read(key) if step == newest.best_step and attempt <= newest.attempt else None
        if data is None:
            continue
        try:
            best = download_checkpoint(store, keys, Commit.from_bytes(data, key), folder)
            result.best_key = key
            return best
        except (BadCheckpoint, StoreError) as error:
            result.rejected.append(f"best checkpoint, step {newest.best_step}: {error}")
    return None
