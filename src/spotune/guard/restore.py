"""Restores the newest commit whose files verify, else the one before; decides if a fault is worth another machine."""

import re
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from spotune.core import errors
from spotune.core.errors import BadRecord, Misplaced
from spotune.core.io import failpoint
from spotune.core.keys import Keys, commit_of
from spotune.core.protocol import number, parse_objects
from spotune.core.records import Commit
from spotune.core.revisions import few
from spotune.core.store import Store

THREADS = 4
TRIES = 2


class BadCheckpoint(Exception):
    """A committed checkpoint that does not verify."""


@dataclass
class Restored:
    """The restored commit and the rejected ones."""

    commit: Commit | None = None  # None for a fresh start
    key: str = ""
    checkpoint: Path | None = None
    best: Path | None = None
    best_key: str = ""
    rejected: list[str] = field(default_factory=list)  # a line for each commit that did not verify
    bad: list[str] = field(default_factory=list)  # their keys


def list_commits(store: Store, keys: Keys) -> list[tuple[tuple[int, int], str]]:
    """Returns ((attempt, step), key) of every commit, newest first: the highest (attempt, step)."""
    return sorted(((number, key) for key in store.keys(keys.commits) if (number := commit_of(key))), reverse=True)


def newest_commit(store: Store, keys: Keys) -> Commit | None:
    """Returns the newest readable commit whose files exist, unread: ranks start by it before it is restored."""
    for _, key in list_commits(store, keys):
        with suppress(BadCheckpoint, Misplaced):
            if commit := _read(store, key):
                folder = keys.checkpoint(commit.step, commit.attempt)
                there = {name.removeprefix(f"{folder}/") for name in store.keys(folder)}
                if there.issuperset(commit.files) and not missing_files(commit.files, commit.world_size):
                    return commit
    return None


def restore(
    store: Store,
    keys: Keys,
    folder: Path,
    check: Callable[[Commit], None] = lambda commit: None,
    unusable: Mapping[str, str] = MappingProxyType({}),
) -> Restored:
    """Downloads the newest commit that verifies to ``folder/checkpoint-N``; raises StoreError if the store fails.

    Fetches the commit's best checkpoint too, if that is another one. ``check`` raises InputError for a whole commit
    that must not be continued. ``unusable``: the keys of commits that the worker could not load, and why; skips them.
    """
    result = Restored()
    store.names(keys.checkpoints)  # raises Misplaced if nothing could be uploaded
    seen: set[str] = set()
    while True:
        # Lists again after each failure: another attempt may have pruned this commit and made a newer one.
        entry = next((entry for entry in list_commits(store, keys) if entry[1] not in seen), None)
        if entry is None:
            return result
        (attempt, step), key = entry
        seen.add(key)
        try:
            if key in unusable:
                raise BadCheckpoint(unusable[key])
            if (commit := _read(store, key)) is None:
                continue
            check(commit)
            result.best, result.best_key = _restore_best(store, keys, commit, folder)
            result.checkpoint = download_checkpoint(store, keys, commit, folder)
        except BadCheckpoint as error:
            if store.exists(key):
                result.rejected.append(f"step {step} of attempt {attempt}: {error}")
                result.bad.append(key)
            continue
        result.commit, result.key = commit, key
        return result


def _read(store: Store, key: str) -> Commit | None:
    """Returns None for a commit that has been pruned since it was listed. Raises BadCheckpoint."""
    try:
        data = store.read(key)
        commit = None if data is None else Commit.from_bytes(data, key)
    except BadRecord as error:
        raise BadCheckpoint(str(error)) from error
    if commit and f"{Keys(commit.run_id).commits}/" != key[: key.rindex("/") + 1]:
        raise BadCheckpoint(f"{key}: run_id: {commit.run_id!r}, not that of its folder")
    return commit


