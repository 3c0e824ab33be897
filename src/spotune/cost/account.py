"""What became of one machine: its interval divided, its price, and why it ended."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from spotune.contracts import exits
from spotune.contracts.events import EndReason, Event
from spotune.contracts.keys import commit_of
from spotune.contracts.money import Place, claimed_place, cost_usd, narrowed, price_of
from spotune.contracts.records import AttemptRecord, PriceRow
from spotune.cost.bills import interval_of
from spotune.cost.eventlog import clean, step_of
from spotune.cost.evidence import Evidence
from spotune.cost.join import Machine
from spotune.cost.phases import Segment, Span, Step, divide
from spotune.launch.infra import PaidInterval

_REASONS: dict[Any, EndReason] = {
    "completed": "completed", "preempted": "preempted", "failed": "failed",
    "cancelled": "cancelled", "paused": "paused", "lost": "lost", "stalled": "stalled",
}  # fmt: skip
_OF_EXIT_CODE: dict[int | None, EndReason] = {exits.PREEMPTED: "preempted", exits.PAUSED: "paused", None: "lost"}


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
        is_final = self.end_reason in ("failed", "stalled") and code != exits.PREEMPTED
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
    if certificate and reason == "failed" and row and row.exit_code == exits.SUCCEEDED:
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
