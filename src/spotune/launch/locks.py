"""A lock between processes of this machine that no verb waits for without end."""

import fcntl
import time
from pathlib import Path
from typing import IO

from spotune.contracts.errors import InfraError

MOST_S = 30.0
LOOK_S = 0.05


def take_lock(file: IO[str], path: Path) -> None:
    """Takes the lock of an open file, which goes with it. Raises InfraError where another process keeps it."""
    until = time.monotonic() + MOST_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() >= until:
                remedy = f"fuser {path} names it"
                raise InfraError(f"{path}: locked by another process for {MOST_S:g} s ({remedy})") from error
        time.sleep(LOOK_S)
