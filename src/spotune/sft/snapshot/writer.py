"""The threads that write snapshots to disk: one snapshot at a time, a few files of it, behind training."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from spotune.sft.snapshot.capture import Piece

# Gets the facts of the files that were hashed, and how long writing took in seconds.
Then = Callable[[dict[Path, dict[str, Any]], float], None]
NICENESS = 5  # training's own threads go first where there is a core too few; on leaving there are none
# Hashing takes a core for as long as the disk is fast. Training's threads wait for the slowest among them at every
# operator: time that is taken from all cores at once costs it less than the same time taken from one.
FILES_AT_A_TIME = 2


class Writer:
    """Writes one snapshot; whoever brings the next one waits for it, or looks at ``busy`` first."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        self._files = ThreadPoolExecutor(FILES_AT_A_TIME, thread_name_prefix="snapshot-file", initializer=_step_back)
        self._job: Future[None] | None = None

    @property
    def busy(self) -> bool:
        return self._job is not None and not self._job.done()

    def submit(self, pieces: list[Piece], then: Then) -> None:
        """Writes the pieces, each a file or more, and lets go of them; then calls ``then``."""

        def write() -> None:
            began = time.monotonic()
            facts: dict[Path, dict[str, Any]] = {}
            under_way = [self._files.submit(piece) for piece in pieces]
            wait(under_way)  # for all, also when one fails: nobody writes into a checkpoint that is given up
            for piece in under_way:
                facts |= piece.result()
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
