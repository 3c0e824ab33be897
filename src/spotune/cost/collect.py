"""Makes reports from a workspace: asks the engines and the bucket, keeps the index, and checks budgets."""

import hashlib
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import cpu_count
from typing import Any, TypeVar

from spotune.core.errors import BadRecord, InputError, StoreError
from spotune.core.keys import LATE, RUN_ID, RUNS, Keys
from spotune.core.money import WARN_AT, usd
from spotune.core.records import RunRecord
from spotune.core.store import FOR_VERBS, Store
from spotune.cost.account import build_accounts, write_due_bills
from spotune.cost.dev_clusters import Warn, paid_since
from spotune.cost.export import indexed_attempts, name_of, run_row, start_of
from spotune.cost.index import Index, IndexEntry, Key, index_file, parallel_map, read_run_data, use_index
from spotune.cost.report import build_report, estimates
from spotune.launch.engine import ACTIVE, JobStatus, PaidInterval, is_infra
from spotune.launch.plan import BUDGET_FLAG, Plan
from spotune.launch.settings import MonthlyBudget, Workspace
from spotune.launch.status import LAST_SEEN, certify_if_reachable, find_run, jobs_of, read_run

GONE = "removed"  # in place of a config's fingerprint: the run's record is gone
MANY = 200  # from here on processes are worth their start: reading a run is work for the CPU
CHUNK = 50

Progress = Callable[[int, int], None]  # runs read, runs to read
Result = TypeVar("Result")


Failure = tuple[Key, str]  # a run that could not be read, and why
Found = IndexEntry | Failure | None  # None: there is no such run


# One run.


def report_run(workspace: Workspace, run_id: str) -> dict[str, Any]:
    """Returns one run's report. Raises InputError, with the nearest known name, for an unknown run."""
    status = find_run(workspace, run_id)
    # No rows if the engine's history is out of this machine's reach, or if the engine does not answer.
    is_asked = is_infra(status.infra) and not status.reason.startswith(LAST_SEEN)
    history = workspace.infra(status.infra).history(run_id) if is_asked else []
    return report_of(workspace.store(status.bucket), status, history, time.time())


def report_of(
    store: Store, status: JobStatus, history: Sequence[PaidInterval], now: float, is_drawn: bool = True
) -> dict[str, Any]:
    """Returns a run's report, with its ``bucket``, and writes the bills that are due.

    A bucket is shared: a record of an unexpected shape raises BadRecord, which costs a line and not the list of runs.
    """
    keys, is_active = Keys(status.run_id), status.state in ACTIVE
    try:
        run_data = read_run_data(store, status.run_id, history, _stand_in(status) if history else None)
        if history and run_data.run.config_sha256 == GONE and is_active:
            gone = f"{keys.run}: missing, its folder was removed; what was paid for it comes from the engine"
            run_data = replace(run_data, unread=[*run_data.unread, gone])
        is_state_known = not status.reason.startswith(LAST_SEEN)  # otherwise its machine may be on or off
        accounts = build_accounts(run_data, now, status.state if is_state_known else None)
        write_due_bills(store, run_data, accounts, is_over=not is_active)
        report = build_report(run_data, status.state, now, accounts, is_drawn, is_state_known)
        return {**report, "bucket": store.url, "estimates": estimates(run_data, store.url), "reason": status.reason}
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise BadRecord(f"{keys.root}: a record does not have the expected shape: {error!r}") from error


def _stand_in(status: JobStatus) -> RunRecord:
    """Returns what the engine knows of a run whose folder was removed: no config, and no prices."""
    facts = {name: getattr(status, name) for name in ("run_id", "user", "infra", "priority")}
    facts |= {"created_at": status.submitted_at, "config_path": "", "config": {}}
    return RunRecord(**facts, config_sha256=GONE, data_sha256="")


# All runs: the index, brought up to date. A run is not read again if it does not run any more, all its machines are
# off, its dev cluster has a price, and no record of it in the bucket has come or gone. The records of a certified run
# whose machines the engine has accounted for are not even listed.


