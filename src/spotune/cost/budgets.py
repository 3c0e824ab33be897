"""Budgets before anything is spent: may this run start or go on, and how much is left to it.

A month's budget is kept by whoever launches: what its owner's runs in this bucket have cost in this month, from the
index, and what those under way may still spend of a ``--budget``, is not there for another run. A run without one gets
what is left as its wall; it promises nothing, so that several of them at once can pass the month's budget together,
and the next launch is refused.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from spotune.core.errors import InputError
from spotune.core.money import WARN_AT, usd
from spotune.cost.clusters import paid_since
from spotune.cost.collect import Progress, all_runs
from spotune.cost.index import Index
from spotune.cost.rows import name_of, start_of
from spotune.launch.engine import ACTIVE
from spotune.launch.plan import BUDGET_FLAG, Plan
from spotune.launch.settings import MonthlyBudget, Workspace

_LEAST_USD = 1e-9  # less is what sums of cents leave over


@dataclass(frozen=True)
class Left:
    """What a month's budget still has, US dollars.

    Attributes:
        month: ``2026-11``.
        spent_usd: by all runs of its owner, and by dev clusters of its owner's that were idle, in this month.
        promised_usd: what the ``runs`` of its owner that are under way may still spend of their own budgets.
    """

    budget: MonthlyBudget
    month: str
    spent_usd: float
    promised_usd: float
    runs: int

    @property
    def usd(self) -> float:
        return max(0.0, self.budget.limit_usd - self.spent_usd - self.promised_usd)

    def __str__(self) -> str:
        """``user alice has $12.00 left of $200.00 in 2026-11: $180.00 spent, $8.00 promised to 1 run``."""
        promised = f", {usd(self.promised_usd)} promised to {_runs(self.runs)}" if self.runs else ""
        of = f"{usd(self.budget.limit_usd)} in {self.month}: {usd(self.spent_usd)} spent{promised}"
        return f"{self.budget.owner} has {usd(self.usd)} left of {of}"

    @property
    def is_low(self) -> bool:
        return self.spent_usd + self.promised_usd >= WARN_AT * self.budget.limit_usd


@dataclass(frozen=True)
class Month:
    """The budgets that a run comes out of, and where the run itself stands: its totals in the index, if it is there."""

    left: tuple[Left, ...]
    totals: Mapping[str, Any] | None = None

    @property
    def is_active(self) -> bool:
        return self.totals is not None and self.totals["state"] in ACTIVE

    @property
    def cost_usd(self) -> float:
        return (self.totals and self.totals["cost_usd"]) or 0.0

    @property
    def tightest(self) -> Left | None:
        return min(self.left, key=lambda left: left.usd, default=None)

    def wall_usd(self, wanted_usd: float | None) -> float | None:
        """How far the run may go without a budget of its own; None: without end, or as far as its own budget.

        Raises InputError, with the figures, for what these budgets cannot pay.
        """
        left = self.tightest
        if left is None:
            return None
        where, key = left.budget.file, left.budget.key
        if left.usd <= 0:
            raise InputError(where, f"{left}", key=key, remedy="wait for the next month, or raise it")
        if wanted_usd is None:
            return self.cost_usd + left.usd
        if wanted_usd > self.cost_usd + left.usd + _LEAST_USD:
            what = f"{usd(wanted_usd)} is more than is left: {left}"
            most = _typed(self.cost_usd + left.usd, places=2 if left.usd >= 0.01 else 6)
            raise InputError(BUDGET_FLAG, what, remedy=f"{BUDGET_FLAG} {most} at most, or raise {key}")
        return None


def read_month(
    workspace: Workspace,
    run_id: str,
    user: str,
    team: str,
    now: float,
    warn: Callable[[str], None],
    progress: Progress | None = None,
) -> Month:
    """What is left of the budgets of that user and that team; the run's own promise is not counted."""
    budgets = workspace.settings.budgets.of(user, team)
    if not budgets:
        return Month(())
    since = start_of("month", now)

    def take(index: Index) -> Month:
        totals = dict(index.runs(0.0))
        paid = paid_since(workspace.store(), index, since, warn)
        charges = [
            *((totals[key], attempt) for key, attempt in paid.attempts),
            *((piece, piece) for piece in paid.idle),
        ]
        spent = [(owner, charge["cost_usd"] or 0.0) for owner, charge in charges]
        promised = [
            (run, max(0.0, run["budget_usd"] - (run["cost_usd"] or 0.0)))
            for key, run in totals.items()
            if run["budget_usd"] is not None and run["state"] in ACTIVE and key[1] != run_id
        ]
        left = tuple(_left(budget, name_of("month", since), spent, promised) for budget in budgets)
        return Month(left, totals.get((workspace.env.bucket, run_id)))

    return all_runs(workspace, take, clock=lambda: now, warn=warn, progress=progress, asks_clusters=True)


def within_month(plan: Plan, month: Month) -> Plan:
    """The plan with the wall that the month's budgets set it, and a word on them; raises InputError where none is left.

    What has no price spends nothing of them, and what is under way already is not judged again.
    """
    priced = any(offer.price_usd_per_hour > 0 for offer in plan.offers)
    if not month.left or not priced or month.is_active:
        return plan
    wall_usd = month.wall_usd(plan.record.budget_usd)
    notes = [f"{left}" for left in month.left if left.is_low or left == month.tightest]
    month_of = "" if wall_usd is None or month.tightest is None else month.tightest.budget.owner
    record = replace(plan.record, month_usd=wall_usd, month_of=month_of)
    return replace(plan, record=record, notes=(*plan.notes, *notes))


def check_wall(report: Mapping[str, Any], wanted_usd: float | None) -> None:
    """Raises InputError for a run that would only pause again: its wall, or the wanted one, is reached already.

    One that has paused at its own wall has, though it stopped before that, by what stopping takes.
    """
    limit_usd = report["budget_usd"] if wanted_usd is None else wanted_usd
    spent_usd = report["cost_usd"]
    if limit_usd is None or spent_usd is None:
        return
    is_at_wall = report["state"] == "PAUSED" and limit_usd <= (report["budget_usd"] or 0.0)
    if spent_usd < limit_usd and not is_at_wall:
        return
    remedy = f"spotune resume {report['run_id']} --budget, above {usd(max(spent_usd, limit_usd))}"
    raise InputError(report["run_id"], f"has cost {usd(spent_usd)} of {usd(limit_usd)}", key="budget", remedy=remedy)


def _left(
    budget: MonthlyBudget,
    month: str,
    spent: Sequence[tuple[Mapping[str, Any], float]],
    promised: Sequence[tuple[Mapping[str, Any], float]],
) -> Left:
    kind, _, name = budget.owner.partition(" ")
    promises = [amount for run, amount in promised if run[kind] == name]
    return Left(budget, month, sum(amount for run, amount in spent if run[kind] == name), sum(promises), len(promises))


def _typed(amount_usd: float, places: int) -> str:
    """No more than the amount, as a flag takes it: ``1999.00``."""
    return f"{math.floor((amount_usd + _LEAST_USD) * 10**places) / 10**places:.{places}f}"


def _runs(number: int) -> str:
    return "1 run" if number == 1 else f"{number} runs"
