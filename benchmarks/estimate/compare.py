"""Each cloud's cheapest machine for a fine-tune, and each GPU's cheapest cloud."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from estimate.assumptions import GPUS, HEADROOM, FineTune
from estimate.cost import Timing, Work, break_even, on_demand_hours, spot_hours, timing
from estimate.market import Market
from estimate.prices import Offer, Row, offers


@dataclass(frozen=True)
class Quote:
    """A run on one kind of machine. Dollars and hours of the whole run; None: no such price is known."""

    offer: Offer
    on_demand_h: float
    paid_h: float
    end_h: float  # until it is done, waiting for machines included
    on_demand_usd: float | None
    spot_usd: float | None
    median_spot_usd: float | None
    break_even: float | None

    @property
    def least_usd(self) -> float:
        return min(usd for usd in (self.on_demand_usd, self.spot_usd) if usd is not None)


def quotes(job: FineTune, work: Work, market: Market, rows: Iterable[Row]) -> list[Quote]:
    """For every kind of machine whose GPUs it fits."""
    fitting = [offer for offer in offers(rows, job.gpus) if fits(work, offer.gpu)]
    return [quote(offer, timing(job, work, GPUS[offer.gpu]), market) for offer in fitting]


def fits(work: Work, gpu: str) -> bool:
    return gpu in GPUS and work.memory_gb * HEADROOM.value <= GPUS[gpu].memory_gb


def quote(offer: Offer, times: Timing, market: Market) -> Quote:
    usual_h, paid_h = on_demand_hours(times), spot_hours(times, market.per_hour)
    on_demand = offer.on_demand.on_demand if offer.on_demand else None
    spot = offer.spot.spot if offer.spot else None
    return Quote(
        offer,
        on_demand_h=usual_h,
        paid_h=paid_h,
        end_h=paid_h * (1 + market.per_hour * market.wait_h),
        on_demand_usd=on_demand and on_demand * usual_h,
        spot_usd=spot and spot * paid_h,
        median_spot_usd=offer.median_spot and offer.median_spot * paid_h,
        break_even=break_even(times, on_demand, spot) if on_demand and spot else None,
    )


def by_cloud(found: Sequence[Quote]) -> list[Quote]:
    """The cheapest of each cloud, on-demand or spot, cheapest first."""
    best: dict[str, Quote] = {}
    for one in sorted(found, key=lambda one: one.least_usd):
        best.setdefault(one.offer.cloud, one)
    return list(best.values())


def by_gpu(found: Sequence[Quote]) -> list[tuple[str, Quote | None, Quote | None]]:
    """(GPU, cheapest on-demand, cheapest spot), slowest GPU first."""
    names = sorted({one.offer.gpu for one in found}, key=lambda gpu: (GPUS[gpu].bf16_tflops, gpu))
    table = []
    for name in names:
        ours = [one for one in found if one.offer.gpu == name]
        paid = [one for one in ours if one.on_demand_usd is not None]
        spot = [one for one in ours if one.spot_usd is not None]
        table.append(
            (
                name,
                min(paid, key=lambda one: one.on_demand_usd or 0, default=None),
                min(spot, key=lambda one: one.spot_usd or 0, default=None),
            )
        )
    return table
