"""Pairs a run's machines with its attempts, and divides each machine's paid seconds into phases. Pure."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any, Literal, get_args

from spotune.core.protocol import Event, number
from spotune.core.records import AttemptRecord, Bill, Certificate, Commit, PriceRow, RunRecord
from spotune.launch.engine import PaidInterval


@dataclass(frozen=True)
class RunData:
    """What the bucket and the engine hold on one run.

    Attributes:
        intervals: the engine's rows; empty if its history is not available.
        events: by attempt, as read.
        certificate: present if the run is certified.
        parts: by attempt, the price of its part of a dev cluster, if it ran on one.
        cancelled_at: when it was cancelled, epoch seconds.
        unread: a line for each record that cannot be read; the report is made as if it had never been written.
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
        """The prices frozen at submission. Raises BadRecord."""
        return self.run.price_rows()


# Bills: an attempt's paid interval, written once it is known, so that any machine can make the report.

Billed = tuple[int, PaidInterval]  # an attempt's number, or 0 for a machine that ended before it claimed an attempt


def interval_of(bill: Bill) -> PaidInterval:
    """Returns the engine's row that a bill was made from. Some bills have the machine's place only in their price."""
    place = bill.price_row if not bill.infra and bill.price_row else bill
    names = ("run_id", "started_at", "ended_at", "nodes", "setup_s", "exit_code")
    facts = {name: getattr(bill, name) for name in names}
    facts |= {name: getattr(place, name) for name in ("infra", "instance_type", "accelerators", "use_spot")}
    facts |= {name: getattr(place, name).strip("*") for name in ("region", "zone")}
    end_reason = bill.reason or ("" if bill.exit_code is not None else bill.end_reason)
    return PaidInterval(**facts, end_reason=end_reason)


def with_bills(rows: Iterable[PaidInterval], bills: Iterable[Bill]) -> tuple[list[Billed], list[PaidInterval]]:
    """Returns each machine once: the billed intervals, and the engine's rows without a bill."""
    billed: dict[PaidInterval, int] = {}
    for bill in sorted(bills, key=lambda bill: bill.attempt == 0):  # of two bills for a machine keep the attempt's
        billed.setdefault(interval_of(bill), bill.attempt)
    left = list(dict.fromkeys(rows))
    for is_exact in (True, False):
        for interval in billed:
            if found := next((row for row in left if _is_billed(row, interval, is_exact)), None):
                left.remove(found)
    return [(number, interval) for interval, number in billed.items()], left


def _is_billed(row: PaidInterval, bill: PaidInterval, is_exact: bool) -> bool:
    """Returns whether a bill is for this row; not exact: the engine has changed one end of the interval since."""
    ends = ((row.started_at, bill.started_at), (row.ended_at, bill.ended_at))
    same = [at is not None and other is not None and abs(at - other) < 0.01 for at, other in ends]
    if is_exact or row.ended_at is None or bill.ended_at is None:
        return all(same)
    here, there = ((one.infra, one.region, one.zone, one.instance_type, one.use_spot) for one in (row, bill))
    overlap_s = min(row.ended_at, bill.ended_at) - max(row.started_at, bill.started_at)
    return here == there and overlap_s > 0 and any(same)


# Pairing: which machine of the engine's history made which attempt. A bill decides, otherwise time and order do.

MAX_SKEW_S = 900.0


@dataclass(frozen=True)
class PaidMachine:
    """A machine that was paid for, an attempt that ran, or both in one, which is the usual case.

    Attributes:
        interval: None if the engine's row is not available.
        record: None if the machine ended before its guard claimed an attempt, or if the claim cannot be read.
        attempt: the number in the claim or the bill; otherwise a number that later attempts left free, if any.
        is_billed: the interval comes from a bill.
    """

    interval: PaidInterval | None
    record: AttemptRecord | None
    attempt: int | None = None
    is_billed: bool = False

    @property
    def times(self) -> tuple[float, float]:
        if self.interval:
            return _times(self.interval)
        assert self.record
        return self.record.claimed_at, math.inf


