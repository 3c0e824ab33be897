"""The queue's rows as values."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol

from spotune.core.environment import check_bucket
from spotune.core.errors import SpotuneError
from spotune.core.fields import YEAR_2000, Time, fits
from spotune.core.keys import RUN_ID
from spotune.launch.engine import ACTIVE, State
from spotune.launch.task import Demand, demand_of

if TYPE_CHECKING:
    from spotune.launch.local.processes import Identity


_MOST_PID = 2**31 - 1
_SUBMISSION = ("task", "workdir", "secrets", "preemptions")
_EMPTY: dict[str, Any] = {
    "id": 0,
    "state": "FAILED",
    "priority": 0,
    "submitted_at": 0.0,
    "started_at": None,
    "ended_at": None,
    "attempt": 0,
    "exit_code": None,
    "not_before": 0.0,
    "restarts": 0,
    "faults": 0,
    "interactive": False,
    "cancelling": False,
    "fired": [],
    "task": {},
    "secrets": [],
    "preemptions": [],
}


class Row(Protocol):
    """A row of a table, or a mapping."""

    def __getitem__(self, name: str, /) -> Any: ...


@dataclass(frozen=True)
class Job:
    """A job as the queue has it; ``secrets`` are names only, their values are never here.

    One without a ``task`` has a row that cannot be read: ``reason`` says so, and it is never started.
    """

    id: int
    run_id: str
    state: State
    priority: int
    user: str
    bucket: str
    interactive: bool
    submitted_at: float
    started_at: float | None
    ended_at: float | None
    attempt: int
    reason: str
    exit_code: int | None
    not_before: float
    restarts: int
    faults: int
    last_commit: str
    cancelling: bool
    fired: list[int]
    task: dict[str, Any]
    workdir: str
    secrets: list[str]
    preemptions: list[dict[str, float]]

    @classmethod
    def from_row(cls, row: Row) -> "Job | None":
        """The job; None for a row that does not say which run it is of."""
        values: dict[str, Any] = {field.name: _cell(row, field.name) for field in fields(cls)}
        if not isinstance(values["run_id"], str) or not RUN_ID.fullmatch(values["run_id"]):
            return None
        values |= {name: bool(values[name]) for name in ("interactive", "cancelling")}
        why = ""
        try:
            submission = json.loads(_cell(row, "submission") or "{}")
            values |= {"fired": json.loads(values["fired"] or "[]"), **{name: submission[name] for name in _SUBMISSION}}
            demand_of(values["task"])
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError, SpotuneError) as error:
            values |= {"fired": [], "task": {}, "secrets": [], "preemptions": [], "workdir": ""}
            why = f"{error!r}"
        wrong = [name for name, value in values.items() if not fits(cls, name, value)]
        if "bucket" not in wrong and not _is_bucket(values["bucket"]):
            wrong.append("bucket")
        if wrong or why:
            values |= {name: _EMPTY.get(name, "") for name in wrong}
            what = why or f"{wrong[0]} is damaged"
            reason = f"its row in queue.db cannot be read: {what} (train it anew, under another --name)"
            values |= {"task": {}, "reason": reason}
        return cls(**values)

    @property
    def is_active(self) -> bool:
        return self.state in ACTIVE

    @property
    def demand(self) -> Demand:
        return demand_of(self.task)


@dataclass(frozen=True)
class Attempt:
    """A machine that a job was given.

    Attributes:
        marker: in the environment of everything that runs on it.
        slots: which of the machine's slots it has; empty for an interactive job.
        taking: ``preempted`` or ``cancelled`` once it is being taken away, all of it dead by ``kill_at``.
        started_at: 0: not said, by a row that is damaged.
        settled: the job's state accounts for its end.
    """

    run_id: str
    attempt: int
    marker: str
    boot: str
    started_at: Time
    slots: list[int] = field(default_factory=list)
    accelerators: str = ""
    use_spot: bool = False
    pid: int | None = None
    created: float | None = None
    running_at: Time | None = None
    ended_at: Time | None = None
    setup_s: float = 0.0
    exit_code: int | None = None
    phase: str = "run"
    end_reason: str = ""
    taking: str = ""
    kill_at: Time | None = None
    settled: bool = False

    @classmethod
    def from_row(cls, row: Row) -> "Attempt | None":
        """The machine; None for a row that does not say of which run, and which of its machines it is."""
        values: dict[str, Any] = {field.name: _cell(row, field.name) for field in fields(cls)}
        run_id, number = values["run_id"], values["attempt"]
        if not isinstance(run_id, str) or not RUN_ID.fullmatch(run_id) or not fits(cls, "attempt", number):
            return None
        values |= {name: bool(values[name]) for name in ("use_spot", "settled")}
        try:
            values["slots"] = json.loads(values["slots"])
        except (ValueError, TypeError, RecursionError):
            values["slots"] = []
        return sound_attempt(values, run_id, number)

    @property
    def is_dated(self) -> bool:
        """Whether it says from when to when it was paid for; one that is not settled may have no end yet."""
        return self.started_at >= YEAR_2000 and (self.ended_at is not None or not self.settled)

    @property
    def node(self) -> "Identity | None":
        from spotune.launch.local.processes import Identity  # here: psutil, which only a supervisor needs

        is_pid = self.pid and self.created and 0 < self.pid <= _MOST_PID
        return Identity(self.pid, self.created) if is_pid and self.pid and self.created else None


@dataclass(frozen=True)
class Request:
    """Something that a verb wants done: ``cancel``, or ``preempt`` with so much notice."""

    id: int
    run_id: str
    kind: str
    notice_s: float
    made_at: float

    @classmethod
    def from_row(cls, row: Row) -> "Request":
        """The request; of a value that is damaged nothing is wanted."""
        values = {field.name: _cell(row, field.name) for field in fields(cls)}
        empty: dict[str, Any] = {"id": 0, "run_id": "", "kind": "", "notice_s": 0.0, "made_at": 0.0}
        return cls(**{name: value if fits(cls, name, value) else empty[name] for name, value in values.items()})


def sound_attempt(values: Mapping[str, Any], run_id: str, number: int) -> Attempt:
    """The machine of these values; one that is damaged counts as not said."""
    found: dict[str, Any] = {"marker": "unknown", "boot": "", "started_at": 0.0}
    for one in fields(Attempt):
        if one.name in values and fits(Attempt, one.name, values[one.name]):
            found[one.name] = values[one.name]
    return Attempt(**found | {"run_id": run_id, "attempt": number})


def _is_bucket(url: str) -> bool:
    try:
        return bool(check_bucket(url, "bucket"))
    except SpotuneError:
        return False


def _cell(row: Row, name: str) -> Any:
    """A value of a row, None where it has no such column."""
    try:
        return row[name]
    except LookupError:
        return None
