"""Dev clusters: bring one up with its idle watcher, run a config or Jupyter on it."""

import math
import re
import secrets
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import SystemRandom
from typing import Any

from spotune.core import environment
from spotune.core.config import load_config
from spotune.core.environment import parse_save_every
from spotune.core.errors import InfraError, InputError
from spotune.core.keys import Keys, check_run_id, new_run_id
from spotune.core.revisions import record_in_force
from spotune.launch import code
from spotune.launch.engine import ANY, LOCAL, spell
from spotune.launch.plan import WATCHER as WATCHER_CODE
from spotune.launch.plan import check_model, check_project, inside
from spotune.launch.settings import Workspace
from spotune.launch.skypilot import clusters
from spotune.launch.skypilot.clusters import Cluster, ClusterJob
from spotune.launch.skypilot.task import placed, with_secrets
from spotune.launch.task import Resources, check_amounts, fill_in, load_task, parse_gpus

DEV, WATCHER, NOTEBOOK = "tasks/dev.yaml", "tasks/watcher.yaml", "tasks/notebook.yaml"
MIN_IDLE_MINUTES = 2
_NAME = re.compile(r"[a-zA-Z]([-_.a-zA-Z0-9]*[a-zA-Z0-9])?")  # SkyPilot's own (CLUSTER_NAME_VALID_REGEX)
# A job's place in the cluster's queue. On Slurm a job without CPUs asks for all of them, and the watcher holds one for
# ever (sky/backends/cloud_vm_ray_backend.py: _get_task_demands_dict). The guard's own step gets all of them anyway.
_ONE_CPU = {"cpus": "1+"}
# Prints the newest Jupyter server whose process runs; Jupyter leaves the files of killed ones behind.
_FIND = (
    'for f in $(ls -t "${JUPYTER_RUNTIME_DIR:-$HOME/.local/share/jupyter/runtime}"/jpserver-*.json 2> /dev/null); do '
    'pid=$(basename "$f" .json); kill -0 "${pid#jpserver-}" 2> /dev/null && cat "$f" && break; done; true'
)


def place(infra: str) -> str:
    """Returns ``--infra`` as SkyPilot spells it; empty if SkyPilot may choose. Raises InputError for an invalid one."""
    if (spelt := spell(infra)) == LOCAL:
        raise InputError("--infra", "local is this machine: it needs no cluster", remedy="spotune dev run CONFIG")
    return "" if spelt == ANY else spelt


def is_at(cluster: Cluster, infra: str) -> bool:
    """Returns whether a cluster is at this place; an empty ``infra`` is anywhere."""
    return not infra or f"{cluster.infra.lower()}/".startswith(f"{infra.lower()}/")


def bucket_of(workspace: Workspace) -> dict[str, str]:
    """Returns the bucket for the job's environment, if one is set; else the run keeps its state on the cluster."""
    is_given = bool(environment.setting(workspace.environ, environment.BUCKET) or workspace.settings.bucket)
    return {environment.BUCKET: workspace.env.bucket} if is_given else {}


@dataclass(frozen=True)
class DevOptions:
    """The options of ``dev up``; None keeps what the cluster has, or takes the default."""

    name: str
    infra: str = ""  # as `place` returns it; empty: SkyPilot chooses
    gpus: str | None = None
    cpus: str | None = None
    memory: str | None = None
    idle_minutes: int | None = None
    down: bool = False  # take the idle cluster down instead of stopping it
    envs: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)  # with their values

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            remedy = "letters, digits, '-', '_' and '.', a letter first, a letter or digit last"
            raise InputError("--name", f"{self.name!r} is not a valid cluster name", remedy=remedy)
        if self.gpus:
            parse_gpus(self.gpus, "--gpus")
        check_amounts(self.cpus, self.memory)
        if self.idle_minutes is not None and self.idle_minutes < MIN_IDLE_MINUTES:
            remedy = f"{MIN_IDLE_MINUTES} or more: SkyPilot itself checks once a minute"
            raise InputError("--idle-minutes-to-autostop", f"{self.idle_minutes} is too short", remedy=remedy)


