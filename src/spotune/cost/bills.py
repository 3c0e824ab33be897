"""bill.json: an attempt's paid interval, written once it is known, so that any machine can make the report."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from spotune.contracts.records import Bill
from spotune.launch.infra import PaidInterval


@dataclass(frozen=True, kw_only=True)
class MachineBill(Bill):
    """A bill, and what else the engine said of the machine: where it was, how long its setup ran.

    The base class's readers ignore these. ``reason`` and ``exit_code`` are the engine's own words.
    """

    infra: str = ""
    region: str = ""
    zone: str = ""
    instance_type: str = ""
    accelerators: str = ""
    use_spot: bool = False
    setup_s: float = 0.0
    reason: str = ""
    exit_code: int | None = None

    def interval(self) -> PaidInterval:
        """The engine's row that this bill was made from."""
        return PaidInterval(
            run_id=self.run_id,
            started_at=self.started_at,
            ended_at=self.ended_at,
            infra=self.infra,
            region=self.region,
            zone=self.zone,
            instance_type=self.instance_type,
            accelerators=self.accelerators,
            use_spot=self.use_spot,
            nodes=self.nodes,
            setup_s=self.setup_s,
            end_reason=self.reason,
            exit_code=self.exit_code,
        )


def with_bills(rows: Sequence[PaidInterval], bills: Iterable[MachineBill]) -> list[PaidInterval]:
    """The intervals to report on: those of bills, and the engine's rows that no bill speaks for."""
    billed = [bill.interval() for bill in bills]
    rest = [row for row in rows if not any(_is_same(row, interval) for interval in billed)]
    return sorted([*billed, *rest], key=lambda row: row.started_at)


def _is_same(row: PaidInterval, other: PaidInterval) -> bool:
    return abs(row.started_at - other.started_at) < 0.01
