"""What guard and worker say to each other, and what a run tells the world: events, extras, trackers."""

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from spotune.core.config_keys import is_on
from spotune.core.keys import YEAR_2000, YEAR_2200, Amount, Count, Files, Ranks, Step, Time, build, fits, plain
from spotune.core.records import Record

# The event log: what a machine says while it runs. One JSON object per line, in order of time.
#
# Every line has ``t`` (epoch seconds) and ``event``:
#
#     start    {attempt, host, world_size}                       the guard has claimed the attempt
#     phase    {phase}                                           this phase lasts until the next one
#     restored {step, commit or null, rejected: [text], restore_s}
#     rows     {set, max_length, sources: [{source, rows, dropped, truncated, empty}]}  set: training or evaluation;
#              what tokenizing took away from each source, before training; null counts: the source is streamed
#     plan     {max_steps, num_train_epochs, trainable_parameters, total_parameters}  training begins
#     step     {step, tokens, data_wait_s}                       a step ended; tokens since step 0, all ranks
#     log      {step, epoch, loss, learning_rate, ...}           Trainer's own log line, numbers only; NaN and infinity
#                                                                are "nan", "inf", "-inf": JSON has no number for them
#     predicted {step}                                           an evaluation has come on; at most every 2 s
#     save     {step, stall_s}                                   training stood still for a checkpoint; it is in memory
#     written  {step, write_s, bytes}                            it is on the local disk
#     unsaved  {step, message}                                   it is not, and why; training goes on
#     commit   {step, upload_s, bytes}                           it is committed in the bucket
#     interval {interval_s, stall_s, slowdown_s, upload_s, ...}  how often to save, and what follows from what
#     budget   {spent_usd, budget_usd}                           most of the run's budget is used up
#     gpu      {busy, memory_gib, memory_total_gib}              share of time with a kernel on, GiB of the fullest
#     notice   {source, grace_s or null}                         the machine is about to be taken
#     stall    {phase, silent_s, limit_s, since}                 the watchdog ends the attempt; since: last sign of life
#     alive    {}                                                nothing but the time: what was going on still is
#     end      {reason, exit_code, step, message}                the attempt's last line, when it had time
#
# Phases are those of the cost report that a machine can know: ``load`` (imports, model, tokenizing),
# ``restore``, ``train`` (split into useful, replayed and data_wait by its steps), ``eval``, ``save``,
# ``idle``, ``teardown`` (uploading the result, leaving).

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


# Seam 2, guard | worker: one local folder.
#
# The worker knows torch and no store; the guard knows the store and no torch.
#
#     job.json               guard -> worker   what to do (Job), before the worker starts
#     trainer/checkpoint-N/  both              restored there by the guard; saved there by Trainer
#     candidate.json         guard -> worker   {"number": n, "checkpoint": path, "best_checkpoint": path or null}:
#                            can rank 0 load this verified checkpoint? Another number: another candidate
#     verdict.json           worker -> guard   {"number": the candidate's, "fault": why it cannot, empty where it can}
#     restored.json          guard -> worker   {"checkpoint": path or null, "tokens": n, "error": text or null,
#                                             "versions", "global_batch": the commit's, "other_versions_allowed": bool}
#     staged/<step 8d>-<rank>.json  worker -> guard   a rank's part of a local checkpoint is complete (Staged); once all
#                            ranks of this machine have said so, the checkpoint is the guard's
#     control.json           guard -> worker   {"stop": bool, "save": n}: stop at the next step; save once per n
#     events-<rank>.jsonl    worker -> guard   append-only, one JSON object per line (see events.py)
#     outcome-<rank>.json    worker -> guard   how the rank ended (Outcome), last
#     python-stacks-<rank>.txt  worker -> guard  its Python stacks, after STACKS_SIGNAL
#     stacks-<rank>.txt      guard             what the rank was doing when the watchdog ended the attempt
#     output/                worker -> guard   the result, complete once rank 0's outcome says "completed"
#
# What is done with the result after its certificate is in extras.py.
#
# Every file but the event logs appears by an atomic rename, so that a reader sees all of it or nothing.