@dataclass(frozen=True)
class Up:
    """The result of ``dev up``."""

    cluster: Cluster
    is_new: bool  # it was not up before
    idle_minutes: int | None  # None if the idle watcher that runs there was kept
    down: bool
    notes: tuple[str, ...] = ()  # lines for the user


def up(options: DevOptions, workspace: Workspace) -> Up:
    """Brings the cluster up, or reuses the one of that name, and starts its idle watcher."""
    found = clusters.own_cluster(options.name)
    idle, notes = options.idle_minutes or 30, []
    is_new, is_held = found is None or found.status != "UP", False
    if found and not is_new:
        jobs = clusters.list_jobs(options.name)
        is_held = "watcher" in [job.name for job in jobs if job.is_active]
        is_set_up = _finish_setup(options, jobs, workspace)
        notes = differences(replace(options, envs={}, secrets={}) if is_set_up else options, found)
    else:
        # Until the place is known, an idle cluster is taken down: the place may be unable to stop one.
        down = options.down or not (found and _can_stop(found))
        clusters.launch(_dev_task(options, workspace), options.name, idle, down)
        found = clusters.find_cluster(options.name)
    if is_held and not options.idle_minutes and not options.down:
        return Up(found, False, None, found.to_down, tuple(notes))
    down = _start_watcher(found, idle, options.down or not _can_stop(found), workspace)
    if down and not options.down:
        notes.append(f"{found.infra} cannot stop this cluster: it is taken down when it is idle (as with --down)")
    return Up(found, is_new, idle, down, tuple(notes))


def differences(options: DevOptions, found: Cluster) -> list[str]:
    """Returns a line for each thing that was asked for and that the existing cluster lacks."""
    has = []
    if not is_at(found, options.infra):
        has.append(f"is on {found.infra}, not on {options.infra}")
    if options.gpus:
        name, count = parse_gpus(options.gpus, "--gpus")
        if {name.lower(): count} != {there.lower(): number for there, number in found.accelerators.items()}:
            has.append(f"has {found.gpus or 'no GPU'}, not {options.gpus}")
    for unit, there, asked in (("CPUs", found.cpus, options.cpus), ("GB of memory", found.memory, options.memory)):
        if asked and there and not _is_enough(there, asked):
            has.append(f"has {there} {unit}, not {asked}")
    if given := [flag for flag, values in (("--env", options.envs), ("--secret", options.secrets)) if values]:
        has.append(f"was set up before, without this {' and '.join(given)}")
    return [f"{found.name} {what} (another --name, or dev down first)" for what in has]


def _is_enough(there: str, asked: str) -> bool:
    """Compares amounts: ``4`` is exact, ``4+`` is at least 4. Texts that are not numbers must be equal."""
    try:
        has, wanted = float(there.rstrip("+")), float(asked.rstrip("+"))
    except ValueError:
        return there == asked
    return has >= wanted if asked.endswith("+") else has == wanted


def _can_stop(cluster: Cluster) -> bool:
    return bool(cluster.infra) and clusters.can_stop(cluster.infra)


def _finish_setup(options: DevOptions, jobs: Sequence[ClusterJob], workspace: Workspace) -> bool:
    """Completes a running cluster's setup if it failed or was interrupted. Returns whether it ran the setup now."""
    setups = [job for job in jobs if job.name in (options.name, "dev")]  # a bare `sky launch` calls it dev
    if setups and setups[-1].is_active:
        clusters.see_setup(options.name, setups[-1].id)
        return False
    if setups[-1].status == "SUCCEEDED" if setups else jobs:  # jobs without a setup: `sky` brought the cluster up
        return False
    job = _as_job(_dev_task(options, workspace), workspace)
    clusters.see_setup(options.name, clusters.execute(job, options.name))
    return True