def all_runs(
    workspace: Workspace,
    use: Callable[[Index], Result],
    now: float | None = None,
    warn: Warn = lambda message: None,
    progress: Progress | None = None,
    asks_clusters: bool = False,
) -> Result:
    """Returns what ``use`` makes of the index, once that is up to date.

    Args:
        now: epoch seconds; the time of the call if missing.
        warn: gets a line for each engine that does not answer; its runs are then as the bucket has them.
        asks_clusters: first asks SkyPilot about the dev clusters that were up when it was last asked.
    """
    if asks_clusters:
        from spotune.launch.skypilot.clusters import book_open  # here: most reports have nothing to book

        book_open(workspace, warn)

    def use_fresh(index: Index) -> Result:
        refresh(workspace, index, time.time() if now is None else now, warn, progress)
        return use(index)

    return use_index(index_file(workspace.env.cache, workspace.env.bucket), use_fresh, warn)


def refresh(workspace: Workspace, index: Index, now: float, warn: Warn, progress: Progress | None = None) -> None:
    """Brings the index up to date with the bucket and the engines. Warns of each run that cannot be read."""
    bucket = workspace.env.bucket
    silent: list[str] = []
    found = [job for engine in workspace.engines() for job in jobs_of(engine, True, silent.append)]
    jobs = {(job.bucket or bucket, job.run_id): job for job in found}
    for message in silent:
        warn(message)
    wanted = {(bucket, name) for name in workspace.store().folders(RUNS) if RUN_ID.fullmatch(name)}
    wanted |= {key for key, job in jobs.items() if key[0] != bucket or job.attempt}  # even if its folder is gone
    indexed = index.keep_only(wanted)
    stale = _stale(workspace, index, wanted, jobs, warn)
    done = 0
    for size, chunk in _read(workspace, stale, jobs, not silent, now):
        index.put([one for one in chunk if isinstance(one, IndexEntry)])
        for one in chunk:
            match one:
                case IndexEntry():
                    for line in one.unread:
                        warn(f"{one.run_id} is shown without one of its records: {line}")
                case key, why:
                    warn(f"{key[1]} is {'shown as it was' if key in indexed else 'left out'}: {why}")
        done += size
        if progress:
            progress(done, len(stale))


def _stale(
    workspace: Workspace, index: Index, wanted: Collection[Key], jobs: Mapping[Key, JobStatus], warn: Warn
) -> list[Key]:
    """Returns the runs that must be read, in order."""
    stamps = index.stamps()
    late: Collection[str] = ()
    try:
        late = set(workspace.store().keys(LATE))
    except (InputError, StoreError) as error:
        warn(f"late bills are not looked for: {error}")
    active = {key for key, job in jobs.items() if job.state in ACTIVE}

    def is_stale(key: Key) -> bool:
        try:
            return key not in stamps or key in active or stamps[key] != stamp_of(workspace.store(key[0]), key[1])
        except (InputError, StoreError):  # the bucket is gone, or the folder is unreadable: reading the run reports it
            return True

    # The other runs cannot change any more, except by a late bill.
    open_ones = [key for key in wanted if stamps.get(key) != "" or key in active or Keys(key[1]).late in late]
    answers = parallel_map(workspace.env.bucket, is_stale, open_ones)
    return sorted(key for key, stale in zip(open_ones, answers, strict=True) if stale)


def stamp_of(store: Store, run_id: str) -> str:
    """Returns a digest of the names of a run's records. Records are never rewritten: only their names change."""
    keys = Keys(run_id)
    there = {f"{keys.root}/{name}" for name in store.names(keys.root)}  # saves requests for missing folders
    folders = [folder for folder in (keys.attempts, keys.lost, keys.revisions) if f"{folder}/" in there]
    names = [key for folder in folders for key in store.keys(folder)]
    names += [keys.completed] if f"{keys.output}/" in there and store.exists(keys.completed) else []
    names += [key for key in (keys.failed, keys.paused, keys.cancelled) if key in there]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def _read(
    workspace: Workspace, stale: Sequence[Key], jobs: Mapping[Key, JobStatus], is_whole: bool, now: float
) -> Iterator[tuple[int, Sequence[Found]]]:
    """Yields a chunk of runs at a time: how many they were, and what was found.

    ``is_whole``: all engines answered, so a run without a row has none on this machine.
    """
    with_engine = [key for key in stale if key in jobs]
    rest = [key[1] for key in stale if key not in jobs]
    bucket = workspace.env.bucket
    for keys in _chunks(with_engine):
        yield len(keys), parallel_map(bucket, lambda key: _read_known(workspace, key, jobs[key], now), keys)
    if len(rest) < MANY:
        for run_ids in _chunks(rest):
            yield len(run_ids), read_chunk(bucket, run_ids, is_whole, now)
        return
    from concurrent.futures import ProcessPoolExecutor  # here: most calls have nothing to read, and do not wait for it
    from multiprocessing import get_context

    with ProcessPoolExecutor(cpu_count(), mp_context=get_context("spawn")) as processes:
        futures = [
            (len(run_ids), processes.submit(read_chunk, bucket, run_ids, is_whole, now)) for run_ids in _chunks(rest)
        ]
        for size, future in futures:
            yield size, future.result()


