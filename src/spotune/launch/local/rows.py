"""The queue's rows as values."""

import json
import sqlite3
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spotune.launch.infra import ACTIVE, State
from spotune.launch.task import Demand, demand_of

if TYPE_CHECKING:
    from spotune.launch.local.processes import Identity


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
    def from_row(cls, row: sqlite3.Row) -> "Job":
        values = {name: row[name] for name in row.keys() if name not in ("position", "submission")}  # noqa: SIM118
        values["interactive"], values["cancelling"] = bool(row["interactive"]), bool(row["cancelling"])
        try:
            return cls(**values | {"fired": json.loads(row["fired"])} | json.loads(row["submission"]))
        except (ValueError, TypeError) as error:
            reason = f"its row in queue.db cannot be read: {error} (train it anew, under another --name)"
            empty = {"fired": [], "task": {}, "workdir": "", "secrets": [], "preemptions": []}
            return cls(**values | empty | {"reason": reason})

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
        settled: the job's state accounts for its end.
    """

    run_id: str
    attempt: int
    marker: str
    boot: str
    started_at: float
    slots: list[int] = field(default_factory=list)
    accelerators: str = ""
    use_spot: bool = False
    pid: int | None = None
    created: float | None = None
    running_at: float | None = None
    ended_at: float | None = None
    setup_s: float = 0.0
    exit_code: int | None = None
    phase: str = "run"
    end_reason: str = ""
    taking: str = ""
    kill_at: float | None = None
    settled: bool = False

    @classmethod
    def from_row(cls, row: sqlite3.Row) -> "Attempt":
        values = {name: row[name] for name in row.keys()}  # noqa: SIM118
        values["slots"] = json.loads(row["slots"])
        values["use_spot"], values["settled"] = bool(row["use_spot"]), bool(row["settled"])
        return cls(**values)

    @property
    def node(self) -> "Identity | None":
        from spotune.launch.local.processes import Identity  # here: psutil, which only a supervisor needs

        return Identity(self.pid, self.created) if self.pid and self.created else None


@dataclass(frozen=True)
class Request:
    """Something that a verb wants done: ``cancel``, or ``preempt`` with so much notice."""

    id: int
    run_id: str
    kind: str
    notice_s: float
    made_at: float

    @classmethod
    def from_row(cls, row: sqlite3.Row) -> "Request":
        return cls(row["id"], row["run_id"], row["kind"], row["notice_s"], row["made_at"])
