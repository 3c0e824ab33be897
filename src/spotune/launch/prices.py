"""What machines cost, as rows that are frozen in ``run.json``; here those of this machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spotune.contracts.records import PriceRow
from spotune.launch.local.gpus import Gpu
from spotune.launch.settings import Settings
from spotune.launch.task import Demand

CPU = "cpu"


@dataclass(frozen=True)
class Offers:
    """The task at its place, and the prices of all places that it may land on.

    Attributes:
        rows: the cheapest first; also those of places that it may not be launched on, to compare with.
        chosen: what SkyPilot tries first, as far as prices tell.
        notes: what is to be said beside the prices.
        kinds: whether it may get spot machines (True), others (False), or either; empty: the kind of ``chosen``.
    """

    task: dict[str, Any]
    rows: list[PriceRow]
    chosen: PriceRow
    notes: tuple[str, ...] = ()
    kinds: frozenset[bool] = frozenset()

    @property
    def may_be_spot(self) -> bool:
        return True in (self.kinds or {self.chosen.use_spot})

    @property
    def may_be_either(self) -> bool:
        return len(self.kinds) > 1


def local_prices(settings: Settings, gpus: Sequence[Gpu], demand: Demand, at: float) -> list[PriceRow]:
    """Spot and on-demand price of what a job gets on this machine, from the local price table.

    A task that asks for GPUs runs on the CPU of a machine that has none, and is priced as that.
    """
    count = max(1, demand.gpus) if gpus else 1
    kind = gpus[0].name if gpus else CPU
    price = settings.local.prices.get(kind)
    source = "local price table" if price else f"no price for {kind} in the local price table"
    rows = []
    for use_spot in (True, False):
        each = (price.spot if use_spot else price.on_demand) if price else 0.0
        rows.append(
            PriceRow(
                infra="local",
                region="local",
                instance_type="local",
                accelerators=f"{kind}:{count}" if gpus else "",
                use_spot=use_spot,
                price_usd_per_hour=round(each * count, 6),
                source=source,
                at=at,
            )
        )
    return rows
