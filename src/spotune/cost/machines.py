"""All that is known of a run: its records, which machine made which attempt, and the bills."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from spotune.core.protocol import Event
from spotune.core.records import AttemptRecord, Bill, Certificate, Commit, PriceRow, RunRecord
from spotune.launch.engine import PaidInterval

# All that is known of a run, before anything is made of it.


@dataclass(frozen=True)
class Evidence:
    """What the bucket and the engine hold on one run.

    Attributes:
        intervals: the engine's rows; empty where its history is not to be had.
        events: by attempt, as read.
        certificate: there when the run is certified.
        parts: by attempt, the price of its part of a dev cluster, where it ran on one.
        cancelled_at: when it was cancelled, epoch seconds; None where it was not.
        unread: a line for each record that cannot be read; the rest is as if it had never been written.
    """

    run: RunRecord
    intervals: Sequence[PaidInterval] = ()
    attempts: Sequence[AttemptRecord] = ()
    events: Mapping[int, Sequence[Event]] = field(default_factory=dict)
    commits: Sequence[Commit] = ()
    certificate: Certificate | None = None
    bills: Sequence[Bill] = ()
    parts: Mapping[int, PriceRow] = field(default_factory=dict)
    cancelled_at: float | None = None
    unread: Sequence[str] = ()

    @cached_property
    def prices(self) -> Sequence[PriceRow]:
        """As frozen at submission. Raises BadRecord."""
        return self.run.price_rows()


# bill.json: an attempt's paid interval, written once it is known, so that any machine can make the report.

Billed = tuple[int, PaidInterval]  # whose it is: an attempt's, or 0, of a machine that went before it claimed one


def interval_of(bill: Bill) -> PaidInterval:
    """The engine's row that a bill was made from; where it was is in its price too, and only there in one that has no
    more than the price and the interval."""
    place = bill.price_row if not bill.infra and bill.price_row else bill
    return PaidInterval(
        run_id=bill.run_id,
        started_at=bill.started_at,
        ended_at=bill.ended_at,
        infra=place.infra,
        region=place.region.strip("*"),
        zone=place.zone.strip("*"),
        instance_type=place.instance_type,
        accelerators=place.accelerators,
        use_spot=place.use_spot,
        nodes=bill.nodes,
        setup_s=bill.setup_s,
        end_reason=bill.reason or ("" if bill.exit_code is not None else bill.end_reason),
        exit_code=bill.exit_code,
    )


def with_bills(rows: Iterable[PaidInterval], bills: Iterable[Bill]) -> tuple[list[Billed], list[PaidInterval]]:
    """What to report on, each machine once: what bills say, and the engine's rows that no bill speaks for."""
    billed: dict[PaidInterval, int] = {}
    for bill in sorted(bills, key=lambda bill: bill.attempt == 0):  # of one that is billed twice the attempt's stands
        billed.setdefault(interval_of(bill), bill.attempt)
    left = list(dict.fromkeys(rows))
    for is_same in (_is_exact, _is_dated_anew):
        for interval in billed:
            if found := next((row for row in left if is_same(row, interval)), None):
                left.remove(found)
    return [(number, interval) for interval, number in billed.items()], left


def _is_exact(row: PaidInterval, bill: PaidInterval) -> bool:
    return _is_at(row.started_at, bill.started_at) and _is_at(row.ended_at, bill.ended_at)


def _is_dated_anew(row: PaidInterval, bill: PaidInterval) -> bool:
    """Whether an engine dates one end of a billed machine otherwise than when the bill was written; the bill stands."""
    if row.ended_at is None or bill.ended_at is None or _place(row) != _place(bill):
        return False
    if min(row.ended_at, bill.ended_at) <= max(row.started_at, bill.started_at):
        return False
    return _is_at(row.started_at, bill.started_at) or _is_at(row.ended_at, bill.ended_at)


def _place(row: PaidInterval) -> tuple[str, str, str, str, bool]:
    return row.infra, row.region, row.zone, row.instance_type, row.use_spot


def _is_at(time: float | None, other: float | None) -> bool:
    return time is not None and other is not None and abs(time - other) < 0.01


# Which machine of the engine's history made which attempt in the bucket: as its bill says, else by time, in order.

MAX_SKEW_S = 900.0


@dataclass(frozen=True)
class Machine:
    """A machine that was paid for, an attempt that ran, or, as it should be, both in one.

    ``interval`` None: the engine's row is not to be had. ``record`` None: it died before its guard claimed, or its
    claim cannot be read. ``attempt`` is that of its claim or its bill, else the number that those after it have left
    free, None where they have left none. ``is_billed``: the interval is a bill's.
    """

    interval: PaidInterval | None
    record: AttemptRecord | None
    attempt: int | None = None
    is_billed: bool = False


