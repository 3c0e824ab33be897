"""The two small programs that the supervisor starts, ``python -m spotune.launch.local.programs node | probe``.

The node is a process in its own session that runs a job's ``setup`` and ``run``. It outlives the supervisor. It ignores
the signals that a notice sends to every process of the machine; when it is killed, the machine is gone.

The probe asks a remote bucket about a run, in the job's environment: the supervisor never waits for a remote bucket,
and it may lack that bucket's credentials, since another shell started it. Both start often, so this module imports
neither the queue nor psutil.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spotune.core.errors import BadRecord, SpotuneError, protect_output
from spotune.core.io import Damaged, load_object, log_line, write_state
from spotune.core.keys import Keys, commit_of
from spotune.core.records import Progress, read_mark
from spotune.core.store import Store
from spotune.launch.local.layout import AttemptFiles, Exit, Running

NODE, PROBE = "node", "probe"
HEARTBEAT_S = 1.0


def run_node(folder: Path) -> None:
    """Runs a job's ``setup`` and ``run``, and writes down how they ended."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGURG):
        signal.signal(number, _ignore)  # a function: SIG_IGN would be inherited by the job
    files = AttemptFiles(folder)
    if not (job := _job(files.machine)):
        return  # without exit.json the machine counts as lost
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
    """Returns the job, empty if the file is damaged: the supervisor writes another one for the next machine."""
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
    """Ignores a signal: the job decides what its processes do about it."""


def _beat(path: Path) -> None:
    while True:
        time.sleep(HEARTBEAT_S)
        with suppress(OSError):
            os.utime(path)


def _setup(job: dict[str, Any]) -> int:
    """Runs ``setup`` unless it has succeeded before for this job, text and folder. Returns its exit code."""
    done = Path(job["setup_marker"])
    if not job["setup"].strip() or done.exists():
        return 0
    if not (code := _bash(job["setup"])):
        done.touch()
    return code


def _bash(script: str) -> int:
    """Returns the exit code of a script's last command as a shell gives it: 128 + n for a signal."""
    try:
        code = subprocess.run(["bash", "-c", script], stdin=subprocess.DEVNULL, check=False).returncode
    except OSError as error:
        print(f"bash: {error}", file=sys.stderr, flush=True)
        return 127
    return code if code >= 0 else 128 - code


@dataclass(frozen=True)
class BucketProbe:
    """What the bucket says of a run: certificate, marks and newest commit.

    Attributes:
        failed, cancelled, paused: the marks' reasons; None if there is no such mark.
        commit: the newest commit's key.
        stalled: the watchdog ended the last attempt that wrote its progress.
        error: why the bucket did not answer.
    """

    completed: bool = False
    failed: str | None = None
    failed_code: int = 1
    cancelled: str | None = None
    paused: str | None = None
    commit: str = ""
    stalled: bool = False
    error: str = ""


def probe(bucket: str, run_id: str) -> BucketProbe:
    """Reads the bucket. If it does not answer, the result has only ``error``."""
    keys = Keys(run_id)
    try:
        store = Store(bucket)
        if store.exists(keys.completed):
            return BucketProbe(completed=True)
        marks = {name: read_mark(store, getattr(keys, name)) for name in ("failed", "cancelled", "paused")}
        stalled = _has_stalled(store, keys.progress)
        commits = [found for key in store.keys(keys.commits) if (found := commit_of(key))]
    except SpotuneError as error:
        return BucketProbe(error=str(error))
    reasons: dict[str, Any] = {name: mark.reason for name, mark in marks.items() if mark}
    failed_code = marks["failed"].exit_code if marks["failed"] else 1
    commit = keys.commit(*max(commits)) if commits else ""
    return BucketProbe(**reasons, failed_code=failed_code, commit=commit, stalled=stalled)


def cancelled_because(bucket: str, run_id: str) -> str | None:
    """Returns why a run is cancelled, or None. Asks only a bucket on this computer: the supervisor never waits."""
    if not bucket.startswith("file://"):
        return None
    try:
        mark = read_mark(Store(bucket), Keys(run_id).cancelled)
    except SpotuneError:
        return None
    return mark.reason if mark else None


def _has_stalled(store: Store, key: str) -> bool:
    """Returns whether ``progress.json`` says so: after an attempt its phase is the reason. False if unreadable."""
    try:
        data = store.read(key)
        return data is not None and Progress.from_bytes(data, key).phase == "stalled"
    except BadRecord:
        return False


def run_probe(bucket: str, run_id: str, output: Path) -> None:
    try:
        write_state(output, probe(bucket, run_id))
    except (OSError, SpotuneError) as error:  # the supervisor asks again
        log_line(f"{run_id}: {error}")


if __name__ == "__main__":
    protect_output()
    name, *arguments = sys.argv[1:]
    if name == NODE:
        run_node(Path(arguments[0]))
    else:
        run_probe(arguments[0], arguments[1], Path(arguments[2]))
