"""Slurm clusters over their login node, and how SkyPilot itself stands."""

import re
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spotune.core.errors import InfraError
from spotune.launch.engine import ANY, cloud_of
from spotune.launch.settings import SlurmSettings
from spotune.launch.skypilot import client, slurm
from spotune.launch.skypilot.client import server_problems

# What SkyPilot does not do on a Slurm cluster and Slurm does: partitions and signals, over the login node.
#
# As SkyPilot does: ssh with the hosts of ``~/.slurm/config``.

CONFIG = ".slurm/config"
_TIMEOUT_S = 60.0
_SPOT = re.compile(r"spot|preempt", re.IGNORECASE)


@dataclass(frozen=True)
class Partition:
    """``preemptible``: its jobs are thrown out for those of others."""

    name: str
    preemptible: bool


def clusters(environ: Mapping[str, str]) -> list[str]:
    """The clusters whose login node is known here."""
    try:
        hosts = (_home(environ) / CONFIG).read_text()
    except OSError:
        return []
    named = [name for line in re.findall(r"(?mi)^\s*Host\s+(.+)$", hosts) for name in line.split()]
    return [name for name in named if not set(name) & set("*?!")]


def is_spot_name(partition: str) -> bool:
    """Where Slurm does not tell, the partition's name does."""
    return bool(_SPOT.search(partition))


def partitions(cluster: str, environ: Mapping[str, str]) -> list[Partition]:
    """As Slurm says; raises InfraError when the login node does not answer."""
    return parse_partitions(on_login(cluster, "scontrol --oneliner show partition", environ))


def parse_partitions(text: str) -> list[Partition]:
    """From ``scontrol --oneliner show partition``.

    Preemptible: it says how its jobs are thrown out, and another partition is above it. Where no partition is above
    another (preemption by QOS, or none), a partition's name has to tell.
    """
    found = []
    for line in text.splitlines():
        facts = dict(pair.partition("=")[::2] for pair in line.split() if "=" in pair)
        if name := facts.get("PartitionName"):
            tier = facts.get("PriorityTier", "1")
            found.append((name, facts.get("PreemptMode", "OFF").upper(), int(tier) if tier.isdigit() else 1))
    highest = max((tier for _, _, tier in found), default=1)
    is_tiered = any(tier < highest for _, _, tier in found)
    return [
        Partition(name, (mode != "OFF" and tier < highest) if is_tiered else is_spot_name(name))
        for name, mode, tier in found
    ]


def known_partitions(cluster: str, settings: SlurmSettings, environ: Mapping[str, str]) -> list[Partition]:
    """The cluster's partitions: as Slurm says where its login node can be asked, corrected by the settings."""
    found: list[Partition] = []
    if cluster in clusters(environ):
        try:
            found = partitions(cluster, environ)
        except InfraError:
            found = []  # SkyPilot's server may reach it from where it is
    if settings.preemptible is None:
        return found
    ours = [name.partition("/")[2] for name in settings.preemptible if name.partition("/")[0] == cluster]
    found = [replace(one, preemptible=one.name in ours) for one in found]
    return [*found, *(Partition(name, True) for name in ours if name not in [one.name for one in found])]


def partitions_of(infra: str, settings: SlurmSettings, environ: Mapping[str, str]) -> dict[str, list[Partition]]:
    """What ``slurm[/CLUSTER[/PARTITION]]`` may mean, by cluster; a partition that is named is among them."""
    cluster, partition = (*infra.split("/")[1:], "", "")[:2]
    known = {name: known_partitions(name, settings, environ) for name in ([cluster] if cluster else clusters(environ))}
    if partition and partition not in [one.name for one in known[cluster]]:
        known[cluster].append(Partition(partition, is_spot_name(partition)))
    return known


def preemptible_partitions(infra: str, settings: SlurmSettings, environ: Mapping[str, str]) -> list[str]:
    """Partitions that ``infra`` may land on and that count as spot, ``CLUSTER/PARTITION``; none but on Slurm."""
    if cloud_of(infra) != "slurm":
        return []
    known = partitions_of(infra, settings, environ)
    return [f"{name}/{one.name}" for name, partitions in known.items() for one in partitions if one.preemptible]


def on_login(cluster: str, command: str, environ: Mapping[str, str]) -> str:
    """The output of a command on the login node; raises InfraError with what it said when it fails."""
    config = _home(environ) / CONFIG
    ssh = ["ssh", "-F", str(config), "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", cluster, command]
    try:
        done = subprocess.run(
            ssh, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, stdin=subprocess.DEVNULL, env=environ
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InfraError(f"slurm/{cluster}: the login node does not answer: {error}") from error
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise InfraError(f"slurm/{cluster}: {said} (is {cluster} in ~/{CONFIG}?)")
    return done.stdout


def take(cluster: str, name: str, notice_s: float, environ: Mapping[str, str]) -> bool:
    """Takes the allocation called ``name`` away as Slurm preempts; returns False where there is none.

    With notice SIGURG goes to the steps at once, which is how a task on Slurm asks to be warned. A process on the login
    node ends the job when the time is over: it needs neither this process nor this machine any more.
    """
    return on_login(cluster, taking(name, notice_s), environ).strip() == "taken"


def taking(name: str, notice_s: float) -> str:
    """The shell command that does it; prints ``taken`` or ``none``.

    Without notice the job is killed and given back at once: the longer its steps are dead while the allocation is still
    there, the likelier SkyPilot's poll finds a job that failed on a machine that is up, and gives it up for good. Slurm
    begins the end of any job with a SIGTERM, so that a step may hear of it seconds before; killing the steps one by one
    avoids that, but was measured to end a job FAILED.
    """
    jobs = f"jobs=$(echo $(squeue --me --noheader --name={shlex.quote(name)} --states=RUNNING --format=%A)) || exit"
    jobs += '; [ -n "$jobs" ] || { echo none; exit; }'
    if notice_s:
        later = f'nohup setsid sh -c "sleep {notice_s:g}; scancel $jobs" < /dev/null > /dev/null 2>&1 &'
        return f"{jobs}; scancel --signal=URG $jobs; {later} echo taken"
    return f"{jobs}; scancel --full --signal=KILL $jobs; scancel $jobs; echo taken"


def _home(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("HOME") or "~").expanduser()


# ``spotune check --infra NAME``: how SkyPilot stands, and what of it would make a report inexact or a launch slow.


def survey_infra(infra: str, settings: SlurmSettings, environ: Mapping[str, str]) -> dict[str, Any]:
    """Facts, and ``problems`` with what to do about each. Raises InfraError when the API server does not answer."""
    cloud = cloud_of(infra)
    server = client.server()
    clouds = client.enabled_clouds()
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
