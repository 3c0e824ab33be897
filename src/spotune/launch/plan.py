"""What would run, at which price, and what ``spotune check`` finds."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random, SystemRandom
from typing import Any

from spotune import __version__
from spotune.core import environment
from spotune.core.config import check_local_files, load_config, profiles_of, read_config
from spotune.core.config_keys import allowed_in, recorded
from spotune.core.config_rules import HUB_ID
from spotune.core.environment import parse_save_every, parse_stall_after
from spotune.core.errors import InfraError, InputError, SpotuneError, raise_all, shown
from spotune.core.fingerprint import MODEL_KEYS, data_files, data_sha256, model_files, model_sha256, notices
from spotune.core.keys import RUNS, Keys, check_run_id, new_run_id
from spotune.core.money import parse_usd
from spotune.core.records import PriceRow, RunRecord, fingerprint
from spotune.core.revisions import record_history
from spotune.launch.code import Code, check_used, differs, sent_code
from spotune.launch.engine import LOCAL, Submission, infra_of, spell
from spotune.launch.local.layout import Gpu, find_gpus
from spotune.launch.origins import Origin, from_run, goes_to, origins_of, revision_of, unseen_by
from spotune.launch.settings import Settings, Workspace
from spotune.launch.status import find_run
from spotune.launch.task import (
    Demand,
    Resources,
    demand_of,
    env_pairs,
    fill_in,
    find_trainer,
    load_task,
    read_preemptions,
    trainer_of,
)

# What would run, where and at what price: made without doing anything, so that it can be shown.

# Whether a folder is one that machines can work in: what is synced to them is what they set up from.

PYTHON = "SPOTUNE_PYTHON"  # an environment that is there already, so that nothing is set up
WATCHER = "src/spotune/idle.py"  # runs with the machine's own Python, before any setup
SCRIPT = "tasks/setup.sh"  # of the shipped tasks' setup: make setup-train, and what machines lack for it
_SETUP = (SCRIPT, "Makefile", "pyproject.toml", "requirements-trainer.lock", "src/spotune")


def check_project(folder: Path, task: Mapping[str, Any], *more: str) -> None:
    """Raises InputError where ``folder`` lacks what a machine that gets it needs: ``more``, and for a task that sets
    its environment up with ``SCRIPT`` what that takes.

    Tasks are found beside the package too, so that nothing else would fail before the machine is paid for.
    """
    is_set_up = bool((task.get("envs") or {}).get(PYTHON)) or SCRIPT not in (task.get("setup") or "")
    missing = [name for name in (*(() if is_set_up else _SETUP), *more) if not (folder / name).exists()]
    if missing:
        what = f"is what the machine would get, and has no {', '.join(missing)}"
        raise InputError(folder, what, remedy="cd to a checkout of spotune")


def inside(path: Path, folder: Path) -> Path | None:
    """``path`` relative to ``folder``, links followed; None where it is elsewhere."""
    path, folder = path.resolve(), folder.resolve()
    return path.relative_to(folder) if path.is_relative_to(folder) else None


# What can be told about a config's model and folders before anything runs; the machine checks the rest.

_MODEL_FILES = ("config.json", "adapter_config.json")


def check_model(config: Mapping[str, Any], where: object) -> str:
    """``local`` or ``hub``: where the model comes from. Raises InputError for a folder that is not one."""
    name = str(config["model_name_or_path"])
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # ~name of nobody
        raise InputError(where, f"{name}: {error}", key="model_name_or_path") from error
    if os.path.isdir(path):
        if not any(os.path.isfile(path / file) for file in _MODEL_FILES):
            raise InputError(where, f"{name} holds no model", key="model_name_or_path", remedy="it needs a config.json")
        return "local"
    if os.path.lexists(path):
        what = "is a file" if os.path.isfile(path) else "is no folder"
        raise InputError(where, f"{name} {what}", key="model_name_or_path", remedy="a hub id or a folder")
    if name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1:
        raise InputError(where, f"no such folder {name}", key="model_name_or_path", remedy="a hub id or a local folder")
    if not HUB_ID.fullmatch(name):
        raise InputError(
            where, f"{shown(name)} is no name on the hub", key="model_name_or_path", remedy="a hub id or a folder"
        )
    return "hub"


# What machines cost, as rows that are frozen in ``run.json``; here those of this machine.

CPU = "cpu"


@dataclass(frozen=True)
class Offers:
    """The task at its place, and the prices of all places that it may land on.

    Attributes:
        rows: the cheapest first; also those of places that it may not be launched on, to compare with.
        chosen: what SkyPilot tries first, as far as prices tell.
        notes: what is to be said beside the prices.
        kinds: whether it may get spot machines (True), others (False), or either; empty: the kind of ``chosen``.
    """

    task: dict[str, Any]
    rows: list[PriceRow]
    chosen: PriceRow
    notes: tuple[str, ...] = ()
    kinds: frozenset[bool] = frozenset()

    @property
    def may_be_spot(self) -> bool:
        return True in (self.kinds or {self.chosen.use_spot})

    @property
    def may_be_either(self) -> bool:
        return len(self.kinds) > 1


def local_prices(settings: Settings, gpus: Sequence[Gpu], demand: Demand, at: float) -> list[PriceRow]:
    """Spot and on-demand price of what a job gets on this machine, from the local price table.

    A task that asks for GPUs runs on the CPU of a machine that has none, and is priced as that.
    """
    count = max(1, demand.gpus) if gpus else 1
    kind = gpus[0].name if gpus else CPU
    price = settings.local.prices.get(kind)
    source = "local price table" if price else f"no price for {kind} in the local price table"
    rows = []
    for use_spot in (True, False):
        each = (price.spot if use_spot else price.on_demand) if price else 0.0
        rows.append(
            PriceRow(
                infra="local",
                region="local",
                instance_type="local",
                accelerators=f"{kind}:{count}" if gpus else "",
                use_spot=use_spot,
                price_usd_per_hour=round(each * count, 6),
                source=source,
                at=at,
            )
        )
    return rows


# What would run, where and at what price: made from a wish without doing anything, so that it can be shown.

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
    allow_env: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Everything that a submission needs; ``offers`` are the candidates, cheapest first, ``chosen`` among them.

    ``notes``: what is said of them.
    ``takes``: what it takes from elsewhere. ``unseen``: who has revised that since this user last saw it.
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
    takes: tuple[Origin, ...] = ()
    unseen: tuple[str, ...] = ()

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
    config = load_config(wish.config_path, wish.profile, wish.overrides, wish.default_profile, wish.allow_env)
    check_local_files(config, wish.config_path)
    allowed_env = allowed_in(config, wish.allow_env)
    check_model(config, wish.config_path)
    files = data_files(config, wish.config_path)
    model = model_files(config, wish.config_path, workspace.env.cache)
    task_path, task = load_task(workspace.cwd)
    task = fill_in(task, _environment(wish, workspace, run_id, allowed_env), wish.resources, run_id)
    demand = _check_demand(demand_of(task, task_path), wish, infra, task_path)
    secrets = secrets_of(wish.secrets, workspace.environ)
    now = clock()
    if backend == LOCAL:
        trainer_of(task, workspace.environ, workspace.cwd)
    else:
        from spotune.launch.skypilot.task import check_sent

        check_sent(config, files, wish.config_path, workspace.cwd, task, infra)
    offered = _offers(task, wish, infra, demand, workspace, now)
    if budget_usd is not None:
        check_priced(offered.chosen)
    code = sent_code(task, workspace.cwd)
    check_used(code, config, wish.config_path, files, task, task_path, workspace.cwd)
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
        allowed_env=allowed_env,
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
        takes=tuple(origins_of(record, workspace.cwd)),
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


def _environment(wish: Wish, workspace: Workspace, run_id: str, allowed_env: list[str]) -> dict[str, str]:
    """What the task's ``envs`` get: seam 1, and what ``--env`` adds."""
    ours = {
        environment.BUCKET: workspace.env.bucket,
        environment.RUN_ID: run_id,
        environment.CONFIG: wish.config_path,
        environment.PROFILE: wish.profile or wish.default_profile,
        **({environment.ALLOW_ENV: " ".join(allowed_env)} if allowed_env else {}),
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
        "code": {
            **plan.record.code,
            "changed": plan.code.changed,
            "new": plan.code.new,
            "left_out": [{"path": left.path, "why": left.why} for left in plan.code.left_out],
        },
        "takes": [vars(origin) for origin in plan.takes],
        "notes": list(plan.notes),
    }


