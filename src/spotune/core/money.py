"""Prices as they were frozen at submission. Nothing is looked up when a report is read."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from spotune.core.errors import InputError, shown
from spotune.core.fields import HOUR_S as HOUR_S
from spotune.core.fields import MOST_USD
from spotune.core.records import AttemptRecord, PriceRow, RunRecord

WARN_AT = 0.8  # of a budget, a run's or a month's


@dataclass(frozen=True)
class Place:
    """Where a machine was and what it was; ``use_spot`` None: not known (the engine's row is missing)."""

    infra: str
    region: str = ""
    zone: str = ""
    instance_type: str = ""
    accelerators: str = ""
    use_spot: bool | None = None


def price_of(place: Place, rows: Sequence[PriceRow]) -> PriceRow | None:
    """The frozen row of where a machine was, the most specific one; None when no price was frozen for it.

    A row of 0 dollars is no price: it is what SkyPilot has for a place whose price nobody has told it.

    Where it is not known whether it was a spot machine, the dearer row is taken: a cost is not understated.
    """
    fits = [row for row in rows if row.price_usd_per_hour > 0 and _fits(row, place)]
    return max(fits, key=lambda row: (_precision(row, place), row.price_usd_per_hour), default=None)


def claimed_place(record: AttemptRecord, run: RunRecord, rows: Sequence[PriceRow]) -> Place:
    """Where a claim says that its machine is, which does not know whether it is a spot one: where all that the run may
    land on are, or none is, it is told by that."""
    use_spot = None if run.use_spot and run.may_be_on_demand else run.use_spot
    place = Place(record.infra, record.region, record.zone, use_spot=use_spot)
    return place if price_of(place, rows) else replace(place, use_spot=None)


def narrowed(place: Place, rows: Sequence[PriceRow]) -> Place:
    """The place with what is not known of its machine, as far as all rows that were frozen for it say the same."""
    fits = [row for row in rows if _fits(row, place)]
    told = {
        name: values.pop()
        for name in ("instance_type", "accelerators", "use_spot")
        if getattr(place, name) in ("", None) and len(values := {getattr(row, name) for row in fits}) == 1
    }
    return replace(place, **told)


def on_demand_price(accelerators: Iterable[str], rows: Sequence[PriceRow]) -> PriceRow | None:
    """The cheapest on-demand row with the accelerators that ran."""
    wanted = set(accelerators)
    fits = [row for row in rows if not row.use_spot and row.accelerators in wanted and row.price_usd_per_hour > 0]
    return min(fits, key=lambda row: row.price_usd_per_hour, default=None)


def cost_usd(seconds: float, nodes: float, price: PriceRow | None) -> float | None:
    """Seconds x nodes at the price of one node; None when there is no price."""
    return None if price is None else seconds / HOUR_S * nodes * price.price_usd_per_hour


def parse_usd(text: str, name: str) -> float:
    """``20``, ``0.05`` or ``$20``: dollars, above 0, up to a billion. Raises InputError naming ``name``."""
    try:
        amount = float(text.strip().removeprefix("$"))
    except ValueError:
        amount = math.nan
    if not 0 < amount <= MOST_USD:
        raise InputError(name, f"{shown(text)} is no amount of US dollars", remedy="20, or 0.05")
    return amount


def usd(amount: float) -> str:
    """``$1,234.50``, ``$0.42``, ``$0.00042``: cents, and of less than a dime two digits that say something."""
    sign, size = ("−" if amount < 0 else ""), abs(amount)
    if size >= 0.095 or size == 0:
        return f"{sign}${size:,.2f}"
    if size < 1e-6:
        return "$0.00"
    digits = 2
    while size < 10 ** (1 - digits):
        digits += 1
    return f"{sign}${size:.{digits}f}"


def _fits(row: PriceRow, place: Place) -> bool:
    return (
        _backend(row.infra) == _backend(place.infra)
        and place.use_spot in (None, row.use_spot)
        and all(
            given in ("", "*") or known in ("", given)
            for given, known in (
                (row.region, place.region),
                (row.zone, place.zone),
                (row.instance_type, place.instance_type),
                (row.accelerators, place.accelerators),
            )
        )
    )


def _precision(row: PriceRow, place: Place) -> int:
    pairs = (
        (row.infra.lower(), place.infra.lower()),
        (row.region, place.region),
        (row.zone, place.zone),
        (row.instance_type, place.instance_type),
        (row.accelerators, place.accelerators),
    )
    return sum(given == known for given, known in pairs)


def _backend(infra: str) -> str:
    return infra.lower().split("/", 1)[0]
