"""bill.json: an attempt's paid interval, written once it is known, so that any machine can make the report."""

from collections.abc import Iterable, Sequence

from spotune.contracts.records import Bill
from spotune.launch.infra import PaidInterval


def interval_of(bill: Bill) -> PaidInterval:
    """The engine's row that a bill was made from."""
    return PaidInterval(
        run_id=bill.run_id,
        started_at=bill.started_at,
        ended_at=bill.ended_at,
        infra=bill.infra,
        region=bill.region,
        zone=bill.zone,
        instance_type=bill.instance_type,
        accelerators=bill.accelerators,
        use_spot=bill.use_spot,
        nodes=bill.nodes,
        setup_s=bill.setup_s,
        end_reason=bill.reason,
        exit_code=bill.exit_code,
    )


def with_bills(rows: Sequence[PaidInterval], bills: Iterable[Bill]) -> list[PaidInterval]:
    """The intervals to report on: those of bills, and the engine's rows that no bill speaks for; each machine once."""
    billed = _distinct(map(interval_of, bills))
    left = _distinct(rows)
    for is_same in (_is_exact, _is_dated_anew):
        for bill in billed:
            if found := next((row for row in left if is_same(row, bill)), None):
                left.remove(found)
    return sorted([*billed, *left], key=lambda row: row.started_at)


def _distinct(intervals: Iterable[PaidInterval]) -> list[PaidInterval]:
    found: list[PaidInterval] = []
    for one in intervals:
        if one not in found:
            found.append(one)
    return found


def _is_exact(row: PaidInterval, bill: PaidInterval) -> bool:
    return _is_at(row.started_at, bill.started_at) and _is_at(row.ended_at, bill.ended_at)


def _is_dated_anew(row: PaidInterval, bill: PaidInterval) -> bool:
    """Whether an engine dates one end of a billed machine otherwise than when the bill was written; the bill stands."""
    if row.ended_at is None or bill.ended_at is None:
        return False
    if min(row.ended_at, bill.ended_at) <= max(row.started_at, bill.started_at):
        return False
    return _is_at(row.started_at, bill.started_at) or _is_at(row.ended_at, bill.ended_at)


def _is_at(time: float | None, other: float | None) -> bool:
    return time is not None and other is not None and abs(time - other) < 0.01
