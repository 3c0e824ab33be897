"""``spotune check --infra NAME``: how SkyPilot stands, and what of it would make a report inexact or a launch slow."""

from collections.abc import Mapping
from typing import Any

from spotune.contracts.errors import InfraError
from spotune.launch.infra import ANY, cloud_of
from spotune.launch.settings import SlurmSettings
from spotune.launch.skypilot import engine, slurm
from spotune.launch.skypilot.server import server_problems


def survey_infra(infra: str, settings: SlurmSettings, environ: Mapping[str, str]) -> dict[str, Any]:
    """Facts, and ``problems`` with what to do about each. Raises InfraError when the API server does not answer."""
    cloud = cloud_of(infra)
    server = engine.server()
    clouds = engine.enabled_clouds()
    found: dict[str, Any] = {
        "infra": infra,
        "api_server": f"{server.url} ({'local' if server.is_local else 'remote'}, SkyPilot {server.version})",
        "enabled": clouds,
        "consolidation": {True: "on", False: "off", None: "not known"}[server.consolidation],
        "controllers": server.controllers if server.controllers is not None else "not known",
    }
    problems = server_problems(server)
    if cloud != ANY and cloud not in clouds:
        problems.append(f"{cloud} is not enabled: sky check {cloud} says what is missing")
    if cloud == "slurm":
        lines, wrong = _slurm(infra, settings, environ)
        found["partitions"], problems = lines, [*problems, *wrong]
    return {**found, "problems": problems}


def _slurm(infra: str, settings: SlurmSettings, environ: Mapping[str, str]) -> tuple[list[str], list[str]]:
    cluster = infra.split("/")[1] if "/" in infra else ""
    clusters = slurm.clusters(environ)
    lines, problems = [], []
    for name in [cluster] if cluster else clusters:
        known = slurm.known_partitions(name, settings, environ)
        lines += [f"{name}/{one.name}{' (preemptible)' if one.preemptible else ''}" for one in known]
        if name not in clusters:
            problems.append(f"{name} is not in ~/{slurm.CONFIG} here: spotune preempt cannot reach it")
            continue
        try:
            slurm.on_login(name, "squeue --version", environ)
        except InfraError as error:
            problems.append(str(error))
    return lines, problems
