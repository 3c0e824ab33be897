"""What would run, where and at what price: made from a wish without doing anything, so that it can be shown."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from spotune import __version__
from spotune.contracts import environment
from spotune.contracts.basemodel import model_files, model_sha256
from spotune.contracts.config import load_config
from spotune.contracts.durations import parse_save_every, parse_stall_after
from spotune.contracts.errors import InputError
from spotune.contracts.fingerprint import data_files, data_sha256
from spotune.contracts.keys import check_run_id, new_run_id
from spotune.contracts.localfiles import check_local_files
from spotune.contracts.money import parse_usd
from spotune.contracts.records import PriceRow, RunRecord, fingerprint
from spotune.launch.checks import check_model
from spotune.launch.code import Code, sent_code
from spotune.launch.infra import LOCAL, Submission, infra_of, spell
from spotune.launch.local.gpus import find_gpus
from spotune.launch.preemptions import read_preemptions
from spotune.launch.prices import Offers, local_prices
from spotune.launch.task import Demand, Resources, demand_of, env_pairs, fill_in, load_task
from spotune.launch.trainer import trainer_of
from spotune.launch.workspace import Workspace

PRIORITIES = (-1000, 1000)
BUDGET_FLAG = "--budget"


@dataclass(frozen=True)
class Wish:
    """What the command line asks for."""

    config_path: str
    profile: str = ""
    default_profile: str = "prod"
    overrides: tuple[str, ...] = ()
    name: str = ""
    infra: str = ""
    resources: Resources = field(default_factory=Resources)
    save_every: str = ""
    stall_after: str = ""
    budget: str | None = None
    preemptions: str = ""
    envs: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()
    kind: str = "prod"
    allow_config_change: bool = False


@dataclass(frozen=True)
class Plan:
    """Everything that a submission needs; ``offers`` are the candidates, cheapest first, ``chosen`` among them.

    ``notes``: what is said of them.
    ``allow_config_change``: a run of that id may go on with another config, data or model than it began with.
    """

    record: RunRecord
    submission: Submission
    bucket: str
    infra: str
    task_path: Path
    offers: list[PriceRow] = field(default_factory=list)
    chosen: PriceRow | None = None
    notes: tuple[str, ...] = ()
    code: Code = field(default_factory=Code)
    allow_config_change: bool = False

    @property
    def run_id(self) -> str:
        return self.record.run_id


def make_plan(wish: Wish, workspace: Workspace, clock: Callable[[], float], rng: Random) -> Plan:
    """Reads and checks everything that a run depends on. Raises InputError, the first thing that is wrong."""
    infra = spell(wish.infra or workspace.settings.infra)
    backend = infra_of(infra)
    workspace.check_bucket_reaches(infra)
    run_id = check_run_id(wish.name) if wish.name else new_run_id(Path(wish.config_path).stem, rng)
    parse_save_every(wish.save_every)
    parse_stall_after(wish.stall_after)
    budget_usd = None if wish.budget is None else parse_usd(wish.budget, BUDGET_FLAG)
    if wish.preemptions and backend != LOCAL:
        raise InputError("--preemptions", f"{infra} takes machines away by itself", remedy="--infra local")
    config = load_config(wish.config_path, wish.profile, wish.overrides, wish.default_profile)
    check_local_files(config, wish.config_path)
    check_model(config, wish.config_path)
    files = data_files(config, wish.config_path)
    model = model_files(config, wish.config_path, workspace.env.cache)
    task_path, task = load_task(workspace.cwd)
    task = fill_in(task, _environment(wish, workspace, run_id), wish.resources, run_id)
    demand = _check_demand(demand_of(task, task_path), wish, infra, task_path)
    secrets = secrets_of(wish.secrets, workspace.environ)
    now = clock()
    if backend == LOCAL:
        trainer_of(task, workspace.environ, workspace.cwd)
    else:
        from spotune.launch.skypilot.sent import check_sent

        check_sent(config, files, wish.config_path, workspace.cwd, task, infra)
    offered = _offers(task, wish, infra, demand, workspace, now)
    if budget_usd is not None:
        check_priced(offered.chosen)
    code = sent_code(task, workspace.cwd)
    record = RunRecord(
        run_id=run_id,
        created_at=now,
        user=workspace.env.user,
        team=workspace.settings.team,
        kind=wish.kind,
        config_path=wish.config_path,
        profile=wish.profile,
        overrides=list(wish.overrides),
        config=config,
        config_sha256=fingerprint(config),
        data_sha256=data_sha256(config, files),
        data_files=files,
        model_sha256=model_sha256(model),
        model_files=model,
        infra=infra,
        use_spot=offered.may_be_spot,
        may_be_on_demand=offered.may_be_either,
        priority=demand.priority,
        save_every=wish.save_every,
        stall_after=wish.stall_after,
        budget_usd=budget_usd,
        prices=[vars(offer) for offer in offered.rows],
        code=code.facts(),
        versions={"spotune": __version__},
    )
    return Plan(
        record=record,
        submission=_submission(record, wish, workspace, offered.task, secrets),
        bucket=workspace.env.bucket,
        infra=infra,
        task_path=task_path,
        offers=offered.rows,
        chosen=offered.chosen,
        notes=(*offered.notes, *code.notes()),
        code=code,
        allow_config_change=wish.allow_config_change,
    )


def check_priced(chosen: PriceRow) -> None:
    """Raises InputError where no price says what a machine costs, so that nothing could be counted."""
    if not chosen.price_usd_per_hour:
        raise InputError(BUDGET_FLAG, f"cannot be kept: {chosen.source}", remedy="leave it out, or give that price")


def _submission(
    record: RunRecord, wish: Wish, workspace: Workspace, task: dict[str, Any], secrets: dict[str, str]
) -> Submission:
    return Submission(
        run_id=record.run_id,
        task=task,
        workdir=str(workspace.cwd),
        user=record.user,
        infra=record.infra,
        priority=record.priority,
        secrets=secrets,
        preemptions=read_preemptions(Path(wish.preemptions)) if wish.preemptions else (),
        interactive=wish.kind == "dev",
    )


def _offers(task: dict[str, Any], wish: Wish, infra: str, demand: Demand, workspace: Workspace, now: float) -> Offers:
    """Where it could run, and at what price."""
    if infra != LOCAL:
        from spotune.launch.skypilot.offers import Wanted, make_offers

        place = Wanted(task, infra, wish.resources.use_spot, workspace.environ, workspace.settings.slurm)
        return make_offers(place, now)
    gpus = find_gpus(workspace.environ)
    if wish.resources.gpus and not gpus:
        raise InputError("--gpus", f"{wish.resources.gpus} on a machine without a GPU", remedy="leave it out")
    rows = sorted(local_prices(workspace.settings, gpus, demand, now), key=lambda row: row.price_usd_per_hour)
    return Offers(task, rows, next(row for row in rows if row.use_spot == demand.use_spot))


def _check_demand(demand: Demand, wish: Wish, infra: str, task_path: Path) -> Demand:
    where = "--priority" if wish.resources.priority is not None else f"{task_path}: resources.priority"
    if not PRIORITIES[0] <= demand.priority <= PRIORITIES[1]:
        raise InputError(where, f"{demand.priority} is out of range", remedy=f"{PRIORITIES[0]} to {PRIORITIES[1]}")
    where = "--num-nodes" if wish.resources.num_nodes is not None else f"{task_path}: num_nodes"
    if demand.num_nodes < 1:
        raise InputError(where, f"{demand.num_nodes} is not a number of machines", remedy="1 or more")
    if demand.num_nodes > 1 and infra == LOCAL:
        raise InputError(where, f"local is one machine, not {demand.num_nodes}", remedy="--num-nodes 1")
    return demand


def _environment(wish: Wish, workspace: Workspace, run_id: str) -> dict[str, str]:
    """What the task's ``envs`` get: seam 1, and what ``--env`` adds."""
    ours = {
        environment.BUCKET: workspace.env.bucket,
        environment.RUN_ID: run_id,
        environment.CONFIG: wish.config_path,
        environment.PROFILE: wish.profile or wish.default_profile,
    }
    return {**env_pairs(wish.envs), **ours}