def _start_watcher(cluster: Cluster, idle_minutes: int, down: bool, workspace: Workspace) -> bool:
    """Starts an idle watcher, which replaces the earlier one, and sets SkyPilot's autostop to the last minutes.
    Returns whether the cluster will be taken down, also where stopping is not possible.

    On Slurm the watcher ends the allocation itself: SkyPilot's skylet, which does autostop, is missing if another
    cluster's skylet has its port on the same node.
    """
    lead = 2 if idle_minutes >= 5 else 1
    envs = {"SPOTUNE_IDLE_MINUTES": str(idle_minutes - lead), "SPOTUNE_AUTOSTOP_MINUTES": str(lead)}
    if cluster.cloud == "slurm":
        envs = {"SPOTUNE_IDLE_MINUTES": str(idle_minutes), "SPOTUNE_AUTOSTOP_MINUTES": "0"}
        envs["SPOTUNE_WATCHER_ENDS"] = "scancel"
    _, task = load_task(workspace.cwd, WATCHER)
    clusters.execute(fill_in(task, envs, Resources(), "watcher"), cluster.name)
    return clusters.set_autostop(cluster.name, lead, down)


def _dev_task(options: DevOptions, workspace: Workspace) -> dict[str, Any]:
    _, task = load_task(workspace.cwd, DEV)
    asked = Resources(gpus=options.gpus, cpus=options.cpus, memory=options.memory)
    filled = fill_in(task, options.envs, asked, options.name)
    check_project(workspace.cwd, filled, WATCHER_CODE)
    resources = placed(filled.get("resources") or {}, options.infra or ANY)
    resources.pop("autostop", None)  # set with the launch
    return with_secrets({**filled, "resources": resources, "workdir": str(workspace.cwd)}, options.secrets)


def _as_job(task: Mapping[str, Any], workspace: Workspace) -> dict[str, Any]:
    """Returns a task as a job for ``sky exec``, which skips a setup and here asks the queue for no GPU."""
    rest = {name: value for name, value in task.items() if name != "setup"}
    run = f"{task.get('setup') or ''}\n{task['run']}"
    return {**rest, "resources": dict(_ONE_CPU), "workdir": str(workspace.cwd), "run": run}


@dataclass(frozen=True)
class DevRunOptions:
    """The options of ``dev run`` on a cluster."""

    profile: str = ""
    overrides: tuple[str, ...] = ()
    gpus: str | None = None
    share: float | None = None
    save_every: str = ""
    envs: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    allow_env: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.share is not None and not 0 < self.share <= 1:
            raise InputError("--share", f"{self.share:g} is not a share of a GPU", remedy="--share 0.5")
        parse_save_every(self.save_every)
        if self.gpus:
            parse_gpus(self.gpus, "--gpus")
            shared(self.gpus, self.share)


def shared(gpus: str, share: float | None) -> str:
    """Returns a share of GPUs: ``L4:1`` and 0.5 -> ``L4:0.5``.

    Raises InputError for a share that Ray cannot give: it gives a part of one GPU, or whole GPUs.
    """
    if share is None:
        return gpus
    if not gpus:
        raise InputError("--share", "there is no GPU to share", remedy="leave it out, or a cluster with --gpus L4:1")
    name, count = parse_gpus(gpus, "--gpus")
    part = count * share
    if part > 1 and part != int(part):
        what = f"{share:g} of {gpus} is {part:g} GPUs: Ray gives a part of one GPU, or whole GPUs"
        remedy = f"--gpus {name}:1 --share {share:g}, or --gpus {name}:{math.ceil(part)}"
        raise InputError("--share", what, remedy=remedy)
    return f"{name}:{part:g}"


RunPlace = tuple[str, str | None, bool]


def run_place(cluster: str, infra: str, workspace: Workspace) -> RunPlace | None:
    """Decides where ``dev run`` runs, from ``--cluster`` and ``--infra``, empty if not given; None: this machine.

    Returns (cluster's name, place to bring it up at or None if it must be up, whether ``--infra`` names that place).
    """
    if not cluster and spell(infra or workspace.settings.infra) == LOCAL:
        return None
    wanted = infra or ("" if cluster else workspace.settings.infra)
    return cluster or clusters.default_name(workspace.env.user), place(wanted) if wanted else None, bool(infra)