def join(
    rows: Iterable[PaidInterval], attempts: Iterable[AttemptRecord], now: float, billed: Iterable[Billed] = ()
) -> list[PaidMachine]:
    """Returns every machine in order of time. Attempts without a row, whose clock is another, keep the attempts' order.

    A ``billed`` interval belongs to its attempt, whatever the clocks say. The other rows are paired with the other
    attempts so that order is kept, most are paired, and claims lie in or near their interval: up to MAX_SKEW_S
    outside, since another clock made them. Among pairings of equally many, the one with the least distance wins.
    """
    claims = {record.attempt: record for record in attempts}
    by_attempt: dict[int, PaidInterval] = {}
    machines: list[PaidMachine] = []
    for attempt, row in billed:
        is_first = bool(attempt) and by_attempt.setdefault(attempt, row) is row
        claim = claims.pop(attempt, None) if is_first else None
        machines.append(PaidMachine(row, claim, attempt if is_first else None, is_billed=True))
    left = sorted(rows, key=_times)
    open_claims = [claims[number] for number in sorted(claims)]
    between = [_between(claim.attempt, by_attempt) for claim in open_claims]
    pairs = list(zip(open_claims, between, strict=True))
    found = dict(_assign([[_distance_s(row, claim, when, now) for claim, when in pairs] for row in left]))
    for index, row in enumerate(left):
        paired = open_claims[found[index]] if index in found else None
        machines.append(PaidMachine(row, paired, paired.attempt if paired else None))
    machines.sort(key=lambda machine: machine.times)
    for column, claim in enumerate(open_claims):
        if column not in found.values():
            machines.insert(_place_of(claim, machines), PaidMachine(None, claim, claim.attempt))
    return _numbered(machines)


def _place_of(claim: AttemptRecord, machines: Sequence[PaidMachine]) -> int:
    """Returns an index between the attempts before and after; among machines without a claim there, by time."""
    numbers = [machine.attempt or 0 for machine in machines]
    at = max((index + 1 for index, number in enumerate(numbers) if 0 < number < claim.attempt), default=0)
    end = next((index for index, number in enumerate(numbers) if number > claim.attempt), len(machines))
    while at < end and machines[at].times[0] <= claim.claimed_at:
        at += 1
    return at


def _numbered(machines: list[PaidMachine]) -> list[PaidMachine]:
    """Gives machines without a claim the numbers that are free between their neighbours."""
    taken = {machine.attempt for machine in machines}
    numbered: list[PaidMachine] = []
    last = 0
    for index, machine in enumerate(machines):
        later = next((one.attempt for one in machines[index:] if one.attempt), None)
        free = last + 1 if last + 1 not in taken and (later is None or last + 1 < later) else None
        number = machine.attempt or free
        numbered.append(replace(machine, attempt=number))
        last = max(last, number or 0)
    return numbered


def _between(attempt: int, billed: Mapping[int, PaidInterval]) -> tuple[float, float]:
    """Returns when its machine can have started, given the machines of other attempts."""
    earlier = (row.started_at for number, row in billed.items() if number < attempt)
    later = (row.started_at for number, row in billed.items() if number > attempt)
    return max(earlier, default=-math.inf), min(later, default=math.inf)


def _distance_s(row: PaidInterval, claim: AttemptRecord, between: tuple[float, float], now: float) -> float | None:
    """Returns how far the claim lies outside the interval; None if it is too far to belong to it."""
    if not between[0] <= row.started_at <= between[1]:
        return None
    outside = max(row.started_at - claim.claimed_at, claim.claimed_at - (row.ended_at or now), 0.0)
    return outside if outside <= MAX_SKEW_S else None


def _assign(distances: list[list[float | None]]) -> list[tuple[int, int]]:
    """Returns order-keeping pairs (row, column): the most pairs, then the least sum. Dynamic programming."""
    rows, columns = len(distances), len(distances[0]) if distances else 0
    # best[i][j]: (minus the pairs, distance) of what is left from row i and column j on.
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


def _times(row: PaidInterval) -> tuple[float, float]:
    """Returns a sort key: a placement that failed and the machine after it may begin in the same second."""
    return row.started_at, math.inf if row.ended_at is None else row.ended_at


