"""What was paid since a time, whenever it was submitted: attempts and dev clusters, cut there."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from spotune.contracts.store import Store
from spotune.cost.clusters import charged, idle_of, splits_of
from spotune.cost.groups import COLUMNS, Idle, Run
from spotune.cost.index import Index

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Paid:
    """Runs that were paid for since then, or submitted; what of their attempts lies in that time; and idle clusters.

    What a run would have cost on demand is known of the whole run only: of one that began earlier it is None.
    """

    runs: Sequence[Run]
    attempts: Sequence[Run]
    idle: Sequence[Idle]


def paid_since(store: Store, index: Index, since: float, warn: Warn) -> Paid:
    """``store``: the bucket with the clusters' records; ``warn`` is told of one that cannot be read."""
    splits = splits_of(store, index, since, warn)
    attempts = list(charged(clip(index.attempts(since, COLUMNS), since), splits))
    seen = {key for key, _ in attempts}
    runs: list[Run] = []
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


def clip(attempts: Iterable[Run], since: float) -> Iterator[Run]:
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
