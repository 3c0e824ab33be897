"""The event log: what a machine says while it runs. One JSON object per line, in order of time.

Every line has ``t`` (epoch seconds) and ``event``:

    start    {attempt, host, world_size}                       the guard has claimed the attempt
    phase    {phase}                                           this phase lasts until the next one
    restored {step, commit or null, rejected: [text], restore_s}
    rows     {set, max_length, sources: [{source, rows, dropped, truncated, empty}]}  set: training or evaluation; what
             tokenizing took away from each source, before training; null counts: the source is streamed
    plan     {max_steps, num_train_epochs, trainable_parameters, total_parameters}  training begins
    step     {step, tokens, data_wait_s}                       a step ended; tokens since step 0, all ranks
    log      {step, epoch, loss, learning_rate, ...}           Trainer's own log line, numbers only; NaN and infinity
                                                               are "nan", "inf" and "-inf", JSON has no number for them
    predicted {step}                                           an evaluation has come on; at most every 2 s
    save     {step, stall_s}                                   training stood still for a checkpoint; it is in memory
    written  {step, write_s, bytes}                            it is on the local disk
    unsaved  {step, message}                                   it is not, and why; training goes on
    commit   {step, upload_s, bytes}                           it is committed in the bucket
    interval {interval_s, stall_s, slowdown_s, upload_s, ...}  how often to save, and what follows from what
    budget   {spent_usd, budget_usd}                           most of the run's budget is used up
    gpu      {busy, memory_gib, memory_total_gib}              share of time with a kernel on, GiB of the fullest
    notice   {source, grace_s or null}                         the machine is about to be taken
    stall    {phase, silent_s, limit_s, since}                 the watchdog ends the attempt; since: last sign of life
    alive    {}                                                nothing but the time: what was going on still is
    end      {reason, exit_code, step, message}                the attempt's last line, when it had time

Phases are those of the cost report that a machine can know: ``load`` (imports, model, tokenizing),
``restore``, ``train`` (split into useful, replayed and data_wait by its steps), ``eval``, ``save``,
``idle``, ``teardown`` (uploading the result, leaving).
"""

import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spotune.contracts.shapes import YEAR_2000, YEAR_2200, Amount, Count, Step, Time, fits

Event = dict[str, Any]
Phase = Literal["setup", "load", "restore", "train", "eval", "save", "idle", "teardown"]
NOT_FINITE = ("nan", "inf", "-inf")
EndReason = Literal["completed", "preempted", "failed", "cancelled", "paused", "lost", "stalled"]


@dataclass(frozen=True)
class _Fields:
    """What the fields hold that the guard acts on while the worker runs."""

    t: Time
    event: str
    phase: str | None = None
    step: Step | None = None
    tokens: Count | None = None
    max_steps: Step | None = None
    stall_s: Amount | None = None
    bytes: Count | None = None
    reason: str | None = None


_NEEDED = {
    "phase": ("phase",),
    "step": ("step",),
    "save": ("step", "stall_s"),
    "written": ("step",),
    "commit": ("step", "bytes"),
    "end": ("reason",),
}


class EventLog:
    """Appends events to a local file; each line is whole and on its way to disk when ``write`` returns. Thread-safe."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - held open for the process's life
        self._clock = clock
        self._lock = threading.Lock()

    def write(self, event: str, **fields: Any) -> None:
        fields = {name: as_json(value) for name, value in fields.items()}
        with self._lock:
            self._file.write(json.dumps({"t": round(self._clock(), 4), "event": event, **fields}) + "\n")

    def phase(self, phase: Phase) -> None:
        self.write("phase", phase=phase)

    def close(self) -> None:
        self._file.close()


def as_json(value: Any) -> Any:
    """Returns what stands for a value in JSON: ``nan``, ``inf`` or ``-inf`` as text, else the value itself."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def as_number(value: Any) -> float | None:
    """Returns the number that ``as_json`` wrote, NaN and infinity among them; None for what is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and value not in NOT_FINITE:
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def parse_lines(data: bytes) -> list[Event]:
    """The events of one part. Skipped: what is no JSON object, such as a last line that was cut, and what is dated by
    a clock that nobody had set, or in milliseconds."""
    return [event for event in parse_objects(data) if _is_dated(event)]


def is_whole(event: Any) -> bool:
    """Returns whether a line of the worker's log is an event, with the fields that the guard acts on."""
    if not isinstance(event, dict) or not {"t", "event"} <= event.keys():
        return False
    if not all(fits(_Fields, name, event[name]) for name in _Fields.__dataclass_fields__ if name in event):
        return False
    return all(event.get(name) is not None for name in _NEEDED.get(event["event"], ()))


def parse_objects(data: bytes) -> list[Event]:
    """The same, whatever their time."""
    lines = data.splitlines()
    try:
        found = json.loads(b"[" + b",".join(lines) + b"]")  # whole, as most are: in one go, in half the time
    except (ValueError, RecursionError):
        found = [_parse(line) for line in lines]
    return [event for event in found if isinstance(event, dict)]


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_dated(event: Event) -> bool:
    at = number(event.get("t"))
    return at is not None and YEAR_2000 <= at < YEAR_2200


def number(value: Any) -> float | None:
    """A finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None
