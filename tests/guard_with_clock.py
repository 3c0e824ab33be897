"""``python -m spotune.sft`` with a budget that goes by the test's clock: seconds in a file, added to the time of day.

A test's task runs it as ``python guard_with_clock.py FILE CONFIG``. The rest of the guard goes by the time of day.
"""

import sys
import time
from functools import partial
from pathlib import Path

from spotune.guard import attempt
from spotune.guard.budget import BudgetLimit
from spotune.guard.main import main


def clock(file: Path) -> float:
    return time.time() + (float(file.read_text()) if file.exists() else 0.0)


if __name__ == "__main__":
    attempt.BudgetLimit = partial(BudgetLimit, clock=partial(clock, Path(sys.argv[1])))  # type: ignore[assignment, misc]
    sys.exit(main(sys.argv[2:]))
