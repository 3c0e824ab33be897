"""Where ``dev run`` runs: on the cluster that is there, or on one that is brought up for it."""

from collections.abc import Callable
from dataclasses import dataclass

from spotune.contracts.errors import InputError
from spotune.launch.infra import LOCAL, spell
from spotune.launch.skypilot import clusters
from spotune.launch.skypilot.clusters import Cluster
from spotune.launch.skypilot.dev import DevWish, RunWish, check_place, place, up
from spotune.launch.skypilot.reuse import is_at
from spotune.launch.workspace import Workspace


@dataclass(frozen=True)
class RunPlace:
    """Which cluster ``dev run`` is to run on.

    Attributes:
        infra: where it is brought up when it is not there, as ``place`` gives it; None: it has to be there.
        is_asked: whether ``infra`` was said now, not in the settings.
    """

    cluster: str
    infra: str | None
    is_asked: bool

    @classmethod
    def read(cls, cluster: str, infra: str, workspace: Workspace) -> "RunPlace | None":
        """From ``--cluster`` and ``--infra``, empty where not given; None: this machine."""
        if cluster:
            return cls(cluster, place(infra) if infra else None, bool(infra))
        if spell(infra or workspace.settings.infra) == LOCAL:
            return None
        return cls(clusters.default_name(workspace.env.user), place(infra or workspace.settings.infra), bool(infra))


def run_cluster(
    where: RunPlace, wish: RunWish, workspace: Workspace, say: Callable[[str], None]
) -> tuple[Cluster, bool]:
    """The cluster of a run, and whether it was brought up now; raises InputError where it cannot be."""
    found = clusters.own_cluster(where.cluster)
    if found or where.infra is None:
        found = clusters.check_up(found, where.cluster)
        if where.infra and not is_at(found, where.infra):
            what = f"{found.name} is on {found.infra}, not on {where.infra}"
            if where.is_asked:
                raise InputError("--infra", what, remedy=f"another -c NAME, or spotune dev down {found.name}")
            say(what)
        return found, False
    check_place(where.infra, wish, workspace)
    say(f"{where.cluster}: not there yet, it is brought up on {where.infra or 'the cheapest place'}")
    asked = DevWish(where.cluster, where.infra, wish.gpus, envs=wish.envs, secrets=wish.secrets)
    done = up(asked, workspace)
    for note in done.notes:
        say(note)
    return done.cluster, True
