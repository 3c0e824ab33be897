"""Which code a run was submitted from: the commit, and the difference to it."""

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spotune.contracts.records import fingerprint

MAX_DIFF_BYTES = 10 << 20


@dataclass(frozen=True)
class Code:
    """The state of a working tree; ``commit`` is empty outside a git repository.

    Attributes:
        diff: what differs from the commit, as a patch; cut off when it is huge.
        untracked: files that git does not know and does not ignore, names only.
    """

    commit: str = ""
    branch: str = ""
    diff: bytes = b""
    untracked: tuple[str, ...] = ()

    @property
    def dirty(self) -> bool:
        return bool(self.diff or self.untracked)

    def facts(self) -> dict[str, Any]:
        """What ``run.json`` and ``code/commit.json`` say."""
        if not self.commit:
            return {}
        diff_sha256 = fingerprint(self.diff.decode(errors="replace")) if self.diff else ""
        return {
            "commit": self.commit,
            "branch": self.branch,
            "dirty": self.dirty,
            "diff_sha256": diff_sha256,
            "untracked": list(self.untracked),
        }


def read_code(folder: Path) -> Code:
    """Asks git; a folder without git or without a commit is a Code without a commit."""
    commit = _git(folder, "rev-parse", "HEAD").strip().decode()
    if not commit:
        return Code()
    untracked = _git(folder, "ls-files", "--others", "--exclude-standard").decode(errors="replace").splitlines()
    return Code(
        commit=commit,
        branch=_git(folder, "rev-parse", "--abbrev-ref", "HEAD").strip().decode(),
        diff=_git(folder, "diff", "--binary", "HEAD")[:MAX_DIFF_BYTES],
        untracked=tuple(untracked[:1000]),
    )


def _git(folder: Path, *arguments: str) -> bytes:
    command = ["git", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return b""
