"""The machine, what all parts of an attempt share, and the journal of its events."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from spotune.core import environment
from spotune.core.errors import InputError, SpotuneError
from spotune.core.keys import Keys
from spotune.core.protocol import as_json, as_number, is_whole
from spotune.core.records import AttemptRecord, Progress, RunRecord
from spotune.core.store import Store

# What machine this is, and what all parts of one attempt need to know of it.

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


# The events of an attempt, the line that people see, and how busy the GPUs are.

# One line for people, which never gets in the way: after a SIGTERM stdout may be gone.


def say(text: str, bare: bool = False) -> None:
    """Prints to stderr; ``bare`` for an error, whose line begins with where it is."""
    try:
        print(text if bare else f"[spotune] {text}", file=sys.stderr, flush=True)
    except (OSError, ValueError):  # broken pipe, closed file
        return


# The journal: one ordered stream of events of this attempt, and what can be seen while it runs.
#
# Reads the worker's local event log, adds the guard's own events, uploads parts that are never rewritten,
# and keeps ``progress.json`` and the local status file current.

POLL_S = 0.2
# A part is uploaded when it holds a twentieth of the attempt's age, between these: a machine that vanishes loses
# at most that much detail, and a day's attempt has a few thousand parts, not a hundred thousand.
PART_S = (1.0, 15.0)
HEARTBEAT_S = 15.0  # the contract: progress.json at most every 15 s


class Journal:
    """Thread-safe; ``close`` flushes. Faults of the store are said once and retried with the next part.

    ``shown``: what can be seen to begin with, where an attempt does not start from nothing.
    """

    def __init__(
        self,
        store: Store,
        keys: Keys,
        attempt: int,
        worker_log: Path,
        status_file: str = "",
        shown: Progress | None = None,
    ) -> None:
        self._store, self._keys, self._attempt = store, keys, attempt
        self._worker_log, self._status_file = worker_log, status_file
        self._lock = threading.RLock()
        self._flushing = threading.Lock()
        self._pending: list[str] = []
        self._offset, self._part = 0, 0
        self._began = self._flushed_at = self._beat_at = time.monotonic()
        self._shown = shown or Progress(run_id=keys.run_id, attempt=attempt, phase="load", at=time.time())
        self.first_step: int | None = None
        self._listeners: list[Callable[[dict[str, Any]], None]] = []
        self._stop = threading.Event()
        self._show()
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._thread.start()

    def listen(self, listener: Callable[[dict[str, Any]], None]) -> None:
        """Calls ``listener`` with each event from now on, in order; it must be quick, and write none."""
        with self._lock:
            self._listeners.append(listener)

    @property
    def progress(self) -> Progress:
        with self._lock:
            return self._shown

    def write(self, event: str, **fields: Any) -> None:
        """Adds one of the guard's own events, after all that the worker has written so far."""
        with self._lock:
            self._read_worker()
            self._take({"t": round(time.time(), 4), "event": event, **fields})
            self._show()

    def poll(self) -> None:
        """Reads what the worker wrote since the last look."""
        with self._lock:
            if self._read_worker():
                self._show()

    def close(self) -> None:
        """Uploads everything that is left. Raises StoreError when the bucket does not take it."""
        self._stop.set()
        self._thread.join()
        self.poll()
        self._flush()
        self._beat()

    def _work(self) -> None:
        while not self._stop.wait(POLL_S):
            self.poll()
            now = time.monotonic()
            try:
                if now - self._flushed_at >= min(max((now - self._began) / 20, PART_S[0]), PART_S[1]):
                    self.write("alive")
                    self._flush()
                if now - self._beat_at >= HEARTBEAT_S:
                    self._beat()
            except SpotuneError as error:
                self._flushed_at = self._beat_at = now
                say(f"progress is not reported for now: {error}")

    def _read_worker(self) -> int:
        """Takes the worker's complete new lines; an unfinished last line waits for its end."""
        try:
            with open(self._worker_log, "rb") as log:
                log.seek(self._offset)
                data = log.read()
        except FileNotFoundError:
            return 0
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = whole.splitlines()
        for line in lines:
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):  # a line cut by a dying worker
                continue
            if is_whole(event):
                self._take(event)
        return len(lines)

    def _take(self, event: dict[str, Any]) -> None:
        self._pending.append(json.dumps(event))
        for listener in self._listeners:
            listener(event)
        changes: dict[str, Any] = {}
        match event["event"]:
            case "phase":
                changes = {"phase": event["phase"]}
            case "plan":
                changes = {"max_steps": int(event.get("max_steps") or 0)}
            case "step":
                changes = {"step": event["step"], "tokens": event.get("tokens") or self._shown.tokens}
                self.first_step = self.first_step or event["step"]
            case "log" if "loss" in event:
                changes = {"loss": as_json(as_number(event["loss"]))}  # a run may diverge
            case "restored" if event.get("step"):
                changes = {"step": event["step"], "committed_step": event["step"]}
            case "commit":
                changes = {"committed_step": event["step"]}
            case "end":
                changes = {"phase": event["reason"]}
        self._shown = replace(self._shown, at=time.time(), **changes)

    def _show(self) -> None:
        if not self._status_file:
            return
        path = Path(self._status_file)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            part.write_text(json.dumps(asdict(self._shown)))
            part.replace(path)
        except OSError as error:  # the bucket has it too
            say(f"status file {path}: {error}")
            self._status_file = ""

    def _flush(self) -> None:
        with self._flushing:
            with self._lock:
                lines, self._pending = self._pending, []
                self._flushed_at = time.monotonic()
            if not lines:
                return
            data = ("\n".join(lines) + "\n").encode()
            try:
                while not self._store.create(self._keys.events(self._attempt, 0, self._part), data):
                    self._part += 1
                self._part += 1
            except SpotuneError:
                with self._lock:
                    self._pending = lines + self._pending
                raise

    def _beat(self) -> None:
        with self._lock:
            self._beat_at = time.monotonic()
            shown = replace(self._shown, at=time.time())
        self._store.write(self._keys.progress, shown.to_bytes())


