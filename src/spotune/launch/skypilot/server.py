"""SkyPilot's API server, and what of it makes a report inexact or a launch slow: pure."""

from dataclasses import dataclass

CONTROLLER_CPU_S = 8  # to start one


@dataclass(frozen=True)
class Server:
    """The API server; ``consolidation`` and ``controllers`` are None where it cannot be told from here.

    Attributes:
        consolidation: its job controllers run inside it, not on a machine of their own.
        controllers: how many of them run, and ``controllers_mb``: the memory that they hold.
        free_mb: memory that its machine has left, and its ``cpus``.
    """

    url: str
    version: str
    is_local: bool
    consolidation: bool | None = None
    controllers: int | None = None
    controllers_mb: float = 0.0
    free_mb: float = 0.0
    cpus: int = 0


def server_problems(server: Server) -> list[str]:
    """What of the server makes cost inexact or launches slow."""
    problems = []
    if server.consolidation is False:
        problems.append(
            "consolidation mode is off: SkyPilot's history of machines is on the controller's and spotune cost has only"
            " what the machines said themselves (jobs: {controller: {consolidation_mode: true}} in ~/.sky/config.yaml)"
        )
    if server.consolidation is None:
        problems.append(
            "whether consolidation mode is on cannot be told from here: cost is exact only where it is (who runs the"
            " server: jobs: {controller: {consolidation_mode: true}} in its config)"
        )
    many = server.controllers or 0
    if many and server.controllers_mb > server.free_mb:
        problems.append(
            f"{many} job controllers hold {server.controllers_mb:.0f} MB of memory and {server.free_mb:.0f} MB are left"
            " (SkyPilot starts one for each 0.8 GB that it takes for its own: give its server a limit of memory)"
        )
    if many and server.cpus and many > 2 * server.cpus:
        seconds = many * CONTROLLER_CPU_S / server.cpus
        problems.append(f"{many} job controllers on {server.cpus} CPUs: {seconds:.0f} s each time the server starts")
    return problems
