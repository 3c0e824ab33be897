"""What runs on a dev cluster: ``dev run`` and Jupyter."""

import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import SystemRandom

from spotune.core.errors import InfraError, InputError
from spotune.launch.engine import LOCAL, spell
from spotune.launch.settings import Workspace
from spotune.launch.skypilot import clusters, ssh
from spotune.launch.skypilot.clusters import Cluster
from spotune.launch.skypilot.dev import DevWish, RunWish, check_place, is_at, notebook_task, place, up

# Where ``dev run`` runs: on the cluster that is there, or on one that is brought up for it.


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


# Jupyter on a dev cluster: found or started there, reached through a tunnel.

START_S = 600.0  # with its installation
# The newest server whose process is there; Jupyter leaves the files of killed ones behind.
_FIND = (
    'for f in $(ls -t "${JUPYTER_RUNTIME_DIR:-$HOME/.local/share/jupyter/runtime}"/jpserver-*.json 2> /dev/null); do '
    'pid=$(basename "$f" .json); kill -0 "${pid#jpserver-}" 2> /dev/null && cat "$f" && break; done; true'
)


@dataclass(frozen=True)
class Server:
    """A Jupyter server: its port on the cluster, and its token."""

    port: int
    token: str

    def __post_init__(self) -> None:
        """Raises ValueError for what is no port, or no token of a URL."""
        if not 0 < self.port < 1 << 16 or not re.fullmatch(r"[\w.~-]*", self.token, re.ASCII):
            raise ValueError("not a port and a token")


def find(name: str) -> Server | None:
    """The server that runs on the cluster, None where there is none."""
    try:
        return ssh.read_as(name, _FIND, Server)
    except ValueError:
        return None


def start(
    name: str,
    envs: Mapping[str, str],
    given: Mapping[str, str],
    workspace: Workspace,
    clock: Callable[[], float] = time.monotonic,
) -> Server:
    """Starts one as a job, with the secrets ``given``, and waits for it. Its port is one of many: a Slurm node has
    other users. Raises InputError on another's cluster, where the code here would overwrite what is there."""
    clusters.find_cluster(name)
    task = notebook_task(SystemRandom().randint(20000, 29999), secrets.token_urlsafe(24), envs, given, workspace)
    job_id = clusters.execute(task, name)
    end = clock() + START_S
    while clock() < end:
        if server := find(name):
            return server
        if "notebook" not in clusters.running_jobs(name):
            break
        time.sleep(3)
    raise InfraError(f"{name}: Jupyter did not start (sky logs {name} {job_id})")


def tunnel(name: str, port: int, server: Server) -> list[str]:
    """The command that forwards a port of this machine to the server, until it is interrupted."""
    forward = f"{port}:localhost:{server.port}"
    alive = ("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3")  # it ends when the cluster goes
    return ssh.ssh_command(name, "-N", "-o", "ExitOnForwardFailure=yes", *alive, "-L", forward)
