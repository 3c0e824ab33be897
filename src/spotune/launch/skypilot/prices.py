"""Prices of every place that a run may land on, as rows: pure but for what they are read from.

SkyPilot's own figures, from its catalog and, for Slurm, from ``slurm.pricing`` of its config.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from spotune.contracts.records import PriceRow
from spotune.launch.infra import ANY, cloud_of


@dataclass(frozen=True)
class Quote:
    """What a machine costs in one zone, US dollars an hour; ``zone`` empty: in each of the region's."""

    cloud: str
    region: str
    zone: str
    instance_type: str
    accelerators: str
    use_spot: bool
    usd_per_hour: float


@dataclass(frozen=True)
class Choice:
    """One of a task's alternatives, as far as prices depend on it; empty: any. ``accelerators`` as in a price row."""

    accelerators: str
    use_spot: bool
    cloud: str = ""
    region: str = ""
    zone: str = ""
    instance_type: str = ""

    def takes(self, row: PriceRow) -> bool:
        places = (
            (self.cloud, row.infra),
            (self.region, row.region),
            (self.zone, row.zone),
            (self.instance_type, row.instance_type),
            (self.accelerators, row.accelerators),
        )
        return self.use_spot == row.use_spot and all(asked in ("", found) or found == "*" for asked, found in places)


def price_rows(quotes: Iterable[Quote], source: str, at: float) -> list[PriceRow]:
    """The cheapest first. Zones that cost the same are one row for their region.

    Where they do not, the region has a row too, at its dearest zone's price, for a zone that has another name there:
    Amazon's differ from account to account, and only who has the account's credentials knows them.

    A price of nothing is no price but for those that have none: catalogs write 0 where they do not know.
    """
    by_machine: dict[tuple[str, str, str, str, bool], dict[str, float]] = {}
    for quote in quotes:
        if quote.usd_per_hour > 0 or quote.cloud in ("slurm", "kubernetes", "ssh"):
            machine = (quote.cloud, quote.region, quote.instance_type, quote.accelerators, quote.use_spot)
            by_machine.setdefault(machine, {})[quote.zone] = round(quote.usd_per_hour, 6)
    rows = []
    for (cloud, region, instance_type, accelerators, use_spot), zones in by_machine.items():
        is_one = cloud != "slurm" and len(set(zones.values())) == 1
        anywhere = {"": max(zones.values())} if cloud != "slurm" else {}
        for zone, price in (anywhere if is_one else zones | anywhere).items():
            rows.append(
                PriceRow(
                    infra=cloud,
                    region=region or "*",
                    zone=zone or "*",
                    instance_type=instance_type,
                    accelerators=accelerators,
                    use_spot=use_spot,
                    price_usd_per_hour=price,
                    source=source if price else f"no price in {source}",
                    at=at,
                )
            )
    return sorted(rows, key=lambda row: (row.price_usd_per_hour, row.infra, row.region, row.zone, row.use_spot))


def within(rows: Sequence[PriceRow], infra: str) -> list[PriceRow]:
    """The rows of places that ``infra`` names: ``aws/us-east-1`` takes that region's only."""
    if cloud_of(infra) == ANY:
        return list(rows)
    _, *places = infra.split("/")
    region, zone = (*places, "", "")[:2]
    return [row for row in rows if region in ("", "*", row.region) and (zone in ("", "*") or row.zone in ("*", zone))]


def first_tried(rows: Sequence[PriceRow], choices: Sequence[Choice], is_ordered: bool) -> PriceRow | None:
    """What SkyPilot tries first: the cheapest of the places that a choice takes, of ordered ones the first's."""
    groups = [[one] for one in choices] if is_ordered else [choices]
    for group in groups:
        fits = [row for row in rows if any(one.takes(row) for one in group)]
        if fits:
            return min(fits, key=lambda row: row.price_usd_per_hour)
    return None


def choose(rows: Sequence[PriceRow], use_spot: bool) -> PriceRow | None:
    """On Slurm, where partitions are of a kind: the cheapest of the kind that was asked for, else of any kind."""
    return min(rows, key=lambda row: (row.use_spot != use_spot, row.price_usd_per_hour), default=None)
