"""SkyPilot's prices for what a task asks for: every machine that would do, in every zone, spot and on demand.

Read from SkyPilot's catalog on this machine, with SkyPilot's own rules for which machine has which accelerator; the
optimizer would name the cheapest alone, and only of clouds whose credentials are there.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from spotune.contracts.errors import SpotuneError
from spotune.launch.skypilot import engine
from spotune.launch.skypilot.history import accelerators_of
from spotune.launch.skypilot.prices import Choice, Quote
from spotune.launch.skypilot.slurm import Partition

CATALOG = "SkyPilot's catalog"
SLURM_PRICING = "slurm.pricing of SkyPilot's config"


PODS = ("kubernetes", "ssh")


def has_spot(name: str, task: Any) -> bool:
    """Whether a cloud has spot machines at all. Of pods only their own cluster can tell: taken for a yes."""
    if name in PODS:
        return True
    try:
        with engine.translated():
            spot = engine.sdk().clouds.CloudImplementationFeatures.SPOT_INSTANCE
            engine.cloud(name).check_features_are_supported(next(iter(task.resources)), {spot})
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
            with engine.translated():
                found.update(dict.fromkeys(_quotes(name, resources, task.num_nodes)))
        except SpotuneError:
            continue
    return list(found)


def _quotes(name: str, resources: Any, num_nodes: int) -> Iterator[Quote]:
    cloud = engine.cloud(name)
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
    cloud = engine.cloud("slurm")
    found: dict[Quote, None] = {}
    for resources in task.resources:
        accelerators = accelerators_of(resources.accelerators)
        machine = slurm_machine(resources.cpus, resources.memory, accelerators)
        for partition in partitions:
            with engine.translated():
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
