"""What an infrastructure is: the one interface behind ``local`` and ``sky``, with the same contract tests."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, Protocol

from spotune.contracts.errors import InputError

State = Literal["PENDING", "STARTING", "RUNNING", "RECOVERING", "PAUSED", "SUCCEEDED", "FAILED", "CANCELLED"]
ACTIVE: tuple[State, ...] = ("PENDING", "STARTING", "RUNNING", "RECOVERING")


@dataclass(frozen=True)
class JobStatus:
    """What the engine itself says of a job; whether a run SUCCEEDED is for the certificate to say.

    ``attempt`` counts the machines that the engine gave it so far, ``recoveries`` is one less, never below 0.
    ``step`` and ``max_steps`` are what the engine saw last, where it sees more than the bucket; else None.
    """

    run_id: str
    state: State
    priority: int
    user: str
    infra: str
    submitted_at: float
    started_at: float | None = None
    ended_at: float | None = None
    attempt: int = 0
    recoveries: int = 0
    reason: str = ""
    exit_code: int | None = None
    step: int | None = None
    max_steps: int | None = None
    loss: float | None = None
    phase: str = ""
    bucket: str = ""  # where the run keeps its state; it need not be the one of the verb that asks


@dataclass(frozen=True)
class PaidInterval:
    """One machine that the engine gave a run: a row of its history, the truth about what was paid.

    Attributes:
        started_at, ended_at: epoch seconds; ``ended_at`` None while it is still paid for.
        setup_s: how long ``setup:`` ran at its start, seconds.
        end_reason: what the engine knows: preempted, exited, cancelled, lost, or empty while it runs.
        nodes: machines held in this interval.
    """

    run_id: str
    started_at: float
    ended_at: float | None
    infra: str
    region: str = ""
    zone: str = ""
    instance_type: str = ""
    accelerators: str = ""
    use_spot: bool = False
    nodes: int = 1
    setup_s: float = 0.0
    end_reason: str = ""
    exit_code: int | None = None


@dataclass(frozen=True)
class Submission:
    """A plan that was agreed to: everything an engine needs to run it."""

    run_id: str
    task: dict[str, Any]  # a SkyPilot task YAML as data, envs filled in
    workdir: str
    user: str
    priority: int = 0
    secrets: dict[str, str] = field(default_factory=dict)
    preemptions: tuple[dict[str, float], ...] = ()
    interactive: bool = False  # a dev run: started at once, beside the queue, never recovered


class Infra(Protocol):
    """An engine that runs managed jobs. Every verb raises InfraError (one line) when the engine fails."""

    name: str

    def submit(self, submission: Submission) -> None: ...

    def check_resumable(self, run_id: str) -> None:
        """Raises InputError when ``resume`` would; nothing is changed."""

    def resume(self, run_id: str) -> None:
        """Puts a run that has ended back into the queue, at its old priority."""

    def cancel(self, run_id: str) -> None:
        """Returns once nothing of the run is running any more; no error when it has ended already."""

    def preempt(self, run_id: str, notice_s: float) -> None:
        """Takes the run's machine away as this infrastructure does, after ``notice_s`` of warning (0: none)."""

    def jobs(self, run_ids: list[str] | None = None) -> list[JobStatus]:
        """All known jobs (or those named), ordered as they would run: priority, then order of submission."""

    def logs(self, run_id: str, follow: bool) -> Iterator[str]:
        """Lines of all attempts; with ``follow`` it ends when the job does."""

    def history(self, run_id: str) -> list[PaidInterval]:
        """Every machine the run was given, oldest first."""


BACKENDS = {"local": "spotune.launch.local.infra:LocalInfra"}


def infra_of(name: str) -> str:
    """The backend that serves ``--infra NAME``; raises InputError for one that is not there."""
    backend = name.split("/", 1)[0]
    if backend not in BACKENDS:
        what = f"{name!r} comes with SkyPilot's infrastructure, which is not in this version"
        raise InputError("--infra", what, remedy=f"one of {', '.join(BACKENDS)}")
    return backend


def open_infra(name: str, **options: Any) -> Infra:
    """Opens a backend by name; it is imported only now, so that no verb pays for another's engine."""
    module, _, attribute = BACKENDS[infra_of(name)].partition(":")
    backend: Infra = getattr(import_module(module), attribute)(**options)
    return backend
