"""Is a fault worth another machine once more? Two in a row without a commit between them are not."""

import json
from typing import Any

from spotune.contracts import exits
from spotune.contracts.keys import Keys
from spotune.contracts.store import Store
from spotune.guard.restore import list_commits

FAULTS = ("failed", "stalled")  # the reasons of attempts that another machine may do better


def is_second_fault(store: Store, keys: Keys, attempt: int) -> bool:
    """Whether this attempt and the one before it both failed or stalled, unpreempted, and committed nothing new."""
    if any(number >= attempt - 1 for (number, _), _ in list_commits(store, keys)):
        return False
    end = last_event(store, keys, attempt - 1)
    return end.get("event") == "end" and end.get("reason") in FAULTS and end.get("exit_code") == exits.PREEMPTED


def last_event(store: Store, keys: Keys, attempt: int) -> dict[str, Any]:
    """The last event that an attempt's rank 0 uploaded, empty when there is none."""
    prefix = keys.attempt(attempt).removesuffix("attempt.json") if attempt > 0 else ""
    parts = [key for key in store.keys(prefix.rstrip("/")) if "/events-0-" in key] if prefix else []
    if not parts:
        return {}
    newest = max(parts, key=lambda key: int(key.rpartition("-")[2].removesuffix(".jsonl")))
    lines = (store.read(newest) or b"").splitlines()
    try:
        found = json.loads(lines[-1]) if lines else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
