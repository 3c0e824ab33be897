"""The machines of this computer: how one is started, what runs on it, how it is ended."""

import json
import os
import signal
import subprocess
import sys
import threading
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
from spotune.core.errors import InfraError, InputError, protect_output
from spotune.core.io import Damaged, load_object, make_room, write_state
from spotune.core.store.faults import is_machine_fault
from spotune.launch.local.database import Attempt, Job
from spotune.launch.local.layout import MARKER, AttemptFiles, Exit, Layout, Running

# Which processes belong to a machine, told apart from those that got a recycled pid, and how to signal them.

_GONE = (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied)
_CREATED_TOLERANCE_S = 2.0  # create times shift a little when the clock is corrected


def boot_id() -> str:
    """What changes with every boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return str(round(psutil.boot_time() / 60))  # to the minute: clocks are corrected


@dataclass(frozen=True)
class Identity:
    """A process that can be found again: its pid alone may have been recycled."""

    pid: int
    created: float

    @classmethod
    def of(cls, pid: int) -> "Identity":
        """Raises ProcessLookupError when there is no such process."""
        try:
            return cls(pid, psutil.Process(pid).create_time())
        except _GONE as error:
            raise ProcessLookupError(pid) from error

    def process(self) -> psutil.Process | None:
        """The live process, None when it is gone, a zombie, or another one with the same pid."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created) < _CREATED_TOLERANCE_S
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except _GONE:
            return None

    @property
    def alive(self) -> bool:
        return self.process() is not None


def members(node: Identity | None, marker: str) -> list[psutil.Process]:
    """Every live process of a machine: of the node's session, below the node, or with its marker."""
    session = node.pid if node and _session_is_ours(node) else 0
    found: dict[int, psutil.Process] = {}
    leader = node.process() if node else None
    if leader:
        found = {process.pid: process for process in [leader, *_below(leader)]}
    for process in psutil.process_iter():
        if process.pid not in found and _belongs(process, session, marker):
            found[process.pid] = process
    return [process for process in found.values() if is_live(process)]


def find_node(marker: str) -> Identity | None:
    """The node with this marker: the one process of the machine that leads its session."""
    for process in psutil.process_iter():
        if _belongs(process, 0, marker) and _session_of(process.pid) == process.pid:
            return Identity.of(process.pid)
    return None


def send(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except _GONE:
            continue


def _session_is_ours(node: Identity) -> bool:
    """A session keeps its number while it has members, unless the pid now leads somebody else's."""
    try:
        return abs(psutil.Process(node.pid).create_time() - node.created) < _CREATED_TOLERANCE_S
    except _GONE:
        return True


def _below(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except _GONE:
        return []


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
    """A zombie is not: its parent may take its time."""
    """A zombie is not: its parent may take its time."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except _GONE:
        return False


# A machine for one attempt: its environment as SkyPilot makes it, its files, and its start.

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
            [sys.executable, "-P", "-m", "spotune.launch.local.machine", str(files.folder)],
            cwd=job.workdir,
            env=machine_environment(layout, job, attempt, devices),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


# The machine: a tiny process in a session of its own that runs a job's ``setup`` and ``run``.
#
# It outlives the supervisor. It ignores what a notice sends to everything on the machine; when it is
# killed, the machine is gone.

HEARTBEAT_S = 1.0


def main(arguments: list[str]) -> None:
    """Runs the job that ``machine.json`` in the given folder describes."""
    protect_output()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGURG):
        signal.signal(number, _ignore)  # a function: SIG_IGN would be inherited by the job
    files = AttemptFiles(Path(arguments[0]))
    if not (job := _job(files.machine)):
        return  # without a word of its end, the machine counts as lost
    files.heartbeat.touch()
    threading.Thread(target=_beat, args=(files.heartbeat,), daemon=True).start()
    began = time.time()
    code, phase = _setup(job), "setup"
    setup_s = time.time() - began
    if code == 0:
        write_state(files.running, Running(at=time.time(), setup_s=setup_s))
        code, phase = _bash(job["run"]), "run"
    ended = time.time()
    write_state(files.exit, Exit(exit_code=code, phase=phase, setup_s=setup_s, ended_at=ended))


def _job(path: Path) -> dict[str, Any]:
    """The job, empty where the file is damaged: the supervisor writes another for the next machine."""
    why = "it is missing"
    try:
        job = load_object(path) or {}
    except Damaged as error:
        job, why = {}, str(error)
    if all(isinstance(job.get(name), str) for name in ("setup", "run", "setup_marker")):
        return job
    print(f"[spotune] {path}: {why}", flush=True)
    return {}


def _ignore(*_: Any) -> None:
    """What happens to the machine's processes is for the job to say."""


def _beat(path: Path) -> None:
    while True:
        time.sleep(HEARTBEAT_S)
        with suppress(OSError):
            os.utime(path)


def _setup(job: dict[str, Any]) -> int:
    """Runs ``setup`` unless it has succeeded before for this job, text and folder."""
    done = Path(job["setup_marker"])
    if not job["setup"].strip() or done.exists():
        return 0
    code = _bash(job["setup"])
    if code == 0:
        done.touch()
    return code


def _bash(script: str) -> int:
    """The exit code of a script's last command, as a shell spells it: 128 + n for a signal."""
    try:
        code = subprocess.run(["bash", "-c", script], stdin=subprocess.DEVNULL, check=False).returncode
    except OSError as error:
        print(f"bash: {error}", file=sys.stderr, flush=True)
        return 127
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    main(sys.argv[1:])
