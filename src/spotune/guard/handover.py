"""Checkpoints that pass from the ranks of this machine to the guard: complete, sealed, and findable after a crash.

A checkpoint is complete once each rank has said so of its part. Sealed means that the guard has written down the
facts of every file: so a later attempt on the same machine can tell whether what lies there is whole.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from spotune.contracts.errors import InfraError
from spotune.contracts.exchange import STAGED, TRAINER, Staged
from spotune.contracts.fingerprint import file_facts
from spotune.contracts.localstate import Damaged, load_as, load_object, set_aside, write_state
from spotune.contracts.names import number_of
from spotune.contracts.shapes import MOST_RANKS, MOST_STEPS
from spotune.guard.say import say

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
