"""From a workspace to reports: which runs have to be read again, and reading them."""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import cpu_count
from typing import Any, TypeVar

from spotune.core.errors import BadRecord, InputError, StoreError
from spotune.core.keys import LATE, RUN_ID, RUNS, Keys
from spotune.core.money import WARN_AT, usd
from spotune.core.records import RunRecord
from spotune.core.store import FOR_VERBS, Store
from spotune.cost.account import build_accounts, leave_bills
from spotune.cost.dev_clusters import paid_since
from spotune.cost.export import indexed_attempts, name_of, run_row, start_of
from spotune.cost.index import Index, IndexEntry, Key, index_file, parallel_map, read_run_data, use_index
from spotune.cost.report import build_report, estimates
from spotune.launch.engine import ACTIVE, JobStatus, PaidInterval, is_infra
from spotune.launch.plan import BUDGET_FLAG, Plan
from spotune.launch.settings import MonthlyBudget, Workspace
from spotune.launch.status import LAST_SEEN, certify_if_reachable, find_run, jobs_of, read_run

# Which runs have to be read again, and reading them: what cannot have changed is taken from the index.
#
# A run stays as it is indexed once it does not run any more, every machine of its is off, a dev cluster that it was on
# has a price, and nothing of its records in the bucket has come or gone since; of a certified one whose machines the
# engine has accounted for, not even that is looked at.

GONE = "removed"  # in the place of a fingerprint: there is no record of the run any more
MANY = 200  # from here on it pays to start processes: reading a run is work for the CPU
CHUNK = 50

Progress = Callable[[int, int], None]  # runs read, runs to read
Item = TypeVar("Item")


@dataclass(frozen=True)
class Failure:
    """A run that could not be read, and why."""

    key: Key
    why: str


Found = IndexEntry | Failure | None  # None: there is no such run


@dataclass(frozen=True)
class Known:
    """What the engines say: jobs by bucket and run, and whether all engines did."""

    jobs: Mapping[Key, JobStatus]
    is_whole: bool


def refresh(
    workspace: Workspace, index: Index, now: float, warn: Callable[[str], None], progress: Progress | None = None
) -> None:
    """Brings the index up to the bucket and the engines. ``warn`` is told of what could not be read."""
    bucket = workspace.env.bucket
    known = _ask_engines(workspace, warn)
    wanted = {(bucket, name) for name in workspace.store().folders(RUNS) if RUN_ID.fullmatch(name)}
    wanted |= {key for key, job in known.jobs.items() if key[0] != bucket or job.attempt}  # also without its folder
    indexed = index.keep_only(wanted)
    stale = _stale(workspace, index, wanted, known, warn)
    done = 0
    for size, found in _read(workspace, stale, known, now):
        index.put([one for one in found if isinstance(one, IndexEntry)])
        for message in (line for one in found for line in _lines(one, indexed)):
            warn(message)
        done += size
        if progress:
            progress(done, len(stale))


def _lines(found: Found, indexed: set[Key]) -> list[str]:
    """What has to be said of a run."""
    match found:
        case Failure(key, why):
            return [f"{key[1]} is {'shown as it was' if key in indexed else 'left out'}: {why}"]
        case IndexEntry():
            return [f"{found.run_id} is shown without one of its records: {line}" for line in found.unread]
    return []


def _ask_engines(workspace: Workspace, warn: Callable[[str], None]) -> Known:
    silent: list[str] = []
    jobs = [job for engine in workspace.engines() for job in jobs_of(engine, True, silent.append)]
    for message in silent:
        warn(message)
    return Known({(job.bucket or workspace.env.bucket, job.run_id): job for job in jobs}, is_whole=not silent)


def _late(workspace: Workspace, warn: Callable[[str], None]) -> set[str]:
    try:
        return set(workspace.store().keys(LATE))
    except (InputError, StoreError) as error:
        warn(f"bills that came late are not looked for: {error}")
        return set()


def _stale(
    workspace: Workspace, index: Index, wanted: Iterable[Key], known: Known, warn: Callable[[str], None]
) -> list[Key]:
    """Those of the runs that have to be read, in order."""
    stamps = index.stamps()
    late = _late(workspace, warn)

    def is_active(key: Key) -> bool:
        return key in known.jobs and known.jobs[key].state in ACTIVE

    def is_stale(key: Key) -> bool:
        try:
            return key not in stamps or is_active(key) or stamps[key] != stamp_of(workspace.store(key[0]), key[1])
        except (InputError, StoreError):  # the run's bucket is gone, or its folder cannot be read: that is said next
            return True

    # The others cannot change any more, but for a bill that comes late.
    open_ones = [key for key in wanted if stamps.get(key) != "" or is_active(key) or Keys(key[1]).late in late]
    answers = parallel_map(workspace.env.bucket, is_stale, open_ones)
    return sorted(key for key, stale in zip(open_ones, answers, strict=True) if stale)


