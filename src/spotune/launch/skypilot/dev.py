"""Dev clusters: up with their idle watcher, what runs on them, notebooks."""

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

# What ``spotune dev`` does with a cluster: up, reused, a run on it, and what is refused.

# What part of a cluster's GPUs a job takes.

_FLAG = "--share"


def check_share(share: float | None, infra: str) -> None:
    """Raises InputError for a share that is none, or where GPUs come whole; ``infra`` empty: not known yet."""
    if share is None:
        return
    if not 0 < share <= 1 or math.isnan(share):
        raise InputError(_FLAG, f"{share:g} is no share of a GPU", remedy="--share 0.5")
    if share < 1 and infra.split("/", 1)[0] == "slurm":
        what = "Slurm hands out whole GPUs: SkyPilot runs its jobs there as steps, without Ray that would share one"
        raise InputError(_FLAG, what, remedy="leave it out, or another --infra")


def shared(gpus: str, share: float | None) -> str:
    """``L4:1`` and 0.5 -> ``L4:0.5``. Raises InputError where that is not to be had: Ray gives out a part of one GPU,
    or whole ones."""
    if share is None:
        return gpus
    if not gpus:
        raise InputError(_FLAG, "there is no GPU to share", remedy="leave it out, or a cluster with --gpus L4:1")
    name, count = parse_gpus(gpus, "--gpus")
    part = count * share
    if part > 1 and part != int(part):
        what = f"{share:g} of {gpus} is {part:g} GPUs: a part of one GPU is to be had, or whole ones"
        raise InputError(_FLAG, what, remedy=f"--gpus {name}:1 --share {share:g}, or --gpus {name}:{math.ceil(part)}")
    return f"{name}:{part:g}"


# A dev cluster that is up already: what it lacks of what is asked for, and whether it was ever set up.

_OTHER = "another --name, or dev down first"


def is_at(cluster: Cluster, infra: str) -> bool:
    """Whether a cluster is at a place, as SkyPilot spells it; empty is anywhere."""
    return not infra or f"{cluster.infra.lower()}/".startswith(f"{infra.lower()}/")


def differences(wish: "DevWish", found: Cluster) -> list[str]:
    """What the cluster that is there does not have of what is asked for."""
    has = []
    if not is_at(found, wish.infra):
        has.append(f"is on {found.infra}, not on {wish.infra}")
    if wish.gpus and not _is_of(wish.gpus, found):
        has.append(f"has {found.gpus or 'no GPU'}, not {wish.gpus}")
    for unit, there, asked in (("CPUs", found.cpus, wish.cpus), ("GB of memory", found.memory, wish.memory)):
        if asked and there and not _is_enough(there, asked):
            has.append(f"has {there} {unit}, not {asked}")
    if given := [flag for flag, values in (("--env", wish.envs), ("--secret", wish.secrets)) if values]:
        has.append(f"was set up before, without this {' and '.join(given)}")
    return [f"{found.name} {what} ({_OTHER})" for what in has]


def finish_setup(name: str, jobs: Sequence[ClusterJob], job: Callable[[], Mapping[str, Any]], *names: str) -> bool:
    """Sees to it that the setup of a cluster that is up is done: it may have failed, or been left half way.

    Args:
        jobs: of its queue.
        job: makes the one that sets it up, the code synced.
        names: what jobs are called that set it up.

    Returns:
        Whether it was set up now.
    """
    setups = [one for one in jobs if one.name in names]
    if setups and setups[-1].is_active:
        clusters.see_setup(name, setups[-1].id)
        return False
    if setups[-1].status == "SUCCEEDED" if setups else jobs:  # jobs, but no setup: `sky` brought it up
        return False
    clusters.see_setup(name, clusters.execute(job(), name))
    return True


def _is_of(gpus: str, found: Cluster) -> bool:
    name, count = parse_gpus(gpus, "--gpus")
    return {name.lower(): count} == {there.lower(): number for there, number in found.accelerators.items()}


def _is_enough(there: str, asked: str) -> bool:
    """``4`` is exact, ``4+`` at least that; what is no number is SkyPilot's to judge."""
    try:
        has, wanted = float(there.rstrip("+")), float(asked.rstrip("+"))
    except ValueError:
        return there == asked
    return has >= wanted if asked.endswith("+") else has == wanted


