"""What earlier attempts left on this machine: a sealed checkpoint that never reached the bucket is committed now.

Only what the bucket does not have yet, only what still is what the seal says, and only where one machine holds all of
a checkpoint. Everything else on this disk is not ours to trust, and goes.
"""

import os
import shutil
import stat
from pathlib import Path

from spotune.contracts.exchange import Staged
from spotune.contracts.fingerprint import file_facts
from spotune.contracts.records import Commit
from spotune.guard.context import Context
from spotune.guard.handover import sealed
from spotune.guard.restore import missing_files


def find_stranded(context: Context, newest: Commit | None) -> Staged | None:
    """The furthest whole checkpoint beyond the newest commit, None when there is none; of this config only."""
    done = newest.step if newest else 0
    found = [staged for folder in context.scratch.glob("[0-9]*") for staged in sealed(folder)]
    for staged in sorted(found, key=lambda staged: -staged.step):
        if staged.step > done and staged.config_sha256 == context.run.config_sha256 and is_whole(staged):
            return staged
    return None


def is_whole(staged: Staged) -> bool:
    """Whether each file is there as sealed, and nothing that a resume needs is missing."""
    if missing_files(staged.files, staged.world_size):
        return False
    source = Path(staged.checkpoint)
    try:
        return all(
            _is_own_file(source, name) and file_facts(source / name) == staged.files[name] for name in staged.files
        )
    except OSError:
        return False


def _is_own_file(source: Path, name: str) -> bool:
    """Whether a name leads to a regular file of this user, without a link on the way: its bytes leave this machine."""
    path, found = source / name, os.lstat(source / name)
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and path.resolve() == source.resolve() / name


def clear(context: Context, but: Staged | None = None) -> None:
    """Removes what earlier attempts left, but for the attempt's folder that holds ``but``."""
    for folder in context.scratch.glob("*"):
        if folder != context.folder and not (but and Path(but.checkpoint).is_relative_to(folder)):
            shutil.rmtree(folder, ignore_errors=True)