def stamp_of(store: Store, run_id: str) -> str:
    """A digest of the names of a run's records: they are never rewritten, so that a change is a name more or less."""
    keys = Keys(run_id)
    there = {f"{keys.root}/{name}" for name in store.names(keys.root)}  # spares asking for what is not
    folders = [folder for folder in (keys.attempts, keys.lost, keys.revisions) if f"{folder}/" in there]
    names = [key for folder in folders for key in store.keys(folder)]
    names += [keys.completed] if f"{keys.output}/" in there and store.exists(keys.completed) else []
    names += [key for key in (keys.failed, keys.paused, keys.cancelled) if key in there]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def _read(
    workspace: Workspace, stale: Sequence[Key], known: Known, now: float
) -> Iterator[tuple[int, Sequence[Found]]]:
    """A chunk of runs at a time: how many they were, and what was found of them."""
    with_engine = [key for key in stale if key in known.jobs]
    rest = [key[1] for key in stale if key not in known.jobs]
    bucket = workspace.env.bucket
    for keys in _chunks(with_engine):
        yield len(keys), parallel_map(bucket, lambda key: _read_known(workspace, key, known.jobs[key], now), keys)
    if len(rest) < MANY:
        for run_ids in _chunks(rest):
            yield len(run_ids), read_chunk(bucket, run_ids, known.is_whole, now)
        return
    from concurrent.futures import ProcessPoolExecutor  # here: most calls have nothing to read, and do not wait for it
    from multiprocessing import get_context

    with ProcessPoolExecutor(cpu_count(), mp_context=get_context("spawn")) as processes:
        futures = [
            (len(run_ids), processes.submit(read_chunk, bucket, run_ids, known.is_whole, now))
            for run_ids in _chunks(rest)
        ]
        for size, future in futures:
            yield size, future.result()


