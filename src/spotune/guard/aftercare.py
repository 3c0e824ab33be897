"""An attempt on a run that is certified already and still owes extras: it does these, and nothing else."""

import shutil
import time
from contextlib import suppress
from dataclasses import replace

from spotune.contracts import exchange, exits
from spotune.contracts.errors import BadRecord, SpotuneError
from spotune.contracts.extras import CONFIG_KEYS
from spotune.contracts.records import Certificate, Progress
from spotune.guard.context import Context
from spotune.guard.extras import Extras
from spotune.guard.journal import Journal
from spotune.guard.notices import Notices
from spotune.guard.say import say


def finish_owed(context: Context, notices: Notices, owed: tuple[str, ...]) -> int:
    """Does what is owed; returns 0, however that went, or 75 when the machine goes before it is through."""
    keys, folder = context.keys, context.folder
    named = ", ".join(CONFIG_KEYS[name] for name in owed)
    say(f"{keys.run_id} owes {named}: attempt {context.attempt} does that alone")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        shown = _shown(context)
        certificate = Certificate.from_bytes(context.store.read(keys.completed) or b"", keys.completed)
    except SpotuneError as error:
        say(f"{named}: still owed: {error}")
        return exits.SUCCEEDED
    log = exchange.events_path(folder, 0)
    journal = Journal(context.store, keys, context.attempt, log, context.status_file, shown)
    journal.write("start", attempt=context.attempt, host=context.record.host, world_size=context.machine.world_size)
    journal.write("phase", phase="teardown")
    extras = Extras(context, certificate, notices, journal)
    in_time = extras.run(owed)
    code = exits.SUCCEEDED if in_time else exits.PREEMPTED
    reason, message = "completed" if in_time else "preempted", "; ".join(extras.failures)
    journal.write("end", reason=reason, exit_code=code, step=certificate.step, message=message)
    try:
        journal.close()
    except SpotuneError as error:
        say(f"the last events are not recorded: {error}")
    shutil.rmtree(folder, ignore_errors=True)
    return code


def _shown(context: Context) -> Progress:
    """What could be seen of the run last: its steps do not go back to 0."""
    key = context.keys.progress
    seen = Progress(run_id=context.keys.run_id, attempt=context.attempt)
    with suppress(BadRecord):  # a broken heartbeat costs nothing else
        data = context.store.read(key)
        seen = Progress.from_bytes(data, key) if data else seen
    return replace(seen, attempt=context.attempt, at=time.time())
