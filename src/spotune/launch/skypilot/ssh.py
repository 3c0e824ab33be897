"""The way onto a cluster: SkyPilot's ssh configuration, used so that it works with any HOME.

OpenSSH takes ``~`` from the password database and not from $HOME, and so do the files that SkyPilot writes: the file
and the key are named on the command line.
"""

import json
import subprocess
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from spotune.contracts.errors import InfraError, InputError
from spotune.launch.skypilot import engine

GENERATED = ".sky/generated/ssh"
STATE = ".spotune/keeper.json"


def ssh_command(name: str, *options: str) -> list[str]:
    """The ssh command for a cluster whose configuration is written."""
    config = Path.home() / GENERATED / name
    if not config.is_file():
        raise InputError(name, "no way onto it is known here", remedy="sky status writes it, or spotune dev up")
    keys = [line.split(None, 1)[1] for line in config.read_text().splitlines() if "IdentityFile" in line]
    identity = ["-i", str(Path(keys[0].strip('"')).expanduser())] if keys else []
    return ["ssh", "-F", str(config), *identity, *options, name]


def write_config(name: str) -> None:
    """Lets SkyPilot write its ssh configuration of a cluster, as ``sky status NAME`` does."""
    if (Path.home() / GENERATED / name).is_file():
        return
    command = import_module(f"{engine.sdk().__name__}.client.cli.command")
    with engine.translated(name):
        command._get_cluster_records_and_set_ssh_config(clusters=[name])


def read(name: str, command: str, timeout_s: float = 60.0) -> str:
    """What a command prints on a cluster; raises InfraError when it cannot be asked or fails."""
    argv = [*ssh_command(name, "-o", "BatchMode=yes", "-o", "LogLevel=ERROR"), command]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise InfraError(f"{name}: no answer within {timeout_s:.0f} s (sky status -r {name})") from error
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise InfraError(f"{name}: {said}")
    return done.stdout


def keeper_state(name: str) -> dict[str, Any]:
    """What the cluster's keeper said last, empty when it is not there or not to be asked."""
    try:
        state = json.loads(read(name, f"cat ~/{STATE}", 30.0))
    except (InfraError, InputError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def attach(argv: Sequence[str]) -> int:
    """Runs a command in this terminal; returns its exit code."""
    try:
        return subprocess.run(argv, check=False).returncode
    except FileNotFoundError as error:
        raise InfraError(f"{argv[0]}: not installed here") from error
