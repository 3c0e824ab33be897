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
    """The intervals to report on: those of bills, and the engine's rows that no bill speaks for."""
    billed = [interval_of(bill) for bill in bills]
    rest = [row for row in rows if not any(_is_same(row, interval) for interval in billed)]
    return sorted([*billed, *rest], key=lambda row: row.started_at)


def _is_same(row: PaidInterval, other: PaidInterval) -> bool:
    return abs(row.started_at - other.started_at) < 0.01
