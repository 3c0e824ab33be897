"""What ``spotune dev`` does with a cluster: up with its keeper, a run on it, a notebook."""

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import SystemRandom
from typing import Any

from spotune.contracts import environment
from spotune.contracts.config import load_config
from spotune.contracts.errors import InputError
from spotune.contracts.keys import Keys, check_run_id, new_run_id
from spotune.launch import code
from spotune.launch.skypilot import clusters
from spotune.launch.skypilot.clusters import Cluster
from spotune.launch.task import Resources, fill_in, load_task, parse_gpus
from spotune.launch.workspace import Workspace

DEV, KEEPER, NOTEBOOK = "tasks/dev.yaml", "tasks/keeper.yaml", "tasks/notebook.yaml"
IDLE_MINUTES = 30
MIN_IDLE_MINUTES = 2
# A place in the cluster's queue. On Slurm a job that does not say takes all CPUs, beside the keeper's one for ever
# too many (sky/backends/cloud_vm_ray_backend.py: _get_task_demands_dict); the guard's own step has them all anyway.
_ONE_CPU = {"cpus": "1+"}


@dataclass(frozen=True)
class DevWish:
    """What ``dev up`` asks for; None leaves what is there, or the default.

    Attributes:
        share: of each GPU, above 0 and at most 1.
        down: take the cluster down when it is idle, not only stop it.
    """

    name: str
    infra: str = ""
    gpus: str | None = None
    share: float | None = None
    cpus: str | None = None
    memory: str | None = None
    idle_minutes: int | None = None
    down: bool = False
    envs: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.idle_minutes is not None and self.idle_minutes < MIN_IDLE_MINUTES:
            remedy = f"{MIN_IDLE_MINUTES} or more: SkyPilot itself looks once a minute"
            raise InputError("--idle-minutes-to-autostop", f"{self.idle_minutes} is too short", remedy=remedy)
        check_share(self.share, self.infra)


@dataclass(frozen=True)
class Up:
    """What has become of a wish: ``is_new`` unless the cluster was up already; ``notes`` are for people.

    ``idle_minutes``: None where the keeper that was there goes on as it was told.
    """

    cluster: Cluster
    is_new: bool
    idle_minutes: int | None
    down: bool
    notes: tuple[str, ...] = ()


def up(wish: DevWish, workspace: Workspace) -> Up:
    """Brings the cluster up, or reuses the one of that name, and starts its keeper."""
    found = next(iter(clusters.list_clusters([wish.name])), None)
    infra = found.infra if found else wish.infra
    idle = wish.idle_minutes or IDLE_MINUTES
    down, notes = wish.down, []
    if not down and infra and not clusters.can_stop(infra):
        down = True
        notes.append(f"{infra} cannot stop a cluster: it is taken down when it is idle (as with --down)")
    is_up = False
    if found and found.status == "UP":
        is_up = True
        notes += _differences(wish, found)
    else:
        clusters.launch(_dev_task(wish, workspace), wish.name, idle, down)
        found = clusters.find_cluster(wish.name)
    if is_up and not wish.idle_minutes and not wish.down and "keeper" in clusters.running_jobs(wish.name):
        return Up(found, False, None, found.to_down, tuple(notes))
    start_keeper(found, idle, down, workspace)
    return Up(found, not is_up, idle, down, tuple(notes))


def start_keeper(cluster: Cluster, idle_minutes: int, down: bool, workspace: Workspace) -> None:
    """A keeper that holds the cluster in place of the one before; then SkyPilot's own count is set to the rest.

    On Slurm the keeper takes the allocation down itself: the skylet, which autostop is part of, is not there when
    another cluster's has its port on the same node.
    """
    lead = 2 if idle_minutes >= 5 else 1
    _, task = load_task(workspace.cwd, KEEPER)
    envs = {"SPOTUNE_IDLE_MINUTES": str(idle_minutes - lead), "SPOTUNE_AUTOSTOP_MINUTES": str(lead)}
    if cluster.cloud == "slurm":
        envs = {
            "SPOTUNE_IDLE_MINUTES": str(idle_minutes),
            "SPOTUNE_AUTOSTOP_MINUTES": "0",
            "SPOTUNE_KEEPER_ENDS": "scancel",
        }
    clusters.execute(fill_in(task, envs, Resources(), "keeper"), cluster.name)
    clusters.set_autostop(cluster.name, lead, down)


