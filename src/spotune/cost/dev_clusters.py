"""Dev clusters for whoever pays for them, and what was paid since a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spotune.core.money import cost_usd
from spotune.core.records import ClusterRecord, read_clusters
from spotune.core.store import Store
from spotune.cost.account import Split, Use, price_of_part, split_all
from spotune.cost.export import COLUMNS, KeyedRow, Row
from spotune.cost.index import Index
from spotune.launch.engine import ACTIVE

# Dev clusters for whoever pays for them: which runs were on each, what they had of it, and what was idle.

_USED = ("attempt", "started_at", "ended_at", "end_reason", "nodes", "cluster", "gpu_share")
CLUSTER_COLUMNS = (
    "name", "owner", "team", "infra", "accelerators", "nodes", "launched_at", "is_up", "price_usd_per_hour",
    "price_source", "paid_s", "cost_usd", "runs", "idle_s", "idle_usd", "idle_since", "idle_usd_per_hour", "seen_at",
)  # fmt: skip


def splits_of(store: Store, index: Index, since: float, warn: Callable[[str], None]) -> list[Split]:
    """Of every cluster what was paid for since then, the newest first.

    ``warn`` is told of a record that cannot be read.
    """
    clusters = read_clusters(store, warn=lambda line: warn(f"a dev cluster is left out: {line}"))
    if not clusters:
        return []
    runs = [(key, totals) for key, totals in index.runs(0.0) if key[0] == store.url]
    found = split_all(clusters, list(_uses(runs, index.attempts(0.0, _USED))), since)
    return list(reversed(found))


def cluster_rows(splits: Iterable[Split], runs: Iterable[KeyedRow]) -> list[dict[str, Any]]:
    """A row a cluster that was paid for; its ``runs`` each with what it had, the dearest first.

    Seconds are of the whole cluster.
    """
    totals = dict(runs)
    return [_row(split, totals) for split in splits if split.paid_s]


def flat_rows(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The same for a table: how many runs there were."""
    return [{name: len(row["runs"]) if name == "runs" else row[name] for name in CLUSTER_COLUMNS} for row in rows]


def charged(attempts: Iterable[KeyedRow], splits: Iterable[Split]) -> Iterator[KeyedRow]:
    """Attempts, each on a dev cluster with what it had of that: no more than there was, where runs were in each
    other's way. One that outlasts what is known of its cluster keeps what it has cost by its own clock."""
    shares = {share.key: (share.cost_usd, split.cluster) for split in splits for share in split.shares}
    for key, attempt in attempts:
        cost_usd, cluster = shares.get((key, attempt["attempt"]), (None, None))
        ended_at = attempt["started_at"] + attempt["paid_s"]
        if cluster is None or cost_usd is None or (cluster.is_up and ended_at > cluster.updated_at):
            yield key, attempt
        else:
            yield key, {**_priced(attempt, cluster), "cost_usd": cost_usd}


def _priced(attempt: Row, cluster: ClusterRecord) -> Row:
    """With a price, where one is asked for, also if the cluster was booked only after the run was read."""
    if attempt.get("price_usd_per_hour", 0.0) is not None or not (
        price := price_of_part(cluster, attempt["gpu_share"])
    ):
        return attempt
    names = ("price_usd_per_hour", "accelerators", "instance_type", "use_spot")
    return {**attempt, **{name: getattr(price, name) for name in names}, "price_source": price.source}


def idle_of(splits: Iterable[Split]) -> Iterator[dict[str, Any]]:
    """What clusters cost while no run was on them: a row a piece of time, which says whose it is as a run's totals do,
    and the rest as an attempt does. ``nodes`` is the part of them that was idle, 0.5 of one, say."""
    for split in splits:
        cluster, price = split.cluster, split.cluster.price_row
        for piece in split.idle:
            paid_s, nodes = piece.ended_at - piece.started_at, piece.part * max(1, cluster.nodes)
            yield {
                "cluster": cluster.name,
                "key": cluster.key,
                "user": cluster.owner,
                "team": cluster.team,
                "kind": "dev",
                "infra": cluster.infra.partition("/")[0],
                "region": price.region.strip("*") if price else "",
                "zone": price.zone.strip("*") if price else "",
                "instance_type": price.instance_type if price else "",
                "accelerators": cluster.accelerators,
                "nodes": nodes,
                "use_spot": price is not None and price.use_spot,
                "price_usd_per_hour": price.price_usd_per_hour if price else None,
                "price_source": price.source if price else "",
                "started_at": piece.started_at,
                "paid_s": paid_s,
                "cost_usd": cost_usd(paid_s, nodes, price),
                "reconciled": True,
            }


