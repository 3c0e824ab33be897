"""A dev cluster's paid time, split among the runs that were on it; the rest is idle, the owner's. Pure.

At any instant a run has the part of the cluster's GPUs that it asked for; one that asked for none, and any on a machine
without GPUs, has its nodes whole. Where runs together ask for more than there is, each has proportionally less.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from spotune.core.clusters import ClusterRecord
from spotune.core.money import HOUR_S, cost_usd
from spotune.core.records import PriceRow
from spotune.cost.account import gpus_of

_LEAST_PART = 1e-9  # less is what sums of thirds leave over


@dataclass(frozen=True)
class Use:
    """An attempt on a cluster.

    Attributes:
        key: whose it is.
        ended_at: None while it runs.
        gpu_share: GPUs of each node, 0.5 for half of one; 0: not said.
    """

    key: Any
    cluster: str
    started_at: float
    ended_at: float | None
    gpu_share: float = 0.0
    nodes: int = 1


@dataclass(frozen=True)
class Share:
    """``paid_s``: seconds of the whole cluster; ``cost_usd`` None: no price is known."""

    key: Any
    paid_s: float
    cost_usd: float | None


@dataclass(frozen=True)
class Idle:
    """Paid time in which no run had this part of a cluster: above 0, and at most 1."""

    started_at: float
    ended_at: float
    part: float


@dataclass(frozen=True)
class Split:
    """A cluster's time. ``shares`` and idle add up to ``paid_s`` and ``cost_usd``.

    Attributes:
        idle: the pieces of ``idle_s``, in order.
        idle_s: seconds of the whole cluster.
        idle_since: since when no run has been on it; None while one is, and once it is not up.
        idle_usd_per_hour: what the part that no run has burns now; 0 once it is not up, None without a price.
    """

    cluster: ClusterRecord
    paid_s: float
    cost_usd: float | None
    shares: tuple[Share, ...]
    idle: tuple[Idle, ...]
    idle_s: float
    idle_usd: float | None
    idle_since: float | None
    idle_usd_per_hour: float | None


def split(cluster: ClusterRecord, uses: Sequence[Use]) -> Split:
    """Divides what was paid for a cluster among its uses; what of them lies outside its paid spans is nobody's."""
    seconds, idle, paid_s = [0.0] * len(uses), list[Idle](), 0.0
    parts = [part_of(cluster, use.gpu_share, use.nodes) for use in uses]
    for start, end in cluster.intervals():
        paid_s += end - start
        within = [(max(use.started_at, start), min(_end(use), end)) for use in uses]
        cuts = sorted({start, end, *(at for piece in within if piece[0] < piece[1] for at in piece)})
        for began, until in pairwise(cuts):
            present = [index for index, (first, last) in enumerate(within) if first <= began and until <= last]
            asked = sum(parts[index] for index in present)
            for index in present:
                seconds[index] += (until - began) * parts[index] / max(1.0, asked)
            _leave(idle, began, until, 1.0 - asked)
    shares = [Share(use.key, spent, _usd(cluster, spent)) for use, spent in zip(uses, seconds, strict=True)]
    idle_s = sum((piece.ended_at - piece.started_at) * piece.part for piece in idle)
    since, free = _now(cluster, uses, parts)
    return Split(
        cluster=cluster,
        paid_s=paid_s,
        cost_usd=_usd(cluster, paid_s),
        shares=tuple(shares),
        idle=tuple(idle),
        idle_s=idle_s,
        idle_usd=_usd(cluster, idle_s),
        idle_since=since,
        idle_usd_per_hour=_usd(cluster, HOUR_S * free),
    )


def split_all(clusters: Sequence[ClusterRecord], uses: Sequence[Use], since: float = 0.0) -> list[Split]:
    """Every cluster's split, of what was paid since then. A use has a share of nothing where it had all before."""
    of_cluster: dict[str, list[Use]] = {cluster.key: [] for cluster in clusters}
    for use in uses:
        if (home := home_of(clusters, use.cluster, use.started_at)) and _is_within(use, home):
            of_cluster[home.key].append(use)
    return [split(_after(cluster, since), of_cluster[cluster.key]) for cluster in clusters]


def _after(cluster: ClusterRecord, since: float) -> ClusterRecord:
    spans = [[max(start or 0.0, since), end] for start, end in cluster.spans if end is None or end > since]
    return replace(cluster, spans=spans)


def part_of(cluster: ClusterRecord, gpu_share: float, nodes: int) -> float:
    """The part of a cluster that a run asks for, above 0 and at most 1."""
    gpus = gpus_of(cluster.accelerators)[1]
    of_node = min(1.0, gpu_share / gpus) if gpus > 0 and gpu_share > 0 else 1.0
    return of_node * min(1.0, max(1, nodes) / max(1, cluster.nodes))


def home_of(clusters: Sequence[ClusterRecord], name: str, at: float) -> ClusterRecord | None:
    """Of the clusters of a name the one that was there then: the last that had been launched."""
    named = [cluster for cluster in clusters if cluster.name == name and cluster.launched_at <= at]
    return max(named, key=lambda cluster: cluster.launched_at, default=None)


def price_of_part(cluster: ClusterRecord, gpu_share: float) -> PriceRow | None:
    """The frozen price of one node, of which a run has only the GPUs that it asked for; None where none is known."""
    row, part = cluster.price_row, part_of(cluster, gpu_share, cluster.nodes)
    if row is None:
        return None
    gpu, gpus = gpus_of(cluster.accelerators)
    accelerators = f"{gpu}:{gpus * part:g}" if gpus else ""
    source = row.source if part == 1.0 else f"{row.source}, {part:.0%} of {cluster.name}"
    return replace(row, accelerators=accelerators, price_usd_per_hour=row.price_usd_per_hour * part, source=source)


def _leave(idle: list[Idle], began: float, until: float, part: float) -> None:
    """Adds a piece to what was idle, or makes the last one longer."""
    if part < _LEAST_PART:
        return
    if idle and (idle[-1].ended_at, idle[-1].part) == (began, part):
        began = idle.pop().started_at
    idle.append(Idle(began, until, part))


def _is_within(use: Use, cluster: ClusterRecord) -> bool:
    return any(use.started_at < end and start < _end(use) for start, end in cluster.intervals())


def _now(cluster: ClusterRecord, uses: Sequence[Use], parts: Sequence[float]) -> tuple[float | None, float]:
    """(since when no run is on it, the part of it that no run has), where it is up."""
    if not cluster.is_up or not (spans := cluster.intervals()):
        return None, 0.0
    start, now = spans[-1]
    asked = sum(part for use, part in zip(uses, parts, strict=True) if use.started_at < now <= _end(use))
    ends = [min(_end(use), now) for use in uses if use.started_at < now]
    return (max([start, *ends]) if asked == 0 else None), max(0.0, 1.0 - asked)


def _end(use: Use) -> float:
    return float("inf") if use.ended_at is None else use.ended_at


def _usd(cluster: ClusterRecord, seconds: float) -> float | None:
    return cost_usd(seconds, max(1, cluster.nodes), cluster.price_row)
