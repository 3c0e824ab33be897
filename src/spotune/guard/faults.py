"""Is a fault worth another machine once more? Two in a row without a commit between them are not."""

import re
from typing import Any

from spotune.contracts import exits
from spotune.contracts.errors import BadRecord
from spotune.contracts.events import number, parse_objects
from spotune.contracts.keys import Keys
from spotune.contracts.store import Store
from spotune.guard.restore import list_commits

FAULTS = ("failed", "stalled")  # the reasons of attempts that another machine may do better
_PART = re.compile(r"/events-0-([0-9]{1,15})\.jsonl\Z")


def is_second_fault(store: Store, keys: Keys, attempt: int) -> bool:
    """Whether this attempt and the one before it both failed or stalled, unpreempted, and committed nothing new."""
    if any(number >= attempt - 1 for (number, _), _ in list_commits(store, keys)):
        return False
    end = last_event(store, keys, attempt - 1)
    return end.get("event") == "end" and end.get("reason") in FAULTS and end.get("exit_code") == exits.PREEMPTED


def last_event(store: Store, keys: Keys, attempt: int) -> dict[str, Any]:
    """The last event that an attempt's rank 0 uploaded, empty when there is none. A time, ``t``, is a number."""
    prefix = keys.attempt(attempt).removesuffix("attempt.json") if attempt > 0 else ""
    keys_there = store.keys(prefix.rstrip("/")) if prefix else []
    parts = {int(name[1]): key for key in keys_there if (name := _PART.search(key))}
    if not parts:
        return {}
    try:
        found = parse_objects(store.read(parts[max(parts)]) or b"")
    except BadRecord:
        return {}
    return found[-1] if found and number(found[-1].get("t", 0.0)) is not None else {}
