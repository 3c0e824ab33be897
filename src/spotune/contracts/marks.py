"""``failed.json``, ``paused.json``, ``cancelled.json``: a mark is one by being there, for every reader.

What a mark says may be unreadable: cut, of another version, or a link that is not followed. The run stands still all
the same until ``spotune resume`` removes it.
"""

from spotune.contracts import exits
from spotune.contracts.errors import BadRecord
from spotune.contracts.records import Mark
from spotune.contracts.store import Store


def read_mark(store: Store, key: str) -> Mark | None:
    """The mark, None where there is none. One that cannot be read says so as its reason, and counts as a failure."""
    try:
        data = store.read(key)
        return None if data is None else Mark.from_bytes(data, key)
    except BadRecord as error:
        return Mark(run_id="", attempt=0, at=0.0, reason=str(error), exit_code=exits.FAILED)
