"""The interface of an engine, which ``local`` and ``skypilot`` share with their tests; and the names of ``--infra``."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from spotune.core.errors import InputError, shown
from spotune.core.keys import Amount, Count, Ranks, Time

State = Literal["PENDING", "STARTING", "RUNNING", "RECOVERING", "PAUSED", "SUCCEEDED", "FAILED", "CANCELLED"]
ACTIVE: tuple[State, ...] = ("PENDING", "STARTING", "RUNNING", "RECOVERING")

Agree = Callable[[str], None]  # asks the user a question; raises if the answer is no


@dataclass(frozen=True)
class JobStatus:
    """What the engine says of a job. Only the certificate says whether a run SUCCEEDED.

    Attributes:
        attempt: machines that the job got so far; ``recoveries`` is one less, never below 0.
        by_infra: FAILED without a fault of the run: it got no machine, or the engine itself failed.
        step, max_steps: None unless the engine sees them before the bucket does.
        bucket: where the run keeps its state; the verb's own bucket may be another one.
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
    by_infra: bool = False
    step: int | None = None
    max_steps: int | None = None
    loss: float | None = None
    phase: str = ""
    bucket: str = ""


@dataclass(frozen=True)
class PaidInterval:
    """One machine that the engine gave a run: what was paid for.

    Attributes:
        started_at, ended_at: epoch seconds; ``ended_at`` is None while the machine is paid for.
        setup_s: how long ``setup:`` ran, seconds.
        end_reason: as the engine knows it: preempted, exited, cancelled, lost, or empty while the machine runs.
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
    """A plan that the user agreed to: everything that an engine needs to run it."""

    run_id: str
    task: dict[str, Any]  # a SkyPilot task YAML as data, envs filled in
    workdir: str
    user: str
    infra: str = "local"  # as in --infra
    priority: int = 0
    secrets: dict[str, str] = field(default_factory=dict)
    preemptions: tuple[dict[str, float], ...] = ()
    interactive: bool = False  # a dev run: started at once, beside the queue, never recovered


class Infra(Protocol):
    """An engine that runs managed jobs. Every method raises InfraError (one line) if the engine fails."""

    name: str
    refresh_s: float  # how often to read a job's state while somebody follows it

    def submit(self, submission: Submission) -> None: ...

    def check_resumable(self, run_id: str) -> None:
        """Raises InputError if ``resume`` would. Changes nothing."""

    def workdir(self, run_id: str) -> str:
        """Returns the local folder whose code a resumed run gets; empty if its code is a git reference."""

    def resume(self, run_id: str) -> None:
        """Puts an ended run back into the queue, at its old priority."""

    def cancel(self, run_id: str) -> None:
        """Stops a run and returns when none of its processes runs any more. An ended run is no error."""

    def preempt(self, run_id: str, notice_s: float, agree: Agree = lambda question: None) -> None:
        """Takes the run's machine away as this infrastructure does, ``notice_s`` after a warning (0: no warning).

        Calls ``agree`` before it terminates a cloud's instance.
        """

    def jobs(self, run_ids: list[str] | None = None, everyone: bool = False) -> list[JobStatus]:
        """Returns all known jobs, or the named ones, as they would run: by priority, then order of submission.

        ``everyone``: also jobs of other users, and named jobs that were not submitted from here.
        """

    def logs(self, run_id: str, follow: bool) -> Iterator[str]:
        """Yields the log lines of all attempts; with ``follow`` until the job ends."""

    def history(self, run_id: str) -> list[PaidInterval]:
        """Returns every machine that the run got, oldest first."""


def check_secrets(run_id: str, names: Iterable[str], environ: Mapping[str, str]) -> None:
    """Raises InputError if a run's secret is not set here: no engine keeps the secrets of an ended run."""
    missing = [name for name in names if name not in environ]
    if missing:
        raise InputError(run_id, f"secret {missing[0]} is not set here", remedy=f"export {missing[0]}=… first")


def check_folder(run_id: str, folder: str) -> None:
    """Raises InputError if the folder with the run's code is gone."""
    if not Path(folder).is_dir():
        raise InputError(run_id, f"its folder {folder} is gone", remedy=f"spotune train --from {run_id}")


LOCAL, SKYPILOT = "local", "skypilot"
BACKENDS = {LOCAL: "spotune.launch.local.engine:LocalInfra", SKYPILOT: "spotune.launch.skypilot.engine:SkyInfra"}
ANY = "any"  # SkyPilot chooses among the clouds that are enabled
# The clouds of the pinned SkyPilot. A test compares them with SkyPilot's own list, which takes seconds to import.
CLOUDS = (
    "aws", "azure", "cudo", "do", "fluidstack", "gcp", "hyperbolic", "ibm", "kubernetes", "lambda", "mithril", "nebius",
    "oci", "paperspace", "primeintellect", "runpod", "scp", "seeweb", "shadeform", "slurm", "ssh", "vast", "verda",
    "vsphere", "yotta",
)  # fmt: skip
_ALIASES = {"k8s": "kubernetes"}


def infra_of(name: str, where: object = "--infra") -> str:
    """Returns the backend for ``--infra NAME``. Raises InputError, with the nearest known name, for an unknown one."""
    if name == LOCAL:
        return LOCAL
    if cloud_of(name, where) == ANY and name != ANY:
        raise InputError(where, f"{shown(name)}: {ANY} leaves the place to SkyPilot", remedy="--infra any")
    return SKYPILOT


def spell(name: str) -> str:
    """Returns ``--infra NAME`` with the cloud as SkyPilot spells it. Raises InputError for an unknown one."""
    return name if infra_of(name) == LOCAL else "/".join([cloud_of(name), *name.split("/")[1:]])


def cloud_of(name: str, where: object = "--infra") -> str:
    """Returns the cloud of ``CLOUD[/REGION[/ZONE]]`` as SkyPilot spells it, or ``any``. Raises InputError."""
    first, *places = name.lower().split("/")
    cloud = _ALIASES.get(first, first)
    if cloud not in (*CLOUDS, ANY):
        known = (LOCAL, ANY, *CLOUDS)
        near = difflib.get_close_matches(first, [*known, *_ALIASES], n=1)
        remedy = f"did you mean {near[0]}?" if near else f"one of {', '.join(known)}"
        raise InputError(where, f"{shown(name)} is not a known infrastructure", remedy=remedy)
    if "" in places or (len(places) > 2 and cloud not in ("kubernetes", "ssh")):  # a context may contain slashes
        shape = {"slurm": "slurm/CLUSTER/PARTITION", "kubernetes": "kubernetes/CONTEXT"}
        remedy = shape.get(cloud, f"{cloud}/REGION/ZONE")
        raise InputError(where, f"{shown(name)} is not a valid place", remedy=remedy)
    return cloud


def is_infra(name: str) -> bool:
    """Returns whether a backend serves it. None does for a run that was started by hand, or by a later version."""
    try:
        return infra_of(name) in BACKENDS
    except InputError:
        return False


def open_backend(backend: str, **options: Any) -> Infra:
    """Opens a backend by name. Imports it only now, so that no verb waits for the import of another engine."""
    module, _, attribute = BACKENDS[backend].partition(":")
    opened: Infra = getattr(import_module(module), attribute)(**options)
    return opened
