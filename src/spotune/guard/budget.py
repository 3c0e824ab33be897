"""The budget limit: what the run has cost as far as its machine knows, and whether the run has to stop.

    spent = earlier attempts + (now - this machine's start) x nodes x the frozen price of its place

An earlier attempt counts by its bill; without a bill from its claim to its last event, plus the time that this machine
was up before its own claim. A machine that never claimed an attempt counts by its bill. Time that only the engine sees
(a machine that waits to be found lost) is in the bill once somebody has asked for the cost. The report uses the same
price (core/money.py).
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from spotune.core.errors import BadRecord
from spotune.core.keys import Keys, attempt_number
from spotune.core.money import HOUR_S, WARN_AT, claimed_place, price_of, usd
from spotune.core.records import AttemptRecord, Bill, Record, RunRecord, check_paid
from spotune.core.store import Store
from spotune.guard.journal import Clock, Context, Journal, log
from spotune.guard.restore import last_event
from spotune.guard.save_schedule import SaveCost

Kind = TypeVar("Kind", bound=Record)


@dataclass(frozen=True)
class Budget:
    """What the run may spend, and how fast it spends; US dollars."""

    limit_usd: float
    earlier_usd: float  # the cost of the attempts before this one
    usd_per_s: float  # of all machines of this attempt together
    paid_since: float  # epoch seconds
    month_of: str = ""  # whose monthly budget left the run so much; empty for the run's own budget

    def __str__(self) -> str:
        amount = usd(self.limit_usd)
        return f"the {amount} that {self.month_of} had left this month" if self.month_of else f"the budget of {amount}"

    def spent_usd(self, now: float) -> float:
        return self.earlier_usd + max(0.0, now - self.paid_since) * self.usd_per_s


class BudgetLimit:
    """Checks the budget while training runs; ``reached`` once training has to stop for it."""

    def __init__(self, budget: Budget | None, journal: Journal, save_cost: SaveCost, clock: Clock = time.time) -> None:
        self._budget, self._journal, self._save_cost, self._clock = budget, journal, save_cost, clock
        self._is_warned = self.reached = False

    def check(self) -> bool:
        """Returns whether to stop now, so that the stop itself is paid for too; logs once that the limit is near."""
        budget, now = self._budget, self._clock()
        if budget is None or self._journal.progress.phase == "teardown":  # all steps are made: only the result is left
            return False
        spent_usd = budget.spent_usd(now)
        if not self._is_warned and spent_usd >= WARN_AT * budget.limit_usd:
            self._is_warned = True
            self._journal.write("budget", spent_usd=round(spent_usd, 6), budget_usd=budget.limit_usd)
            log(f"{spent_usd / budget.limit_usd:.0%} of {budget} used up")
        measured = self._save_cost.record
        stop_s = sum(measured.get(name, 0.0) for name in ("step_s", "stall_s", "write_s", "send_s"))
        self.reached = budget.spent_usd(now + stop_s) >= budget.limit_usd
        return self.reached

    def reason(self, step: int) -> str:
        assert self._budget
        spent = usd(self._budget.spent_usd(self._clock()))
        return f"{str(self._budget).removeprefix('the ')} used up at step {step}: {spent} spent"


def read_budget(context: Context) -> Budget | None:
    run, record = context.run, context.record
    if run.wall_usd is None:
        return None
    since = min(record.claimed_at, paid_since(record.infra, run.kind, context.environ) or record.claimed_at)
    earlier = _earlier_usd(context.store, context.keys, run, record.attempt, record.claimed_at - since)
    return Budget(run.wall_usd, earlier, _usd_per_s(run, record), since, "" if run.budget_usd else run.month_of)


def paid_since(infra: str, kind: str, environ: Mapping[str, str]) -> float | None:
    """Returns when this machine began to cost something, in epoch seconds; None if that is unknown.

    A managed job owns its machine, which counts from its first process, on Slurm from the allocation. On a dev cluster
    and on this machine a run pays only for its own process.
    """
    if infra == "slurm":
        started = environ.get("SLURM_JOB_START_TIME", "")
        return float(started) if started.isdigit() and kind != "dev" else _process_started_at(os.getpid())
    return _process_started_at(os.getpid() if kind == "dev" or infra in ("", "local") else 1)


def _process_started_at(pid: int) -> float | None:
    """Reads field 22 of ``/proc/PID/stat`` (proc(5)): clock ticks since the machine's boot."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        up_s = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return time.time() - (up_s - int(fields[19]) / os.sysconf("SC_CLK_TCK"))


def _earlier_usd(store: Store, keys: Keys, run: RunRecord, attempt: int, lead_s: float) -> float:
    numbers = [attempt_number(name) or 0 for name in store.folders(keys.attempts)]
    claimed = sum(_attempt_usd(store, keys, run, number, lead_s) for number in numbers if 0 < number < attempt)
    lost = (_read(store, Bill, key) for key in store.keys(keys.lost))
    return claimed + sum(_billed_usd(run, bill) for bill in lost if bill)


def _billed_usd(run: RunRecord, bill: Bill, claim: AttemptRecord | None = None) -> float:
    """Uses the bill's own price, else that of the place that the machine's claim names."""
    seconds = max(0.0, bill.ended_at - bill.started_at)
    if claim and not bill.price_row:
        return seconds * _usd_per_s(run, claim)
    hourly = bill.price_row.price_usd_per_hour if bill.price_row else _dearest(run)
    return seconds / HOUR_S * max(1, bill.nodes) * hourly


def _attempt_usd(store: Store, keys: Keys, run: RunRecord, attempt: int, lead_s: float) -> float:
    bill, record = _read(store, Bill, keys.bill(attempt)), _read(store, AttemptRecord, keys.attempt(attempt))
    if bill:
        return _billed_usd(run, bill, record)
    if record is None:  # lost before it could claim: only a bill counts it
        return 0.0
    ended_at = float(last_event(store, keys, attempt).get("t") or record.claimed_at)
    return (max(0.0, ended_at - record.claimed_at) + lead_s) * _usd_per_s(run, record)


def _read(store: Store, kind: type[Kind], key: str) -> Kind | None:
    """Returns None for a record that is missing or unreadable; the report does the same."""
    try:
        if (data := store.read(key)) is not None:
            record = kind.from_bytes(data, key)
            check_paid(record, key)
            return record
    except BadRecord as error:
        log(f"left out of the budget: {error}")
    return None


def _usd_per_s(run: RunRecord, record: AttemptRecord) -> float:
    """Uses the dearest row if none was frozen for the place, so that spending is not understated."""
    rows = run.price_rows()
    price = price_of(claimed_place(record, run, rows), rows)
    return record.num_nodes * (price.price_usd_per_hour if price else _dearest(run)) / HOUR_S


def _dearest(run: RunRecord) -> float:
    return max((row.price_usd_per_hour for row in run.price_rows()), default=0.0)
