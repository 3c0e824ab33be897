"""The machine: a tiny process in a session of its own that runs a job's ``setup`` and ``run``.

It outlives the supervisor. It ignores what a notice sends to everything on the machine; when it is
killed, the machine is gone.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from spotune.core.io import Damaged, load_object, write_state
from spotune.core.output import protect_output
from spotune.launch.local.layout import AttemptFiles, Exit, Running

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
