"""What each paid second went to: attempts by phase, dev clusters by run."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from spotune.core import errors
from spotune.core.errors import BadRecord, InputError, StoreError
from spotune.core.keys import MOST, Keys, commit_of
from spotune.core.money import HOUR_S, Place, claimed_place, cost_usd, narrowed, price_of
from spotune.core.protocol import EndReason, Event, number
from spotune.core.records import AttemptRecord, Bill, ClusterRecord, PriceRow, check_paid
from spotune.core.store import Store
from spotune.cost.machines import (
    Evidence,
    Machine,
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

# A run's machines, each accounted for: its price, its phases, its GPU hours, and why it ended.

# What became of one machine: its interval divided, its price, and why it ended.

_REASONS: dict[Any, EndReason] = {
    "completed": "completed", "preempted": "preempted", "failed": "failed",
    "cancelled": "cancelled", "paused": "paused", "lost": "lost", "stalled": "stalled",
}  # fmt: skip
_OF_EXIT_CODE: dict[int | None, EndReason] = {errors.PREEMPTED: "preempted", errors.PAUSED: "paused", None: "lost"}


@dataclass(frozen=True)
class Account:
    """A machine's share of the report.

    Attributes:
        steps: those that its events tell of.
        committed: the steps of which it left a checkpoint, also those known only from who restored it.
        end_reason: None while it runs.
    """

    machine: Machine
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
    def stands_still(self) -> bool:
        """Whether nothing follows until somebody resumes the run."""
        code = next((event.get("exit_code") for event in self.events if event["event"] == "end"), None)
        code = code if code is not None or not self.machine.interval else self.machine.interval.exit_code
        is_final = self.end_reason in ("failed", "stalled") and code != errors.PREEMPTED
        return is_final or self.end_reason in ("cancelled", "paused", "completed")


def account_of(machine: Machine, evidence: Evidence, done_before: int, now: float, is_on: bool = False) -> Account:
    """Everything about one machine, from its row, its claim and what it wrote.

    ``is_on``: it is known to run; only of one without a row that has to be told.
    """
    number = machine.attempt or 0
    marks = clean(evidence.events.get(number, ()))
    row, record = machine.interval, machine.record
    span = _span_of_row(row, now) if row else _span_of_events(record, marks, now, is_on)
    place, nodes = _place(row, record, evidence)
    place = place if row else narrowed(place, evidence.prices)
    price = price_of(place, evidence.prices) or _billed_price(machine, evidence)
    if record and price is None and (price := evidence.parts.get(record.attempt)):
        place = replace(
            place, accelerators=price.accelerators, instance_type=price.instance_type, use_spot=price.use_spot
        )
    segments, steps = divide(span, record.claimed_at if record else None, marks, done_before)
    certificate = evidence.certificate
    is_certified = bool(certificate and certificate.attempt == number)
    reason: EndReason | None = "completed" if is_certified else _end_reason(row, marks, span)
    if certificate and reason == "failed" and row and row.exit_code == errors.SUCCEEDED:
        reason = "completed"  # it came up after the certificate, and found nothing left to do
    committed = _committed(number, evidence)
    return Account(machine, span, place, price, nodes, marks, segments, steps, committed, reason)


def _billed_price(machine: Machine, evidence: Evidence) -> PriceRow | None:
    """What its bill says, where the run's own record has no price for the place."""
    its = (bill for bill in evidence.bills if machine.is_billed and interval_of(bill) == machine.interval)
    return next((bill.price_row for bill in its), None)


def _committed(attempt: int, evidence: Evidence) -> list[int]:
    """Old commits are deleted, and a lost machine's last events too; what another attempt started from remains."""
    steps = {commit.step for commit in evidence.commits if commit.attempt == attempt}
    steps |= {step_of(event) for event in evidence.events.get(attempt, ()) if event.get("event") == "commit"}
    for events in evidence.events.values():
        keys = (str(event.get("commit")) for event in events if event.get("event") == "restored")
        steps |= {found[1] for key in keys if (found := commit_of(key)) and found[0] == attempt}
    return sorted(steps - {0})


def _span_of_row(row: PaidInterval, now: float) -> Span:
    ended_at = now if row.ended_at is None else row.ended_at
    return Span(row.started_at, max(row.started_at, ended_at), row.setup_s, is_open=row.ended_at is None)


def _span_of_events(record: AttemptRecord | None, marks: Sequence[Event], now: float, is_on: bool) -> Span:
    """By its own clock: from its claim to its last word, or up to now. What is dated in the future is none."""
    assert record
    if is_on and not any(mark["event"] == "end" for mark in marks):
        return Span(record.claimed_at, max(record.claimed_at, now), is_open=True)
    spoken = [mark["t"] for mark in marks if mark["t"] <= now]
    return Span(record.claimed_at, max([record.claimed_at, *spoken[-1:]]))


def _place(row: PaidInterval | None, record: AttemptRecord | None, evidence: Evidence) -> tuple[Place, int]:
    if row:
        where = Place(row.infra, row.region, row.zone, row.instance_type, row.accelerators, row.use_spot)
        return where, max(1, row.nodes)
    assert record
    return claimed_place(record, evidence.run, evidence.prices), max(1, record.num_nodes)


def _end_reason(row: PaidInterval | None, marks: Sequence[Event], span: Span) -> EndReason | None:
    """The machine's own word, but a cancelled run says what the user did; else the engine's; None while it runs."""
    said = next((str(mark.get("reason")) for mark in marks if mark["event"] == "end"), "")
    if row and row.end_reason == "cancelled":
        return "cancelled"
    if said in _REASONS:
        return _REASONS[said]
    if span.is_open:
        return None
    if row is None:
        return "lost"
    return _REASONS.get(row.end_reason) or _OF_EXIT_CODE.get(row.exit_code, "failed")