def check_run(config: str, name: str, wish: "RunWish", workspace: Workspace) -> str:
    """The id of a run of CONFIG on a cluster; raises InputError for what would only fail there."""
    run_id = check_run_id(name) if name else new_run_id(Path(config).stem, SystemRandom())
    if run_id in ("keeper", "notebook"):
        raise InputError("--name", f"{run_id} is the name of another job of a cluster", remedy="another --name")
    load_config(config, wish.profile, wish.overrides, "dev")
    if not (workspace.cwd / config).resolve().is_relative_to(workspace.cwd.resolve()):
        raise InputError(config, f"is not below {workspace.cwd}, which is what a cluster gets", remedy="copy it here")
    return run_id


def run_task(config: str, run_id: str, cluster: Cluster, wish: "RunWish", workspace: Workspace) -> dict[str, Any]:
    """A job that runs CONFIG on the cluster as a bare launch: its record is made there."""
    check_share(wish.share, cluster.infra)
    flags = [flag for pair in wish.overrides for flag in ("--set", pair)]
    python = '"${SPOTUNE_PYTHON:-.venv/bin/python}"'
    command = f'exec {python} -m spotune.sft "$SPOTUNE_CONFIG" {shlex.join(flags)}'.rstrip()
    _, dev = load_task(workspace.cwd, DEV)
    envs = {
        **_whose(workspace),
        **wish.envs,
        environment.RUN_ID: run_id,
        environment.CONFIG: config,
        environment.PROFILE: wish.profile or "dev",
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
    return task


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


def notebook_task(port: int, token: str, envs: Mapping[str, str], workspace: Workspace) -> dict[str, Any]:
    """Jupyter as a job of a cluster that is there: it sees the GPUs and asks the queue for none."""
    _, task = load_task(workspace.cwd, NOTEBOOK)
    filled = fill_in(task, {**envs, "NOTEBOOK_PORT": str(port), "JUPYTER_TOKEN": token}, Resources(), "notebook")
    setup = filled.pop("setup", "")
    return {**filled, "resources": dict(_ONE_CPU), "workdir": str(workspace.cwd), "run": f"{setup}\n{filled['run']}"}


def bucket_of(workspace: Workspace) -> dict[str, str]:
    """The bucket where machines can reach it; else the run keeps its state on the cluster, and goes with it."""
    is_given = bool(workspace.environ.get(environment.BUCKET) or workspace.settings.bucket)
    return {environment.BUCKET: workspace.env.bucket} if is_given else {}


def _whose(workspace: Workspace) -> dict[str, str]:
    """Whose money the run is, since its record is made there."""
    whose = {environment.KIND: "dev", environment.USER: workspace.env.user, environment.TEAM: workspace.settings.team}
    return {name: value for name, value in whose.items() if value}


def shared(gpus: str, share: float | None) -> str:
    """``L4:1`` and 0.5 -> ``L4:0.5``."""
    if not gpus or share is None:
        return gpus
    name, count = parse_gpus(gpus, "--gpus")
    return f"{name}:{count * share:g}"


def check_share(share: float | None, infra: str) -> None:
    """Raises InputError for a share that is none, or where GPUs come whole."""
    if share is None:
        return
    if not 0 < share <= 1 or math.isnan(share):
        raise InputError("--share", f"{share:g} is no share of a GPU", remedy="--share 0.5")
    if share < 1 and infra.split("/", 1)[0].lower() == "slurm":
        what = "Slurm hands out whole GPUs: SkyPilot runs its jobs there as steps, without Ray that would share one"
        raise InputError("--share", what, remedy="leave it out, or another --infra")


def _dev_task(wish: DevWish, workspace: Workspace) -> dict[str, Any]:
    _, task = load_task(workspace.cwd, DEV)
    filled = fill_in(task, wish.envs, Resources(gpus=wish.gpus), wish.name)
    resources = dict(filled.get("resources") or {})
    resources.pop("autostop", None)  # set with the launch
    if wish.share is not None:
        if not wish.gpus:
            raise InputError("--share", "of which GPU?", remedy="--gpus L4:1 --share 0.5")
        resources["accelerators"] = shared(wish.gpus, wish.share)
    for key in ("infra", "cpus", "memory"):
        if value := getattr(wish, key):
            resources[key] = value
    return {**filled, "resources": resources, "workdir": str(workspace.cwd)}


def _differences(wish: DevWish, found: Cluster) -> list[str]:
    """What the cluster that is there does not have of what is asked for."""
    notes = []
    if wish.infra and not found.infra.lower().startswith(wish.infra.lower()):
        notes.append(f"{found.name} is on {found.infra}, not on {wish.infra} (another --name, or dev down first)")
    if wish.gpus and found.gpus.partition(":")[0].lower() != wish.gpus.partition(":")[0].lower():
        notes.append(f"{found.name} has {found.gpus or 'no GPU'}, not {wish.gpus} (another --name, or dev down first)")
    return notes