# What is refused of a dev cluster or of a run on one before SkyPilot is asked.

_NAME = re.compile(r"[a-zA-Z]([-_.a-zA-Z0-9]*[a-zA-Z0-9])?")  # SkyPilot's own (CLUSTER_NAME_VALID_REGEX)


def check_name(name: str) -> None:
    """Raises InputError for what SkyPilot would not call a cluster."""
    if not _NAME.fullmatch(name):
        remedy = "letters, digits, '-', '_' and '.', a letter first, a letter or digit last"
        raise InputError("--name", f"{name!r} is no name of a cluster", remedy=remedy)


def check_machine(gpus: str | None, cpus: str | None = None, memory: str | None = None) -> None:
    """Raises InputError for GPUs, CPUs or a memory that are none; None is not asked for."""
    if gpus:
        parse_gpus(gpus, "--gpus")
    check_amounts(cpus, memory)


def check_model_goes_along(config: Mapping[str, Any], where: str, folder: Path) -> None:
    """Raises InputError for a model that the cluster will not find; an absolute path may be there alone."""
    name = str(config["model_name_or_path"])
    if name.startswith(("/", "~")) or check_model(config, where) == "hub":
        return
    if inside(folder / name, folder) is None:
        what = f"{name} is not below {folder}, which is what a cluster gets"
        raise InputError(where, what, key="model_name_or_path", remedy="copy it here")


# What ``spotune dev`` does with a cluster: up with its idle watcher, a run on it, a notebook.

DEV, WATCHER, NOTEBOOK = "tasks/dev.yaml", "tasks/watcher.yaml", "tasks/notebook.yaml"
DEV_JOB = "dev"  # what a bare `sky launch` calls the job of tasks/dev.yaml
IDLE_MINUTES = 30
MIN_IDLE_MINUTES = 2
# A place in the cluster's queue. On Slurm a job that does not say takes all CPUs, beside the watcher's one for ever
# too many (sky/backends/cloud_vm_ray_backend.py: _get_task_demands_dict); the guard's own step has them all anyway.
_ONE_CPU = {"cpus": "1+"}


@dataclass(frozen=True)
class DevWish:
    """What ``dev up`` asks for; None leaves what is there, or the default.

    Attributes:
        infra: as ``place`` gives it; empty: wherever SkyPilot likes.
        down: take the cluster down when it is idle, not only stop it.
        secrets: with their values.
    """

    name: str
    infra: str = ""
    gpus: str | None = None
    cpus: str | None = None
    memory: str | None = None
    idle_minutes: int | None = None
    down: bool = False
    envs: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        check_name(self.name)
        check_machine(self.gpus, self.cpus, self.memory)
        if self.idle_minutes is not None and self.idle_minutes < MIN_IDLE_MINUTES:
            remedy = f"{MIN_IDLE_MINUTES} or more: SkyPilot itself looks once a minute"
            raise InputError("--idle-minutes-to-autostop", f"{self.idle_minutes} is too short", remedy=remedy)


@dataclass(frozen=True)
class Up:
    """What has become of a wish: ``is_new`` unless the cluster was up already; ``notes`` are for people.

    ``idle_minutes``: None where the idle watcher that was there goes on as it was told.
    """

    cluster: Cluster
    is_new: bool
    idle_minutes: int | None
    down: bool
    notes: tuple[str, ...] = ()


def place(infra: str) -> str:
    """``--infra`` as a cluster is launched with it: empty where SkyPilot may choose. Raises InputError for no place."""
    if (spelt := spell(infra)) == LOCAL:
        raise InputError("--infra", "local is this machine: it needs no cluster", remedy="spotune dev run CONFIG")
    return "" if spelt == ANY else spelt


