"""One supervisor at a time, started by the verb that needs it."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from spotune.contracts.errors import InfraError
from spotune.launch.local.layout import MARKER, Layout

# Put in the background by a shell, so that it is nobody's child: no zombie is left in a verb that lives long.
_BACKGROUND = 'exec </dev/null >>"$0" 2>&1; "$@" &'


@contextmanager
def only_one(layout: Layout) -> Iterator[bool]:
    """Holds the supervisor's lock; yields whether it was free. The kernel frees it when the holder dies."""
    descriptor = os.open(layout.lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        yield True
    finally:
        os.close(descriptor)


def is_running(layout: Layout) -> bool:
    """Whether somebody holds the lock. A shared lock is tried, so that two who ask do not mislead each other."""
    try:
        descriptor = os.open(layout.lock, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def start(layout: Layout, environ: Mapping[str, str]) -> None:
    """Starts a supervisor; one too many leaves at once. Call it after the queue was written: an idle one that is
    about to leave looks at the queue again once it has let go of the lock. Raises InfraError where none can be."""
    command = [sys.executable, "-P", "-m", "spotune.launch.local.supervisor", str(layout.home)]
    shell = ["sh", "-c", _BACKGROUND, str(layout.supervisor_log), *command]
    # A verb that is called by a job must not make the supervisor a part of that job's machine.
    own = {name: value for name, value in environ.items() if name != MARKER}
    try:
        subprocess.run(
            shell, cwd=layout.root, env=own, start_new_session=True, stderr=subprocess.PIPE, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise InfraError(f"the supervisor cannot be started: {' '.join(said.split())}") from error
