"""``python -m spotune.sft`` with a watchdog that goes by the test's clock: seconds in a file, added to this machine's.

A test runs it as ``python guard_with_watchdog_clock.py FILE HOW CONFIG``. HOW is ``jumps`` where a jump of the clock is
time that the guard has seen, or ``misses`` where it is time that the guard has missed, as outside of tests.
"""

import math
import sys
import time
from functools import partial
from pathlib import Path

from spotune.guard import attempt, stalls
from spotune.guard.main import main
from spotune.guard.watchdog import Watchdog


def clock(file: Path) -> float:
    moved_s = file.read_text()
    part = file.with_name(".seen")
    part.write_text(moved_s)
    part.rename(file.with_suffix(".seen"))
    return time.monotonic() + float(moved_s)


if __name__ == "__main__":
    moved = partial(clock, Path(sys.argv[1]))
    if sys.argv[2] == "jumps":
        stalls.LONGEST_TICK_S = math.inf
    attempt.Watchdog = partial(Watchdog, clock=moved, boot=moved)  # type: ignore[assignment, misc]
    sys.exit(main(sys.argv[3:]))