# ``train --from RUN``: the run that was tried, as a production job, with nothing changed underneath.


def promote(source: str, wish: Wish, workspace: Workspace) -> Plan:
    """The plan of a new run from ``source``'s config file and overrides, under the profile that ``wish`` says.

    Raises InputError when the config, the data, the model or the code is not what ``source`` ran with: what was tried
    is what goes to production. Overrides of the new command line come on top.
    """
    history = _history(source, workspace)
    record = history[-1]
    default = _default_profile(record)
    then = load_config(record.config_path, record.profile, record.overrides, default, record.allowed_env)
    if fingerprint(then) not in (record.config_sha256, fingerprint(recorded(record.config))):
        raise InputError(source, f"{record.config_path} has changed since", remedy="submit the config itself")
    overrides = (*record.overrides, *wish.overrides)
    wish = replace(wish, config_path=record.config_path, overrides=overrides)
    save_every, stall_after = wish.save_every or record.save_every, wish.stall_after or record.stall_after
    wish = replace(wish, save_every=save_every, stall_after=stall_after)
    plan = make_plan(wish, workspace, time.time, SystemRandom())
    if [_content(file) for file in plan.record.data_files] != [_content(file) for file in record.data_files]:
        raise InputError(source, "its data has changed since", remedy="submit the config itself")
    is_same_model = all(plan.record.config.get(key) == record.config.get(key) for key in MODEL_KEYS)
    if is_same_model and record.model_sha256 and plan.record.model_sha256 != record.model_sha256:
        raise InputError(source, "its model has changed since", remedy="submit the config itself")
    if not record.code.get("commit") or not plan.record.code:
        raise InputError(source, "its code is not known: it was not submitted from a git commit")
    if words := differs(record.code, plan.record.code):
        is_there = record.code["commit"] == plan.record.code.get("commit")
        patch = f"{plan.bucket}/{Keys(source).code}/diff.patch has what they were"
        remedy = patch if is_there else f"git checkout {record.code['commit'][:12]}"
        raise InputError(source, f"its code has changed since: {words}", remedy=remedy)
    taken = [from_run(record, "its config, overrides, data and model")]
    user = workspace.env.user
    taken += [*revision_of(user, history), *goes_to(user, history, plan.record)]
    unseen = tuple(unseen_by(user, history))
    return replace(plan, takes=(*taken, *plan.takes), unseen=unseen)


