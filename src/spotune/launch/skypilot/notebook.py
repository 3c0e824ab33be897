"""Jupyter on a dev cluster: found or started there, reached through a tunnel."""

import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import SystemRandom

from spotune.contracts.errors import InfraError
from spotune.launch.skypilot import clusters, ssh
from spotune.launch.skypilot.dev import notebook_task
from spotune.launch.workspace import Workspace

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
