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
from collections.abc import Mapping

from spotune.contracts.environment import GUARD_PID

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


def die_with_parent(environ: Mapping[str, str], period_s: float = 1.0) -> None:
    """Ends this process when its guard ends, however and whenever that happens; and each that it forks when it ends.

    A DataLoader's worker looks after its parent by itself, but takes whoever that is when it begins for it: of one
    that is forked while the parent is killed that is process 1, and it would stay for ever.
    """
    parent = int(environ.get(GUARD_PID) or os.getppid())
    _die_with(parent)

    def watch() -> None:  # for systems without prctl
        while os.getppid() == parent:
            time.sleep(period_s)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
    forking: list[tuple[int, bool]] = []

    def note() -> None:
        forking[:] = [(os.getpid(), threading.current_thread() is threading.main_thread())]

    def bind() -> None:
        # Linux means the thread that forked: of one that ends before its process does that is no reason to die.
        process, is_main = forking[0]
        _die_with(process, is_main)

    os.register_at_fork(before=note, after_in_child=bind)


def _die_with(parent: int, by_signal: bool = True) -> None:
    if by_signal and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it was gone before it could be asked for
        os.kill(os.getpid(), signal.SIGKILL)
