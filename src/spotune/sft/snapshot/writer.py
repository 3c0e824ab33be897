"""The thread that writes snapshots to disk: one at a time, behind training."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from spotune.sft.snapshot.capture import Piece

# Gets the facts of the files that were hashed, and how long writing took in seconds.
Then = Callable[[dict[Path, dict[str, Any]], float], None]
NICENESS = 5  # training's own threads go first where there is a core too few; on leaving there are none


class Writer:
    """Writes one snapshot; whoever brings the next one waits for it, or looks at ``busy`` first."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="snapshot", initializer=_step_back)
        self._job: Future[None] | None = None

    @property
    def busy(self) -> bool:
        return self._job is not None and not self._job.done()

    def submit(self, pieces: list[Piece], then: Then) -> None:
        """Writes the pieces in order and lets go of them; then calls ``then``."""

        def write() -> None:
            began = time.monotonic()
            facts: dict[Path, dict[str, Any]] = {}
            for piece in pieces:
                facts |= piece()
            pieces.clear()  # with them goes what they hold in memory
            then(facts, time.monotonic() - began)

        self._job = self._pool.submit(write)

    def settle(self) -> OSError | None:
        """Waits for the snapshot under way and says, once, what kept it from the disk; other errors are raised."""
        job, self._job = self._job, None
        error = job.exception() if job else None
        if error is None:
            return None
        if disk_fault := _disk_fault(error):
            return disk_fault
        raise error


def _disk_fault(error: BaseException | None) -> OSError | None:
    """The disk's own word among an error and its causes."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _step_back() -> None:
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    except OSError:  # not a thing that every system allows for a thread
        return