# Events: a machine's own account of itself.


def clean(events: Iterable[Mapping[str, Any]]) -> list[Event]:
    """Returns the events with a time and a name, each once, in order of time; equal times keep the given order."""
    found = [dict(one) for one in events if number(one.get("t")) is not None and isinstance(one.get("event"), str)]
    found.sort(key=lambda event: float(event["t"]))
    cleaned: list[Event] = []
    for _, same in groupby(found, key=lambda event: float(event["t"])):
        many = list(same)
        if len(many) > 1:
            many = list({json.dumps(event, sort_keys=True, default=str): event for event in many}.values())
        cleaned += many
    return cleaned


def step_of(event: Mapping[str, Any]) -> int:
    """Returns the step in an event, 0 without one."""
    step = number(event.get("step"))
    return int(step) if step is not None and 0 < step < 1e15 else 0


# Phases: the engine's interval is the truth about how long was paid; events only divide it. The segments tile the
# interval exactly, whatever the events say: time that no event explains is ``unknown``.

Phase = Literal[
    "provision", "setup", "load", "restore", "useful", "data_wait",
    "eval", "save_stall", "replayed", "stalled", "idle", "teardown", "unknown",
]  # fmt: skip
PAID_PHASES: tuple[Phase, ...] = get_args(Phase)
# A machine's names of phases (core/protocol.py) -> the report's; "train" is divided by its steps.
_NAMES: dict[Any, Phase] = {
    "setup": "setup", "load": "load", "restore": "restore", "eval": "eval",
    "save": "save_stall", "idle": "idle", "teardown": "teardown",
}  # fmt: skip


@dataclass(frozen=True)
class Span:
    """A paid interval.

    Attributes:
        setup_s: how long ``setup:`` ran, as the engine reports it.
        is_open: it is still paid for; ``ended_at`` is the time of the report.
    """

    started_at: float
    ended_at: float
    setup_s: float = 0.0
    is_open: bool = False


@dataclass(frozen=True)
class Segment:
    """A piece of a paid interval; ``again``: it repeats what an earlier attempt had done already."""

    started_at: float
    ended_at: float
    phase: Phase
    again: bool = False

    @property
    def seconds(self) -> float:
        return self.ended_at - self.started_at


@dataclass(frozen=True)
class Step:
    """A completed step; ``again``: an earlier attempt had completed it too."""

    step: int
    ended_at: float
    again: bool


def divide(
    span: Span, claimed_at: float | None, events: Iterable[Event], done_before: int
) -> tuple[list[Segment], list[Step]]:
    """Divides a paid interval into segments that tile it, and lists the steps that were completed in it.

    Args:
        claimed_at: when the machine's guard claimed the attempt; None if no guard got that far.
        events: as read, in any order, with lines missing or doubled, from a clock that may be minutes off.
        done_before: the highest step that any earlier attempt is known to have completed.
    """
    marks = clean([*([{"t": claimed_at, "event": "claim"}] if claimed_at is not None else []), *events])
    if not marks:  # no guard ever wrote: still provisioning while the interval is open, unknown once it has ended
        ready = min(span.started_at + max(span.setup_s, 0.0), span.ended_at)
        rest: Phase = "provision" if span.is_open else "unknown"
        return _solid([Segment(span.started_at, ready, "setup"), Segment(ready, span.ended_at, rest)]), []
    marks = _with_stall(marks)
    offset = clock_offset_s(span, marks[0]["t"], marks[-1]["t"])
    walk = _Walk(span, done_before)
    for mark in marks:
        walk.on_event(mark, min(max(mark["t"] + offset, span.started_at), span.ended_at))
        if walk.has_ended:
            break
    return walk.finish(), walk.steps


