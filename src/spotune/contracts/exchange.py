"""Seam 2, guard | worker: one local folder.

The worker knows torch and no store; the guard knows the store and no torch.

    job.json               guard -> worker   what to do (Job), before the worker starts
    trainer/checkpoint-N/  both              restored there by the guard; saved there by Trainer
    candidate.json         guard -> worker   {"number": n, "checkpoint": path, "best_checkpoint": path or null}:
                           can rank 0 load this verified checkpoint? Another number: another candidate
    verdict.json           worker -> guard   {"number": the candidate's, "fault": why it cannot, empty where it can}
    restored.json          guard -> worker   {"checkpoint": path or null, "tokens": n, "error": text or null,
                                            "versions", "global_batch": the commit's, "other_versions_allowed": bool}
    staged/<step 8d>-<rank>.json  worker -> guard   a rank's part of a local checkpoint is complete (Staged); once all
                           ranks of this machine have said so, the checkpoint is the guard's
    control.json           guard -> worker   {"stop": bool, "save": n}: stop at the next step boundary; save once per n
    events-<rank>.jsonl    worker -> guard   append-only, one JSON object per line (see events.py)
    outcome-<rank>.json    worker -> guard   how the rank ended (Outcome), last
    python-stacks-<rank>.txt  worker -> guard  its Python stacks, after STACKS_SIGNAL
    stacks-<rank>.txt      guard             what the rank was doing when the watchdog ended the attempt
    output/                worker -> guard   the result, complete once rank 0's outcome says "completed"

What is done with the result after its certificate is in extras.py.

Every file but the event logs appears by an atomic rename, so that a reader sees all of it or nothing.
"""

import json
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from spotune.contracts.shapes import Amount, Count, Files, Ranks, Step, build, plain

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
