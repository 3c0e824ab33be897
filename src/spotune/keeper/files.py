"""Small files of others, read and written so that none of them can hold up the keeper or fill its memory."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

MOST_BYTES = 1 << 20


def read_file(path: Path) -> bytes:
    """Returns a file's first MOST_BYTES; raises OSError for what is not a file. Waits for no pipe."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is not a file")
        return file.read(MOST_BYTES)


def write_file(path: Path, text: str) -> None:
    """Replaces a file, or a pipe in its place, at once; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK, 0o666), "w") as file:
            file.write(text)
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink()
        raise


def one_line(text: object) -> str:
    """Returns a text of others for a line of ours: at most 100 characters."""
    return " ".join(str(text).split())[:100]