def _history(run_id: str, workspace: Workspace) -> list[RunRecord]:
    status = find_run(workspace, run_id)
    history = record_history(workspace.store(status.bucket), Keys(run_id))
    if not history:
        raise InputError(run_id, "has no run.json in its bucket")
    return history


def _default_profile(record: RunRecord) -> str:
    return "dev" if record.kind == "dev" else "prod"


def _content(file: dict[str, object]) -> tuple[object, ...]:
    return tuple(file.get(name) for name in ("source", "size", "sha256", "checksum"))


# What ``spotune check`` says: of a config and its rows, or of this machine and project.

# Looks at the rows of a config's local data files, by the trainer's Python: the launcher's reads no Parquet.

MOST_BYTES = 16 << 20  # keeps ``check`` within a second
_ASKED = "spotune.sft.sources"


class RowsRefused(InputError):
    """A row does not fit; the message is the trainer's own."""

    def __init__(self, message: str) -> None:
        SpotuneError.__init__(self, message)


def check_rows(
    config: Mapping[str, Any], path: str, environ: Mapping[str, str], folder: Path, most_bytes: int = MOST_BYTES
) -> dict[str, Any]:
    """Returns ``{rows_read: number, rows_not_read: [file or reason, …]}``.

    Args:
        config: a resolved one.
        path: its file, for messages.
        environ: of the shell.
        folder: the project's.
        most_bytes: about how much is read.

    Raises:
        InputError: a row, or all of a source's rows together, do not fit.
    """
    if not config.get("data"):
        return {"rows_read": 0, "rows_not_read": ["only rows of data: are read here"]}
    try:
        python = find_trainer(environ, folder)
    except InputError as error:
        return {"rows_read": 0, "rows_not_read": [str(error)]}
    asked = json.dumps({"config": config, "config_path": path, "most_bytes": most_bytes}, default=str)
    source = str(Path(__file__).resolve().parents[2])
    child = {**environ, "PYTHONPATH": os.pathsep.join([source, *filter(None, [environ.get("PYTHONPATH", "")])])}
    ended = subprocess.run(
        [python, "-m", _ASKED], input=asked, env=child, cwd=folder, capture_output=True, text=True, check=False
    )
    try:
        found = json.loads(ended.stdout)
    except ValueError:
        last = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
        return {"rows_read": 0, "rows_not_read": [f"{python} cannot read them: {last}"]}
    if found["error"]:
        raise RowsRefused(found["error"])
    return {"rows_read": found["rows"], "rows_not_read": found["partly"]}


