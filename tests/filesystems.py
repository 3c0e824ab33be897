"""File systems of a test's own, for faults of disks that are real. Tests without the right to mount are skipped."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def file_system(folder: Path, size: str = "64k") -> Iterator[Path]:
    """Mounts a file system in memory in the folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let a test mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remounted(folder: Path, mode: str) -> bool:
    """Makes the file system read-only (``ro``) or writable (``rw``); returns whether that was possible."""
    command = ["mount", "-o", f"remount,{mode}", str(folder)]
    return not subprocess.run(command, capture_output=True, check=False).returncode


def fill(folder: Path, left_bytes: int = 12 << 10) -> None:
    """Fills the file system with a file ``ballast``, but for so many bytes."""
    free = os.statvfs(folder)
    (folder / "ballast").write_bytes(b"\0" * max(0, free.f_bavail * free.f_frsize - left_bytes))
