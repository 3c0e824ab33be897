"""Where a task could run, and what that costs: SkyPilot's catalog, and Slurm's prices."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spotune.core.errors import InfraError, InputError, SpotuneError
from spotune.core.records import PriceRow
from spotune.launch.engine import ANY, cloud_of
from spotune.launch.plan import Offers
from spotune.launch.settings import SlurmSettings
from spotune.launch.skypilot import client
from spotune.launch.skypilot.jobs import accelerators_of
from spotune.launch.skypilot.task import Partition, partitions_of, placed
from spotune.launch.task import may_be_spot, override

# Where a task could run and what that costs. What SkyPilot would refuse it refuses here, before anybody is asked.

_PARTITION = 2  # slashes in slurm/CLUSTER/PARTITION


@dataclass(frozen=True)
class Wanted:
    """What was asked for.

    Attributes:
        use_spot: what was said on the command line; None: nothing, the task decides.
    """

    task: dict[str, Any]
    infra: str
    use_spot: bool | None = None
    environ: Mapping[str, str] = field(default_factory=dict)
    slurm: SlurmSettings = field(default_factory=SlurmSettings)


def make_offers(wanted: Wanted, at: float) -> Offers:
    """Asks SkyPilot whether it can be had, and for the prices. Raises InputError or InfraError when it cannot."""
    cloud = cloud_of(wanted.infra)
    if cloud == "slurm":
        return _on_slurm(wanted, at)
    clouds = [name for name in client.enabled_clouds() if name != "slurm"] if cloud == ANY else [cloud]
    task, asked, notes = _feasible(wanted, clouds)
    rows = price_rows((quote for name in clouds for quote in cloud_quotes(name, asked)), CATALOG, at)
    open_to = choices(asked)
    kinds = frozenset(one.use_spot for one in open_to)
    chosen = first_tried(within(rows, wanted.infra), open_to, isinstance(asked.resources, list))
    if chosen is None:
        chosen = _unpriced(wanted.infra, True in kinds, CATALOG, at)
        rows = [chosen, *rows]
    return Offers(task, rows, chosen, notes, kinds)


def _feasible(wanted: Wanted, clouds: Sequence[str]) -> tuple[dict[str, Any], Any, tuple[str, ...]]:
    """The task at its place, that as SkyPilot reads it, and what is to be said.

    A task that wants spot machines where there are none gets others, unless they were asked for with ``--use-spot``.
    """
    task = {**wanted.task, "resources": placed(wanted.task.get("resources") or {}, wanted.infra)}
    asked = client.task(task)
    wants_spot = may_be_spot(task["resources"])
    if wants_spot and clouds and not any(has_spot(name, asked) for name in clouds):
        if wanted.use_spot:
            raise InputError("--use-spot", f"{wanted.infra} has no spot machines", remedy="--no-use-spot")
        return _on_demand(task, wanted.infra)
    try:
        client.check_feasible(asked)
    except InfraError:
        if wants_spot and not wanted.use_spot and clouds and set(clouds) <= set(PODS):
            return _on_demand(task, wanted.infra)
        raise
    return task, asked, ()


def _on_demand(task: dict[str, Any], infra: str) -> tuple[dict[str, Any], Any, tuple[str, ...]]:
    task = {**task, "resources": override(task["resources"], {}, without=("use_spot",))}
    asked = client.task(task)
    client.check_feasible(asked)
    return task, asked, (f"{infra} has no spot machines for this: on demand instead",)


def _on_slurm(wanted: Wanted, at: float) -> Offers:
    known = partitions_of(wanted.infra, wanted.slurm, wanted.environ)
    resources = wanted.task.get("resources") or {}
    use_spot = may_be_spot(resources)
    places = narrowed(wanted.infra, wanted.use_spot, use_spot, known)
    task = {**wanted.task, "resources": placed(resources, wanted.infra, places)}
    asked = client.task(task)
    client.check_feasible(asked)
    quotes = (quote for name, found in known.items() for quote in slurm_quotes(asked, name, found))
    rows = price_rows(quotes, SLURM_PRICING, at)
    open_to = [row for row in rows if f"slurm/{row.region}/{row.zone}" in places] if places else rows
    chosen = choose(open_to, use_spot)
    if chosen is None:
        chosen = _unpriced(wanted.infra, False, SLURM_PRICING, at)
        rows = [chosen, *rows]
    kind = "may be preempted" if chosen.use_spot else "is not preempted"
    where = f"partition {chosen.zone} {kind}" if chosen.zone != "*" else "SkyPilot chooses"
    notes = (f"slurm has no spot machines, the partition decides: {where}",)
    return Offers(task, rows, chosen, notes, frozenset(row.use_spot for row in open_to))


def narrowed(infra: str, said: bool | None, use_spot: bool, known: Mapping[str, Sequence[Partition]]) -> list[str]:
    """The partitions that it may run on, ``slurm/CLUSTER/PARTITION``; empty: SkyPilot's choice.

    Args:
        said: ``--use-spot`` or ``--no-use-spot`` on the command line; None: neither.
        use_spot: what the task wants.
        known: partitions by cluster.

    Raises:
        InputError: where the flag asks for what there is not.
    """
    kinds = {f"slurm/{cluster}/{one.name}": one.preemptible for cluster, found in known.items() for one in found}
    flag = "--use-spot" if said else "--no-use-spot"
    fits = [place for place, preemptible in kinds.items() if preemptible == use_spot]
    if infra.count("/") == _PARTITION:
        if said is not None and kinds.get(infra, said) != said:
            what = "is never preempted" if said else "may be preempted"
            raise InputError(flag, f"a job on {infra} {what}", remedy=f"--infra {fits[0]}" if fits else "")
        return [infra]
    if not fits and said is not None and kinds:
        what = "may be preempted" if said else "is safe from preemption"
        raise InputError(flag, f"no partition of {infra} {what}", remedy=f"--infra {next(iter(kinds))}")
    return fits


def _unpriced(infra: str, use_spot: bool, source: str, at: float) -> PriceRow:
    _, *places = infra.split("/")
    region, zone = (*places, "*", "*")[:2]
    return PriceRow(
        infra=cloud_of(infra),
        region=region,
        zone=zone,
        use_spot=use_spot,
        price_usd_per_hour=0.0,
        source=f"no price in {source}",
        at=at,
    )


# Prices of every place that a run may land on, as rows: pure but for what they are read from.
#
# SkyPilot's own figures, from its catalog and, for Slurm, from ``slurm.pricing`` of its config.


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


# SkyPilot's prices for what a task asks for: every machine that would do, in every zone, spot and on demand.
#
# Read from SkyPilot's catalog on this machine, with SkyPilot's own rules for which machine has which accelerator; the
# optimizer would name the cheapest alone, and only of clouds whose credentials are there.

CATALOG = "SkyPilot's catalog"
SLURM_PRICING = "slurm.pricing of SkyPilot's config"


PODS = ("kubernetes", "ssh")


def has_spot(name: str, task: Any) -> bool:
    """Whether a cloud has spot machines at all. Of pods only their own cluster can tell: taken for a yes."""
    if name in PODS:
        return True
    try:
        with client.translated():
            spot = client.sdk().clouds.CloudImplementationFeatures.SPOT_INSTANCE
            client.cloud(name).check_features_are_supported(next(iter(task.resources)), {spot})
    except SpotuneError:
        return False
    return True


def choices(task: Any) -> list[Choice]:
    """The task's alternatives, in their order if they have one (then ``task.resources`` is a list)."""
    return [
        Choice(
            accelerators=accelerators_of(one.accelerators),
            use_spot=bool(one.use_spot),
            cloud=str(one.cloud or "").lower(),
            region=one.region or "",
            zone=one.zone or "",
            instance_type=one.instance_type or "",
        )
        for one in task.resources
    ]


