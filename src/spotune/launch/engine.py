"""What an engine is: the one interface behind ``local`` and ``skypilot``, with the same contract tests."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from spotune.core.errors import InputError, shown
from spotune.core.keys import Amount, Count, Ranks, Time

# What an infrastructure is: the one interface behind ``local`` and ``skypilot``, with the same contract tests.

State = Literal["PENDING", "STARTING", "RUNNING", "RECOVERING", "PAUSED", "SUCCEEDED", "FAILED", "CANCELLED"]
ACTIVE: tuple[State, ...] = ("PENDING", "STARTING", "RUNNING", "RECOVERING")

Agree = Callable[[str], None]  # puts a question to whoever sits there


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
    submitted_at: Time
    started_at: Time | None = None
    ended_at: Time | None = None
    attempt: Count = 0
    recoveries: Count = 0
    reason: str = ""
    exit_code: int | None = None
    by_infra: bool = False  # FAILED without a fault of the run: no machine could be had, or the engine itself failed
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
    started_at: Time
    ended_at: Time | None
    infra: str
    region: str = ""
    zone: str = ""
    instance_type: str = ""
    accelerators: str = ""
    use_spot: bool = False
    nodes: Ranks = 1
    setup_s: Amount = 0.0
    end_reason: str = ""
    exit_code: int | None = None


@dataclass(frozen=True)
class Submission:
    """A plan that was agreed to: everything an engine needs to run it."""

    run_id: str
    task: dict[str, Any]  # a SkyPilot task YAML as data, envs filled in
    workdir: str
    user: str
    infra: str = "local"  # where it is to run, as in --infra
    priority: int = 0
    secrets: dict[str, str] = field(default_factory=dict)
    preemptions: tuple[dict[str, float], ...] = ()
    interactive: bool = False  # a dev run: started at once, beside the queue, never recovered


class Infra(Protocol):
    """An engine that runs managed jobs. Every verb raises InfraError (one line) when the engine fails."""

    name: str
    refresh_s: float  # how often its state is worth asking for while somebody watches

    def submit(self, submission: Submission) -> None: ...

    def check_resumable(self, run_id: str) -> None:
        """Raises InputError when ``resume`` would; nothing is changed."""

    def workdir(self, run_id: str) -> str:
        """The folder here whose code a run gets when it is resumed; empty where that is a git reference."""

    def resume(self, run_id: str) -> None:
        """Puts a run that has ended back into the queue, at its old priority."""

    def cancel(self, run_id: str) -> None:
        """Returns once nothing of the run is running any more; no error when it has ended already."""

    def preempt(self, run_id: str, notice_s: float, agree: Agree = lambda question: None) -> None:
        """Takes the run's machine away as this infrastructure does, after ``notice_s`` of warning (0: none).

        ``agree`` is asked where that means to terminate what was bought, and raises where it may not be done.
        """

    def jobs(self, run_ids: list[str] | None = None, everyone: bool = False) -> list[JobStatus]:
        """All known jobs (or those named), ordered as they would run: priority, then order of submission.

        ``everyone``: also those of other users, where the engine serves several; among those named, too, what was not
        submitted from here.
        """

    def logs(self, run_id: str, follow: bool) -> Iterator[str]:
        """Lines of all attempts; with ``follow`` it ends when the job does."""

    def history(self, run_id: str) -> list[PaidInterval]:
        """Every machine the run was given, oldest first."""


def check_secrets(run_id: str, names: Iterable[str], environ: Mapping[str, str]) -> None:
    """Raises InputError for a run's secret that is not set here: no engine keeps the values of one that has ended."""
    missing = [name for name in names if name not in environ]
    if missing:
        raise InputError(run_id, f"secret {missing[0]} is not set here", remedy=f"export {missing[0]}=… first")


def check_folder(run_id: str, folder: str) -> None:
    """Raises InputError for a run whose folder is not there any more: its code is there and nowhere else."""
    if not Path(folder).is_dir():
        raise InputError(run_id, f"its folder {folder} is gone", remedy=f"spotune train --from {run_id}")


LOCAL, SKYPILOT = "local", "skypilot"
BACKENDS = {
    LOCAL: "spotune.launch.local.engine:LocalInfra",
    SKYPILOT: "spotune.launch.skypilot.engine:SkyInfra",
}
ANY = "any"  # SkyPilot chooses among the clouds that are enabled
# The clouds of the pinned SkyPilot, and what its --infra calls them too. Held to SkyPilot's own list by a test: asking
# it would cost seconds.
CLOUDS = (
    "aws", "azure", "cudo", "do", "fluidstack", "gcp", "hyperbolic", "ibm", "kubernetes", "lambda", "mithril", "nebius",
    "oci", "paperspace", "primeintellect", "runpod", "scp", "seeweb", "shadeform", "slurm", "ssh", "vast", "verda",
    "vsphere", "yotta",
)  # fmt: skip
_ALIASES = {"k8s": "kubernetes"}
_DEPTH = 3  # CLOUD/REGION/ZONE; a Kubernetes context may hold slashes


def infra_of(name: str, where: object = "--infra") -> str:
    """The backend that serves ``--infra NAME``; raises InputError, naming the nearest known one, for any other."""
    if name == LOCAL:
        return LOCAL
    if cloud_of(name, where) == ANY and name != ANY:
        raise InputError(where, f"{shown(name)}: {ANY} leaves the place to SkyPilot", remedy="--infra any")
    return SKYPILOT


def spell(name: str) -> str:
    """``--infra NAME`` with its cloud as SkyPilot spells it; raises InputError for no infrastructure."""
    return name if infra_of(name) == LOCAL else "/".join([cloud_of(name), *name.split("/")[1:]])


def cloud_of(name: str, where: object = "--infra") -> str:
    """The cloud in ``CLOUD[/REGION[/ZONE]]`` as SkyPilot spells it, or ``any``; raises InputError for no such thing."""
    first, *places = name.lower().split("/")
    cloud = _ALIASES.get(first, first)
    if cloud not in (*CLOUDS, ANY):
        known = (LOCAL, ANY, *CLOUDS)
        near = difflib.get_close_matches(first, [*known, *_ALIASES], n=1)
        remedy = f"did you mean {near[0]}?" if near else f"one of {', '.join(known)}"
        raise InputError(where, f"{shown(name)} is no infrastructure", remedy=remedy)
    if "" in places or (len(places) >= _DEPTH and cloud not in ("kubernetes", "ssh")):
        shape = {"slurm": "slurm/CLUSTER/PARTITION", "kubernetes": "kubernetes/CONTEXT"}
        remedy = shape.get(cloud, f"{cloud}/REGION/ZONE")
        raise InputError(where, f"{shown(name)} is no place", remedy=remedy)
    return cloud


def is_infra(name: str) -> bool:
    """Whether a backend serves it: not so for runs that were started by hand, or by a later version."""
    try:
        return infra_of(name) in BACKENDS
    except InputError:
        return False


def open_backend(backend: str, **options: Any) -> Infra:
    """Opens a backend by name; it is imported only now, so that no verb pays for another's engine."""
    module, _, attribute = BACKENDS[backend].partition(":")
    opened: Infra = getattr(import_module(module), attribute)(**options)
    return opened
