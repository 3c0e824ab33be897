"""What the bucket says of a run, as far as the engine needs it: certificate, marks, newest commit.

For a bucket far away it runs as a process of its own (``python -m spotune.launch.local.probe``), with the job's
environment: the supervisor was started by another shell and may lack this bucket's credentials, and it never waits.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spotune.core.errors import BadRecord, SpotuneError
from spotune.core.io import log_line, write_state
from spotune.core.keys import Keys, commit_of
from spotune.core.output import protect_output
from spotune.core.records import Progress, read_mark
from spotune.core.store import Store


@dataclass(frozen=True)
class Look:
    """``failed``, ``cancelled`` and ``paused`` are the marks' reasons, None for none; ``commit`` the newest's key.

    ``stalled``: the watchdog ended the last attempt that wrote its progress.
    """

    completed: bool = False
    failed: str | None = None
    failed_code: int = 1
    cancelled: str | None = None
    paused: str | None = None
    commit: str = ""
    stalled: bool = False
    error: str = ""
    at: float = 0.0


def look(bucket: str, run_id: str, clock: Callable[[], float] = time.time) -> Look:
    """Reads the bucket; a bucket that does not answer is a Look with ``error``."""
    keys = Keys(run_id)
    try:
        store = Store(bucket)
        if store.exists(keys.completed):
            return Look(completed=True, at=clock())
        failed, cancelled, paused = (read_mark(store, key) for key in (keys.failed, keys.cancelled, keys.paused))
        stalled = _has_stalled(store, keys.progress)
        commits = [found for key in store.keys(keys.commits) if (found := commit_of(key))]
    except SpotuneError as error:
        return Look(error=str(error), at=clock())
    return Look(
        failed=failed.reason if failed else None,
        failed_code=failed.exit_code if failed else 1,
        cancelled=cancelled.reason if cancelled else None,
        paused=paused.reason if paused else None,
        commit=keys.commit(*max(commits)) if commits else "",
        stalled=stalled,
        at=clock(),
    )


def cancelled_because(bucket: str, run_id: str) -> str | None:
    """Why a run is cancelled, None where it is not, or its bucket is not on this machine: nobody waits for another."""
    try:
        mark = read_mark(Store(bucket), Keys(run_id).cancelled) if bucket.startswith("file://") else None
    except SpotuneError:
        return None
    return mark.reason if mark else None


def _has_stalled(store: Store, key: str) -> bool:
    """Whether ``progress.json`` says so: once an attempt has ended, its phase is the reason. False where unreadable."""
    try:
        data = store.read(key)
        return data is not None and Progress.from_bytes(data, key).phase == "stalled"
    except BadRecord:
        return False


def main(arguments: list[str]) -> None:
    protect_output()
    bucket, run_id, output = arguments
    try:
        write_state(Path(output), look(bucket, run_id))
    except (OSError, SpotuneError) as error:  # the supervisor asks again
        log_line(f"{run_id}: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
