"""Accounts for each machine of a run, makes the bills, and splits dev clusters among runs. Pure but for the bills."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf
from typing import Any, get_args

from spotune.core import errors
from spotune.core.errors import BadRecord, InputError, StoreError
from spotune.core.keys import MOST, Keys, commit_of
from spotune.core.money import HOUR_S, Place, claimed_place, cost_usd, narrowed, price_of
from spotune.core.protocol import EndReason, Event, number
from spotune.core.records import AttemptRecord, Bill, ClusterRecord, PriceRow, check_paid, read_clusters
from spotune.core.store import Store
from spotune.cost.machines import (
    PaidMachine,
    RunData,
    Segment,
    Span,
    Step,
    clean,
    divide,
    interval_of,
    join,
    step_of,
    with_bills,
)
from spotune.launch.engine import PaidInterval, State

_REASONS: dict[Any, EndReason] = {reason: reason for reason in get_args(EndReason)}
_OF_EXIT_CODE: dict[int | None, EndReason] = {errors.PREEMPTED: "preempted", errors.PAUSED: "paused", None: "lost"}
_ON: tuple[State, ...] = ("STARTING", "RUNNING")  # a PENDING or RECOVERING run has no machine


@dataclass(frozen=True)
class Account:
    """What became of one machine: its price, its interval by phases, and why it ended.

    Attributes:
        steps: the completed steps in its events.
        committed: the steps of its checkpoints, including those known only from the attempt that restored them.
        end_reason: None while it runs.
    """

    machine: PaidMachine
    span: Span
    place: Place
    price: PriceRow | None
    nodes: int
    events: Sequence[Event]
    segments: Sequence[Segment]
    steps: Sequence[Step]
    committed: Sequence[int]
    end_reason: EndReason | None

    @property
    def paid_s(self) -> float:
        return self.span.ended_at - self.span.started_at

    @property
    def cost_usd(self) -> float | None:
        return cost_usd(self.paid_s, self.nodes, self.price)

    @property
    def waits_for_resume(self) -> bool:
        """Whether no machine follows until somebody resumes the run."""
        code = next((event.get("exit_code") for event in self.events if event["event"] == "end"), None)
        code = code if code is not None or not self.machine.interval else self.machine.interval.exit_code
        is_final = self.end_reason in ("failed", "stalled") and code != errors.PREEMPTED
        return is_final or self.end_reason in ("cancelled", "paused", "completed")


def build_accounts(run_data: RunData, now: float, state: State | None = None) -> list[Account]:
    """Accounts for each machine, in order of time.

    ``state``: the run's; the newest attempt of a run that runs has a machine, even if the engine's row is missing.
    """
    billed, rows = with_bills(run_data.intervals, run_data.bills)
    newest = max((record.attempt for record in run_data.attempts), default=0) if state in _ON else 0
    accounts: list[Account] = []
    done_before = 0
    for machine in join(rows, run_data.attempts, now, billed):
        account = _account_of(machine, run_data, done_before, now, is_on=machine.attempt == newest)
        accounts.append(account)
        done_before = max([done_before, *account.committed, *(step.step for step in account.steps)])
    return accounts


def _account_of(machine: PaidMachine, run_data: RunData, done_before: int, now: float, is_on: bool) -> Account:
    """Accounts for one machine. ``is_on``: it is known to run; matters only for a machine without a row."""
    number = machine.attempt or 0
    events = clean(run_data.events.get(number, ()))
    row, record = machine.interval, machine.record
    if row:
        ended_at = now if row.ended_at is None else row.ended_at
        span = Span(row.started_at, max(row.started_at, ended_at), row.setup_s, is_open=row.ended_at is None)
        place = Place(row.infra, row.region, row.zone, row.instance_type, row.accelerators, row.use_spot)
        nodes = row.nodes
    else:
        assert record
        span = _span_of_events(record, events, now, is_on)
        place = narrowed(claimed_place(record, run_data.run, run_data.prices), run_data.prices)
        nodes = record.num_nodes
    price = price_of(place, run_data.prices)
    if price is None and machine.is_billed:
        price = next((bill.price_row for bill in run_data.bills if interval_of(bill) == row), None)
    if record and price is None and (price := run_data.parts.get(record.attempt)):
        names = ("accelerators", "instance_type", "use_spot")
        place = replace(place, **{name: getattr(price, name) for name in names})
    segments, steps = divide(span, record.claimed_at if record else None, events, done_before)
    certificate = run_data.certificate
    reason = _end_reason(row, events, span)
    # A machine that came up after the certificate found nothing to do.
    is_late = reason == "failed" and row is not None and row.exit_code == errors.SUCCEEDED
    if certificate and (certificate.attempt == number or is_late):
        reason = "completed"
    committed = _committed(number, run_data)
    return Account(machine, span, place, price, max(1, nodes), events, segments, steps, committed, reason)


def _committed(attempt: int, run_data: RunData) -> list[int]:
    """Returns the steps of an attempt's commits, also of those that only another attempt's restore still proves."""
    # Old commits are deleted, and the last events of a lost machine are missing.
    steps = {commit.step for commit in run_data.commits if commit.attempt == attempt}
    steps |= {step_of(event) for event in run_data.events.get(attempt, ()) if event.get("event") == "commit"}
    for events in run_data.events.values():
        keys = (str(event.get("commit")) for event in events if event.get("event") == "restored")
        steps |= {found[1] for key in keys if (found := commit_of(key)) and found[0] == attempt}
    return sorted(steps - {0})


def _span_of_events(record: AttemptRecord, events: Sequence[Event], now: float, is_on: bool) -> Span:
    """Returns a machine's time by its own clock: from its claim to its last event or to now. Ignores future events."""
    if is_on and not any(event["event"] == "end" for event in events):
        return Span(record.claimed_at, max(record.claimed_at, now), is_open=True)
    past = [event["t"] for event in events if event["t"] <= now]
    return Span(record.claimed_at, max([record.claimed_at, *past[-1:]]))