def up(wish: DevWish, workspace: Workspace) -> Up:
    """Brings the cluster up, or reuses the one of that name, and starts its idle watcher."""
    found = clusters.own_cluster(wish.name)
    idle, notes = wish.idle_minutes or IDLE_MINUTES, []
    is_up, is_held = found is not None and found.status == "UP", False
    if found and is_up:
        jobs = clusters.list_jobs(wish.name)
        is_held = "watcher" in [job.name for job in jobs if job.is_active]
        is_anew = finish_setup(wish.name, jobs, lambda: _setup_job(wish, workspace), wish.name, DEV_JOB)
        notes = differences(replace(wish, envs={}, secrets={}) if is_anew else wish, found)
    else:
        # A place that cannot stop a cluster might be chosen: until it is known, what is idle is taken down.
        clusters.launch(_dev_task(wish, workspace), wish.name, idle, wish.down or not (found and _can_stop(found)))
        found = clusters.find_cluster(wish.name)
    if is_held and not wish.idle_minutes and not wish.down:
        return Up(found, False, None, found.to_down, tuple(notes))
    down = start_watcher(found, idle, wish.down or not _can_stop(found), workspace)
    if down and not wish.down:
        notes.append(f"{found.infra} cannot stop this cluster: it is taken down when it is idle (as with --down)")
    return Up(found, not is_up, idle, down, tuple(notes))


def _can_stop(cluster: Cluster) -> bool:
    return bool(cluster.infra) and clusters.can_stop(cluster.infra)


def start_watcher(cluster: Cluster, idle_minutes: int, down: bool, workspace: Workspace) -> bool:
    """An idle watcher that holds the cluster in place of the one before; then SkyPilot's own count is set to the rest.
    Returns whether the cluster will be taken down, also where only that is possible.

    On Slurm the idle watcher takes the allocation down itself: the skylet, which autostop is part of, is not there when
    another cluster's has its port on the same node.
    """
    lead = 2 if idle_minutes >= 5 else 1
    _, task = load_task(workspace.cwd, WATCHER)
    envs = {"SPOTUNE_IDLE_MINUTES": str(idle_minutes - lead), "SPOTUNE_AUTOSTOP_MINUTES": str(lead)}
    if cluster.cloud == "slurm":
        envs = {
            "SPOTUNE_IDLE_MINUTES": str(idle_minutes),
            "SPOTUNE_AUTOSTOP_MINUTES": "0",
            "SPOTUNE_WATCHER_ENDS": "scancel",
        }
    clusters.execute(fill_in(task, envs, Resources(), "watcher"), cluster.name)
    return clusters.set_autostop(cluster.name, lead, down)


def check_run(config: str, name: str, wish: "RunWish", workspace: Workspace) -> str:
    """The id of a run of CONFIG on a cluster; raises InputError for what would only fail there."""
    run_id = check_run_id(name) if name else new_run_id(Path(config).stem, SystemRandom())
    if run_id in ("watcher", "notebook"):
        raise InputError("--name", f"{run_id} is the name of another job of a cluster", remedy="another --name")
    checked = load_config(config, wish.profile, wish.overrides, "dev", wish.allow_env)
    if inside(workspace.cwd / config, workspace.cwd) is None:
        raise InputError(config, f"is not below {workspace.cwd}, which is what a cluster gets", remedy="copy it here")
    check_model_goes_along(checked, config, workspace.cwd)
    if bucket_of(workspace) and (run := record_in_force(workspace.store(), Keys(run_id))) and run.kind != "dev":
        raise InputError("--name", f"{run_id} is a production run", remedy="another --name")
    return run_id


def run_task(config: str, run_id: str, cluster: Cluster, wish: "RunWish", workspace: Workspace) -> dict[str, Any]:
    """A job that runs CONFIG on the cluster as a bare launch: its record is made there."""
    check_place(cluster.infra, wish, workspace)
    flags = [flag for pair in wish.overrides for flag in ("--set", pair)]
    python = '"${SPOTUNE_PYTHON:-.venv-train/bin/python}"'
    command = f'exec {python} -m spotune.sft "$SPOTUNE_CONFIG" {shlex.join(flags)}'.rstrip()
    _, dev = load_task(workspace.cwd, DEV)
    check_project(workspace.cwd, fill_in(dev, wish.envs, Resources(), run_id))
    envs = {
        **_whose(workspace),
        **wish.envs,
        environment.RUN_ID: run_id,
        environment.CONFIG: config,
        environment.PROFILE: wish.profile or "dev",
        **({environment.ALLOW_ENV: " ".join(wish.allow_env)} if wish.allow_env else {}),
        **({environment.SAVE_EVERY: wish.save_every} if wish.save_every else {}),
        **bucket_of(workspace),
    }
    accelerators = shared(wish.gpus or cluster.gpus, wish.share)
    if accelerators:
        envs[environment.GPU_SHARE] = f"{float(accelerators.partition(':')[2] or 1):g}"
    task: dict[str, Any] = {
        "name": run_id,
        "workdir": str(workspace.cwd),
        "resources": dict(_ONE_CPU),
        "envs": {**{name: str(value or "") for name, value in (dev.get("envs") or {}).items()}, **envs},
        "run": f"{dev.get('setup') or ''}\n{command}\n",  # a lock that has changed since is set up first
    }
    if accelerators:
        task["resources"]["accelerators"] = accelerators
    return with_secrets({**task, "secrets": dev.get("secrets")}, wish.secrets)


