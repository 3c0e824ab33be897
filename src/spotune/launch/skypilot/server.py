"""SkyPilot's API server, and what of it makes a report inexact or a launch slow: pure."""

from dataclasses import dataclass

CONTROLLER_MB = 200  # measured 165-197 MB each
CONTROLLER_CPU_S = 8  # to start one


@dataclass(frozen=True)
class Server:
    """The API server; ``consolidation`` and ``controllers`` are None where it cannot be told from here.

    Attributes:
        consolidation: its job controllers run inside it, not on a machine of their own.
        controllers: how many of them there are.
        memory_mb: of its machine, and ``cpus``.
    """

    url: str
    version: str
    is_local: bool
    consolidation: bool | None = None
    controllers: int | None = None
    memory_mb: float = 0.0
    cpus: int = 0


def server_problems(server: Server) -> list[str]:
    """What of the server makes cost inexact or launches slow."""
    problems = []
    if server.consolidation is False:
        problems.append(
            "consolidation mode is off: SkyPilot's history of machines is on the controller's and spotune cost has only"
            " what the machines said themselves (jobs: {controller: {consolidation_mode: true}} in ~/.sky/config.yaml)"
        )
    many = server.controllers or 0
    if many and server.memory_mb and many * CONTROLLER_MB > server.memory_mb / 4:
        problems.append(f"{many} job controllers take {many * CONTROLLER_MB} of {server.memory_mb:.0f} MB of memory")
    if many and server.cpus and many > 2 * server.cpus:
        seconds = many * CONTROLLER_CPU_S / server.cpus
        problems.append(f"{many} job controllers on {server.cpus} CPUs: {seconds:.0f} s each time the server starts")
    return problems