# How busy this machine's GPUs are while the ranks run, and how full: an event every 15 s, for the cost report.

EVERY_S = 15.0
TIMEOUT_S = 15.0
END_S = 20.0
_QUERY = "--query-gpu=utilization.gpu,memory.used,memory.total"
_MIB_PER_GIB = 1024.0


class GpuMeter:
    """Asks nvidia-smi for as long as its block lasts; does nothing on a machine without a GPU.

    ``utilization.gpu`` is the share of the last sample period, at most a second, in which a kernel ran: nvidia-smi(1).
    Of several machines the first one is measured, as it is the one whose events are read.
    """

    def __init__(self, gpus: int, environ: Mapping[str, str], journal: Journal, every_s: float = EVERY_S) -> None:
        self._gpus, self._journal, self._every_s = gpus, journal, every_s
        visible = environ.get("CUDA_VISIBLE_DEVICES", "")
        self._command = ["nvidia-smi", _QUERY, "--format=csv,noheader,nounits", *(["-i", visible] if visible else [])]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="gpus", daemon=True)

    def __enter__(self) -> Self:
        if self._gpus:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        if self._gpus:
            self._thread.join(END_S)  # nvidia-smi may hang with the driver

    def _work(self) -> None:
        while not self._stop.wait(self._every_s):
            try:
                done = subprocess.run(self._command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
            except subprocess.TimeoutExpired:  # a busy machine: the next sample may come in time
                continue
            except (OSError, subprocess.SubprocessError) as error:
                say(f"GPUs are not measured: {error}")
                return
            if sample := read_sample(done.stdout):
                self._journal.write("gpu", **sample)


def read_sample(listing: str) -> dict[str, float] | None:
    """The GPUs of one answer as one: mean busy share, GiB used by the fullest, GiB of that one.

    None where nvidia-smi does not know, as for a slice of a GPU (``[N/A]``).
    """
    rows = []
    for line in listing.splitlines():
        try:
            rows.append([float(cell) for cell in line.split(",")])
        except ValueError:
            return None
    if not rows or any(len(row) != 3 for row in rows):
        return None
    fullest = max(rows, key=lambda row: row[1])
    return {
        "busy": round(sum(row[0] for row in rows) / len(rows) / 100, 4),
        "memory_gib": round(fullest[1] / _MIB_PER_GIB, 3),
        "memory_total_gib": round(fullest[2] / _MIB_PER_GIB, 3),
    }