def _end_reason(row: PaidInterval | None, events: Sequence[Event], span: Span) -> EndReason | None:
    """Returns the machine's own reason, otherwise the engine's; None while it runs. A user's cancellation wins."""
    own = next((str(event.get("reason")) for event in events if event["event"] == "end"), "")
    if row and row.end_reason == "cancelled":
        return "cancelled"
    if own in _REASONS:
        return _REASONS[own]
    if span.is_open:
        return None
    if row is None:
        return "lost"
    return _REASONS.get(row.end_reason) or _OF_EXIT_CODE.get(row.exit_code, "failed")


# GPU hours: paid, and those in which a kernel ran, as the machine measured.


def gpus_of(accelerators: str) -> tuple[str, float]:
    """Parses ``L4:2`` as ``("L4", 2.0)``; a machine without GPUs is ``("cpu", 0.0)``."""
    name, _, count = accelerators.partition(":")
    try:
        number = float(count or 1)
    except ValueError:
        number = 1.0
    return name or "cpu", (number if 0 < number <= MOST else 1.0) if name else 0.0


def gpu_figures(accounts: Sequence[Account]) -> dict[str, Any]:
    """Returns how busy and how full a run's GPUs were; None for each figure without a sample, except ``gpu_hours``.

    ``gpu_utilization``: mean over the samples, weighted by the attempts' GPU hours; attempts without samples are left
    out. ``gpu_busy_hours``: of the measured attempts. ``gpu_memory_gib``: the most in use, of
    ``gpu_memory_total_gib``.
    """
    hours = measured = busy = 0.0
    fullest: tuple[float, float] | None = None
    for account in accounts:
        paid = account.paid_s / HOUR_S * account.nodes * gpus_of(account.place.accelerators)[1]
        hours += paid
        samples = [event for event in account.events if event["event"] == "gpu"]
        shares = [share for event in samples if (share := number(event.get("busy"))) is not None and 0 <= share <= 1]
        if shares:
            measured += paid
            busy += paid * sum(shares) / len(shares)
        for event in samples:
            used, total = number(event.get("memory_gib")), number(event.get("memory_total_gib"))
            if used is not None and total is not None:
                fullest = max(fullest or (used, total), (used, total))
    return {
        "gpu_hours": hours,
        "gpu_utilization": busy / measured if measured else None,
        "gpu_busy_hours": busy if measured else None,
        "gpu_memory_gib": fullest and fullest[0],
        "gpu_memory_total_gib": fullest and fullest[1],
    }


# Bills: closed intervals, written to the bucket once.


