"""bill.json: an attempt's paid interval, written once it is known, so that any machine can make the report."""

import math
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
    found: list[PaidInterval] = []
    for row in (*map(interval_of, bills), *sorted(rows, key=lambda row: row.started_at)):
        if not any(_is_same(row, interval) for interval in found):
            found.append(row)
    return sorted(found, key=lambda row: row.started_at)


def _is_same(row: PaidInterval, other: PaidInterval) -> bool:
    """Whether both are of one machine: a run has one at a time, so that two intervals that share most are one.

    An engine may come to date a machine's start otherwise than when its bill was written; the bill stands.
    """
    if abs(row.started_at - other.started_at) < 0.01:
        return True
    ends = [math.inf if one.ended_at is None else one.ended_at for one in (row, other)]
    common = min(ends) - max(row.started_at, other.started_at)
    shorter = min(end - one.started_at for end, one in zip(ends, (row, other), strict=True))
    return common > 0 and common > shorter / 2
