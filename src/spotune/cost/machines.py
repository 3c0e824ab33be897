"""Which machine an attempt had, when that was paid for, and which phase each of its seconds was in."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

from spotune.core.protocol import Event, number
from spotune.core.records import AttemptRecord, Bill, Certificate, Commit, PriceRow, RunRecord
from spotune.launch.engine import PaidInterval

# All that is known of a run: its records, which machine made which attempt, and the bills.

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
    for its_number, row in billed:
        is_its = bool(its_number) and of_bills.setdefault(its_number, row) is row
        claim = claims.pop(its_number, None) if is_its else None
        machines.append(Machine(row, claim, its_number if is_its else None, is_billed=True))
    left = sorted(rows, key=_times)
    open_claims = [claims[its_number] for its_number in sorted(claims)]
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


# One machine's paid seconds, each with one phase, from its own account of itself.

# A machine's own account of itself, cleaned: what was cut, doubled or out of order does no harm.


def clean(events: Iterable[Mapping[str, Any]]) -> list[Event]:
    """Events with a time and a name, each once, in order of time (in the given order where times are equal)."""
    found = [dict(one) for one in events if number(one.get("t")) is not None and isinstance(one.get("event"), str)]
    found.sort(key=lambda event: float(event["t"]))
    return [event for _, same in groupby(found, key=lambda event: float(event["t"])) for event in _once(list(same))]


def _once(events: list[Event]) -> Iterable[Event]:
    if len(events) == 1:
        return events
    seen: dict[str, Event] = {}
    for event in events:
        seen.setdefault(json.dumps(event, sort_keys=True, default=str), event)
    return seen.values()


def step_of(event: Mapping[str, Any]) -> int:
    """The step that an event names, 0 where it names none."""
    step = number(event.get("step"))
    return int(step) if step is not None and 0 < step < 1e15 else 0


# One machine's paid seconds, each with one phase.
#
# The engine's interval is the truth about how long was paid; what the machine wrote only divides it. So the
# segments tile the interval exactly, whatever the events say: time that no event explains is ``unknown``.

Phase = Literal[
    "provision", "setup", "load", "restore", "useful", "data_wait",
    "eval", "save_stall", "replayed", "stalled", "idle", "teardown", "unknown",
]  # fmt: skip
PAID_PHASES: tuple[Phase, ...] = (
    "provision", "setup", "load", "restore", "useful", "data_wait",
    "eval", "save_stall", "replayed", "stalled", "idle", "teardown", "unknown",
)  # fmt: skip
# What a machine calls its phases (core/protocol.py) -> ours; "train" is divided by its steps.
_NAMES: dict[Any, Phase] = {
    "setup": "setup", "load": "load", "restore": "restore", "eval": "eval",
    "save": "save_stall", "idle": "idle", "teardown": "teardown",
}  # fmt: skip


@dataclass(frozen=True)
class Span:
    """A paid interval.

    Attributes:
        setup_s: how long the engine says that ``setup:`` ran.
        is_open: it is still paid for, ``ended_at`` is the time of the report.
    """

    started_at: float
    ended_at: float
    setup_s: float = 0.0
    is_open: bool = False


@dataclass(frozen=True)
class Segment:
    """``again``: it repeats what an earlier attempt had done already."""

    started_at: float
    ended_at: float
    phase: Phase
    again: bool = False

    @property
    def seconds(self) -> float:
        return self.ended_at - self.started_at


@dataclass(frozen=True)
class Step:
    """A step that was completed; ``again``: an earlier attempt had completed it too."""

    step: int
    ended_at: float
    again: bool


def divide(
    span: Span, claimed_at: float | None, events: Iterable[Event], done_before: int
) -> tuple[list[Segment], list[Step]]:
    """Divides a paid interval into segments that tile it, and lists the steps that were completed in it.

    Args:
        claimed_at: when the machine's guard claimed the attempt; None when no guard got that far.
        events: as read, in any order, with lines missing or doubled, from a clock that may be minutes off.
        done_before: the highest step that any earlier attempt is known to have completed.
    """
    marks = clean([*([{"t": claimed_at, "event": "claim"}] if claimed_at is not None else []), *events])
    if not marks:
        return _divide_silence(span), []
    marks = _with_stall(marks)
    offset = clock_offset_s(span, marks[0]["t"], marks[-1]["t"])
    walk = _Walk(span, done_before)
    for mark in marks:
        walk.take(mark, min(max(mark["t"] + offset, span.started_at), span.ended_at))
        if walk.has_ended:
            break
    return walk.finish(), walk.steps


def _with_stall(marks: list[Event]) -> list[Event]:
    """The events with the beginning of a stall as one of them: the last sign of life, which only its end tells."""
    stall = next((mark for mark in marks if mark["event"] == "stall"), None)
    since = number(stall.get("since")) if stall else None
    if stall is None or since is None:
        return marks
    since = min(max(since, marks[0]["t"]), stall["t"])
    before = [mark for mark in marks if mark["t"] <= since]
    after = [mark for mark in marks if mark["t"] > since and mark["event"] not in ("phase", "step")]
    return [*before, {"t": since, "event": "stalled"}, *after]


def clock_offset_s(span: Span, first: float, last: float) -> float:
    """What to add to a machine's times so that they lie within what was paid; 0 where that cannot be told.

    The least shift that fits is taken: a skewed clock moves all events alike. Events that overlap the
    interval and cannot be made to fit within MAX_SKEW_S are left, and clipped.
    """
    if span.started_at <= first and last <= span.ended_at:
        return 0.0
    slack = (span.ended_at - span.started_at) - (last - first)
    is_outside = last < span.started_at or first > span.ended_at
    if slack < 0:
        return span.started_at - first if is_outside else 0.0
    if first < span.started_at:
        offset = span.started_at + min(max(span.setup_s, 0.0), slack) - first
    else:
        offset = span.ended_at - last
    return offset if is_outside or abs(offset) <= MAX_SKEW_S else 0.0


def total(segments: Sequence[Segment]) -> dict[Phase, float]:
    """Seconds by phase, every phase there."""
    sums: dict[Phase, float] = dict.fromkeys(PAID_PHASES, 0.0)
    for segment in segments:
        sums[segment.phase] += segment.seconds
    return sums


def _divide_silence(span: Span) -> list[Segment]:
    """No guard ever spoke: still provisioning while the interval is open, unknown once it has ended."""
    ready = min(span.started_at + max(span.setup_s, 0.0), span.ended_at)
    rest: Phase = "provision" if span.is_open else "unknown"
    return _solid([Segment(span.started_at, ready, "setup"), Segment(ready, span.ended_at, rest)])


class _Walk:
    """Goes over a machine's events once, from the start of its interval to the end."""

    def __init__(self, span: Span, done_before: int) -> None:
        self.span, self.done_before = span, done_before
        self.steps: list[Step] = []
        self.has_ended = False
        self._segments: list[Segment] = []
        self._pending: list[tuple[float, float]] = []  # time in training that no step has accounted for yet
        self._phase: Phase | Literal["train"] = "load"  # from the claim to the first phase: the guard gets ready
        self._cursor: float | None = None

    @property
    def _again(self) -> bool:
        """Whether what happens now repeats an earlier attempt: the last step did."""
        return bool(self.steps) and self.steps[-1].again

    def take(self, event: Event, at: float) -> None:
        # Within an attempt steps only go up: a line that says otherwise is not what it says.
        is_step = event["event"] == "step" and step_of(event) > (self.steps[-1].step if self.steps else 0)
        trains_unsaid = is_step and self._phase != "train" and at > (self._cursor or self.span.started_at)
        if trains_unsaid:
            self._phase = "unknown"  # up to now: the line that said since when is lost
        if self._cursor is None:
            self._open(at)
        else:
            self._advance(at)
        match event["event"]:
            case "phase":
                self._enter(event.get("phase"))
            case "step" if is_step:
                self._close_step(event)
                self._phase = "train" if trains_unsaid else self._phase
            case "stalled":
                self._settle("stalled")
                self._phase = "stalled"
            case "end":
                # An orderly end leaves no step behind; a failure's last, unfinished step is work of unknown use.
                self._settle("unknown" if event.get("reason") in ("failed", "lost") else "teardown")
                self._phase, self.has_ended = "teardown", True

    def finish(self) -> list[Segment]:
        """The segments, up to the end of the interval."""
        self._settle("unknown")
        if self._cursor is not None:
            self._emit(self._cursor, self.span.ended_at, "teardown" if self.has_ended else "unknown")
        return _solid(self._segments)

    def _open(self, at: float) -> None:
        """Before the machine's first word: what the engine calls setup, and the rest."""
        setup_from = max(self.span.started_at, at - max(self.span.setup_s, 0.0))
        self._emit(self.span.started_at, setup_from, "provision")
        self._emit(setup_from, at, "setup")
        self._cursor = at

    def _advance(self, at: float) -> None:
        assert self._cursor is not None
        if self._phase == "train":
            self._pending.append((self._cursor, at))
        else:
            self._emit(self._cursor, at, self._phase, self._again and self._phase in ("eval", "save_stall"))
        self._cursor = at

    def _enter(self, name: Any) -> None:
        self._phase = "train" if name == "train" else _NAMES.get(name if isinstance(name, str) else "", "unknown")
        if self._phase == "teardown":
            self._settle("teardown")

    def _close_step(self, event: Event) -> None:
        step = step_of(event)
        again = step <= self.done_before
        assert self._cursor is not None
        self.steps.append(Step(step, self._cursor, again))
        wait = max(0.0, number(event.get("data_wait_s")) or 0.0)
        pieces, self._pending = self._pending, []
        for started_at, ended_at in pieces:  # a step begins with its batch
            waited_to = min(started_at + wait, ended_at)
            wait -= waited_to - started_at
            self._emit(started_at, waited_to, "data_wait", again)
            self._emit(waited_to, ended_at, "replayed" if again else "useful", again)

    def _settle(self, phase: Phase) -> None:
        pieces, self._pending = self._pending, []
        for started_at, ended_at in pieces:
            self._emit(started_at, ended_at, phase)

    def _emit(self, started_at: float, ended_at: float, phase: Phase, again: bool = False) -> None:
        self._segments.append(Segment(started_at, ended_at, phase, again))


def _solid(segments: Iterable[Segment]) -> list[Segment]:
    """In order of time, without empty ones."""
    return sorted((one for one in segments if one.ended_at > one.started_at), key=lambda one: one.started_at)
