"""Where a task could run, and what that costs: SkyPilot's catalog, and ``slurm.pricing`` of its config.

A task that SkyPilot would refuse is refused here, before the user is asked.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from spotune.core.errors import InfraError, InputError, SpotuneError
from spotune.core.money import Place
from spotune.core.records import PriceRow
from spotune.launch.engine import ANY, cloud_of
from spotune.launch.plan import Offers
from spotune.launch.settings import SlurmSettings
from spotune.launch.skypilot import client
from spotune.launch.skypilot.jobs import accelerators_of, price_row
from spotune.launch.skypilot.task import Partition, partitions_of, placed
from spotune.launch.task import may_be_spot, override

CATALOG = "SkyPilot's catalog"
SLURM_PRICING = "slurm.pricing of SkyPilot's config"
PODS = ("kubernetes", "ssh")


@dataclass(frozen=True)
class Wanted:
    """A task and the place that was asked for."""

    task: dict[str, Any]
    infra: str
    use_spot: bool | None = None  # the flag on the command line; None: the task decides
    environ: Mapping[str, str] = field(default_factory=dict)
    slurm: SlurmSettings = field(default_factory=SlurmSettings)


def make_offers(wanted: Wanted, at: float) -> Offers:
    """Asks SkyPilot whether a task can run, and for the prices. Raises InputError or InfraError if it cannot run."""
    cloud = cloud_of(wanted.infra)
    if cloud == "slurm":
        return _on_slurm(wanted, at)
    clouds = [name for name in client.enabled_clouds() if name != "slurm"] if cloud == ANY else [cloud]
    task, asked, notes = _feasible(wanted, clouds)
    rows = price_rows((quote for name in clouds for quote in cloud_quotes(name, asked).items()), CATALOG, at)
    open_to = choices(asked)
    kinds = frozenset(bool(one.use_spot) for one in open_to)
    chosen = first_tried(within(rows, wanted.infra), open_to, isinstance(asked.resources, list))
    if chosen is None:
        chosen = _unpriced(wanted.infra, True in kinds, CATALOG, at)
        rows = [chosen, *rows]
    return Offers(task, rows, chosen, notes, kinds)


def _feasible(wanted: Wanted, clouds: Sequence[str]) -> tuple[dict[str, Any], Any, tuple[str, ...]]:
    """Returns (the task at its place, SkyPilot's object for it, notes for the user).

    A task that wants spot machines at a place without any gets others, unless the user gave ``--use-spot``.
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
    quotes = (quote for name, found in known.items() for quote in slurm_quotes(asked, name, found).items())
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


def narrowed(infra: str, flagged: bool | None, use_spot: bool, known: Mapping[str, Sequence[Partition]]) -> list[str]:
    """Returns the partitions that a task may run on, ``slurm/CLUSTER/PARTITION``; empty: SkyPilot chooses.

    ``flagged`` is ``--use-spot`` or ``--no-use-spot`` on the command line, ``use_spot`` what the task wants, ``known``
    the partitions by cluster. Raises InputError if no partition is what the flag asks for.
    """
    kinds = {f"slurm/{cluster}/{one.name}": one.preemptible for cluster, found in known.items() for one in found}
    flag = "--use-spot" if flagged else "--no-use-spot"
    fits = [place for place, preemptible in kinds.items() if preemptible == use_spot]
    if infra.count("/") == 2:
        if flagged is not None and kinds.get(infra, flagged) != flagged:
            what = "is never preempted" if flagged else "may be preempted"
            raise InputError(flag, f"a job on {infra} {what}", remedy=f"--infra {fits[0]}" if fits else "")
        return [infra]
    if not fits and flagged is not None and kinds:
        what = "may be preempted" if flagged else "is safe from preemption"
        raise InputError(flag, f"no partition of {infra} {what}", remedy=f"--infra {next(iter(kinds))}")
    return fits


def _unpriced(infra: str, use_spot: bool, source: str, at: float) -> PriceRow:
    _, *places = infra.split("/")
    region, zone = (*places, "", "")[:2]
    return price_row(Place(cloud_of(infra), region, zone, use_spot=use_spot), 0.0, f"no price in {source}", at)


def takes(asked: Place, row: PriceRow) -> bool:
    """Returns whether a task's alternative may land on a row; what is empty in ``asked`` may be anything."""
    pairs = (
        (asked.infra, row.infra),
        (asked.region, row.region),
        (asked.zone, row.zone),
        (asked.instance_type, row.instance_type),
        (asked.accelerators, row.accelerators),
    )
    return asked.use_spot == row.use_spot and all(want in ("", found) or found == "*" for want, found in pairs)


def price_rows(quotes: Iterable[tuple[Place, float]], source: str, at: float) -> list[PriceRow]:
    """Returns the price rows of places and US dollars an hour, cheapest first. Zones of one price become one row for
    their region; an empty zone is each zone of the region.

    If zones differ in price, the region gets a row too, at its dearest zone's price. It is for zones under other names:
    Amazon's zone names differ between accounts, and only the account's credentials tell them.

    A price of 0 means an unknown price in a catalog; Slurm, Kubernetes and ssh machines are taken without a price.
    """
    by_machine: dict[Place, dict[str, float]] = {}
    for place, usd_per_hour in quotes:
        if usd_per_hour > 0 or place.infra in ("slurm", *PODS):
            by_machine.setdefault(replace(place, zone=""), {})[place.zone] = round(usd_per_hour, 6)
    rows = []
    for machine, zones in by_machine.items():
        is_one = machine.infra != "slurm" and len(set(zones.values())) == 1
        anywhere = {"": max(zones.values())} if machine.infra != "slurm" else {}
        for zone, price in (anywhere if is_one else zones | anywhere).items():
            found_in = source if price else f"no price in {source}"
            rows.append(price_row(replace(machine, zone=zone), price, found_in, at))
    return sorted(rows, key=lambda row: (row.price_usd_per_hour, row.infra, row.region, row.zone, row.use_spot))


def within(rows: Sequence[PriceRow], infra: str) -> list[PriceRow]:
    """Returns the rows of the places that ``infra`` names: for ``aws/us-east-1``, that region's rows only."""
    if cloud_of(infra) == ANY:
        return list(rows)
    _, *places = infra.split("/")
    region, zone = (*places, "", "")[:2]
    return [row for row in rows if region in ("", "*", row.region) and (zone in ("", "*") or row.zone in ("*", zone))]


def first_tried(rows: Sequence[PriceRow], choices: Sequence[Place], is_ordered: bool) -> PriceRow | None:
    """Returns what SkyPilot tries first: the cheapest row of any choice; if choices are ordered, of the first one."""
    groups = [[one] for one in choices] if is_ordered else [choices]
    for group in groups:
        fits = [row for row in rows if any(takes(one, row) for one in group)]
        if fits:
            return min(fits, key=lambda row: row.price_usd_per_hour)
    return None


def choose(rows: Sequence[PriceRow], use_spot: bool) -> PriceRow | None:
    """Returns the cheapest row of the kind that was asked for, else of any kind; for Slurm's partitions."""
    return min(rows, key=lambda row: (row.use_spot != use_spot, row.price_usd_per_hour), default=None)


def has_spot(name: str, task: Any) -> bool:
    """Returns whether a cloud has spot machines. True for pods: only their cluster knows."""
    if name in PODS:
        return True
    try:
        with client.translated():
            spot = client.sdk().clouds.CloudImplementationFeatures.SPOT_INSTANCE
            client.cloud(name).check_features_are_supported(next(iter(task.resources)), {spot})
    except SpotuneError:
        return False
    return True


def choices(task: Any) -> list[Place]:
    """Returns the task's alternatives, in their order if they have one (then ``task.resources`` is a list)."""
    return [
        Place(
            infra=str(one.cloud or "").lower(),
            region=one.region or "",
            zone=one.zone or "",
            instance_type=one.instance_type or "",
            accelerators=accelerators_of(one.accelerators),
            use_spot=bool(one.use_spot),
        )
        for one in task.resources
    ]


def cloud_quotes(name: str, task: Any) -> dict[Place, float]:
    """Returns a cloud's prices of every machine that fits the task, in every zone, spot and on demand.

    They come from SkyPilot's catalog on this machine, with SkyPilot's rules for which machine has which accelerator.
    The optimizer would name only the cheapest, and only of clouds with credentials. An alternative whose prices cannot
    be read has none here: an unknown price does not prevent a launch.
    """
    found: dict[Place, float] = {}
    for resources in task.resources:
        with suppress(SpotuneError), client.translated():
            found.update(_quotes(name, resources, task.num_nodes))
    return found


def _quotes(name: str, resources: Any, num_nodes: int) -> dict[Place, float]:
    cloud, found = client.cloud(name), {}
    for use_spot in (True, False):
        wanted = resources.copy(cloud=cloud, use_spot=use_spot)
        for machine in cloud.get_feasible_launchable_resources(wanted, num_nodes).resources_list:
            kind, accelerators = machine.instance_type, machine.accelerators or resources.accelerators
            regions = cloud.regions_with_offering(kind, accelerators, use_spot, resources.region, resources.zone)
            for region in regions:
                for zone in region.zones or [None]:
                    zone_name = zone.name if zone else None
                    usd = _usd_per_hour(cloud, machine, use_spot, region.name, zone_name)
                    name_of = accelerators_of(accelerators)
                    found[Place(name, region.name, zone_name or "", kind, name_of, use_spot)] = usd
    return found


def _usd_per_hour(cloud: Any, machine: Any, use_spot: bool, region: str, zone: str | None) -> float:
    usd = cloud.instance_type_to_hourly_cost(machine.instance_type, use_spot, region, zone)
    if apart := getattr(machine, "_accelerators", None):  # billed apart from the machine, as on GCP
        usd += cloud.accelerators_to_hourly_cost(apart, use_spot, region, zone)
    return float(usd) if usd == usd else 0.0  # the catalog writes NaN for no price


def slurm_quotes(task: Any, cluster: str, partitions: Sequence[Partition]) -> dict[Place, float]:
    """Returns a cluster's quotes from ``slurm.pricing`` of SkyPilot's config on this machine."""
    cloud = client.cloud("slurm")
    found: dict[Place, float] = {}
    for resources in task.resources:
        accelerators = accelerators_of(resources.accelerators)
        machine = slurm_machine(resources.cpus, resources.memory, accelerators)
        for partition in partitions:
            with client.translated():
                usd = cloud.instance_type_to_hourly_cost(machine, False, cluster, partition.name)
            found[Place("slurm", cluster, partition.name, "", accelerators, partition.preemptible)] = float(usd)
    return found


def slurm_machine(cpus: str | None, memory: str | None, accelerators: str) -> str:
    """Returns the size that SkyPilot asks Slurm for, in its spelling: ``4CPU--16GB--L4:1``."""
    name, _, count = accelerators.partition(":")
    ratio, least = (4.0, 4.0 * float(count or 1)) if name else (1.0, 2.0)
    cores = float(cpus.rstrip("+x")) if cpus else least
    gigabytes = cores * ratio if memory is None else float(memory.rstrip("+x")) * (cores if memory[-1] == "x" else 1)
    return f"{cores:g}CPU--{gigabytes:g}GB{f'--{accelerators}' if name else ''}"