def bills_due(run_data: RunData, accounts: Iterable[Account], is_over: bool = False) -> list[Bill]:
    """Returns the bills that can be written by now: closed intervals of machines without a bill.

    A machine that never claimed an attempt gets the number that was left free for it, once a later machine has
    claimed: until then it may still claim. Without a number it is billed by its times; the last machine of all is
    billed so once the run ``is_over``.
    """
    billed = {bill.attempt for bill in run_data.bills} - {0}
    latest = max((record.attempt for record in run_data.attempts), default=0)
    bills = []
    for account in accounts:
        row, number = account.machine.interval, account.machine.attempt
        if row is None or row.ended_at is None or account.machine.is_billed:
            continue
        if number is None or number > latest:
            is_due, attempt = number is None or is_over, 0
        else:
            is_due, attempt = number not in billed, number
        if is_due:
            facts = {**vars(row), "reason": row.end_reason, "end_reason": account.end_reason or "lost"}
            facts |= {"paid_s": account.paid_s, "cost_usd": account.cost_usd or 0.0}
            facts |= {"price": vars(account.price) if account.price else {}}
            bills.append(Bill(**facts, attempt=attempt))
    return bills


def write_due_bills(store: Store, run_data: RunData, accounts: Sequence[Account], is_over: bool) -> None:
    """Writes the bills that are due; users who may only read the bucket get the report all the same.

    An index no longer reads a certified run whose every attempt is billed. So a bill of another machine, one without
    a claim or after the certificate, is announced by a ``late`` key, which is written first: a bill is written once.
    """
    due = [bill for bill in bills_due(run_data, accounts, is_over) if _is_readable(bill)]
    certificate = run_data.certificate
    with suppress(InputError, StoreError):
        known = [one.attempt for one in run_data.attempts if certificate and one.attempt <= certificate.attempt]
        if certificate and any(bill.attempt not in known for bill in due):
            store.create(Keys(run_data.run.run_id).late, b"")
        write_bills(store, due)


def write_bills(store: Store, bills: Iterable[Bill]) -> None:
    """Writes the bills that are missing. Raises InputError or StoreError.

    Skips a bill that its own reader would refuse, made from a damaged row of an engine: it would stay for good.
    """
    for bill in filter(_is_readable, bills):
        keys = Keys(bill.run_id)
        key = keys.bill(bill.attempt) if bill.attempt else keys.lost_bill(bill.started_at, bill.ended_at)
        store.create(key, bill.to_bytes())


def _is_readable(bill: Bill) -> bool:
    keys = Keys(bill.run_id)
    key = keys.bill(bill.attempt) if bill.attempt else f"{keys.lost}/"  # a lost bill's name needs valid times
    try:
        check_paid(Bill.from_bytes(bill.to_bytes(), key), key)
    except BadRecord:
        return False
    return True


# A dev cluster's paid time, split among the runs on it; the rest is idle and the owner's. Pure.
#
# At any instant a run has the part of the cluster's GPUs that it asked for. A run that asked for none, and any run on a
# machine without GPUs, has its nodes whole. If runs together ask for more than there is, each has proportionally less.

_LEAST_PART = 1e-9  # rounding errors of sums of thirds are smaller


@dataclass(frozen=True)
class Use:
    """An attempt on a cluster.

    Attributes:
        key: identifies the attempt.
        ended_at: None while it runs.
        gpu_share: GPUs of each node, 0.5 for half of one; 0: not known.
    """

    key: Any
    cluster: str
    started_at: float
    ended_at: float | None
    gpu_share: float = 0.0
    nodes: int = 1

    @property
    def until(self) -> float:
        return inf if self.ended_at is None else self.ended_at


@dataclass(frozen=True)
class Share:
    """``paid_s``: seconds of the whole cluster; ``cost_usd`` None: the price is unknown."""

    key: Any
    paid_s: float
    cost_usd: float | None


@dataclass(frozen=True)
class Idle:
    """Paid time in which no run had this part of a cluster: above 0, at most 1."""

    started_at: float
    ended_at: float
    part: float