def missing_files(files: Collection[str], world_size: int) -> list[str]:
    """Returns what a checkpoint lacks; a resume without it would silently be another training run."""
    if world_size > len(files):  # no need to make so many names
        return [f"the RNG states of {world_size} ranks"]
    needed = ["scheduler.pt", "trainer_state.json"]
    needed += ["rng_state.pth"] if world_size == 1 else [f"rng_state_{rank}.pth" for rank in range(world_size)]
    missing = [name for name in needed if name not in files]
    if not any(name.startswith(("optimizer.", "optimizer_", "global_step")) for name in files):
        missing.insert(0, "optimizer.pt")
    if not any(name.endswith((".safetensors", ".distcp", ".bin", "model_states.pt")) for name in files):
        missing.insert(0, "model.safetensors")
    return missing


def download_checkpoint(store: Store, keys: Keys, commit: Commit, folder: Path) -> Path:
    """Downloads and verifies one commit's files; raises BadCheckpoint if one is missing or differs."""
    if missing := missing_files(commit.files, commit.world_size):
        raise BadCheckpoint(f"holds no {few(tuple(missing))}")
    target = folder / f"checkpoint-{commit.step}"
    part = folder / f".part-{commit.step}"
    shutil.rmtree(part, ignore_errors=True)
    source = keys.checkpoint(commit.step, commit.attempt)

    def fetch(name: str) -> None:
        committed, local = {fact: commit.files[name][fact] for fact in ("size", "sha256")}, part / name
        for _ in range(TRIES):  # the transfer may be at fault, not the bucket
            try:
                found = store.download(f"{source}/{name}", local)
            except FileNotFoundError as error:
                raise BadCheckpoint(f"{name} is missing") from error
            except BadRecord as error:  # a link, for example
                raise BadCheckpoint(str(error)) from error
            if found == committed:
                failpoint("restoring")
                return
        if found["size"] != committed["size"]:
            raise BadCheckpoint(f"{name} has {found['size']} bytes, {committed['size']} were committed")
        raise BadCheckpoint(f"{name} is not what was committed (sha256)")

    try:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(fetch, sorted(commit.files, key=lambda name: -commit.files[name]["size"])))
    except BadCheckpoint:
        shutil.rmtree(part, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    return target


def _restore_best(store: Store, keys: Keys, newest: Commit, folder: Path) -> tuple[Path | None, str]:
    """Downloads a commit's best checkpoint, if another one: folder, key. Raises BadCheckpoint if none verifies."""
    if newest.best_step is None or newest.best_step == newest.step:
        return None, ""
    reason = "is not there"
    for (attempt, step), key in list_commits(store, keys):
        if step != newest.best_step or attempt > newest.attempt:
            continue
        try:
            if best := _read(store, key):
                return download_checkpoint(store, keys, best, folder), key
        except BadCheckpoint as error:
            reason = str(error)
    raise BadCheckpoint(f"its best checkpoint, step {newest.best_step}: {reason}")


FAULTS = ("failed", "stalled")  # the end reasons after which another machine may do better


def is_second_fault(store: Store, keys: Keys, attempt: int) -> bool:
    """Returns whether this attempt and the one before it failed or stalled, unpreempted, and committed nothing new."""
    if any(number >= attempt - 1 for (number, _), _ in list_commits(store, keys)):
        return False
    end = last_event(store, keys, attempt - 1)
    return end.get("event") == "end" and end.get("reason") in FAULTS and end.get("exit_code") == errors.PREEMPTED


def last_event(store: Store, keys: Keys, attempt: int) -> dict[str, Any]:
    """Returns the last event that an attempt's rank 0 uploaded, empty for none. Its time, ``t``, is a number."""
    keys_there = store.keys(keys.attempt(attempt).removesuffix("/attempt.json")) if attempt > 0 else []
    parts = {int(name[1]): key for key in keys_there if (name := re.search(r"/events-0-([0-9]{1,15})\.jsonl\Z", key))}
    if not parts:
        return {}
    try:
        found = parse_objects(store.read(parts[max(parts)]) or b"")
    except BadRecord:
        return {}
    return found[-1] if found and number(found[-1].get("t", 0.0)) is not None else {}
