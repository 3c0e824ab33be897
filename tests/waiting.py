"""How tests wait: for something to become true, with one generous limit for all of them.

No passing test comes near the limit. It is there so that a test that can never pass ends, and says what was missing.
"""

import subprocess
import time
from collections.abc import Callable
from typing import Any, TypeVar

LIMIT_S = 300.0
POLL_S = 0.02

Found = TypeVar("Found")


def until(look: Callable[[], Found], why: Callable[[], object] | object = "", limit_s: float = LIMIT_S) -> Found:
    """Returns the first true value of ``look``; raises AssertionError with ``why`` (or its value) after the limit."""
    deadline = time.monotonic() + limit_s
    while not (found := look()):
        if time.monotonic() > deadline:
            raise AssertionError(why() if callable(why) else why)
        time.sleep(POLL_S)
    return found


def ended(process: "subprocess.Popen[Any]") -> int:
    """Waits for the process's end; returns its exit code."""
    return process.wait(LIMIT_S)