def keep_code(run_id: str, workspace: Workspace) -> list[str]:
    """Leaves in the bucket which code is sent to the cluster, for the record that is made there, and the keys of it.

    Nothing where the run is there already, or no bucket is given.
    """
    written: list[str] = []
    keys = Keys(run_id)
    if bucket_of(workspace) and not workspace.store().exists(keys.run):
        code.keep_code(code.read_code(workspace.cwd), workspace.store(), keys.code, written)
    return written


@dataclass(frozen=True)
class RunWish:
    """What ``dev run`` asks of a cluster."""

    profile: str = ""
    overrides: tuple[str, ...] = ()
    gpus: str | None = None
    share: float | None = None
    save_every: str = ""
    envs: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    allow_env: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_share(self.share, "")
        check_machine(self.gpus)
        parse_save_every(self.save_every)
        if self.gpus:
            shared(self.gpus, self.share)


def check_place(infra: str, wish: RunWish, workspace: Workspace) -> None:
    """Raises InputError for what a cluster there cannot give a run; ``infra`` empty: anywhere."""
    check_share(wish.share, infra)
    if bucket_of(workspace):
        workspace.check_bucket_reaches(infra or ANY)


def notebook_task(
    port: int, token: str, envs: Mapping[str, str], secrets: Mapping[str, str], workspace: Workspace
) -> dict[str, Any]:
    """Jupyter as a job of a cluster that is there: it sees the GPUs and asks the queue for none."""
    _, task = load_task(workspace.cwd, NOTEBOOK)
    filled = fill_in(task, {**envs, "NOTEBOOK_PORT": str(port)}, Resources(), "notebook")
    check_project(workspace.cwd, filled)
    return with_secrets(_as_job(filled, workspace), {**secrets, "JUPYTER_TOKEN": token})


def bucket_of(workspace: Workspace) -> dict[str, str]:
    """The bucket where machines can reach it; else the run keeps its state on the cluster, and goes with it."""
    is_given = bool(environment.setting(workspace.environ, environment.BUCKET) or workspace.settings.bucket)
    return {environment.BUCKET: workspace.env.bucket} if is_given else {}


def _whose(workspace: Workspace) -> dict[str, str]:
    """Whose money the run is, since its record is made there."""
    whose = {environment.KIND: "dev", environment.USER: workspace.env.user, environment.TEAM: workspace.settings.team}
    return {name: value for name, value in whose.items() if value}


def _dev_task(wish: DevWish, workspace: Workspace) -> dict[str, Any]:
    _, task = load_task(workspace.cwd, DEV)
    asked = Resources(gpus=wish.gpus, cpus=wish.cpus, memory=wish.memory)
    filled = fill_in(task, wish.envs, asked, wish.name)
    check_project(workspace.cwd, filled, WATCHER_CODE)
    resources = placed(filled.get("resources") or {}, wish.infra or ANY)
    resources.pop("autostop", None)  # set with the launch
    return with_secrets({**filled, "resources": resources, "workdir": str(workspace.cwd)}, wish.secrets)


def _setup_job(wish: DevWish, workspace: Workspace) -> dict[str, Any]:
    """What ``dev up`` launches, as a job of a cluster that is there; it waits for no GPU."""
    return _as_job(_dev_task(wish, workspace), workspace)


def _as_job(task: Mapping[str, Any], workspace: Workspace) -> dict[str, Any]:
    """A task's setup and run for ``sky exec``, which leaves a setup out."""
    rest = {name: value for name, value in task.items() if name != "setup"}
    run = f"{task.get('setup') or ''}\n{task['run']}"
    return {**rest, "resources": dict(_ONE_CPU), "workdir": str(workspace.cwd), "run": run}


