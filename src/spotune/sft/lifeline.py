"""A rank's bond to its guard: deaf to the signals of a preemption, and dead when the guard is.

Standard library only: this runs before the heavy imports, so that there is no moment when a
SIGTERM to the whole process tree could end a rank before the guard has decided.
"""

import ctypes
import os
import signal
import sys
import threading
import time

PR_SET_PDEATHSIG = 1
IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGURG)


def ignore_signals() -> None:
    """Only the guard decides what a signal means; for this process and all that it starts.

    Ignoring is not enough: torch has DataLoader workers install a handler that ends them on SIGTERM. What is
    blocked is never delivered, and children inherit that, whatever they install.
    """
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)


def die_with_parent(period_s: float = 1.0) -> None:
    """Ends this process when its parent ends, however that happens."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    def watch() -> None:  # for systems without prctl, and for a parent that was gone before prctl was called
        while os.getppid() == parent:
            time.sleep(period_s)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