# GPU hours paid for and GPU hours in which a kernel ran, from what the machine measured of itself.


def gpus_of(accelerators: str) -> tuple[str, float]:
    """``L4:2`` -> ``("L4", 2.0)``; a machine without one is ``cpu`` and has none."""
    name, _, count = accelerators.partition(":")
    try:
        number = float(count or 1)
    except ValueError:
        number = 1.0
    return name or "cpu", (number if 0 < number <= MOST else 1.0) if name else 0.0


def gpu_figures(accounts: Sequence[Account]) -> dict[str, Any]:
    """Of all machines of a run.

    ``gpu_utilization``: mean over the samples, each attempt by its GPU hours; of attempts without one nothing is
    known, so that they are not in it. ``gpu_busy_hours``: of the attempts that were measured. ``gpu_memory_gib``: the
    most that was in use, of ``gpu_memory_total_gib``. All None without a sample.
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


# The machines of a run in order, each accounted for; and the bills that follow from that.

_ON: tuple[State, ...] = ("STARTING", "RUNNING")  # a PENDING or RECOVERING run has no machine


def build_accounts(evidence: Evidence, now: float, state: State | None = None) -> list[Account]:
    """What became of each machine, in order of time.

    ``state``: the run's. The newest attempt of one that runs is on, also where the engine's row of it is not to be had.
    """
    billed, rows = with_bills(evidence.intervals, evidence.bills)
    newest = max((record.attempt for record in evidence.attempts), default=0) if state in _ON else 0
    accounts: list[Account] = []
    done_before = 0
    for machine in join(rows, evidence.attempts, now, billed):
        account = account_of(machine, evidence, done_before, now, is_on=machine.attempt == newest)
        accounts.append(account)
        done_before = max([done_before, *account.committed, *(step.step for step in account.steps)])
    return accounts


def bills_due(evidence: Evidence, accounts: Iterable[Account], is_over: bool = False) -> list[Bill]:
    """The bills that can be written by now: closed intervals of machines that have none yet.

    A machine that never claimed an attempt has the number that was left free for it, if any, once a later machine has
    claimed: until then it may still be. Without a number it is billed by its times, the last one once the run
    ``is_over``.
    """
    billed = {bill.attempt for bill in evidence.bills} - {0}
    latest = max((record.attempt for record in evidence.attempts), default=0)
    bills = []
    for account in accounts:
        row, number = account.machine.interval, account.machine.attempt
        if row is None or row.ended_at is None or account.machine.is_billed:
            continue
        has_number = number is not None and number <= latest
        if (number not in billed) if has_number else number is None or is_over:
            bills.append(
                Bill(
                    run_id=row.run_id,
                    attempt=number if number is not None and has_number else 0,
                    started_at=row.started_at,
                    ended_at=row.ended_at,
                    price=vars(account.price) if account.price else {},
                    nodes=row.nodes,
                    paid_s=account.paid_s,
                    cost_usd=account.cost_usd or 0.0,
                    end_reason=account.end_reason or "lost",
                    infra=row.infra,
                    region=row.region,
                    zone=row.zone,
                    instance_type=row.instance_type,
                    accelerators=row.accelerators,
                    use_spot=row.use_spot,
                    setup_s=row.setup_s,
                    reason=row.end_reason,
                    exit_code=row.exit_code,
                )
            )
    return bills


def leave_bills(store: Store, evidence: Evidence, accounts: Sequence[Account], is_over: bool) -> None:
    """Writes the bills that are due; whoever may only read the bucket gets the report all the same.

    Of a certified run whose every attempt is billed an index looks at nothing any more: that a machine is billed which
    claimed none, or came after the certificate, is said beside, and first, since a bill is written once.
    """
    due = [bill for bill in bills_due(evidence, accounts, is_over) if _is_readable(bill)]
    with suppress(InputError, StoreError):
        if (certificate := evidence.certificate) and _is_late(due, evidence.attempts, certificate.attempt):
            store.create(Keys(evidence.run.run_id).late, b"")
        write_bills(store, due)


def _is_late(due: Iterable[Bill], claims: Iterable[AttemptRecord], certified: int) -> bool:
    known = {record.attempt for record in claims if record.attempt <= certified}
    return any(bill.attempt not in known for bill in due)


def write_bills(store: Store, bills: Iterable[Bill]) -> None:
    """Writes the bills that are not there yet. Raises InputError or StoreError.

    One that its own reader would refuse is not written: it would stay for good, and a damaged row of an engine is none.
    """
    for bill in filter(_is_readable, bills):
        keys = Keys(bill.run_id)
        key = keys.bill(bill.attempt) if bill.attempt else keys.lost_bill(bill.started_at, bill.ended_at)
        store.create(key, bill.to_bytes())


def _is_readable(bill: Bill) -> bool:
    keys = Keys(bill.run_id)
    key = keys.bill(bill.attempt) if bill.attempt else f"{keys.lost}/"  # its name is made of times, if they are such
    try:
        check_paid(Bill.from_bytes(bill.to_bytes(), key), key)
    except BadRecord:
        return False
    return True


# A dev cluster's paid time, split among the runs that were on it; the rest is idle, the owner's. Pure.
#
# At any instant a run has the part of the cluster's GPUs that it asked for; one that asked for none, and any on a
# machine without GPUs, has its nodes whole. Where runs together ask for more than there is, each has proportionally
# less.

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