def _chunks(items: Sequence[Result]) -> Iterator[Sequence[Result]]:
    return (items[at : at + CHUNK] for at in range(0, len(items), CHUNK))


def read_chunk(bucket: str, run_ids: Sequence[str], is_whole: bool, now: float) -> list[Found]:
    """Reads runs that no engine here knows, from their bucket alone."""
    store = Store(bucket, FOR_VERBS)

    def read(run_id: str) -> Found:
        try:
            stamp = stamp_of(store, run_id)
            status = read_run(store, run_id, now)
            return _entry_of(store, status, [], stamp, is_whole, now) if status else None
        except (InputError, StoreError) as error:
            return (bucket, run_id), str(error)

    return parallel_map(bucket, read, run_ids)


def _read_known(workspace: Workspace, key: Key, job: JobStatus, now: float) -> Found:
    history: Sequence[PaidInterval] = []
    try:
        store = workspace.store(key[0])
        history = workspace.infra(job.infra).history(key[1])
        stamp = stamp_of(store, key[1])
        entry = _entry_of(store, certify_if_reachable(job, store), history, stamp, True, now)
        # A machine that is lost right after the certificate is followed by another.
        return replace(entry, settled=False) if job.state in ACTIVE else entry
    except InputError as error:
        is_here = key[0] == workspace.env.bucket  # otherwise the engine remembers a run whose bucket is gone
        return (key, str(error)) if is_here and history else None
    except StoreError as error:
        return key, str(error)


def _entry_of(
    store: Store, status: JobStatus, history: Sequence[PaidInterval], stamp: str, is_whole: bool, now: float
) -> IndexEntry:
    report = report_of(store, status, history, now, is_drawn=False)
    attempts, unread = report["attempts"], report["unread"]  # an unread record may be mended under the same name
    is_off = status.state not in ACTIVE and all(attempt["ended_at"] is not None for attempt in attempts)
    is_reconciled = not report["unreconciled_s"]
    is_final = is_off and is_reconciled and status.state == "SUCCEEDED" and all(one["claimed"] for one in attempts)
    is_priced = all(attempt["cost_usd"] is not None for attempt in attempts if attempt["cluster"])
    settled = is_off and (is_whole or is_reconciled) and is_priced and not unread
    stamp = "" if is_final else stamp
    return IndexEntry(store.url, status.run_id, stamp, settled, run_row(report), indexed_attempts(report), unread)


# Budgets, checked before anything is spent: may this run start or go on, and how much is left for it.
#
# The launching machine enforces a month's budget: what its owner's runs in this bucket have cost in this month, from
# the index, and what runs under way may still spend of a ``--budget``, is not available to another run. A run without
# a budget of its own gets what is left as its limit. It promises nothing, so several such runs at once can exceed the
# month's budget together; the next launch is refused.

_LEAST_USD = 1e-9  # rounding errors of sums of cents are smaller


