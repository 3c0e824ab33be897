"""What SkyPilot does not do on a Slurm cluster and Slurm does: partitions and signals, over the login node.

As SkyPilot does: ssh with the hosts of ``~/.slurm/config``.
"""

import re
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spotune.contracts.errors import InfraError

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