def _with_stall(marks: list[Event]) -> list[Event]:
    """Adds the beginning of a stall as an event: the last sign of life, which only the stall's end reports."""
    stall = next((mark for mark in marks if mark["event"] == "stall"), None)
    since = number(stall.get("since")) if stall else None
    if stall is None or since is None:
        return marks
    since = min(max(since, marks[0]["t"]), stall["t"])
    before = [mark for mark in marks if mark["t"] <= since]
    after = [mark for mark in marks if mark["t"] > since and mark["event"] not in ("phase", "step")]
    return [*before, {"t": since, "event": "stalled"}, *after]


def clock_offset_s(span: Span, first: float, last: float) -> float:
    """Returns what to add to a machine's times so that they lie within the paid interval; 0 if that is unknown.

    It is the least shift that fits: a skewed clock moves all events alike. Events that overlap the interval and
    cannot be made to fit within MAX_SKEW_S are left, and clipped.
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


def total(segments: Iterable[Segment]) -> dict[Phase, float]:
    """Returns seconds by phase, with every phase."""
    sums: dict[Phase, float] = dict.fromkeys(PAID_PHASES, 0.0)
    for segment in segments:
        sums[segment.phase] += segment.seconds
    return sums


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

    def on_event(self, event: Event, at: float) -> None:
        # Within an attempt steps only go up: an event with another step is ignored as a step.
        is_step = event["event"] == "step" and step_of(event) > (self.steps[-1].step if self.steps else 0)
        lacks_phase = is_step and self._phase != "train" and at > (self._cursor or self.span.started_at)
        if lacks_phase:
            self._phase = "unknown"  # up to now: the line that reported the start of training is lost
        if self._cursor is None:  # before the machine's first line: the engine's setup, and the rest
            setup_from = max(self.span.started_at, at - max(self.span.setup_s, 0.0))
            self._emit(self.span.started_at, setup_from, "provision")
            self._emit(setup_from, at, "setup")
        elif self._phase == "train":
            self._pending.append((self._cursor, at))
        else:
            # Evaluations and saves repeat an earlier attempt if the last step did.
            again = bool(self.steps) and self.steps[-1].again and self._phase in ("eval", "save_stall")
            self._emit(self._cursor, at, self._phase, again)
        self._cursor = at
        match event["event"]:
            case "phase":
                name = event.get("phase")
                self._phase = (
                    "train" if name == "train" else _NAMES.get(name if isinstance(name, str) else "", "unknown")
                )
                if self._phase == "teardown":
                    self._settle("teardown")
            case "step" if is_step:
                self._close_step(event, at)
                self._phase = "train" if lacks_phase else self._phase
            case "stalled":
                self._settle("stalled")
                self._phase = "stalled"
            case "end":
                # An orderly end leaves no step behind; a failure's last, unfinished step is work of unknown use.
                self._settle("unknown" if event.get("reason") in ("failed", "lost") else "teardown")
                self._phase, self.has_ended = "teardown", True

    def finish(self) -> list[Segment]:
        """Returns the segments, up to the end of the interval."""
        self._settle("unknown")
        if self._cursor is not None:
            self._emit(self._cursor, self.span.ended_at, "teardown" if self.has_ended else "unknown")
        return _solid(self._segments)

    def _close_step(self, event: Event, at: float) -> None:
        step = step_of(event)
        again = step <= self.done_before
        self.steps.append(Step(step, at, again))
        wait = max(0.0, number(event.get("data_wait_s")) or 0.0)
        for started_at, ended_at in self._pending:  # a step begins with its batch
            waited_to = min(started_at + wait, ended_at)
            wait -= waited_to - started_at
            self._emit(started_at, waited_to, "data_wait", again)
            self._emit(waited_to, ended_at, "replayed" if again else "useful", again)
        self._pending = []

    def _settle(self, phase: Phase) -> None:
        for started_at, ended_at in self._pending:
            self._emit(started_at, ended_at, phase)
        self._pending = []

    def _emit(self, started_at: float, ended_at: float, phase: Phase, again: bool = False) -> None:
        self._segments.append(Segment(started_at, ended_at, phase, again))


def _solid(segments: Iterable[Segment]) -> list[Segment]:
    """Returns the segments in order of time, without empty ones."""
    return sorted((one for one in segments if one.ended_at > one.started_at), key=lambda one: one.started_at)