# What ``spotune check`` says: of a config, or of this machine and project.


def survey_config(
    path: str, profile: str, overrides: Iterable[str], workspace: Workspace, allow_env: Collection[str] = ()
) -> dict[str, Any]:
    """Facts about a config that is in order, all of its profiles included; raises InputError for all of its faults."""
    profiles = list(profiles_of(read_config(path), path))
    config = _load_all(path, profile, profiles, overrides, allow_env)
    check_local_files(config, path)
    origin = check_model(config, path)
    files = data_files(config, path)
    rows = check_rows(config, path, workspace.environ, workspace.cwd)
    return {
        "config": path,
        "profiles": profiles,
        "profile": profile or ("prod" if "prod" in profiles else ""),
        "model": f"{config['model_name_or_path']} ({origin})",
        "data_files": [file["url"] for file in files],
        **rows,
        "notices": notices(config.get("data"), path),
        "data_sha256": data_sha256(config, files),
        "model_sha256": model_sha256(model_files(config, path, workspace.env.cache)),
        "config_sha256": fingerprint(config),
    }


def _load_all(
    path: str, profile: str, profiles: Iterable[str], overrides: Iterable[str], allow_env: Collection[str]
) -> dict[str, Any]:
    """The config under the chosen profile, once it is in order under each of them."""
    errors: list[InputError] = []
    config: dict[str, Any] = {}
    try:
        config = load_config(path, profile, overrides, "prod", allow_env)
    except InputError as error:
        errors.append(error)
    for name in profiles:
        try:
            load_config(path, name, allowed_env=allow_env)
        except InputError as error:
            errors.append(error)
    raise_all(errors)
    return config


def survey_machine(workspace: Workspace) -> dict[str, Any]:
    """Facts about this machine and project; raises SpotuneError when the bucket cannot be reached."""
    gpus = find_gpus(workspace.environ)
    task_path, _ = load_task(workspace.cwd)
    runs = workspace.store().folders(RUNS)
    return {
        "settings": list(workspace.settings.files),
        "home": str(workspace.env.home),
        "bucket": workspace.env.bucket,
        "runs_in_bucket": len(runs),
        "task": str(task_path),
        "infra": workspace.settings.infra,
        "gpus": [gpu.name for gpu in gpus],
        "slots": workspace.settings.local.slots or len(gpus) or 1,
        "trainer": _trainer(workspace),
    }


def _trainer(workspace: Workspace) -> str:
    """The trainer's Python, or why there is none."""
    try:
        return find_trainer(workspace.environ, workspace.cwd)
    except InputError as error:
        return f"missing: {error}"


def survey_place(workspace: Workspace, infra: str = "") -> dict[str, Any]:
    """Facts about ``--infra NAME``, or else of what the settings name; nothing more of this machine.

    Raises InfraError where the API server of one that was asked for does not answer; else that is one of the problems.
    """
    place = infra or workspace.settings.infra
    if infra_of(place) == LOCAL:
        return {"infra": LOCAL}
    from spotune.launch.skypilot.task import survey_infra

    try:
        return survey_infra(spell(place), workspace.settings.slurm, workspace.environ)
    except InfraError as error:
        if infra:
            raise
        return {"infra": place, "problems": [str(error)]}
