"""Game days: hold a process at a named instant, so that a drill can take the machine away exactly there.

A drill sets ``SPOTUNE_HOLD_AT`` to ``NAME`` or ``NAME:N`` (the N-th time that this process comes by) and
``SPOTUNE_HOLD_FILE`` to a path. The process that gets there writes the name to that file and stands still until it
is killed. Without these two, ``reach`` does nothing. The names, in the order in which a run passes them:

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

from spotune.contracts.environment import HOLD_AT, HOLD_FILE

_passed: Counter[str] = Counter()


def reach(name: str) -> None:
    """Stands still for ever when a drill wants this process held here; else returns at once."""
    wanted, _, count = os.environ.get(HOLD_AT, "").partition(":")
    if wanted != name:
        return
    _passed[name] += 1
    if _passed[name] == int(count or 1):
        Path(os.environ[HOLD_FILE]).write_text(name)
        while True:
            time.sleep(3600)