@dataclass(frozen=True)
class Split:
    """A cluster's time. ``shares`` and idle add up to ``paid_s`` and ``cost_usd``.

    Attributes:
        idle: the pieces of ``idle_s``, in order.
        idle_s: seconds of the whole cluster.
        idle_since: since when no run has been on it; None while a run is, and for a cluster that is down.
        idle_usd_per_hour: what the part without a run costs now; 0 for a cluster that is down, None without a price.
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
    """Divides what was paid for a cluster among its uses. Time of a use outside the paid spans counts for nobody."""
    seconds, idle, paid_s = [0.0] * len(uses), list[Idle](), 0.0
    parts = [part_of(cluster, use.gpu_share, use.nodes) for use in uses]
    for start, end in cluster.intervals():
        paid_s += end - start
        within = [(max(use.started_at, start), min(use.until, end)) for use in uses]
        cuts = sorted({start, end, *(at for piece in within if piece[0] < piece[1] for at in piece)})
        for began, until in pairwise(cuts):
            present = [index for index, (first, last) in enumerate(within) if first <= began and until <= last]
            asked = sum(parts[index] for index in present)
            for index in present:
                seconds[index] += (until - began) * parts[index] / max(1.0, asked)
            free = 1.0 - asked
            if free < _LEAST_PART:
                continue
            if idle and (idle[-1].ended_at, idle[-1].part) == (began, free):
                began = idle.pop().started_at
            idle.append(Idle(began, until, free))

    def usd(seconds: float) -> float | None:
        return cost_usd(seconds, max(1, cluster.nodes), cluster.price_row)

    idle_s = sum((piece.ended_at - piece.started_at) * piece.part for piece in idle)
    since, free_now = _idle_now(cluster, uses, parts)
    shares = tuple(Share(use.key, spent, usd(spent)) for use, spent in zip(uses, seconds, strict=True))
    return Split(
        cluster, paid_s, usd(paid_s), shares, tuple(idle), idle_s, usd(idle_s), since, usd(HOUR_S * free_now)
    )  # fmt: skip


def split_all(clusters: Sequence[ClusterRecord], uses: Sequence[Use], since: float = 0.0) -> list[Split]:
    """Splits what was paid for every cluster since then. A use that ended before has a share of 0."""
    of_cluster: dict[str, list[Use]] = {cluster.key: [] for cluster in clusters}
    for use in uses:
        home = cluster_at(clusters, use.cluster, use.started_at)
        if home and any(use.started_at < end and start < use.until for start, end in home.intervals()):
            of_cluster[home.key].append(use)
    splits = []
    for cluster in clusters:
        spans = [[max(start or 0.0, since), end] for start, end in cluster.spans if end is None or end > since]
        splits.append(split(replace(cluster, spans=spans), of_cluster[cluster.key]))
    return splits


def part_of(cluster: ClusterRecord, gpu_share: float, nodes: int) -> float:
    """Returns the part of a cluster that a run asks for, above 0, at most 1."""
    gpus = gpus_of(cluster.accelerators)[1]
    of_node = min(1.0, gpu_share / gpus) if gpus > 0 and gpu_share > 0 else 1.0
    return of_node * min(1.0, max(1, nodes) / max(1, cluster.nodes))


def cluster_at(clusters: Sequence[ClusterRecord], name: str, at: float) -> ClusterRecord | None:
    """Returns the cluster of that name that existed at a time: the last that had been launched."""
    named = [cluster for cluster in clusters if cluster.name == name and cluster.launched_at <= at]
    return max(named, key=lambda cluster: cluster.launched_at, default=None)


def price_of_part(cluster: ClusterRecord, gpu_share: float) -> PriceRow | None:
    """Returns the frozen price of one node for a run that has only the GPUs it asked for; None if it is unknown."""
    row, part = cluster.price_row, part_of(cluster, gpu_share, cluster.nodes)
    if row is None:
        return None
    gpu, gpus = gpus_of(cluster.accelerators)
    accelerators = f"{gpu}:{gpus * part:g}" if gpus else ""
    source = row.source if part == 1.0 else f"{row.source}, {part:.0%} of {cluster.name}"
    return replace(row, accelerators=accelerators, price_usd_per_hour=row.price_usd_per_hour * part, source=source)


def prices_of_parts(
    store: Store, attempts: Sequence[AttemptRecord], warn: Callable[[str], None]
) -> dict[int, PriceRow]:
    """Returns, by attempt, the price of its part of a dev cluster. A run on a cluster has no prices of its own."""
    if not (names := {record.cluster_name for record in attempts if record.cluster_name}):
        return {}
    clusters = read_clusters(store, sorted(names), warn)
    parts = {}
    for record in attempts:
        home = cluster_at(clusters, record.cluster_name, record.claimed_at)
        if home and (price := price_of_part(home, record.gpu_share)):
            parts[record.attempt] = price
    return parts


def _idle_now(cluster: ClusterRecord, uses: Sequence[Use], parts: Sequence[float]) -> tuple[float | None, float]:
    """Returns since when no run is on a cluster that is up, and the part of it without a run."""
    if not cluster.is_up or not (spans := cluster.intervals()):
        return None, 0.0
    start, now = spans[-1]
    asked = sum(part for use, part in zip(uses, parts, strict=True) if use.started_at < now <= use.until)
    ends = [min(use.until, now) for use in uses if use.started_at < now]
    return (max([start, *ends]) if asked == 0 else None), max(0.0, 1.0 - asked)