def check_run(config: str, name: str, options: DevRunOptions, workspace: Workspace) -> str:
    """Returns the id of a run of CONFIG on a cluster. Raises InputError for a run that would only fail there."""
    run_id = check_run_id(name) if name else new_run_id(Path(config).stem, SystemRandom())
    if run_id in ("watcher", "notebook"):
        raise InputError("--name", f"{run_id} is the name of another job of a cluster", remedy="another --name")
    checked = load_config(config, options.profile, options.overrides, "dev", options.allow_env)
    below = f"is not below {workspace.cwd}, and a cluster gets only that folder"
    if inside(workspace.cwd / config, workspace.cwd) is None:
        raise InputError(config, below, remedy="copy it here")
    model = str(checked["model_name_or_path"])
    is_sent = model.startswith(("/", "~")) or check_model(checked, config) == "hub"  # an absolute path may exist there
    if not is_sent and inside(workspace.cwd / model, workspace.cwd) is None:
        raise InputError(config, f"{model} {below}", key="model_name_or_path", remedy="copy it here")
    if bucket_of(workspace) and (run := record_in_force(workspace.store(), Keys(run_id))) and run.kind != "dev":
        raise InputError("--name", f"{run_id} is a production run", remedy="another --name")
    return run_id


def _check_place(infra: str, options: DevRunOptions, workspace: Workspace) -> None:
    """Raises InputError for a run that a cluster at ``infra`` cannot do; empty: anywhere."""
    if options.share is not None and options.share < 1 and infra.split("/", 1)[0] == "slurm":
        what = "Slurm hands out whole GPUs: SkyPilot runs its jobs there as steps, without Ray that would share one"
        raise InputError("--share", what, remedy="leave it out, or another --infra")
    if bucket_of(workspace):
        workspace.check_bucket_reaches(infra or ANY)


def run_cluster(
    where: RunPlace, options: DevRunOptions, workspace: Workspace, log: Callable[[str], None]
) -> tuple[Cluster, bool]:
    """Returns a run's cluster, and whether it was brought up now. Raises InputError if it cannot be used."""
    name, infra, is_asked = where
    found = clusters.own_cluster(name)
    if found or infra is None:
        found = clusters.check_up(found, name)
        if infra and not is_at(found, infra):
            what = f"{found.name} is on {found.infra}, not on {infra}"
            if is_asked:
                raise InputError("--infra", what, remedy=f"another -c NAME, or spotune dev down {found.name}")
            log(what)
        return found, False
    _check_place(infra, options, workspace)
    log(f"{name}: does not exist yet; bringing it up on {infra or 'the cheapest place'}")
    done = up(DevOptions(name, infra, options.gpus, envs=options.envs, secrets=options.secrets), workspace)
    for note in done.notes:
        log(note)
    return done.cluster, True


