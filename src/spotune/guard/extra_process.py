"""The process that does one extra: started, watched and ended by the guard, like a rank."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from spotune.contracts.environment import GUARD_PID
from spotune.contracts.errors import InfraError
from spotune.contracts.extras import FACTS, Answer, answer_path
from spotune.contracts.localstate import Damaged, load_as
from spotune.guard.worker_command import worker_command

POLL_S = 0.1
TIMEOUT_S = 3600.0


def run_extra(
    name: str,
    folder: Path,
    config: Mapping[str, Any],
    environ: Mapping[str, str],
    wait: Callable[[float], None],
    fault: Callable[[int], str] = lambda pid: "",
    timeout_s: float = TIMEOUT_S,
    clock: Callable[[], float] = time.monotonic,
) -> Answer:
    """Runs ``python -m spotune.sft.extras NAME FOLDER`` to its end; whatever ``wait`` raises ends it at once.

    ``fault``: what is wrong with the process of that id; empty where nothing is.
    """
    answer_path(folder, name).unlink(missing_ok=True)
    process = subprocess.Popen(
        worker_command(environ, "spotune.sft.extras", name, str(folder)),
        env={**extra_environ(config, environ), GUARD_PID: str(os.getpid())},
        stdin=subprocess.DEVNULL,
        process_group=0,
    )
    deadline = clock() + timeout_s
    try:
        while process.poll() is None:
            if clock() > deadline:
                return Answer(False, f"not done after {timeout_s:.0f} s")
            if what := fault(process.pid):
                return Answer(False, what)
            wait(POLL_S)
    finally:
        _kill(process)
    if answer := _read_answer(folder, name):
        return answer
    code = process.returncode
    died = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return Answer(False, f"its process {died} without a word")


def _read_answer(folder: Path, name: str) -> Answer | None:
    """The process's answer, None where it left none; a damaged one means that it is not done."""
    path = answer_path(folder, name)
    try:
        answer = load_as(path, Answer)
    except (Damaged, InfraError) as error:
        return Answer(False, f"its process left a damaged {path.name}: {error}")
    if missing := [fact for fact in FACTS[name] if answer and answer.done and fact not in answer.facts]:
        return Answer(False, f"its process left a damaged {path.name}: facts: {missing[0]}: missing")
    return answer


def extra_environ(config: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, str]:
    """The run's environment, as its ranks had it; in a log, progress bars are lines without end."""
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
    if not sys.stderr.isatty():
        quiet |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return quiet | dict(environ) | {key: str(value) for key, value in (config.get("env") or {}).items()}


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """SIGKILL to the process and its children; returns when it is gone."""
    with suppress(ProcessLookupError, PermissionError):  # macOS says the latter of a zombie
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
