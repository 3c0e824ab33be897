"""Which record each key of a golden bucket holds, and how it is read and written again."""

import re
from typing import Any

from spotune.core.protocol import Pushed
from spotune.core.records import (
    AttemptRecord,
    Bill,
    Certificate,
    ClusterRecord,
    Commit,
    Progress,
    Record,
    RunRecord,
    TerminalMarker,
)

RUN = r"runs/[^/]+"
RECORDS: list[tuple[str, type[Record]]] = [
    (rf"{RUN}/run\.json", RunRecord),
    (rf"{RUN}/revisions/[0-9]+\.json", RunRecord),
    (rf"{RUN}/attempts/[0-9]+/attempt\.json", AttemptRecord),
    (rf"{RUN}/attempts/[0-9]+/bill\.json", Bill),
    (rf"{RUN}/lost/[0-9]+-[0-9]+\.json", Bill),
    (rf"{RUN}/progress\.json", Progress),
    (rf"{RUN}/commits/[0-9]+-[0-9]+\.json", Commit),
    (rf"{RUN}/(output|merged)/completed\.json", Certificate),
    (rf"{RUN}/pushed\.json", Pushed),
    (rf"{RUN}/(failed|paused|cancelled)\.json", TerminalMarker),
    (r"clusters/[^/]+\.json", ClusterRecord),
]
EVENTS = rf"{RUN}/attempts/[0-9]+/events-[0-9]+-[0-9]+\.jsonl"
# What is not a record: data, code, text for people, and a mark without contents.
DATA = rf"{RUN}/(checkpoints|output|merged)/.+|{RUN}/code/.+|{RUN}/attempts/[0-9]+/stacks-[0-9]+\.txt|late/[^/]+"


def kind_of(key: str) -> type[Record] | None:
    """The class of the record at a key, None for what is not a record. Raises LookupError for an unknown key."""
    for pattern, kind in RECORDS:
        if re.fullmatch(pattern, key):
            return kind
    if re.fullmatch(f"{EVENTS}|{DATA}", key):
        return None
    raise LookupError(f"{key}: tests/golden/kinds.py does not say what it holds")


def read_record(key: str, data: bytes) -> Any:
    """Reads a record as every reader does."""
    kind = kind_of(key)
    assert kind, key
    return kind.from_bytes(data, key)
