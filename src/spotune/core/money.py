"""Prices as they were frozen at submission, and figures as people read them.

Nothing is looked up when a report is read.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from spotune.core.errors import InputError, shown
from spotune.core.keys import HOUR_S as HOUR_S
from spotune.core.keys import MOST_USD
from spotune.core.records import AttemptRecord, PriceRow, RunRecord

NONE = "–"  # a figure that is not known
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


def usd(amount: float | None) -> str:
    """``$1,234.50``, ``$0.42``, ``$0.00042``: cents, and of less than a dime two digits that say something."""
    if amount is None:
        return NONE
    sign, size = ("−" if amount < 0 else ""), abs(amount)
    if size >= 0.095 or size == 0:
        return f"{sign}${size:,.2f}"
    if size < 1e-6:
        return "$0.00"
    digits = 2
    while size < 10 ** (1 - digits):
        digits += 1
    return f"{sign}${size:.{digits}f}"


def percent(share: float | None) -> str:
    if share is None:
        return NONE
    return f"{share * 100:.0f} %" if share >= 0.0995 or share <= 0 else f"{share * 100:.1f} %"


def duration(seconds: float | None) -> str:
    """``0.4 s``, ``45 s``, ``12m 3s``, ``5h 2m``, ``3d 4h``."""
    if seconds is None:
        return NONE
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    left, parts = round(seconds), []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        amount, left = divmod(left, size)
        if amount:
            parts.append(f"{amount}{unit}")
    return " ".join(parts[:2])


def is_seen(seconds: float) -> bool:
    """Returns whether a duration is more than the ``0.0 s`` that it would be shown as."""
    return seconds >= 0.05


def count(number: int | None) -> str:
    return NONE if number is None else f"{number:,}"


def cost_of(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """Their sum; None where one of them is not known."""
    costs = [row["cost_usd"] for row in rows]
    return None if None in costs else sum(costs)


def known(amounts: Iterable[float | None]) -> float | None:
    """The sum of those that are known; None where none is."""
    found = list(amounts)
    told = [amount for amount in found if amount is not None]
    return sum(told) if told or not found else None


def size(number: float) -> str:
    """``0.4 GB``, ``12 MB``: powers of 1000."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number:.0f} B"


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