@dataclass(frozen=True)
class Remaining:
    """What a month's budget still has, US dollars.

    Attributes:
        month: ``2026-11``.
        spent_usd: by all runs of its owner, and by the owner's idle dev clusters, in this month.
        promised_usd: what the owner's ``runs`` under way may still spend of their own budgets.
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
        runs = "1 run" if self.runs == 1 else f"{self.runs} runs"
        promised = f", {usd(self.promised_usd)} promised to {runs}" if self.runs else ""
        of = f"{usd(self.budget.limit_usd)} in {self.month}: {usd(self.spent_usd)} spent{promised}"
        return f"{self.budget.owner} has {usd(self.usd)} left of {of}"

    @property
    def is_low(self) -> bool:
        return self.spent_usd + self.promised_usd >= WARN_AT * self.budget.limit_usd


@dataclass(frozen=True)
class Month:
    """The budgets that pay for a run, and the run's own totals from the index, if it is there."""

    left: tuple[Remaining, ...]
    totals: Mapping[str, Any] | None = None

    @property
    def tightest(self) -> Remaining | None:
        return min(self.left, key=lambda left: left.usd, default=None)

    def wall_usd(self, wanted_usd: float | None) -> float | None:
        """Returns how much a run without a budget of its own may cost in all; None: no limit, or its own budget.

        Raises InputError, with the figures, if these budgets cannot pay for it.
        """
        left = self.tightest
        if left is None:
            return None
        where, key = left.budget.file, left.budget.key
        if left.usd <= 0:
            raise InputError(where, f"{left}", key=key, remedy="wait for the next month, or raise it")
        most_usd = ((self.totals and self.totals["cost_usd"]) or 0.0) + left.usd
        if wanted_usd is None:
            return most_usd
        if wanted_usd > most_usd + _LEAST_USD:
            places = 2 if left.usd >= 0.01 else 6
            most = math.floor((most_usd + _LEAST_USD) * 10**places) / 10**places
            what = f"{usd(wanted_usd)} is more than is left: {left}"
            raise InputError(BUDGET_FLAG, what, remedy=f"{BUDGET_FLAG} {most:.{places}f} at most, or raise {key}")
        return None


def read_month(
    workspace: Workspace, run_id: str, user: str, team: str, now: float, warn: Warn, progress: Progress | None = None
) -> Month:
    """Returns what is left of the budgets of that user and that team; the run's own promise does not count."""
    budgets = workspace.settings.budgets.of(user, team)
    if not budgets:
        return Month(())
    since = start_of("month", now)
    store = workspace.store()
    totals, paid = all_runs(
        workspace,
        lambda index: (dict(index.runs(0.0)), paid_since(store, index, since, warn)),
        now,
        warn,
        progress,
        asks_clusters=True,
    )
    # A run's totals name its user and team, and so does a row of an idle cluster.
    charges = [(totals[key], attempt) for key, attempt in paid.attempts] + [(piece, piece) for piece in paid.idle]
    others = [run for key, run in totals.items() if run["state"] in ACTIVE and key[1] != run_id]
    left = []
    for budget in budgets:
        kind, _, name = budget.owner.partition(" ")
        spent_usd = sum(charge["cost_usd"] or 0.0 for owner, charge in charges if owner[kind] == name)
        limited = [run for run in others if run["budget_usd"] is not None and run[kind] == name]
        promised_usd = sum(max(0.0, run["budget_usd"] - (run["cost_usd"] or 0.0)) for run in limited)
        left.append(Remaining(budget, name_of("month", since), spent_usd, promised_usd, len(limited)))
    return Month(tuple(left), totals.get((workspace.env.bucket, run_id)))


def within_month(plan: Plan, month: Month) -> Plan:
    """Returns the plan with the limit that the month's budgets set, and a note. Raises InputError if none is left.

    A run without a price spends nothing of them, and a run under way is not checked again.
    """
    is_priced = any(offer.price_usd_per_hour > 0 for offer in plan.offers)
    if not month.left or not is_priced or (month.totals and month.totals["state"] in ACTIVE):
        return plan
    wall_usd = month.wall_usd(plan.record.budget_usd)
    notes = [f"{left}" for left in month.left if left.is_low or left == month.tightest]
    month_of = "" if wall_usd is None or month.tightest is None else month.tightest.budget.owner
    record = replace(plan.record, month_usd=wall_usd, month_of=month_of)
    return replace(plan, record=record, notes=(*plan.notes, *notes))


def check_wall(report: Mapping[str, Any], wanted_usd: float | None) -> None:
    """Raises InputError for a run that would only pause again: its limit, or the wanted one, is reached already.

    A run that paused at its own limit has reached it, though it stopped earlier by what stopping costs.
    """
    limit_usd = report["budget_usd"] if wanted_usd is None else wanted_usd
    spent_usd = report["cost_usd"]
    if limit_usd is None or spent_usd is None:
        return
    is_at_limit = report["state"] == "PAUSED" and limit_usd <= (report["budget_usd"] or 0.0)
    if spent_usd >= limit_usd or is_at_limit:
        what = f"has cost {usd(spent_usd)} of {usd(limit_usd)}"
        remedy = f"spotune resume {report['run_id']} --budget, above {usd(max(spent_usd, limit_usd))}"
        raise InputError(report["run_id"], what, key="budget", remedy=remedy)
