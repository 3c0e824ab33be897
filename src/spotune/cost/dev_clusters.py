"""Dev clusters: which runs were on each, what was idle, and everything that was paid since a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spotune.core.money import cost_usd
from spotune.core.records import PriceRow, read_clusters
from spotune.core.store import Store
from spotune.cost.account import Split, Use, price_of_part, split_all
from spotune.cost.export import COLUMNS, KeyedRow, Row
from spotune.cost.index import Index
from spotune.launch.engine import ACTIVE

_USED = ("attempt", "started_at", "ended_at", "end_reason", "nodes", "cluster", "gpu_share")
_OF_CLUSTER = ("name", "owner", "team", "infra", "accelerators", "nodes", "launched_at", "is_up")
_OF_SPLIT = ("idle_s", "idle_usd", "idle_since", "idle_usd_per_hour")
CLUSTER_COLUMNS = (
    *_OF_CLUSTER, "price_usd_per_hour", "price_source", "paid_s", "cost_usd", "runs", *_OF_SPLIT, "seen_at",
)  # fmt: skip
Warn = Callable[[str], None]


def splits_of(store: Store, index: Index, since: float, warn: Warn) -> list[Split]:
    """Returns what was paid for every cluster since then, the newest first. Warns of a record that cannot be read."""
    clusters = read_clusters(store, warn=lambda line: warn(f"a dev cluster is left out: {line}"))
    if not clusters:
        return []
    states = {key: totals["state"] for key, totals in index.runs(0.0) if key[0] == store.url}
    attempts = index.attempts(0.0, _USED)
    last = {key: attempt["attempt"] for key, attempt in attempts}
    uses = []
    for key, attempt in attempts:
        if key in states and attempt["cluster"]:
            # The last attempt of an active run is still on the cluster, unless it wrote its end.
            is_last = states[key] in ACTIVE and attempt["attempt"] == last[key]
            ended_at = None if is_last and attempt["end_reason"] in (None, "lost") else attempt["ended_at"]
            facts = {name: attempt[name] for name in ("cluster", "started_at", "gpu_share", "nodes")}
            uses.append(Use(key=(key, attempt["attempt"]), ended_at=ended_at, **facts))
    return split_all(clusters, uses, since)[::-1]


def cluster_rows(splits: Iterable[Split], runs: Iterable[KeyedRow]) -> list[dict[str, Any]]:
    """Returns a row for each cluster that was paid for; its ``runs`` each with their part of it, the dearest first.

    Seconds are of the whole cluster.
    """
    totals = dict(runs)
    return [_row(split, totals) for split in splits if split.paid_s]


def _row(split: Split, totals: Mapping[Any, Row]) -> dict[str, Any]:
    cluster, price = split.cluster, split.cluster.price_row
    runs: dict[str, dict[str, Any]] = {}
    for share in (share for share in split.shares if share.paid_s):
        run = totals[share.key[0]]
        new = {name: run[name] for name in ("run_id", "user", "team")} | {"paid_s": 0.0, "cost_usd": None}
        row = runs.setdefault(run["run_id"], new)
        row["paid_s"] += share.paid_s
        if share.cost_usd is not None:
            row["cost_usd"] = (row["cost_usd"] or 0.0) + share.cost_usd
    return {
        **{name: getattr(cluster, name) for name in _OF_CLUSTER},
        "price_usd_per_hour": price.price_usd_per_hour if price else None,
        "price_source": price.source if price else "no price was known when it came up",
        "paid_s": split.paid_s,
        "cost_usd": split.cost_usd,
        "runs": sorted(runs.values(), key=lambda row: -row["paid_s"]),
        **{name: getattr(split, name) for name in _OF_SPLIT},
        "seen_at": cluster.updated_at,
    }


def flat_rows(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Returns the same rows for a table, with the number of runs."""
    return [{**row, "runs": len(row["runs"])} for row in rows]


