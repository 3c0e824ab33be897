"""``python -m spotune.sft`` with a watchdog that goes by the test's clock: seconds in a file, added to this machine's.

A test runs it as ``python guard_with_watchdog_clock.py FILE HOW CONFIG``. HOW is ``jumps`` where a jump of the clock is
time that the guard has seen, or ``misses`` where it is time that the guard has missed, as outside of tests.

A file ``hang`` beside FILE has calls to the bucket wait as on a disk that is gone: those whose key has its text in it.
``hangs`` appears there once one does. With ``crawl`` in its place the call moves a byte now and then.
"""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from spotune.core.store import faults
from spotune.guard import attempt, stalls
from spotune.guard.main import main
from spotune.guard.stalls import Watchdog


def clock(file: Path) -> float:
    moved_s = file.read_text()
    part = file.with_name(".seen")
    part.write_text(moved_s)
    part.rename(file.with_suffix(".seen"))
    return time.monotonic() + float(moved_s)


def hang(folder: Path, call: Any, self: faults.Calls, verb: str, key: str) -> Any:
    """As ``Calls.call``, and does not return while a test wants the call to hang."""
    under_way = call(self, verb, key)

    @contextmanager
    def hanging() -> Iterator[None]:
        with under_way:
            while (crawls := _wanted(folder / "crawl", key)) or _wanted(folder / "hang", key):
                (folder / "hangs").touch()
                if crawls:
                    self.move(1)
                time.sleep(0.02)
            yield

    return hanging()


def _wanted(file: Path, key: str) -> bool:
    try:
        return file.read_text() in key
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    moved = partial(clock, Path(sys.argv[1]))
    if sys.argv[2] == "jumps":
        stalls.LONGEST_TICK_S = math.inf
    attempt.Watchdog = partial(Watchdog, clock=moved, boot=moved)  # type: ignore[assignment, misc]
    folder, call = Path(sys.argv[1]).parent, faults.Calls.call
    faults.Calls.call = lambda self, verb, key: hang(folder, call, self, verb, key)  # type: ignore[method-assign]
    attempt.HANGING_S = stalls.HUNG_END_S = 1.0
    sys.exit(main(sys.argv[3:]))