def _chunks(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    return (items[at : at + CHUNK] for at in range(0, len(items), CHUNK))


def read_chunk(bucket: str, run_ids: Sequence[str], is_whole: bool, now: float) -> list[Found]:
    """Runs that no engine here knows, from their bucket alone."""
    store = Store(bucket, FOR_VERBS)

    def read(run_id: str) -> Found:
        try:
            stamp = stamp_of(store, run_id)
            status = read_run(store, run_id, now)
            return entry_of(store, status, [], stamp, is_whole, now) if status else None
        except (InputError, StoreError) as error:
            return Failure((bucket, run_id), str(error))

    return parallel_map(bucket, read, run_ids)


def _read_known(workspace: Workspace, key: Key, job: JobStatus, now: float) -> Found:
    history: Sequence[PaidInterval] = []
    try:
        store = workspace.store(key[0])
        history = workspace.infra(job.infra).history(key[1])
        stamp = stamp_of(store, key[1])
        status = certify_if_reachable(job, store)
        entry = entry_of(store, status, history, stamp, True, now)
        # A machine that is lost right after the certificate is followed by another.
        return replace(entry, settled=False) if job.state in ACTIVE else entry
    except InputError as error:
        is_here = key[0] == workspace.env.bucket  # else: the engine remembers a run whose bucket is gone
        return Failure(key, str(error)) if is_here and history else None
    except StoreError as error:
        return Failure(key, str(error))


def entry_of(
    store: Store, status: JobStatus, history: Sequence[PaidInterval], stamp: str, is_whole: bool, now: float
) -> IndexEntry:
    """A run's entry.

    ``is_whole``: whether all engines answered, so that what no row was found for has none here.
    """
    report = report_of(store, status, history, now, is_drawn=False)
    unread = report["unread"]  # it may be mended, under the same name
    is_off = status.state not in ACTIVE and all(attempt["ended_at"] is not None for attempt in report["attempts"])
    is_reconciled = not report["unreconciled_s"]
    is_claimed = all(attempt["claimed"] for attempt in report["attempts"])
    is_final = is_off and is_reconciled and is_claimed and status.state == "SUCCEEDED"
    is_booked = all(attempt["cost_usd"] is not None for attempt in report["attempts"] if attempt["cluster"])
    settled = is_off and (is_whole or is_reconciled) and is_booked and not unread
    totals, attempts = run_row(report), indexed_attempts(report)
    return IndexEntry(store.url, status.run_id, "" if is_final else stamp, settled, totals, attempts, unread)


def report_of(
    store: Store, status: JobStatus, history: Sequence[PaidInterval], now: float, is_drawn: bool = True
) -> dict[str, Any]:
    """A run's report, with its ``bucket``; bills that are due are left there on the way."""
    with _one_shape(status.run_id):
        run_data = read_run_data(store, status.run_id, history, *([_stand_in(status)] if history else []))
        if history and run_data.run.config_sha256 == GONE and status.state in ACTIVE:
            gone = (
                f"{Keys(status.run_id).run}: missing, its folder was removed; what was paid for it is the engine's word"
            )
            run_data = replace(run_data, unread=[*run_data.unread, gone])
        is_heard = not status.reason.startswith(LAST_SEEN)  # else nobody knows whether its machine is still on
        accounts = build_accounts(run_data, now, status.state if is_heard else None)
        leave_bills(store, run_data, accounts, is_over=status.state not in ACTIVE)
        report = build_report(run_data, status.state, now, accounts, is_drawn, is_heard)
        return {**report, "bucket": store.url, "estimates": estimates(run_data, store.url), "reason": status.reason}


def _stand_in(status: JobStatus) -> RunRecord:
    """What the engine knows of a run whose folder was removed: no config, and no prices."""
    return RunRecord(
        run_id=status.run_id,
        created_at=status.submitted_at,
        user=status.user,
        infra=status.infra,
        priority=status.priority,
        config_path="",
        config={},
        config_sha256=GONE,
        data_sha256="",
    )


@contextmanager
def _one_shape(run_id: str) -> Iterator[None]:
    """A bucket is shared: what somebody else wrote there in a shape that nobody expects costs a line, not the list."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise BadRecord(f"{Keys(run_id).root}: a record is not in the shape that it should be: {error!r}") from error


# From a workspace to reports: asks the engine and the bucket, and leaves the bills that are due.

Result = TypeVar("Result")


def report_run(workspace: Workspace, run_id: str, clock: Callable[[], float] = time.time) -> dict[str, Any]:
    """One run's report. Raises InputError, naming the nearest known one, for a run that nobody knows."""
    status = find_run(workspace, run_id, clock)
    # No rows where the engine's history is out of this machine's reach, or the engine does not answer.
    is_asked = is_infra(status.infra) and not status.reason.startswith(LAST_SEEN)
    history = workspace.infra(status.infra).history(run_id) if is_asked else []
    return report_of(workspace.store(status.bucket), status, history, clock())


def all_runs(
    workspace: Workspace,
    take: Callable[[Index], Result],
    clock: Callable[[], float] = time.time,
    warn: Callable[[str], None] = lambda message: None,
    progress: Progress | None = None,
    asks_clusters: bool = False,
) -> Result:
    """What ``take`` takes from the index, once that is up to date.

    Args:
        warn: is told of an engine that does not answer; its runs are then as the bucket has them.
        asks_clusters: SkyPilot is asked first of the dev clusters that were still up when it was last.
    """
    if asks_clusters:
        from spotune.launch.skypilot.clusters import book_open  # here: most reports have nothing to book

        book_open(workspace, warn)

    def use(index: Index) -> Result:
        refresh(workspace, index, clock(), warn, progress)
        return take(index)

    return use_index(index_file(workspace.env.cache, workspace.env.bucket), use, warn)


# Budgets before anything is spent: may this run start or go on, and how much is left to it.
#
# A month's budget is kept by whoever launches: what its owner's runs in this bucket have cost in this month, from the
# index, and what those under way may still spend of a ``--budget``, is not there for another run. A run without one
# gets what is left as its wall; it promises nothing, so that several of them at once can pass the month's budget
# together, and the next launch is refused.

_LEAST_USD = 1e-9  # less is what sums of cents leave over


@dataclass(frozen=True)
class Remaining:
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

    left: tuple[Remaining, ...]
    totals: Mapping[str, Any] | None = None

    @property
    def is_active(self) -> bool:
        return self.totals is not None and self.totals["state"] in ACTIVE

    @property
    def cost_usd(self) -> float:
        return (self.totals and self.totals["cost_usd"]) or 0.0

    @property
    def tightest(self) -> Remaining | None:
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
) -> Remaining:
    kind, _, name = budget.owner.partition(" ")
    promises = [amount for run, amount in promised if run[kind] == name]
    return Remaining(
        budget, month, sum(amount for run, amount in spent if run[kind] == name), sum(promises), len(promises)
    )


def _typed(amount_usd: float, places: int) -> str:
    """No more than the amount, as a flag takes it: ``1999.00``."""
    return f"{math.floor((amount_usd + _LEAST_USD) * 10**places) / 10**places:.{places}f}"


def _runs(number: int) -> str:
    return "1 run" if number == 1 else f"{number} runs"