def run_task(
    config: str, run_id: str, cluster: Cluster, options: DevRunOptions, workspace: Workspace
) -> dict[str, Any]:
    """Returns the job that runs CONFIG on the cluster as a bare launch: the run's record is made there."""
    _check_place(cluster.infra, options, workspace)
    accelerators = shared(options.gpus or cluster.gpus, options.share)
    payer = {environment.KIND: "dev", environment.USER: workspace.env.user, environment.TEAM: workspace.settings.team}
    facts = {
        environment.RUN_ID: run_id,
        environment.CONFIG: config,
        environment.PROFILE: options.profile or "dev",
        environment.ALLOW_ENV: " ".join(options.allow_env),
        environment.SAVE_EVERY: options.save_every,
        environment.GPU_SHARE: f"{float(accelerators.partition(':')[2] or 1):g}" if accelerators else "",
    }
    _, dev = load_task(workspace.cwd, DEV)
    envs = {**_given(payer), **options.envs, **_given(facts), **bucket_of(workspace)}
    filled = fill_in(dev, envs, Resources(), run_id)
    check_project(workspace.cwd, filled)
    flags = [flag for pair in options.overrides for flag in ("--set", pair)]
    python = '"${SPOTUNE_PYTHON:-.venv-train/bin/python}"'
    command = f'exec {python} -m spotune.sft "$SPOTUNE_CONFIG" {shlex.join(flags)}'.rstrip()
    task = {
        "name": run_id,
        "workdir": str(workspace.cwd),
        "resources": {**_ONE_CPU, **({"accelerators": accelerators} if accelerators else {})},
        "envs": filled["envs"],
        "run": f"{dev.get('setup') or ''}\n{command}\n",  # sets up a lock that has changed since
        "secrets": dev.get("secrets"),
    }
    return with_secrets(task, options.secrets)


def _given(values: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in values.items() if value}


def keep_code(run_id: str, workspace: Workspace) -> list[str]:
    """Records in the bucket which code is sent to the cluster; returns the keys that it wrote.

    It writes nothing if the run exists already, or if no bucket is set.
    """
    written: list[str] = []
    keys = Keys(run_id)
    if bucket_of(workspace) and not workspace.store().exists(keys.run):
        code.keep_code(code.read_code(workspace.cwd), workspace.store(), keys.code, written)
    return written


@dataclass(frozen=True)
class NotebookServer:
    """A Jupyter server: its port on the cluster, and its token."""

    port: int
    token: str

    def __post_init__(self) -> None:
        """Raises ValueError for an invalid port, or a token that does not fit into a URL."""
        if not 0 < self.port < 1 << 16 or not re.fullmatch(r"[\w.~-]*", self.token, re.ASCII):
            raise ValueError("not a port and a token")


def find(name: str) -> NotebookServer | None:
    """Returns the Jupyter server that runs on the cluster, or None."""
    try:
        return clusters.read_as(name, _FIND, NotebookServer)
    except ValueError:
        return None


def start(name: str, envs: Mapping[str, str], given: Mapping[str, str], workspace: Workspace) -> NotebookServer:
    """Starts Jupyter as a job, with the secrets ``given``, and waits for it. Its port is random: a Slurm node has
    other users.

    Raises InputError for another user's cluster, where the code here would overwrite theirs.
    """
    clusters.find_cluster(name)
    task = notebook_task(SystemRandom().randint(20000, 29999), secrets.token_urlsafe(24), envs, given, workspace)
    job_id = clusters.execute(task, name)
    end = time.monotonic() + 600  # the first start installs Jupyter
    while time.monotonic() < end:
        if server := find(name):
            return server
        if not any(job.name == "notebook" and job.is_active for job in clusters.list_jobs(name)):
            break
        time.sleep(3)
    raise InfraError(f"{name}: Jupyter did not start (sky logs {name} {job_id})")


def notebook_task(
    port: int, token: str, envs: Mapping[str, str], secrets: Mapping[str, str], workspace: Workspace
) -> dict[str, Any]:
    """Returns Jupyter as a job of a cluster: it sees the GPUs and asks the queue for none."""
    _, task = load_task(workspace.cwd, NOTEBOOK)
    filled = fill_in(task, {**envs, "NOTEBOOK_PORT": str(port)}, Resources(), "notebook")
    check_project(workspace.cwd, filled)
    return with_secrets(_as_job(filled, workspace), {**secrets, "JUPYTER_TOKEN": token})


def tunnel(name: str, port: int, server: NotebookServer) -> list[str]:
    """Returns the command that forwards a port of this machine to the server, until it is interrupted."""
    forward = f"{port}:localhost:{server.port}"
    alive = ("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3")  # ends it when the cluster is gone
    return clusters.ssh_command(name, "-N", "-o", "ExitOnForwardFailure=yes", *alive, "-L", forward)
