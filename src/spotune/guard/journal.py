"""The machine, what all parts of an attempt share, the journal of its events, and the log line that people see."""

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
from typing import Any, Self

from spotune.core import environment
from spotune.core.errors import InputError, SpotuneError
from spotune.core.keys import Keys
from spotune.core.protocol import EndReason, as_json, as_number, events_path, is_whole
from spotune.core.records import AttemptRecord, Progress, RunRecord
from spotune.core.store import Store

Clock = Callable[[], float]  # seconds: time.time or, unless said otherwise, time.monotonic
Sleep = Callable[[float], None]


@dataclass(frozen=True)
class Node:
    """One node of an attempt. Only this class reads SkyPilot's names in the environment."""

    node_rank: int
    num_nodes: int
    node_ips: tuple[str, ...]
    ranks: int  # processes to start here: one per GPU, 1 on CPU
    gpus: int
    host: str
    infra: str
    region: str
    zone: str
    cluster_name: str
    job_id: str  # the managed job's id, empty on a dev cluster or by hand
    task_name: str  # SkyPilot's name of the task, empty by hand
    engine_job_id: str

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.ranks

    @classmethod
    def read(cls, environ: Mapping[str, str], num_processes: int | None = None) -> "Node":
        """Reads the environment. ``num_processes``: ranks on all machines, as ``accelerate launch`` means it."""
        try:
            cluster = json.loads(environ.get("SKYPILOT_CLUSTER_INFO") or "{}")
        except ValueError:
            cluster = {}
        facts = cluster if isinstance(cluster, dict) else {}
        asked = environment.setting(environ, environment.NUM_PROCESSES) or (str(num_processes) if num_processes else "")
        num_nodes, gpus = int(environ.get("SKYPILOT_NUM_NODES") or 1), count_gpus(environ)
        if asked and (not asked.isdigit() or int(asked) < 1 or int(asked) % num_nodes):
            raise InputError("num_processes", f"{asked} ranks do not spread over {num_nodes} machines evenly")
        task = re.fullmatch(r"sky-managed-[\d-]+_(.+)_\d+-\d+", environ.get("SKYPILOT_TASK_ID", ""))
        return cls(
            node_rank=int(environ.get("SKYPILOT_NODE_RANK") or 0),
            num_nodes=num_nodes,
            node_ips=tuple(environ.get("SKYPILOT_NODE_IPS", "127.0.0.1").split()),
            ranks=int(asked) // num_nodes if asked else max(1, gpus),
            gpus=gpus,
            host=socket.gethostname(),
            infra=str(facts.get("cloud") or "").lower(),
            region=str(facts.get("region") or ""),
            zone=str(facts.get("zone") or ""),
            cluster_name=str(facts.get("cluster_name") or ""),
            job_id=environ.get("SKYPILOT_MANAGED_JOB_ID", ""),
            task_name=task[1] if task else "",
            engine_job_id=environ.get("SLURM_JOB_ID") or environ.get("SKYPILOT_INTERNAL_JOB_ID", ""),
        )


