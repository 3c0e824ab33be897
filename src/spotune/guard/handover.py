"""Checkpoints that pass from the ranks of this machine to the guard: complete, sealed, and findable after a crash.

A checkpoint is complete once each rank has said so of its part. Sealed means that the guard has written down the
facts of every file: so a later attempt on the same machine can tell whether what lies there is whole.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from spotune.contracts.errors import InfraError
from spotune.contracts.exchange import STAGED, TRAINER, Staged, read_json
from spotune.contracts.fingerprint import file_facts
from spotune.contracts.localstate import Damaged, load_object, set_aside, write_state
from spotune.contracts.names import number_of
from spotune.contracts.shapes import MOST_STEPS

SEALED = "sealed"


class Handover:
    """What the ``ranks`` processes of one machine stage in an exchange folder; ``taken``: all of it so far."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self._folder, self._ranks = folder, ranks
        self._done: set[int] = set()
        self.taken: list[Staged] = []

    def take(self) -> list[Staged]:
        """The checkpoints that have become complete since the last call, oldest first."""
        parts: dict[int, list[Path]] = {}
        for path in (self._folder / STAGED).glob("*-*.json"):
            step = number_of(path.name.partition("-")[0], 8, MOST_STEPS)
            if step is not None and step not in self._done:
                parts.setdefault(step, []).append(path)
        complete = sorted(step for step, paths in parts.items() if len(paths) == self._ranks)
        self._done.update(complete)
        found = [_merge(parts[step]) for step in complete]
        self.taken += found
        return found


def _merge(paths: list[Path]) -> Staged:
    """The ranks' parts as one: as the lowest of them tells it, with the files of all."""
    ordered = sorted(paths, key=lambda path: int(path.stem.partition("-")[2]))
    parts = [Staged(**data) for path in ordered if (data := read_json(path))]
    files: dict[str, dict[str, Any]] = {}
    for part in parts:
        files |= part.files
    return replace(parts[0], files=files)


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