JOB = "job.json"
TRAINER = "trainer"
RESTORED = "restored.json"
CANDIDATE = "candidate.json"
VERDICT = "verdict.json"
STAGED = "staged"
CONTROL = "control.json"
OUTPUT = "output"
STACKS_SIGNAL = signal.SIGUSR2  # the guard asks a rank for its Python stacks

How = Literal["completed", "stopped", "bad_input", "retry", "failed"]


@dataclass(frozen=True)
class Job:
    """What the worker is to do.

    Attributes:
        config: the resolved flat config, with ``data`` and without ``profiles``.
        config_path: for messages.
        save_steps, save_seconds: when to save, whichever is set.
        save_as_config: as ``save_steps`` and ``save_strategy`` in the config say. None of the three: when asked to.
        threads: torch threads that the restored commit was made with; None: torch's default.
        global_batch: rows of a step of the run so far, over all ranks; None: as the config and the ranks make it.
        cache: a folder of this machine for data sets, kept between attempts.
        data_files: facts of the files that the config trains on, as ``fingerprint.data_files`` has just taken them.
    """

    run_id: str
    attempt: int
    config: dict[str, Any]
    config_path: str
    cache: str
    save_steps: int | None = None
    save_seconds: float | None = None
    save_as_config: bool = False
    threads: int | None = None
    global_batch: int | None = None
    data_files: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Staged:
    """One rank's part of a local checkpoint, complete on disk; tokens are counted over all ranks since step 0.

    Attributes:
        files: facts ({size: bytes, sha256: hex}) of those files, by relative path, that were hashed when written.
        global_batch: rows of a step, over all ranks.
        config_sha256, revision: of the run's record, added by the guard when it seals the checkpoint.
    """

    step: Step
    checkpoint: str
    epoch: Amount
    tokens: Count
    world_size: Ranks
    threads: Ranks
    best_step: Step | None = None
    versions: dict[str, str] = field(default_factory=dict)
    files: Files = field(default_factory=dict)
    global_batch: Count = 0
    config_sha256: str = ""
    revision: Count = 0

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Raises ValueError, naming the field, for what is not a rank's word or a seal. Ignores fields that it does not
        know."""
        return build(cls, data)


@dataclass(frozen=True)
class Outcome:
    """How a rank ended.

    Attributes:
        message: one line for people; for bad_input it is the whole error.
        versions: the changed libraries, ``datasets 5.0.1 -> 5.2.0``, where these are what is refused.
    """

    how: How
    step: Step = 0
    message: str = ""
    versions: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", plain(self.message))  # it may name a file whose name is not UTF-8


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that it appears whole, by rename. Accepts a dataclass or plain data."""
    data = asdict(value) if hasattr(value, "__dataclass_fields__") else value
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    part.write_text(json.dumps(data, default=str))
    part.replace(path)


def read_json(path: Path) -> Any | None:
    """What ``write_json`` wrote, or None when it is not there."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def answer_candidate(folder: Path, fault_of: Callable[[Path, Path | None], str]) -> None:
    """Says whether the guard's candidate can be loaded, once for each; returns at once where there is none."""
    candidate, verdict = read_json(folder / CANDIDATE), read_json(folder / VERDICT)
    if candidate is None or (verdict and verdict["number"] == candidate["number"]):
        return
    best = candidate["best_checkpoint"]
    fault = fault_of(Path(candidate["checkpoint"]), Path(best) if best else None)
    write_json(folder / VERDICT, {"number": candidate["number"], "fault": fault})


def events_path(folder: Path, rank: int) -> Path:
    return folder / f"events-{rank}.jsonl"


def outcome_path(folder: Path, rank: int) -> Path:
    return folder / f"outcome-{rank}.json"


