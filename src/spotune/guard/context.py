"""What machine this is, and what all parts of one attempt need to know of it."""

import json
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spotune.core import environment
from spotune.core.errors import InputError
from spotune.core.keys import Keys
from spotune.core.records import AttemptRecord, RunRecord
from spotune.core.store import Store

# What machine this is: SkyPilot's names in the environment, read here and nowhere else.


@dataclass(frozen=True)
class Machine:
    """One node of an attempt.

    Attributes:
        ranks: processes to start here: one per GPU, 1 on CPU.
        job_id: the managed job's id, empty on a dev cluster or by hand.
        task_name: SkyPilot's name of the task, empty by hand.
    """

    node_rank: int
    num_nodes: int
    node_ips: tuple[str, ...]
    ranks: int
    gpus: int
    host: str
    infra: str
    region: str
    zone: str
    cluster_name: str
    job_id: str
    task_name: str
    engine_job_id: str

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.ranks

    @classmethod
    def read(cls, environ: Mapping[str, str], num_processes: int | None = None) -> "Machine":
        """Reads the environment. ``num_processes``: ranks on all machines, as ``accelerate launch`` means it."""
        cluster = _json_object(environ.get("SKYPILOT_CLUSTER_INFO", ""))
        num_nodes = int(environ.get("SKYPILOT_NUM_NODES") or 1)
        gpus = count_gpus(environ)
        return cls(
            node_rank=int(environ.get("SKYPILOT_NODE_RANK") or 0),
            num_nodes=num_nodes,
            node_ips=tuple(environ.get("SKYPILOT_NODE_IPS", "127.0.0.1").split()),
            ranks=_ranks(environ, num_processes, num_nodes, gpus),
            gpus=gpus,
            host=socket.gethostname(),
            infra=str(cluster.get("cloud") or "").lower(),
            region=str(cluster.get("region") or ""),
            zone=str(cluster.get("zone") or ""),
            cluster_name=str(cluster.get("cluster_name") or ""),
            job_id=environ.get("SKYPILOT_MANAGED_JOB_ID", ""),
            task_name=_task_name(environ.get("SKYPILOT_TASK_ID", "")),
            engine_job_id=environ.get("SLURM_JOB_ID") or environ.get("SKYPILOT_INTERNAL_JOB_ID", ""),
        )


def count_gpus(environ: Mapping[str, str]) -> int:
    """GPUs that this process may use, without importing torch."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if not shutil.which("nvidia-smi"):
        return 0
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1", "NoDevFiles")])
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def _ranks(environ: Mapping[str, str], num_processes: int | None, num_nodes: int, gpus: int) -> int:
    asked = environment.setting(environ, environment.NUM_PROCESSES) or (str(num_processes) if num_processes else "")
    if not asked:
        return max(1, gpus)
    if not asked.isdigit() or int(asked) < 1 or int(asked) % num_nodes:
        raise InputError("num_processes", f"{asked} ranks do not spread over {num_nodes} machines evenly")
    return int(asked) // num_nodes


def _task_name(task_id: str) -> str:
    """The task's name in ``sky-managed-<submission>_<name>_<job>-<task>``, empty when it is not that."""
    found = re.fullmatch(r"sky-managed-[\d-]+_(.+)_\d+-\d+", task_id)
    return found[1] if found else ""


def _json_object(text: str) -> dict[str, object]:
    try:
        data = json.loads(text) if text else {}
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


# What all parts of one attempt need to know of it.


@dataclass(frozen=True)
class Context:
    """An attempt: its place in the bucket, its run, its machine.

    Attributes:
        scratch: this run's folder on the local disk, with a folder for each attempt.
        cache: a folder that stays: data sets, and what is known of files.
        status_file: a local file to keep current, empty for none.
        patience_s: for how long training goes on without a bucket before the attempt ends.
        allow_config_change: whether this attempt was started with ``--allow-config-change``.
    """

    store: Store
    keys: Keys
    run: RunRecord
    record: AttemptRecord
    machine: Machine
    environ: Mapping[str, str]
    scratch: Path
    cache: Path
    status_file: str
    patience_s: float
    allow_config_change: bool = False

    @property
    def attempt(self) -> int:
        return self.record.attempt

    @property
    def folder(self) -> Path:
        """The exchange folder with the ranks."""
        return self.scratch / f"{self.record.attempt:04d}"