def charged(attempts: Iterable[KeyedRow], splits: Iterable[Split]) -> Iterator[KeyedRow]:
    """Yields the attempts, each on a dev cluster with its share of the cluster's cost.

    Where runs shared a cluster, the shares add up to no more than was paid. An attempt that lasts longer than its
    cluster is known to have existed keeps the cost by its own clock.
    """
    shares = {share.key: (share.cost_usd, split.cluster) for split in splits for share in split.shares}
    for key, attempt in attempts:
        cost_usd, cluster = shares.get((key, attempt["attempt"]), (None, None))
        ended_at = attempt["started_at"] + attempt["paid_s"]
        if cluster is None or cost_usd is None or (cluster.is_up and ended_at > cluster.updated_at):
            yield key, attempt
            continue
        price = None
        if attempt.get("price_usd_per_hour", 0.0) is None:  # the cluster was booked after the run was read
            price = price_of_part(cluster, attempt["gpu_share"])
        yield key, {**attempt, **(_price_facts(price) if price else {}), "cost_usd": cost_usd}


def _price_facts(price: PriceRow) -> dict[str, Any]:
    names = ("price_usd_per_hour", "accelerators", "instance_type", "use_spot")
    return {**{name: getattr(price, name) for name in names}, "price_source": price.source}


def idle_of(splits: Iterable[Split]) -> Iterator[dict[str, Any]]:
    """Yields a row for each piece of time in which a part of a cluster was idle.

    It has the owner in the columns of a run's totals, and the other columns of an attempt. ``nodes`` is the part of
    the cluster that was idle, e.g. 0.5 of one node.
    """
    nowhere = PriceRow(infra="", region="", zone="", use_spot=False, price_usd_per_hour=0.0, source="")
    for split in splits:
        cluster, price = split.cluster, split.cluster.price_row
        where = price or nowhere
        for piece in split.idle:
            paid_s, nodes = piece.ended_at - piece.started_at, piece.part * max(1, cluster.nodes)
            yield {
                **_price_facts(where),
                "cluster": cluster.name,
                "key": cluster.key,
                "user": cluster.owner,
                "team": cluster.team,
                "kind": "dev",
                "infra": cluster.infra.partition("/")[0],
                "region": where.region.strip("*"),
                "zone": where.zone.strip("*"),
                "accelerators": cluster.accelerators,
                "nodes": nodes,
                "price_usd_per_hour": price and price.price_usd_per_hour,
                "started_at": piece.started_at,
                "paid_s": paid_s,
                "cost_usd": cost_usd(paid_s, nodes, price),
                "reconciled": True,
            }


# What was paid since a time, whenever the run was submitted.


@dataclass(frozen=True)
class Paid:
    """Runs that were submitted or paid for since then, their attempts in that time, and idle clusters.

    The on-demand cost is known of a whole run only: it is None for a run that began earlier.
    """

    runs: Sequence[KeyedRow]
    attempts: Sequence[KeyedRow]
    idle: Sequence[Row]


def paid_since(store: Store, index: Index, since: float, warn: Warn) -> Paid:
    """Returns what was paid since then, attempts cut at that time. Warns of a cluster record that cannot be read."""
    splits = splits_of(store, index, since, warn)
    attempts = list(charged(clip(index.attempts(since, COLUMNS), since), splits))
    seen = {key for key, _ in attempts}
    runs: list[KeyedRow] = []
    for key, totals in index.runs(0.0):
        if totals["submitted_at"] >= since:
            runs.append((key, totals))
        elif key in seen:
            runs.append((key, {**totals, "on_demand_usd": None, "saved_usd": None}))
    return Paid(runs, attempts, list(idle_of(splits)))


def charges_since(store: Store, index: Index, since: float, warn: Warn) -> Paid:
    """Returns the attempts and idle pieces of which a part was paid since then, whole instead of cut."""
    splits = splits_of(store, index, 0.0, warn)
    attempts = list(charged(index.attempts(since), splits))
    seen = {key for key, _ in attempts}
    runs = [(key, totals) for key, totals in index.runs(0.0) if key in seen]
    return Paid(runs, attempts, [piece for piece in idle_of(splits) if piece["started_at"] + piece["paid_s"] > since])


def clip(attempts: Iterable[KeyedRow], since: float) -> Iterator[KeyedRow]:
    """Yields the part of each attempt after that time; seconds and dollars in proportion."""
    for key, attempt in attempts:
        before_s = since - attempt["started_at"]
        if before_s <= 0:
            yield key, attempt
        elif before_s < attempt["paid_s"]:
            left = 1 - before_s / attempt["paid_s"]
            known = [name for name in ("paid_s", "useful_s", "cost_usd") if attempt[name] is not None]
            yield key, {**attempt, **{name: attempt[name] * left for name in known}, "started_at": since}
