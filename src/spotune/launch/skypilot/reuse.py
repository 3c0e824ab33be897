"""A dev cluster that is up already: what it lacks of what is asked for, and whether it was ever set up."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spotune.launch.skypilot import clusters
from spotune.launch.skypilot.clusters import Cluster, ClusterJob
from spotune.launch.task import parse_gpus

if TYPE_CHECKING:
    from spotune.launch.skypilot.dev import DevWish

_OTHER = "another --name, or dev down first"


def is_at(cluster: Cluster, infra: str) -> bool:
    """Whether a cluster is at a place, as SkyPilot spells it; empty is anywhere."""
    return not infra or f"{cluster.infra.lower()}/".startswith(f"{infra.lower()}/")


def differences(wish: "DevWish", found: Cluster) -> list[str]:
    """What the cluster that is there does not have of what is asked for."""
    has = []
    if not is_at(found, wish.infra):
        has.append(f"is on {found.infra}, not on {wish.infra}")
    if wish.gpus and not _is_of(wish.gpus, found):
        has.append(f"has {found.gpus or 'no GPU'}, not {wish.gpus}")
    for unit, there, asked in (("CPUs", found.cpus, wish.cpus), ("GB of memory", found.memory, wish.memory)):
        if asked and there and not _is_enough(there, asked):
            has.append(f"has {there} {unit}, not {asked}")
    if given := [flag for flag, values in (("--env", wish.envs), ("--secret", wish.secrets)) if values]:
        has.append(f"was set up before, without this {' and '.join(given)}")
    return [f"{found.name} {what} ({_OTHER})" for what in has]


def finish_setup(name: str, jobs: Sequence[ClusterJob], job: Callable[[], Mapping[str, Any]], *names: str) -> bool:
    """Sees to it that the setup of a cluster that is up is done: it may have failed, or been left half way.

    Args:
        jobs: of its queue.
        job: makes the one that sets it up, the code synced.
        names: what jobs are called that set it up.

    Returns:
        Whether it was set up now.
    """
    setups = [one for one in jobs if one.name in names]
    if setups and setups[-1].is_active:
        clusters.see_setup(name, setups[-1].id)
        return False
    if setups[-1].status == "SUCCEEDED" if setups else jobs:  # jobs, but no setup: `sky` brought it up
        return False
    clusters.see_setup(name, clusters.execute(job(), name))
    return True


def _is_of(gpus: str, found: Cluster) -> bool:
    name, count = parse_gpus(gpus, "--gpus")
    return {name.lower(): count} == {there.lower(): number for there, number in found.accelerators.items()}


def _is_enough(there: str, asked: str) -> bool:
    """``4`` is exact, ``4+`` at least that; what is no number is SkyPilot's to judge."""
    try:
        has, wanted = float(there.rstrip("+")), float(asked.rstrip("+"))
    except ValueError:
        return there == asked
    return has >= wanted if asked.endswith("+") else has == wanted
