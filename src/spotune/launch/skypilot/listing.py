"""Dev clusters with what their keepers say."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from spotune.launch.skypilot import clusters, engine, ssh
from spotune.launch.skypilot.booking import Warn, book
from spotune.launch.skypilot.clusters import Cluster
from spotune.launch.workspace import Workspace


@dataclass(frozen=True)
class Listed:
    """A cluster and its keeper.

    Attributes:
        idle_minutes: how long it may be without work, None for ever.
        last_active_at: when somebody worked last, None when nobody knows.
        stops_at: when it stops if nobody works any more, None while somebody does.
        why: what holds it, or since when nothing does.
    """

    cluster: Cluster
    idle_minutes: float | None
    last_active_at: float | None
    stops_at: float | None
    why: str

    def as_row(self) -> dict[str, Any]:
        """A row of ``dev ls --format json``."""
        rest = {name: value for name, value in vars(self).items() if name != "cluster"}
        return {**asdict(self.cluster), **rest}


def list_dev(workspace: Workspace, warn: Warn) -> list[Listed]:
    """This user's clusters, each asked for its keeper's word; what they were paid for is booked on the way."""
    found = clusters.list_clusters()
    rows = engine.cost_rows([cluster.name for cluster in found]) if found else []
    book(workspace, rows, warn)
    found = clusters.with_prices(found, rows)
    if up := [cluster.name for cluster in found if cluster.status == "UP"]:
        ssh.write_config(*up)
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(_listed, found))


def _listed(cluster: Cluster) -> Listed:
    state = ssh.keeper_state(cluster.name) if cluster.status == "UP" else None
    if state is None:
        known = cluster.autostop_minutes is not None
        why = "no keeper: SkyPilot counts jobs and ssh terminals" if cluster.status == "UP" and known else ""
        return Listed(cluster, cluster.autostop_minutes, None, None, why)
    return Listed(cluster, state.idle_minutes, state.last_active_at, state.stops_at, state.why)