def _uses(runs: Sequence[KeyedRow], attempts: Sequence[KeyedRow]) -> Iterator[Use]:
    """The attempts that name a cluster. The last one of a run that goes on lasts, if it has not said its end."""
    states = {key: totals["state"] for key, totals in runs}
    last = {key: attempt["attempt"] for key, attempt in attempts}
    for key, attempt in attempts:
        if key not in states or not attempt["cluster"]:
            continue
        is_on = states[key] in ACTIVE and attempt["attempt"] == last[key] and attempt["end_reason"] in (None, "lost")
        yield Use(
            key=(key, attempt["attempt"]),
            cluster=attempt["cluster"],
            started_at=attempt["started_at"],
            ended_at=None if is_on else attempt["ended_at"],
            gpu_share=attempt["gpu_share"],
            nodes=attempt["nodes"],
        )


def _row(split: Split, totals: Mapping[Any, Row]) -> dict[str, Any]:
    cluster, price = split.cluster, split.cluster.price_row
    runs: dict[str, dict[str, Any]] = {}
    for share in (share for share in split.shares if share.paid_s):
        run = totals[share.key[0]]
        had = {"run_id": run["run_id"], "user": run["user"], "team": run["team"], "paid_s": 0.0, "cost_usd": None}
        row = runs.setdefault(run["run_id"], had)
        row["paid_s"] += share.paid_s
        if share.cost_usd is not None:
            row["cost_usd"] = (row["cost_usd"] or 0.0) + share.cost_usd
    return {
        "name": cluster.name,
        "owner": cluster.owner,
        "team": cluster.team,
        "infra": cluster.infra,
        "accelerators": cluster.accelerators,
        "nodes": cluster.nodes,
        "launched_at": cluster.launched_at,
        "is_up": cluster.is_up,
        "price_usd_per_hour": price.price_usd_per_hour if price else None,
        "price_source": price.source if price else "no price was known when it came up",
        "paid_s": split.paid_s,
        "cost_usd": split.cost_usd,
        "runs": sorted(runs.values(), key=lambda row: -row["paid_s"]),
        "idle_s": split.idle_s,
        "idle_usd": split.idle_usd,
        "idle_since": split.idle_since,
        "idle_usd_per_hour": split.idle_usd_per_hour,
        "seen_at": cluster.updated_at,
    }


# What was paid since a time, whenever it was submitted: attempts and dev clusters, cut there.

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Paid:
    """Runs that were paid for since then, or submitted; what of their attempts lies in that time; and idle clusters.

    What a run would have cost on demand is known of the whole run only: of one that began earlier it is None.
    """

    runs: Sequence[KeyedRow]
    attempts: Sequence[KeyedRow]
    idle: Sequence[Row]


def paid_since(store: Store, index: Index, since: float, warn: Warn) -> Paid:
    """``store``: the bucket with the clusters' records; ``warn`` is told of one that cannot be read."""
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
    """The same, but nothing is cut: attempts and what was idle, whole, where a part of it was paid for since then."""
    splits = splits_of(store, index, 0.0, warn)
    attempts = list(charged(index.attempts(since), splits))
    seen = {key for key, _ in attempts}
    runs = [(key, totals) for key, totals in index.runs(0.0) if key in seen]
    return Paid(runs, attempts, [piece for piece in idle_of(splits) if piece["started_at"] + piece["paid_s"] > since])


def clip(attempts: Iterable[KeyedRow], since: float) -> Iterator[KeyedRow]:
    """Of each attempt what came after that time; seconds and dollars in proportion."""
    for key, attempt in attempts:
        before_s = since - attempt["started_at"]
        if before_s <= 0:
            yield key, attempt
        elif before_s < attempt["paid_s"]:
            left = 1 - before_s / attempt["paid_s"]
            cut = {
                name: attempt[name] * left for name in ("paid_s", "useful_s", "cost_usd") if attempt[name] is not None
            }
            yield key, {**attempt, **cut, "started_at": since}