def staged_path(folder: Path, step: int, rank: int = 0) -> Path:
    return folder / STAGED / f"{step:08d}-{rank}.json"


def stacks_path(folder: Path, rank: int) -> Path:
    return folder / f"stacks-{rank}.txt"


def python_stacks_path(folder: Path, rank: int) -> Path:
    return folder / f"python-stacks-{rank}.txt"


# Extras: what is done with a certified result where the config asks for it. The run is SUCCEEDED without them.
#
# Each is done by a process on the worker's side of seam 2, in the attempt's folder (see exchange.py):
#
#     extras.json         guard -> process   what to do (ExtraJob)
#     output/             guard -> process   the certified result
#     merged/             process -> guard   the merged model, complete once there is an answer
#     answer-<name>.json  process -> guard   how it ended (Answer), last

EXTRAS = "extras.json"
MERGED = "merged"
MERGE, PUSH = "merge", "push"
FACTS = {MERGE: ("check",), PUSH: ("repo_id", "oid", "url")}  # what an answer has to say when it is done
CONFIG_KEYS = {MERGE: "merge_adapter", PUSH: "push_to_hub"}


@dataclass(frozen=True)
class ExtraJob:
    """The certified result, and the config that it was trained with."""

    run_id: str
    step: int
    weights_sha256: str
    config: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """``message``: one line for people; ``facts``: for the mark."""

    done: bool
    message: str = ""
    facts: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", plain(self.message))


@dataclass(frozen=True, kw_only=True)
class Pushed(Record):
    """``pushed.json``: the result is on the hub, as commit ``oid`` of ``repo_id``."""

    run_id: str
    attempt: int
    repo_id: str
    oid: str
    url: str = ""
    at: float = 0.0


def asked_for(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The extras that a config asks for, in the order in which they are done."""
    return tuple(name for name, key in CONFIG_KEYS.items() if is_on(config, key))


def answer_path(folder: Path, name: str) -> Path:
    return folder / f"answer-{name}.json"


# When wandb is asked for: live under one id across all attempts, or rebuilt at the end, or not at all.

Wandb = Literal["live", "rebuild", "off"]


def wandb_mode(config: Mapping[str, Any], environ: Mapping[str, str]) -> Wandb:
    """``live`` where a key allows it; else ``rebuild``: wandb's own offline files do not survive a SIGKILL
    and repeat the steps that are done twice, so one clean run is written from our events at the end.
    """
    asked = config.get("report_to") or []
    asked = [asked] if isinstance(asked, str) else asked
    if not {"wandb", "all"} & set(asked) or environ.get("WANDB_MODE") == "disabled":
        return "off"
    return "live" if environ.get("WANDB_API_KEY") and environ.get("WANDB_MODE", "online") == "online" else "rebuild"


# What the guard asks for while training runs: ``control.json``, looked at on every step's end.


@dataclass(frozen=True)
class Wish:
    """What is asked for at a step's end; ``busy``: a checkpoint is still being written."""

    stop: bool = False
    save: bool = False
    busy: bool = False


class Control:
    """Reads ``control.json`` when it has changed: one ``stat`` a step otherwise."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / CONTROL
        self._seen = (0, 0)
        self._stop = False
        self._asked = 0  # the guard's counter: a save is owed for every increase
        self._answered = 0

    def look(self) -> Wish:
        """What is asked for now; ``save`` stays true until ``answered`` is called."""
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            return Wish()
        stamp = (stat.st_mtime_ns, stat.st_ino)
        if stamp != self._seen:
            self._seen = stamp
            asked = read_json(self._path) or {}
            self._stop = bool(asked.get("stop"))
            self._asked = int(asked.get("save") or 0)
        return Wish(stop=self._stop, save=self._asked > self._answered)

    def answered(self) -> None:
        """A checkpoint was made after all that has been asked for so far."""
        self._answered = self._asked
