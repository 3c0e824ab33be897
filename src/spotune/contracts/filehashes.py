"""sha256 of local files, taken in parallel and remembered on this machine: a 16 GB model is read once.

A file is known again by path, size, both times and inode. Only large files are remembered, and none that was
written within the last seconds: a second write in the same tick of the file system's clock would not show.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from spotune.contracts.errors import InfraError
from spotune.contracts.fingerprint import file_facts
from spotune.contracts.localstate import read_object, write_state

MEMORY = "file-hashes.json"
WORTHWHILE = 1 << 20  # bytes
SETTLED_S = 2.0


def hash_files(
    paths: Sequence[Path], cache: Path | None = None, clock: Callable[[], float] = time.time
) -> list[dict[str, Any]]:
    """``{size, sha256}`` of each file. Raises OSError for one that cannot be read.

    Args:
        paths: the files.
        cache: a folder of this machine for what is remembered; None remembers nothing.
        clock: epoch seconds.
    """
    memory = _recall(cache) if cache else {}
    began = clock()
    states = [_state(path) for path in paths]

    def facts(path: Path, state: list[int]) -> dict[str, Any]:
        known = memory.get(str(path.absolute()))
        if known and known[:-1] == state:
            return {"size": state[0], "sha256": known[-1]}
        return file_facts(path)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(facts, paths, states))
    fresh = {
        str(path.absolute()): [*state, fact["sha256"]]
        for path, state, fact in zip(paths, states, found, strict=True)
        if state[0] >= WORTHWHILE and began - max(state[1], state[2]) / 1e9 > SETTLED_S and _state(path) == state
    }
    if cache and any(memory.get(path) != entry for path, entry in fresh.items()):
        _remember(cache, memory | fresh)
    return found


def _state(path: Path) -> list[int]:
    seen = path.stat()
    return [seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino, seen.st_dev]


def _recall(cache: Path) -> dict[str, list[Any]]:
    try:
        known = read_object(cache / MEMORY) or {}
    except InfraError:  # a disk that fails: everything is read again
        return {}
    return {path: entry for path, entry in known.items() if _is_entry(entry)}


def _is_entry(entry: Any) -> bool:
    """Whether it is a file's state and a sha256: half of one would be taken for the file's."""
    return isinstance(entry, list) and len(entry) == 6 and isinstance(entry[5], str) and len(entry[5]) == 64


def _remember(cache: Path, memory: dict[str, list[Any]]) -> None:
    try:
        write_state(cache / MEMORY, {path: entry for path, entry in memory.items() if os.path.exists(path)})
    except (OSError, InfraError):  # a home that cannot be written: slower, not wrong
        return