def cloud_quotes(name: str, task: Any) -> list[Quote]:
    """Of one cloud, for each of the task's alternatives.

    A cloud whose prices cannot be read has none: what it costs is then not known, which is no reason not to launch.
    """
    found: dict[Quote, None] = {}
    for resources in task.resources:
        try:
            with client.translated():
                found.update(dict.fromkeys(_quotes(name, resources, task.num_nodes)))
        except SpotuneError:
            continue
    return list(found)


def _quotes(name: str, resources: Any, num_nodes: int) -> Iterator[Quote]:
    cloud = client.cloud(name)
    for use_spot in (True, False):
        wanted = resources.copy(cloud=cloud, use_spot=use_spot)
        for machine in cloud.get_feasible_launchable_resources(wanted, num_nodes).resources_list:
            accelerators = machine.accelerators or resources.accelerators
            regions = cloud.regions_with_offering(
                machine.instance_type, accelerators, use_spot, resources.region, resources.zone
            )
            for region in regions:
                for zone in region.zones or [None]:
                    zone_name = zone.name if zone else None
                    yield Quote(
                        cloud=name,
                        region=region.name,
                        zone=zone_name or "",
                        instance_type=machine.instance_type,
                        accelerators=accelerators_of(accelerators),
                        use_spot=use_spot,
                        usd_per_hour=_usd_per_hour(cloud, machine, use_spot, region.name, zone_name),
                    )


def _usd_per_hour(cloud: Any, machine: Any, use_spot: bool, region: str, zone: str | None) -> float:
    usd = cloud.instance_type_to_hourly_cost(machine.instance_type, use_spot, region, zone)
    apart = getattr(machine, "_accelerators", None)  # set where they are billed apart from the machine, as on GCP
    if apart:
        usd += cloud.accelerators_to_hourly_cost(apart, use_spot, region, zone)
    return float(usd) if usd == usd else 0.0  # no price is NaN in the catalog


def slurm_quotes(task: Any, cluster: str, partitions: Sequence[Partition]) -> list[Quote]:
    """Of one cluster, as ``slurm.pricing`` of SkyPilot's config on this machine says."""
    cloud = client.cloud("slurm")
    found: dict[Quote, None] = {}
    for resources in task.resources:
        accelerators = accelerators_of(resources.accelerators)
        machine = slurm_machine(resources.cpus, resources.memory, accelerators)
        for partition in partitions:
            with client.translated():
                usd = cloud.instance_type_to_hourly_cost(machine, False, cluster, partition.name)
            found[Quote("slurm", cluster, partition.name, "", accelerators, partition.preemptible, float(usd))] = None
    return list(found)


def slurm_machine(cpus: str | None, memory: str | None, accelerators: str) -> str:
    """The size that SkyPilot asks Slurm for, as it spells it: ``4CPU--16GB--L4:1``."""
    name, _, count = accelerators.partition(":")
    ratio, least = (4.0, 4.0 * float(count or 1)) if name else (1.0, 2.0)
    cores = float(cpus.rstrip("+x")) if cpus else least
    gigabytes = cores * ratio if memory is None else float(memory.rstrip("+x")) * (cores if memory[-1] == "x" else 1)
    return f"{cores:g}CPU--{gigabytes:g}GB{f'--{accelerators}' if name else ''}"