def count_gpus(environ: Mapping[str, str]) -> int:
    """Returns how many GPUs this process may use. Does not import torch."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if not shutil.which("nvidia-smi"):
        return 0
    if visible is not None:
        return count_devices(visible)
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def count_devices(visible: str) -> int:
    return len([device for device in visible.split(",") if device.strip() not in ("", "-1", "NoDevFiles")])


@dataclass(frozen=True)
class Context:
    """An attempt: its place in the bucket, its run, its machine."""

    store: Store
    keys: Keys
    run: RunRecord
    record: AttemptRecord
    machine: Node
    environ: Mapping[str, str]
    scratch: Path  # this run's folder on the local disk, with a folder for each attempt
    cache: Path  # a folder that stays: data sets, and facts of files
    status_file: str  # a local file to keep current, empty for none
    patience_s: float  # how long training goes on without a bucket
    allow_config_change: bool = False  # whether this attempt was started with ``--allow-config-change``

    @property
    def attempt(self) -> int:
        return self.record.attempt

    @property
    def folder(self) -> Path:
        return self.scratch / f"{self.record.attempt:04d}"


def log(text: str, bare: bool = False) -> None:
    """Prints a line to stderr, if there still is one; ``bare`` for an error, whose line begins with where it is."""
    try:
        print(text if bare else f"[spotune] {text}", file=sys.stderr, flush=True)
    except (OSError, ValueError):  # broken pipe, closed file: as after a SIGTERM
        return


# A part is uploaded when it holds a twentieth of the attempt's age, within these bounds: a machine that vanishes
# loses at most that much detail, and a day's attempt has a few thousand parts, not a hundred thousand.
PART_S = (1.0, 15.0)
HEARTBEAT_S = 15.0  # the contract: progress.json at most every 15 s


class Journal:
    """One ordered stream of an attempt's events: the worker's local log and the guard's own. Thread-safe.

    Uploads parts that are never rewritten, and keeps ``progress.json`` and the local status file current. A fault of
    the store is logged once and retried with the next part. ``close`` flushes. ``progress``: what people see at first.
    """

    def __init__(
        self,
        store: Store,
        keys: Keys,
        attempt: int,
        worker_log: Path,
        status_file: str = "",
        progress: Progress | None = None,
    ) -> None:
        self._store, self._keys, self._attempt = store, keys, attempt
        self._worker_log, self._status_file = worker_log, status_file
        self._lock, self._flushing = threading.RLock(), threading.Lock()
        self._pending: list[str] = []
        self._offset, self._part = 0, 0
        self._began = self._flushed_at = self._beat_at = time.monotonic()
        self._progress = progress or Progress(run_id=keys.run_id, attempt=attempt, phase="load", at=time.time())
        self.first_step: int | None = None
        self._listeners: list[Callable[[dict[str, Any]], None]] = []
        self._stop = threading.Event()
        self._write_status()
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._thread.start()

    @classmethod
    def of(cls, context: Context, progress: Progress | None = None) -> Self:
        """Returns an attempt's journal, which holds its first event."""
        worker_log = events_path(context.folder, 0)
        journal = cls(context.store, context.keys, context.attempt, worker_log, context.status_file, progress)
        world_size = context.machine.world_size
        journal.write("start", attempt=context.attempt, host=context.record.host, world_size=world_size)
        return journal

    def listen(self, listener: Callable[[dict[str, Any]], None]) -> None:
        """Calls ``listener`` with each later event, in order. It must be quick and must not write events."""
        with self._lock:
            self._listeners.append(listener)

    @property
    def progress(self) -> Progress:
        with self._lock:
            return self._progress

    def write(self, event: str, **fields: Any) -> None:
        """Adds an event of the guard after all that the worker has written so far."""
        with self._lock:
            self._read_worker()
            self._append({"t": round(time.time(), 4), "event": event, **fields})
            self._write_status()

    def poll(self) -> None:
        """Reads what the worker wrote since the last poll."""
        with self._lock:
            if self._read_worker():
                self._write_status()

    def end(self, reason: EndReason, code: int, step: int, message: str) -> None:
        """Adds the attempt's last event and closes; logs an error of the store."""
        self.write("end", reason=reason, exit_code=code, step=step, message=message)
        try:
            self.close()
        except SpotuneError as error:
            log(f"the last events are not recorded: {error}")

    def close(self) -> None:
        """Uploads everything that is left. Raises StoreError if the bucket does not accept it."""
        self._stop.set()
        self._thread.join()
        self.poll()
        self._flush()
        self._beat()

    def _work(self) -> None:
        while not self._stop.wait(0.2):
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
                log(f"progress is not reported for now: {error}")

    def _read_worker(self) -> int:
        """Appends the worker's complete new lines; an unfinished last line waits for its end."""
        try:
            with open(self._worker_log, "rb") as events_log:
                events_log.seek(self._offset)
                data = events_log.read()
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
                self._append(event)
        return len(lines)

    def _append(self, event: dict[str, Any]) -> None:
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
                changes = {"step": event["step"], "tokens": event.get("tokens") or self._progress.tokens}
                self.first_step = self.first_step or event["step"]
            case "log" if "loss" in event:
                changes = {"loss": as_json(as_number(event["loss"]))}  # a run may diverge
            case "restored" if event.get("step"):
                changes = {"step": event["step"], "committed_step": event["step"]}
            case "commit":
                changes = {"committed_step": event["step"]}
            case "end":
                changes = {"phase": event["reason"]}
        self._progress = replace(self._progress, at=time.time(), **changes)

    def _write_status(self) -> None:
        if not self._status_file:
            return
        path = Path(self._status_file)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            part.write_text(json.dumps(asdict(self._progress)))
            part.replace(path)
        except OSError as error:  # the bucket has it too
            log(f"status file {path}: {error}")
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
            progress = replace(self._progress, at=time.time())
        self._store.write(self._keys.progress, progress.to_bytes())


class GpuMeter:
    """Writes an event every 15 s with how busy and how full this machine's GPUs are; measures nothing without a GPU.

    Of several machines it measures the first, whose events are read. nvidia-smi(1): ``utilization.gpu`` is the share of
    the last sample period, at most a second, in which a kernel ran.
    """

    def __init__(self, gpus: int, environ: Mapping[str, str], journal: Journal, every_s: float = 15.0) -> None:
        self._gpus, self._journal, self._every_s = gpus, journal, every_s
        visible = environ.get("CUDA_VISIBLE_DEVICES", "")
        query = ["--query-gpu=utilization.gpu,memory.used,memory.total", "--format=csv,noheader,nounits"]
        self._command = ["nvidia-smi", *query, *(["-i", visible] if visible else [])]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="gpus", daemon=True)

    def __enter__(self) -> Self:
        if self._gpus:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._gpus:
            self._thread.join(20.0)  # nvidia-smi may hang with the driver

    def _work(self) -> None:
        while not self._stop.wait(self._every_s):
            try:
                done = subprocess.run(self._command, capture_output=True, text=True, timeout=15, check=True)
            except subprocess.TimeoutExpired:  # a busy machine: the next sample may come in time
                continue
            except (OSError, subprocess.SubprocessError) as error:
                log(f"GPUs are not measured: {error}")
                return
            if sample := read_sample(done.stdout):
                self._journal.write("gpu", **sample)


def read_sample(listing: str) -> dict[str, float] | None:
    """Returns all GPUs of an answer as one: mean busy share, the fullest's GiB used and in all; None for ``[N/A]``."""
    try:
        rows = [[float(cell) for cell in line.split(",")] for line in listing.splitlines()]
    except ValueError:
        return None
    if not rows or any(len(row) != 3 for row in rows):
        return None
    _, used_mib, total_mib = max(rows, key=lambda row: row[1])
    busy = round(sum(row[0] for row in rows) / len(rows) / 100, 4)
    return {"busy": busy, "memory_gib": round(used_mib / 1024, 3), "memory_total_gib": round(total_mib / 1024, 3)}
