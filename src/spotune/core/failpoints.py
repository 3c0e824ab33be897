"""Failpoints: named instants at which a test stops a process, to take the machine away or to change the world there.

A test sets ``SPOTUNE_FAILPOINTS`` to names with commas between them, ``NAME`` or ``NAME:N`` (the N-th time that this
process passes it), and ``SPOTUNE_FAILPOINT_DIR`` to a folder. The thread that gets there writes its process id to the
file ``NAME`` in that folder, and goes on once that file is gone. Without these two, ``failpoint`` does nothing. The
names, in the order in which a run passes them:

    claimed         the attempt has its number; nothing else has happened
    restoring       the first file of a checkpoint is here, the others are not
    restored        the checkpoint is here and verified; the worker does not know yet
    snapshot        (worker) copied in memory, nothing of it on disk
    written         (worker) all files on disk, not handed to the guard
    staged          the guard has taken the checkpoint over, nothing is uploaded
    uploading       the first file is in the bucket, others are not
    uploaded        all files are in the bucket, the commit is not
    committed       the commit is there, nothing is tidied up
    pruning         an old commit is removed, its files are not
    noticed         a notice has come, nothing is done about it
    result-written  (worker) the result is on disk, the guard does not know
    result-uploaded the result is in the bucket, not read back
    result-read     the result was read back, there is no certificate
    certified       the certificate is there, the process has not said so

and, where the config asks for extras:

    merged          the adapter is merged on disk, nothing of it is in the bucket
    merged-uploaded a file of the merged model is in the bucket, not read back
    pushed          the hub has the result, the bucket does not say so
"""

import os
import time
from collections import Counter
from pathlib import Path

from spotune.core.environment import FAILPOINT_DIR, FAILPOINTS

POLL_S = 0.02
_passed: Counter[str] = Counter()


def failpoint(name: str) -> None:
    """Stops the calling thread while a test wants it held at ``name``; else returns at once."""
    wanted = os.environ.get(FAILPOINTS)
    if not wanted:
        return
    _passed[name] += 1
    if any(name == at and _passed[name] == int(count or 1) for at, _, count in _parse(wanted)):
        file = Path(os.environ[FAILPOINT_DIR], name)
        part = file.with_name(f".{name}.{os.getpid()}")
        part.write_text(str(os.getpid()))
        part.rename(file)
        while file.exists():
            time.sleep(POLL_S)


def _parse(wanted: str) -> list[tuple[str, str, str]]:
    return [one.strip().partition(":") for one in wanted.split(",")]
