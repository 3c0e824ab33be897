"""Where a task could run and what that costs. What SkyPilot would refuse it refuses here, before anybody is asked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spotune.contracts.errors import InfraError, InputError
from spotune.contracts.records import PriceRow
from spotune.launch.alternatives import may_be_spot, override
from spotune.launch.infra import ANY, cloud_of
from spotune.launch.prices import Offers
from spotune.launch.settings import SlurmSettings
from spotune.launch.skypilot import engine, slurm
from spotune.launch.skypilot.catalog import (
    CATALOG,
    PODS,
    SLURM_PRICING,
    choices,
    cloud_quotes,
    has_spot,
    slurm_quotes,
)
from spotune.launch.skypilot.prices import choose, first_tried, price_rows, within
from spotune.launch.skypilot.slurm import Partition
from spotune.launch.skypilot.task import placed

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
    clouds = [name for name in engine.enabled_clouds() if name != "slurm"] if cloud == ANY else [cloud]
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
    asked = engine.task(task)
    wants_spot = may_be_spot(task["resources"])
    if wants_spot and clouds and not any(has_spot(name, asked) for name in clouds):
        if wanted.use_spot:
            raise InputError("--use-spot", f"{wanted.infra} has no spot machines", remedy="--no-use-spot")
        return _on_demand(task, wanted.infra)
    try:
        engine.check_feasible(asked)
    except InfraError:
        if wants_spot and not wanted.use_spot and clouds and set(clouds) <= set(PODS):
            return _on_demand(task, wanted.infra)
        raise
    return task, asked, ()


def _on_demand(task: dict[str, Any], infra: str) -> tuple[dict[str, Any], Any, tuple[str, ...]]:
    task = {**task, "resources": override(task["resources"], {}, without=("use_spot",))}
    asked = engine.task(task)
    engine.check_feasible(asked)
    return task, asked, (f"{infra} has no spot machines for this: on demand instead",)


def _on_slurm(wanted: Wanted, at: float) -> Offers:
    known = slurm.partitions_of(wanted.infra, wanted.slurm, wanted.environ)
    resources = wanted.task.get("resources") or {}
    use_spot = may_be_spot(resources)
    places = narrowed(wanted.infra, wanted.use_spot, use_spot, known)
    task = {**wanted.task, "resources": placed(resources, wanted.infra, places)}
    asked = engine.task(task)
    engine.check_feasible(asked)
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
