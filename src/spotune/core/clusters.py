"""``clusters/<name>-<launch>.json``: what a dev cluster was paid for, and its price as it was when it came up.

Unlike a run's records it is rewritten, while its spans grow. Only the launcher writes it: from SkyPilot's own report,
so that whoever writes last writes no less than was known.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from spotune.core.errors import BadRecord
from spotune.core.fields import Ranks, Time
from spotune.core.keys import CLUSTERS, cluster_key
from spotune.core.records import PriceRow, Record
from spotune.core.store import Store


@dataclass(frozen=True, kw_only=True)
class ClusterRecord(Record):
    """One cluster from its launch until it is down; the next of that name has a record of its own.

    Attributes:
        launched_at: when it was first paid for; a cluster that is stopped and started again keeps it.
        owner, team: who brought it up, and pays for what no run does.
        accelerators: of one node, e.g. ``L4:1``; empty for CPU machines.
        price: the row of one node, frozen with the record; empty where no price was known.
        spans: paid intervals ``[started_at, ended_at]`` as SkyPilot counts them; None: it is still paid for.
        updated_at: when SkyPilot was last asked; nothing is known of what came after.
    """

    name: str
    cluster_hash: str
    launched_at: Time
    owner: str
    team: str = ""
    infra: str = ""
    accelerators: str = ""
    nodes: Ranks = 1
    price: dict[str, Any] = field(default_factory=dict)
    spans: list[list[Time | None]] = field(default_factory=list)
    updated_at: Time = 0.0

    def __post_init__(self) -> None:
        """Raises ValueError for spans or a price that are none."""
        if any(len(span) != 2 or span[0] is None for span in self.spans):
            raise ValueError("spans: not pairs of times, of which the last may be null")
        try:
            _ = self.price_row
        except ValueError as error:
            raise ValueError(f"price: {error}") from error

    @property
    def key(self) -> str:
        return cluster_key(self.name, self.launched_at)

    @property
    def is_up(self) -> bool:
        """Whether it was still paid for when SkyPilot was last asked."""
        return bool(self.spans) and self.spans[-1][1] is None

    @property
    def price_row(self) -> PriceRow | None:
        """A price of 0 is none: nobody has told it."""
        row = PriceRow.from_dict(self.price) if self.price else None
        return row if row and row.price_usd_per_hour > 0 else None

    def intervals(self) -> list[tuple[float, float]]:
        """The spans in order and apart from each other; one that is open ends where knowledge does."""
        found: list[tuple[float, float]] = []
        for start, end in sorted(self.spans, key=lambda span: span[0] or 0.0):
            began = max(start or 0.0, found[-1][1] if found else 0.0)
            until = self.updated_at if end is None else end
            if until > began:
                found.append((began, until))
        return found


def read_clusters(
    store: Store, names: Sequence[str] = (), warn: Callable[[str], None] = lambda message: None
) -> list[ClusterRecord]:
    """Those in the bucket, the oldest first; with ``names`` those called so.

    ``warn`` is told, naming the key, of one that cannot be read, which is left out.
    """
    records = []
    for key in store.keys(CLUSTERS):
        stem = key.removeprefix(f"{CLUSTERS}/").rpartition("-")[0]
        if names and stem not in names:
            continue
        try:
            record = ClusterRecord.from_bytes(store.read(key) or b"null", key)
            if record.key != key:
                raise BadRecord(f"{key}: name, launched_at: those of {record.key} (a copy, or renamed)")
            records.append(record)
        except BadRecord as error:
            warn(str(error))
    return sorted(records, key=lambda record: record.launched_at)