def join(
    rows: Iterable[PaidInterval], attempts: Iterable[AttemptRecord], now: float, billed: Iterable[Billed] = ()
) -> list[Machine]:
    """Every machine, in order of time; an attempt without a row, whose time is by another clock, in order of attempts.

    What is ``billed`` is its attempt's, whatever the clocks say. The other rows are paired with the attempts that are
    left so that order is kept, most are paired, and claims lie in or near their interval: a claim may lie up to
    MAX_SKEW_S outside, since it was made by another clock. Among assignments that pair equally many, the one with the
    least distance wins.
    """
    claims = {record.attempt: record for record in attempts}
    of_bills: dict[int, PaidInterval] = {}
    machines: list[Machine] = []
    for number, row in billed:
        is_its = bool(number) and of_bills.setdefault(number, row) is row
        claim = claims.pop(number, None) if is_its else None
        machines.append(Machine(row, claim, number if is_its else None, is_billed=True))
    left = sorted(rows, key=_times)
    open_claims = [claims[number] for number in sorted(claims)]
    between = [_between(claim.attempt, of_bills) for claim in open_claims]
    pairs = list(zip(open_claims, between, strict=True))
    found = dict(_assign([[_distance_s(row, claim, when, now) for claim, when in pairs] for row in left]))
    machines += [_made_by(row, open_claims[found[i]] if i in found else None) for i, row in enumerate(left)]
    machines.sort(key=_order)
    paired = set(found.values())
    for column, claim in enumerate(open_claims):
        if column not in paired:
            machines.insert(_place_of(claim, machines), _made_by(None, claim))
    return _numbered(machines)


def _made_by(row: PaidInterval | None, claim: AttemptRecord | None) -> Machine:
    return Machine(row, claim, claim.attempt if claim else None)


def _place_of(claim: AttemptRecord, machines: Sequence[Machine]) -> int:
    """Between the attempts before and after it; among machines there that claimed none, by time."""
    numbers = [machine.attempt or 0 for machine in machines]
    at = max((index + 1 for index, number in enumerate(numbers) if 0 < number < claim.attempt), default=0)
    end = next((index for index, number in enumerate(numbers) if number > claim.attempt), len(machines))
    while at < end and _order(machines[at])[0] <= claim.claimed_at:
        at += 1
    return at


def _numbered(machines: list[Machine]) -> list[Machine]:
    taken = {machine.attempt for machine in machines}
    numbered: list[Machine] = []
    last = 0
    for index, machine in enumerate(machines):
        later = next((one.attempt for one in machines[index:] if one.attempt), None)
        free = last + 1 if last + 1 not in taken and (later is None or last + 1 < later) else None
        number = machine.attempt or free
        numbered.append(replace(machine, attempt=number))
        last = max(last, number or 0)
    return numbered


def _between(attempt: int, billed: Mapping[int, PaidInterval]) -> tuple[float, float]:
    """When its machine can have started, since the machines of other attempts are known."""
    earlier = (row.started_at for number, row in billed.items() if number < attempt)
    later = (row.started_at for number, row in billed.items() if number > attempt)
    return max(earlier, default=-math.inf), min(later, default=math.inf)


def _distance_s(row: PaidInterval, claim: AttemptRecord, between: tuple[float, float], now: float) -> float | None:
    """How far the claim lies outside the interval; None when too far to belong to it."""
    if not between[0] <= row.started_at <= between[1]:
        return None
    outside = max(row.started_at - claim.claimed_at, claim.claimed_at - (row.ended_at or now), 0.0)
    return outside if outside <= MAX_SKEW_S else None


def _assign(distances: list[list[float | None]]) -> list[tuple[int, int]]:
    """Order-keeping pairs (row, column), the most of them, then of the least sum: dynamic programming."""
    rows, columns = len(distances), len(distances[0]) if distances else 0
    # best[i][j]: (pairs missed, distance) of what is left from row i and column j on.
    best = [[(0, 0.0)] * (columns + 1) for _ in range(rows + 1)]
    for i in range(rows - 1, -1, -1):
        for j in range(columns - 1, -1, -1):
            distance, (pairs, sum_s) = distances[i][j], best[i + 1][j + 1]
            options = [best[i + 1][j], best[i][j + 1]]
            if distance is not None:
                options.append((pairs - 1, sum_s + distance))
            best[i][j] = min(options)
    found: list[tuple[int, int]] = []
    i = j = 0
    while i < rows and j < columns:
        distance, (pairs, sum_s) = distances[i][j], best[i + 1][j + 1]
        if distance is not None and best[i][j] == (pairs - 1, sum_s + distance):
            found.append((i, j))
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            i += 1
        else:
            j += 1
    return found


def _order(machine: Machine) -> tuple[float, float]:
    if machine.interval:
        return _times(machine.interval)
    assert machine.record
    return machine.record.claimed_at, math.inf


def _times(row: PaidInterval) -> tuple[float, float]:
    """A placement that failed and the machine after it may begin in the same second."""
    return row.started_at, math.inf if row.ended_at is None else row.ended_at
