"""A machine of the local engine: its processes, its environment and its start."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import psutil

from spotune.core import environment
from spotune.core.io import Damaged, load_object, make_room, write_state
from spotune.launch.local.database import AttemptRow, JobRow
from spotune.launch.local.layout import MARKER, LocalFolders, home_error
from spotune.launch.local.programs import NODE

_GONE = (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied)


def boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return str(round(psutil.boot_time() / 60))  # to the minute: clocks are corrected


@dataclass(frozen=True)
class Identity:
    """A process that can be found again: a pid alone may be recycled."""

    pid: int
    created: float

    @classmethod
    def of(cls, pid: int) -> "Identity":
        try:
            return cls(pid, psutil.Process(pid).create_time())
        except _GONE as error:
            raise ProcessLookupError(pid) from error

    def process(self) -> psutil.Process | None:
        """Returns the live process, or None if it is gone, a zombie, or another one with the same pid."""
        try:
            process = psutil.Process(self.pid)
            return process if self.is_of(process) and process.status() != psutil.STATUS_ZOMBIE else None
        except _GONE:
            return None

    def is_of(self, process: psutil.Process) -> bool:
        return abs(process.create_time() - self.created) < 2.0  # it shifts a little when the clock is corrected

    @property
    def alive(self) -> bool:
        return self.process() is not None


def members(node: Identity | None, marker: str) -> list[psutil.Process]:
    """Returns every live process of a machine: of the node's session, below the node, or with its marker."""
    session = node.pid if node and _session_is_ours(node) else 0
    found: dict[int, psutil.Process] = {}
    if node and (leader := node.process()):
        found[leader.pid] = leader
        with suppress(*_GONE):
            found |= {process.pid: process for process in leader.children(recursive=True)}
    for process in psutil.process_iter():
        if process.pid not in found and _belongs(process, session, marker):
            found[process.pid] = process
    return [process for process in found.values() if is_live(process)]


def find_node(marker: str) -> Identity | None:
    """Returns the node with this marker: the one process of the machine that leads its session."""
    for process in psutil.process_iter():
        if _belongs(process, 0, marker) and _session_of(process.pid) == process.pid:
            return Identity.of(process.pid)
    return None


def send(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(*_GONE):
            process.send_signal(number)


def _session_is_ours(node: Identity) -> bool:
    """Returns False if the pid now leads another session. A session keeps its number while it has members."""
    try:
        return node.is_of(psutil.Process(node.pid))
    except _GONE:
        return True


def _belongs(process: psutil.Process, session: int, marker: str) -> bool:
    if session and _session_of(process.pid) == session:
        return True
    try:
        return process.environ().get(MARKER) == marker
    except (*_GONE, OSError):
        return False


def _session_of(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return -1


def is_live(process: psutil.Process) -> bool:
    """Returns whether a process runs. A zombie does not: its parent may take its time to reap it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except _GONE:
        return False


# A machine's environment, as SkyPilot makes it, and its start.

REGION = "local"
_FOREIGN = ("SKYPILOT_", "SPOTUNE_", "SLURM_")  # these variables describe the submitter's own run or machine


def zone_of(attempt: AttemptRow) -> str:
    return f"local-{attempt.slots[0]}" if attempt.slots else "local-dev"


def keep_environment(path: Path, environ: Mapping[str, str], secrets: Mapping[str, str], python: str = "") -> None:
    """Writes what a job gets from its submitter's shell to a file that only its owner can read.

    Like any local process, a local job sees the environment of the shell that started it. The file (0600) outlives the
    supervisor and is removed when the job ends; neither the queue's database nor the bucket has its content.
    ``python``: the trainer's Python, which the job gets as ``SPOTUNE_PYTHON``.
    Raises InputError if it cannot be written, InfraError if the disk fails.
    """
    ours = (environment.NUM_PROCESSES, "SPOTUNE_USER")
    kept = {name: value for name, value in environ.items() if name in ours or not name.startswith(_FOREIGN)}
    if python:
        kept[environment.PYTHON] = python
    with _writing(path):
        write_state(path, {"environ": kept, "secrets": dict(secrets)}, mode=0o600)


def check_kept(path: Path) -> None:
    """Raises InputError if no environment can be written there."""
    with _writing(path), TemporaryFile(dir=path.parent):
        pass


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        yield
    except OSError as error:
        raise home_error(error, f"cannot write {path}") from error


def kept_environment(layout: LocalFolders, run_id: str) -> dict[str, str]:
    """Returns what ``keep_environment`` wrote, secrets included; empty if it is gone or damaged."""
    try:
        kept = load_kept(layout.environment(run_id))
    except Damaged:
        return {}
    return {**kept["environ"], **kept["secrets"]}


def load_kept(path: Path) -> dict[str, dict[str, str]]:
    """Returns ``environ`` and ``secrets``, empty if there is no file. Raises Damaged: no job may start without them."""
    kept = load_object(path) or {}
    found = {name: kept.get(name, {}) for name in ("environ", "secrets")}
    if any(texts(values) != values for values in found.values()):
        raise Damaged("not the environment of a job")
    return found


def texts(values: Any) -> dict[str, str]:
    """Returns the entries of a mapping that an environment can hold."""
    given = values if isinstance(values, dict) else {}
    return {
        name: value
        for name, value in given.items()
        if isinstance(value, str) and name and "=" not in name and "\0" not in name + value
    }


def machine_environment(
    layout: LocalFolders, job: JobRow, attempt: AttemptRow, devices: Sequence[str]
) -> dict[str, str]:
    """Returns the environment of the machine's programs, with SkyPilot's names as in a real managed job."""
    submitted = time.strftime("%Y-%m-%d-%H-%M-%S", time.gmtime(job.submitted_at))
    task_id = f"sky-managed-{submitted}-{int(job.submitted_at * 1e6) % 1_000_000:06d}_{job.run_id}_{job.id}-0"
    place = {"cluster_name": f"{job.run_id}-{job.id}", "cloud": "local", "region": REGION, "zone": zone_of(attempt)}
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
        environment.STATUS_FILE: str(layout.attempt(job.run_id, attempt.attempt).status),
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


def start_machine(
    layout: LocalFolders, job: JobRow, attempt: AttemptRow, devices: Sequence[str]
) -> subprocess.Popen[bytes]:
    """Starts the node in its own session; its output goes to the job's log."""
    files = layout.attempt(job.run_id, attempt.attempt)
    make_room(files.machine)
    files.folder.mkdir(parents=True, exist_ok=True)
    make_room(layout.log(job.run_id))
    setup, run = job.task.get("setup") or "", job.task["run"]
    wanted = sha256(f"{job.workdir}\n{setup}".encode()).hexdigest()[:16]
    marker = layout.job(job.run_id) / f"setup-{wanted}"
    write_state(files.attempt, attempt)  # first: its marker is how a machine is found again
    write_state(files.machine, {"setup": setup, "run": run, "setup_marker": str(marker)})
    with open(layout.log(job.run_id), "ab") as log:
        log.write(f"[spotune] attempt {attempt.attempt}\n".encode())
        log.flush()
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "spotune.launch.local.programs", NODE, str(files.folder)],
            cwd=job.workdir,
            env=machine_environment(layout, job, attempt, devices),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
