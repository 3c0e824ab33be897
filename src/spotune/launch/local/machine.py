"""A machine for one attempt: its environment as SkyPilot makes it, its files, and its start."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from spotune.core import environment
from spotune.core.errors import InfraError, InputError
from spotune.core.io import Damaged, load_object, make_room, write_state
from spotune.core.machine_faults import is_machine_fault
from spotune.launch.local.layout import MARKER, Layout
from spotune.launch.local.rows import Attempt, Job

REGION = "local"
# Those of the submitter's own run or machine would be wrong on this one.
_NOT_INHERITED = ("SKYPILOT_", "SPOTUNE_", "SLURM_")
_INHERITED = (environment.NUM_PROCESSES, "SPOTUNE_USER")


def keep_environment(path: Path, environ: Mapping[str, str], secrets: Mapping[str, str], python: str = "") -> None:
    """Keeps what a job gets from its submitter's shell, for its owner's eyes only, until the job ends.

    ``python``: the trainer's Python, which the job finds as ``SPOTUNE_PYTHON``.

    Like any local process, a local job sees the environment of the shell that started it. It has to outlive
    the supervisor, so it is on disk (0600); the queue's database and the bucket never see it.
    Raises InputError where it cannot be written, InfraError where the disk fails.
    """
    kept = {name: value for name, value in environ.items() if name in _INHERITED or not name.startswith(_NOT_INHERITED)}
    if python:
        kept[environment.PYTHON] = python
    with _writing(path):
        write_state(path, {"environ": kept, "secrets": dict(secrets)}, mode=0o600)


def check_kept(path: Path) -> None:
    """Raises InputError where no environment can be kept."""
    with _writing(path), TemporaryFile(dir=path.parent):
        pass


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        yield
    except OSError as error:
        if is_machine_fault(error):
            raise InfraError(f"{environment.HOME}: cannot write {path}: {error.strerror}") from error
        raise InputError(environment.HOME, f"cannot write {path}: {error.strerror}") from error


def kept_environment(layout: Layout, run_id: str) -> dict[str, str]:
    """What ``keep_environment`` kept, secrets included; empty when it is gone or damaged."""
    try:
        kept = load_kept(layout.environment(run_id))
    except Damaged:
        return {}
    return {**kept["environ"], **kept["secrets"]}


def load_kept(path: Path) -> dict[str, dict[str, str]]:
    """``environ`` and ``secrets``, empty where nothing is kept. Raises Damaged: without them no job may start."""
    kept = load_object(path) or {}
    found = {name: kept.get(name, {}) for name in ("environ", "secrets")}
    if any(texts(values) != values for values in found.values()):
        raise Damaged("not the environment of a job")
    return found


def texts(values: Any) -> dict[str, str]:
    """Those of a mapping that an environment can hold."""
    given = values if isinstance(values, dict) else {}
    return {
        name: value
        for name, value in given.items()
        if isinstance(value, str) and name and "=" not in name and "\0" not in name + value
    }


def machine_environment(layout: Layout, job: Job, attempt: Attempt, devices: Sequence[str]) -> dict[str, str]:
    """Everything that a program on this machine sees: SkyPilot's names as on a real managed job."""
    files = layout.attempt(job.run_id, attempt.attempt)
    cluster = f"{job.run_id}-{job.id}"
    submitted = time.strftime("%Y-%m-%d-%H-%M-%S", time.gmtime(job.submitted_at))
    task_id = f"sky-managed-{submitted}-{int(job.submitted_at * 1e6) % 1_000_000:06d}_{job.run_id}_{job.id}-0"
    zone = f"local-{attempt.slots[0]}" if attempt.slots else "local-dev"
    place = {"cluster_name": cluster, "cloud": "local", "region": REGION, "zone": zone}
    gpus = {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}
    kept = load_kept(layout.environment(job.run_id))
    return {
        environment.PYTHON: sys.executable,  # for jobs of versions that had one environment
        **kept["environ"],
        "PYTHONUNBUFFERED": "1",
        environment.ATTEMPT: str(attempt.attempt),
        **texts(job.task.get("envs")),
        **kept["secrets"],
        **gpus,
        environment.HOME: str(layout.home),
        environment.BUCKET: job.bucket,
        environment.RUN_ID: job.run_id,
        environment.STATUS_FILE: str(files.status),
        MARKER: attempt.marker,
        "SKYPILOT_TASK_ID": task_id,
        "SKYPILOT_TASK_IDS": task_id,
        "SKYPILOT_MANAGED_JOB_ID": str(job.id),
        "SKYPILOT_INTERNAL_JOB_ID": "1",
        "SKYPILOT_JOB_RANK": "0",
        "SKYPILOT_NUM_JOBS": "1",
        "SKYPILOT_NODE_RANK": "0",
        "SKYPILOT_NODE_IPS": "127.0.0.1",
        "SKYPILOT_NUM_NODES": "1",
        "SKYPILOT_NUM_GPUS_PER_NODE": str(len(devices)),
        "SKYPILOT_CLUSTER_INFO": json.dumps(place),
        "SKYPILOT_USER": job.user,
    }


def start_machine(layout: Layout, job: Job, attempt: Attempt, devices: Sequence[str]) -> subprocess.Popen[bytes]:
    """Starts the node in a session of its own; its output goes to the job's log."""
    files = layout.attempt(job.run_id, attempt.attempt)
    make_room(files.machine)
    files.folder.mkdir(parents=True, exist_ok=True)
    make_room(layout.log(job.run_id))
    setup, run = job.task.get("setup") or "", job.task["run"]
    wanted = sha256(f"{job.workdir}\n{setup}".encode()).hexdigest()[:16]
    marker = layout.job(job.run_id) / f"setup-{wanted}"
    write_state(files.attempt, attempt)  # first: by its marker a machine is found again
    write_state(files.machine, {"setup": setup, "run": run, "setup_marker": str(marker)})
    with open(layout.log(job.run_id), "ab") as log:
        log.write(f"[spotune] attempt {attempt.attempt}\n".encode())
        log.flush()
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "spotune.launch.local.node", str(files.folder)],
            cwd=job.workdir,
            env=machine_environment(layout, job, attempt, devices),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
