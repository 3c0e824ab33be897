"""What dev clusters were paid for, from SkyPilot's report into the bucket: ``contracts/clusters.py``.

No verb fails because of it: what could not be booked is one line, and the next verb books it.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from spotune.contracts.clusters import ClusterRecord, read_clusters
from spotune.contracts.errors import SpotuneError
from spotune.contracts.money import HOUR_S
from spotune.contracts.records import PriceRow
from spotune.launch.skypilot import engine
from spotune.launch.skypilot.history import Usage, usages
from spotune.launch.workspace import Workspace

SOURCE = "SkyPilot's cost report"

Row = Mapping[str, Any]  # of cost_report
Warn = Callable[[str], None]


def book(workspace: Workspace, rows: Sequence[Row], warn: Warn, clock: Callable[[], float] = time.time) -> None:
    """Writes the records of the clusters in ``rows``; one whose first record this is gets its price now, for good."""
    if not rows:
        return
    try:
        store = workspace.store()
        known = read_clusters(store, [str(row["name"]) for row in rows])
        for record in booked(rows, known, workspace.env.user, workspace.settings.team, clock()):
            store.write(record.key, record.to_bytes())
    except SpotuneError as error:
        warn(f"what the cluster costs is not booked: {error}")


def book_names(workspace: Workspace, names: Sequence[str], warn: Warn) -> None:
    """Asks SkyPilot what was paid for clusters of these names, and books it."""
    try:
        rows = engine.cost_rows(names)
    except SpotuneError as error:
        warn(f"what {', '.join(names)} cost is not booked: {error}")
        return
    book(workspace, rows, warn)


def book_open(workspace: Workspace, warn: Warn) -> None:
    """Books those that were still paid for when they were last booked; without any SkyPilot is not asked."""
    if names := sorted({record.name for record in read_clusters(workspace.store()) if record.is_up}):
        book_names(workspace, names, warn)


def booked(
    rows: Sequence[Row], known: Sequence[ClusterRecord], owner: str, team: str, now: float
) -> Iterator[ClusterRecord]:
    """The records as they are now. Of a name only the newest cluster is taken in anew: it is the one at hand."""
    by_hash = {record.cluster_hash: record for record in known}
    newest: set[str] = set()
    for row in sorted(rows, key=_launched_at, reverse=True):
        name, used = str(row["name"]), usages(row)
        is_newest = name not in newest
        newest.add(name)
        spans: list[list[float | None]] = [[usage.started_at, usage.ended_at] for usage in used]
        if record := by_hash.get(str(row["cluster_hash"])):
            if spans and (record.is_up or spans != record.spans):
                yield replace(record, spans=spans, updated_at=now)
        elif is_newest and used and row.get("duration"):
            yield ClusterRecord(
                name=name,
                cluster_hash=str(row["cluster_hash"]),
                launched_at=used[0].started_at,
                owner=owner,
                team=team,
                infra="/".join(part for part in (used[0].cloud, used[0].region, used[0].zone) if part),
                accelerators=used[0].accelerators,
                nodes=used[0].nodes,
                price=_price(row, used[0], now),
                spans=spans,
                updated_at=now,
            )


def _price(row: Row, used: Usage, now: float) -> dict[str, Any]:
    """The row of one node at SkyPilot's price of now; empty where it knows none."""
    usd_per_hour = (row.get("total_cost") or 0.0) / float(row["duration"]) * HOUR_S / used.nodes
    if not usd_per_hour > 0:
        return {}
    return vars(
        PriceRow(
            infra=used.cloud,
            region=used.region or "*",
            zone=used.zone or "*",
            instance_type=used.instance_type,
            accelerators=used.accelerators,
            use_spot=used.use_spot,
            price_usd_per_hour=round(usd_per_hour, 6),
            source=SOURCE,
            at=now,
        )
    )


def _launched_at(row: Row) -> float:
    return max((usage.started_at for usage in usages(row)), default=0.0)
