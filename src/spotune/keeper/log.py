"""The keeper's lines. None of them may end it: it would then hold, or not hold, a cluster for want of a log."""

from __future__ import annotations

import io
import os
import sys


def open_log() -> None:
    """Lets stdout and stderr take any letter; what their encoding lacks becomes ``\\u2705``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def log(text: str, to_stderr: bool = False) -> None:
    """Prints one line, where that can be."""
    try:
        print(f"keeper: {text}", file=sys.stderr if to_stderr else sys.stdout, flush=True)
    except (OSError, ValueError):  # a full disk, a closed pipe
        return


def close_log() -> None:
    """Gives up what could not be printed, so that Python's own exit does not fail by it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