def secrets_of(names: Iterable[str], environ: Mapping[str, str]) -> dict[str, str]:
    """``--secret NAME`` as a mapping, the values from here; raises InputError for one that has none."""
    names = tuple(names)
    for name in names:
        if "=" in name:
            raise InputError("--secret", "takes a name, not a value", remedy=f"export {name.partition('=')[0]}=… first")
        if name not in environ:
            raise InputError("--secret", f"{name} is not set here", remedy=f"export {name}=… first")
    return {name: environ[name] for name in names}


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as data, for ``--dryrun --format json``; secrets are names."""
    return {
        "run_id": plan.run_id,
        "infra": plan.infra,
        "bucket": plan.bucket,
        "priority": plan.record.priority,
        "budget_usd": plan.record.budget_usd,
        "task": plan.submission.task,
        "workdir": plan.submission.workdir,
        "secrets": sorted(plan.submission.secrets),
        "preemptions": list(plan.submission.preemptions),
        "config": plan.record.config,
        "config_sha256": plan.record.config_sha256,
        "data_sha256": plan.record.data_sha256,
        "model_sha256": plan.record.model_sha256,
        "offers": [vars(offer) for offer in plan.offers],
        "chosen": plan.chosen and vars(plan.chosen),
        "notes": list(plan.notes),
    }
