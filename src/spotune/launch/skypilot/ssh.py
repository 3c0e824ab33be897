"""The way onto a cluster: SkyPilot's ssh configuration, used so that it works with any HOME.

OpenSSH takes ``~`` from the password database and not from $HOME, and so do the files that SkyPilot writes: the file
and the key are named on the command line.
"""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from spotune.core.errors import InfraError, InputError
from spotune.core.fields import Amount, Kind, Time, build
from spotune.launch.skypilot import client

GENERATED = ".sky/generated/ssh"
STATE = ".spotune/keeper.json"
_MOST_BYTES = 1 << 20  # of what a cluster says


@dataclass(frozen=True)
class KeeperState:
    """What a cluster's keeper wrote last; times in epoch seconds, ``stops_at`` None while somebody works."""

    idle_minutes: Amount
    last_active_at: Time
    why: str
    stops_at: Time | None = None


def ssh_command(name: str, *options: str) -> list[str]:
    """The ssh command for a cluster whose configuration is written."""
    config = Path.home() / GENERATED / name
    if not config.is_file():
        raise InputError(name, "no such cluster, or not up", remedy=f"spotune dev up --name {name}")
    keys = [line.split(None, 1)[1] for line in config.read_text().splitlines() if "IdentityFile" in line]
    identity = ["-i", str(Path(keys[0].strip('"')).expanduser())] if keys else []
    return ["ssh", "-F", str(config), *identity, "-o", "LogLevel=ERROR", *options, name]


def write_config(*names: str, everyones: bool = False) -> None:
    """Lets SkyPilot write its ssh configuration of clusters, as ``sky status NAME`` does; raises InputError where
    there is none of a name, or not up. ``everyones``: other users' too, which nobody comes to without naming them.

    Every time, also where there is one: an API server that shares this HOME writes its own at each launch, which on
    Slurm leads to the login node (sky/backends/cloud_vm_ray_backend.py, after provisioning).
    """
    sky = client.sdk()
    command = import_module(f"{sky.__name__}.client.cli.command")
    with client.translated():
        records = client.ask(sky.status(cluster_names=list(names), all_users=everyones, _include_credentials=True))
        proxy = command._get_ws_proxy_command()
        for record in records:
            if record.credentials and getattr(record.handle, "cached_external_ips", None):
                command._write_ssh_config_for_cluster(record.handle, record.credentials, proxy)
    up = {record.name for record in records if record.status.value == "UP"}
    for name in names:
        if name not in up:
            raise InputError(name, "no such cluster, or not up", remedy=f"spotune dev up --name {name}")


def read(name: str, command: str, timeout_s: float = 60.0) -> str:
    """What a command prints on a cluster; raises InfraError when it cannot be asked or fails."""
    argv = [*ssh_command(name, "-o", "BatchMode=yes"), command]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise InfraError(f"{name}: no answer within {timeout_s:.0f} s (sky status -r {name})") from error
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise InfraError(f"{name}: {said}")
    return done.stdout


def keeper_state(name: str) -> KeeperState | None:
    """The state of the cluster's keeper. None where there is none, where it is damaged or cannot be asked for."""
    try:
        return read_as(name, f"head -c {_MOST_BYTES} ~/{STATE}", KeeperState, 30.0)
    except (InfraError, InputError, ValueError):
        return None


def read_as(name: str, command: str, kind: type[Kind], timeout_s: float = 60.0) -> Kind:
    """A dataclass from the JSON that a command prints on a cluster; raises ValueError where it is no such JSON."""
    text = read(name, command, timeout_s)
    try:
        return build(kind, json.loads(text))
    except RecursionError as error:
        raise ValueError("nested without end") from error


def attach(argv: Sequence[str]) -> int:
    """Runs a command in this terminal; returns its exit code."""
    try:
        return subprocess.run(argv, check=False).returncode
    except FileNotFoundError as error:
        raise InfraError(f"{argv[0]}: not installed here") from error