# What runs on a dev cluster: ``dev run`` and Jupyter.

# Where ``dev run`` runs: on the cluster that is there, or on one that is brought up for it.


@dataclass(frozen=True)
class RunPlace:
    """Which cluster ``dev run`` is to run on.

    Attributes:
        infra: where it is brought up when it is not there, as ``place`` gives it; None: it has to be there.
        is_asked: whether ``infra`` was said now, not in the settings.
    """

    cluster: str
    infra: str | None
    is_asked: bool

    @classmethod
    def read(cls, cluster: str, infra: str, workspace: Workspace) -> "RunPlace | None":
        """From ``--cluster`` and ``--infra``, empty where not given; None: this machine."""
        if cluster:
            return cls(cluster, place(infra) if infra else None, bool(infra))
        if spell(infra or workspace.settings.infra) == LOCAL:
            return None
        return cls(clusters.default_name(workspace.env.user), place(infra or workspace.settings.infra), bool(infra))


def run_cluster(
    where: RunPlace, wish: RunWish, workspace: Workspace, say: Callable[[str], None]
) -> tuple[Cluster, bool]:
    """The cluster of a run, and whether it was brought up now; raises InputError where it cannot be."""
    found = clusters.own_cluster(where.cluster)
    if found or where.infra is None:
        found = clusters.check_up(found, where.cluster)
        if where.infra and not is_at(found, where.infra):
            what = f"{found.name} is on {found.infra}, not on {where.infra}"
            if where.is_asked:
                raise InputError("--infra", what, remedy=f"another -c NAME, or spotune dev down {found.name}")
            say(what)
        return found, False
    check_place(where.infra, wish, workspace)
    say(f"{where.cluster}: not there yet, it is brought up on {where.infra or 'the cheapest place'}")
    asked = DevWish(where.cluster, where.infra, wish.gpus, envs=wish.envs, secrets=wish.secrets)
    done = up(asked, workspace)
    for note in done.notes:
        say(note)
    return done.cluster, True


# Jupyter on a dev cluster: found or started there, reached through a tunnel.

START_S = 600.0  # with its installation
# The newest server whose process is there; Jupyter leaves the files of killed ones behind.
_FIND = (
    'for f in $(ls -t "${JUPYTER_RUNTIME_DIR:-$HOME/.local/share/jupyter/runtime}"/jpserver-*.json 2> /dev/null); do '
    'pid=$(basename "$f" .json); kill -0 "${pid#jpserver-}" 2> /dev/null && cat "$f" && break; done; true'
)


@dataclass(frozen=True)
class Server:
    """A Jupyter server: its port on the cluster, and its token."""

    port: int
    token: str

    def __post_init__(self) -> None:
        """Raises ValueError for what is no port, or no token of a URL."""
        if not 0 < self.port < 1 << 16 or not re.fullmatch(r"[\w.~-]*", self.token, re.ASCII):
            raise ValueError("not a port and a token")


def find(name: str) -> Server | None:
    """The server that runs on the cluster, None where there is none."""
    try:
        return clusters.read_as(name, _FIND, Server)
    except ValueError:
        return None


def start(
    name: str,
    envs: Mapping[str, str],
    given: Mapping[str, str],
    workspace: Workspace,
    clock: Callable[[], float] = time.monotonic,
) -> Server:
    """Starts one as a job, with the secrets ``given``, and waits for it. Its port is one of many: a Slurm node has
    other users. Raises InputError on another's cluster, where the code here would overwrite what is there."""
    clusters.find_cluster(name)
    task = notebook_task(SystemRandom().randint(20000, 29999), secrets.token_urlsafe(24), envs, given, workspace)
    job_id = clusters.execute(task, name)
    end = clock() + START_S
    while clock() < end:
        if server := find(name):
            return server
        if "notebook" not in clusters.running_jobs(name):
            break
        time.sleep(3)
    raise InfraError(f"{name}: Jupyter did not start (sky logs {name} {job_id})")


def tunnel(name: str, port: int, server: Server) -> list[str]:
    """The command that forwards a port of this machine to the server, until it is interrupted."""
    forward = f"{port}:localhost:{server.port}"
    alive = ("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3")  # it ends when the cluster goes
    return clusters.ssh_command(name, "-N", "-o", "ExitOnForwardFailure=yes", *alive, "-L", forward)
