"""bill.json: an attempt's paid interval, written once it is known, so that any machine can make the report."""

from collections.abc import Iterable

from spotune.contracts.records import Bill
from spotune.launch.infra import PaidInterval

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
