"""Makes the plan of a run without doing anything, so that it can be shown; and the facts of ``spotune check``."""

import json
import os
import subprocess
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import SystemRandom
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
from spotune.launch import task as tasks
from spotune.launch.code import Code, check_used, differs, sent_code
from spotune.launch.engine import LOCAL, Submission, infra_of, spell
from spotune.launch.local.layout import Gpu, find_gpus
from spotune.launch.origins import Origin, from_run, goes_to, origins_of, revision_of, unseen_by
from spotune.launch.settings import Price, Settings, Workspace
from spotune.launch.status import Run
from spotune.launch.task import Demand, Resources

WATCHER = "src/spotune/idle.py"  # runs with the machine's own Python, before any setup
SCRIPT = "tasks/setup.sh"  # of the shipped tasks' setup: make setup-train, and what machines lack for it
_SETUP = (SCRIPT, "Makefile", "pyproject.toml", "requirements-trainer.lock", "src/spotune")


def check_project(folder: Path, task: Mapping[str, Any], *more: str) -> None:
    """Raises InputError if ``folder`` lacks a file that a machine needs: of ``more``, or for a setup by ``SCRIPT``.

    Nothing else fails before a machine is paid for, since the tasks are also found beside the package.
    """
    is_set_up = bool((task.get("envs") or {}).get(environment.PYTHON)) or SCRIPT not in (task.get("setup") or "")
    missing = [name for name in (*(() if is_set_up else _SETUP), *more) if not (folder / name).exists()]
    if missing:
        what = f"is what the machine would get, and has no {', '.join(missing)}"
        raise InputError(folder, what, remedy="cd to a checkout of spotune")


def inside(path: Path, folder: Path) -> Path | None:
    """Returns ``path`` relative to ``folder``, links followed, or None if it is elsewhere."""
    path, folder = path.resolve(), folder.resolve()
    return path.relative_to(folder) if path.is_relative_to(folder) else None


def check_model(config: Mapping[str, Any], where: object) -> str:
    """Returns where the model comes from, ``local`` or ``hub``. Raises InputError if it can be neither."""
    name, key = str(config["model_name_or_path"]), "model_name_or_path"
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # ~name of nobody
        raise InputError(where, f"{name}: {error}", key=key) from error
    if os.path.isdir(path):
        if not any(os.path.isfile(path / file) for file in ("config.json", "adapter_config.json")):
            raise InputError(where, f"{name} holds no model", key=key, remedy="it needs a config.json")
        return "local"
    if os.path.lexists(path):
        what = "is a file" if os.path.isfile(path) else "is not a folder"
        raise InputError(where, f"{name} {what}", key=key, remedy="a hub id or a folder")
    if name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1:
        raise InputError(where, f"no such folder {name}", key=key, remedy="a hub id or a local folder")
    if not HUB_ID.fullmatch(name):
        raise InputError(where, f"{shown(name)} is not a valid hub name", key=key, remedy="a hub id or a folder")
    return "hub"


@dataclass(frozen=True)
class Training:
    """What a run trains: its config, data and model, each with its hash. The fields are those of ``RunRecord``."""

    config: dict[str, Any]
    config_sha256: str
    data_files: list[dict[str, Any]]
    data_sha256: str
    model_files: list[dict[str, Any]]
    model_sha256: str

    @classmethod
    def read(cls, config: dict[str, Any], where: object, cache: Path) -> "Training":
        """Checks the model's name and reads the data's and the model's files. Raises InputError."""
        check_model(config, where)
        data, model = data_files(config, where), model_files(config, where, cache)
        return cls(config, fingerprint(config), data, data_sha256(config, data), model, model_sha256(model))


@dataclass(frozen=True)
class Offers:
    """The task at its place, and the prices of all places where it may run.

    Attributes:
        rows: the cheapest first; also of places where it may not run, for comparison. They are frozen in ``run.json``.
        chosen: what SkyPilot tries first, judging by the prices.
        notes: the plan's remarks on the prices.
        kinds: whether it may get spot machines (True), others (False), or either; empty: the kind of ``chosen``.
    """

    task: dict[str, Any]
    rows: list[PriceRow]
    chosen: PriceRow
    notes: tuple[str, ...] = ()
    kinds: frozenset[bool] = frozenset()


def local_prices(settings: Settings, gpus: Sequence[Gpu], demand: Demand, at: float) -> list[PriceRow]:
    """Returns the spot and on-demand price of a job on this machine, from the local price table.

    On a machine without GPUs a task that asks for some runs on the CPU, at the CPU's price.
    """
    count = max(1, demand.gpus) if gpus else 1
    kind = gpus[0].name if gpus else "cpu"
    price = settings.local.prices.get(kind, Price(0.0, 0.0))
    is_known = kind in settings.local.prices
    row = PriceRow(
        infra="local",
        region="local",
        instance_type="local",
        accelerators=f"{kind}:{count}" if gpus else "",
        use_spot=True,
        price_usd_per_hour=round(price.spot * count, 6),
        source="local price table" if is_known else f"no price for {kind} in the local price table",
        at=at,
    )
    return [row, replace(row, use_spot=False, price_usd_per_hour=round(price.on_demand * count, 6))]


PRIORITIES = (-1000, 1000)
BUDGET_FLAG = "--budget"


@dataclass(frozen=True)
class TrainOptions:
    """The options of the command line. ``kind``, ``prod`` or ``dev``, is also the default profile."""

    config_path: str
    profile: str = ""
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
    """Everything that a submission needs.

    Attributes:
        offers, chosen, notes: as in ``Offers``; ``notes`` also has the code's.
        allow_config_change: a run of that id may go on with another config, data or model.
        takes: what the run takes from elsewhere.
        unseen: the users who have revised that since this user last saw it.
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


def make_plan(options: TrainOptions, workspace: Workspace) -> Plan:
    """Reads and checks everything that a run depends on. Raises InputError for the first fault."""
    infra, path = spell(options.infra or workspace.settings.infra), options.config_path
    workspace.check_bucket_reaches(infra)
    run_id = check_run_id(options.name) if options.name else new_run_id(Path(path).stem, SystemRandom())
    budget_usd = _check_options(options, infra)
    config = load_config(path, options.profile, options.overrides, options.kind, options.allow_env)
    check_local_files(config, path)
    allowed_env = allowed_in(config, options.allow_env)
    training = Training.read(config, path, workspace.env.cache)
    task_path, task = tasks.load_task(workspace.cwd)
    task = tasks.fill_in(task, _environment(options, workspace, run_id, allowed_env), options.resources, run_id)
    demand = _check_demand(tasks.demand_of(task, task_path), options, infra, task_path)
    secrets = secrets_of(options.secrets, workspace.environ)
    _check_machine(task, training, path, workspace, infra)
    now = time.time()
    offered = _offers(task, options, infra, demand, workspace, now)
    if budget_usd is not None:
        check_priced(offered.chosen)
    code = sent_code(task, workspace.cwd)
    check_used(code, config, path, training.data_files, task, task_path, workspace.cwd)
    record = RunRecord(
        **vars(training),
        **{name: getattr(options, name) for name in ("kind", "config_path", "profile", "save_every", "stall_after")},
        run_id=run_id,
        created_at=now,
        user=workspace.env.user,
        team=workspace.settings.team,
        overrides=list(options.overrides),
        infra=infra,
        use_spot=True in (offered.kinds or {offered.chosen.use_spot}),
        may_be_on_demand=len(offered.kinds) > 1,
        priority=demand.priority,
        budget_usd=budget_usd,
        prices=[vars(offer) for offer in offered.rows],
        code=code.facts(),
        versions={"spotune": __version__},
        allowed_env=allowed_env,
    )
    submission = Submission(
        **{name: getattr(record, name) for name in ("run_id", "user", "infra", "priority")},
        task=offered.task,
        workdir=str(workspace.cwd),
        secrets=secrets,
        preemptions=tasks.read_preemptions(Path(options.preemptions)) if options.preemptions else (),
        interactive=options.kind == "dev",
    )
    return Plan(
        record,
        submission,
        workspace.env.bucket,
        infra,
        task_path,
        offers=offered.rows,
        chosen=offered.chosen,
        notes=(*offered.notes, *code.notes()),
        code=code,
        allow_config_change=options.allow_config_change,
        takes=tuple(origins_of(record, workspace.cwd)),
    )


def _check_options(options: TrainOptions, infra: str) -> float | None:
    """Returns the budget, US dollars. Raises InputError for options that cannot be read."""
    parse_save_every(options.save_every)
    parse_stall_after(options.stall_after)
    budget_usd = None if options.budget is None else parse_usd(options.budget, BUDGET_FLAG)
    if options.preemptions and infra != LOCAL:
        raise InputError("--preemptions", f"{infra} takes machines away by itself", remedy="--infra local")
    return budget_usd


def _check_machine(task: dict[str, Any], training: Training, path: str, workspace: Workspace, infra: str) -> None:
    """Raises InputError if the task cannot run on this machine, or a machine elsewhere would lack files."""
    if infra == LOCAL:
        tasks.trainer_of(task, workspace.environ, workspace.cwd)
    else:
        from spotune.launch.skypilot.task import check_sent

        check_sent(training.config, training.data_files, path, workspace.cwd, task, infra)


def check_priced(chosen: PriceRow) -> None:
    """Raises InputError if a machine has no price, so that no budget can be kept."""
    if not chosen.price_usd_per_hour:
        raise InputError(BUDGET_FLAG, f"cannot be kept: {chosen.source}", remedy="leave it out, or give that price")


def _offers(
    task: dict[str, Any], options: TrainOptions, infra: str, demand: Demand, workspace: Workspace, now: float
) -> Offers:
    if infra != LOCAL:
        from spotune.launch.skypilot.offers import Wanted, make_offers

        place = Wanted(task, infra, options.resources.use_spot, workspace.environ, workspace.settings.slurm)
        return make_offers(place, now)
    gpus = find_gpus(workspace.environ)
    if options.resources.gpus and not gpus:
        raise InputError("--gpus", f"{options.resources.gpus}, but this machine has no GPU", remedy="leave it out")
    rows = sorted(local_prices(workspace.settings, gpus, demand, now), key=lambda row: row.price_usd_per_hour)
    return Offers(task, rows, next(row for row in rows if row.use_spot == demand.use_spot))


def _check_demand(demand: Demand, options: TrainOptions, infra: str, task_path: Path) -> Demand:
    where = "--priority" if options.resources.priority is not None else f"{task_path}: resources.priority"
    if not PRIORITIES[0] <= demand.priority <= PRIORITIES[1]:
        raise InputError(where, f"{demand.priority} is out of range", remedy=f"{PRIORITIES[0]} to {PRIORITIES[1]}")
    where = "--num-nodes" if options.resources.num_nodes is not None else f"{task_path}: num_nodes"
    if demand.num_nodes < 1:
        raise InputError(where, f"{demand.num_nodes} is not a number of machines", remedy="1 or more")
    if demand.num_nodes > 1 and infra == LOCAL:
        raise InputError(where, f"local is one machine, not {demand.num_nodes}", remedy="--num-nodes 1")
    return demand


def _environment(options: TrainOptions, workspace: Workspace, run_id: str, allowed_env: list[str]) -> dict[str, str]:
    """Returns what the task's ``envs`` get: the launcher-guard protocol, and what ``--env`` adds."""
    ours = {
        environment.BUCKET: workspace.env.bucket,
        environment.RUN_ID: run_id,
        environment.CONFIG: options.config_path,
        environment.PROFILE: options.profile or options.kind,
        **({environment.ALLOW_ENV: " ".join(allowed_env)} if allowed_env else {}),
    }
    return {**tasks.env_pairs(options.envs), **ours}


def secrets_of(names: Iterable[str], environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the values of ``--secret NAME`` from the environment. Raises InputError if one is not set."""
    names = tuple(names)
    for name in names:
        if "=" in name:
            raise InputError("--secret", "takes a name, not a value", remedy=f"export {name.partition('=')[0]}=… first")
        if name not in environ:
            raise InputError("--secret", f"{name} is not set here", remedy=f"export {name}=… first")
    return {name: environ[name] for name in names}


def as_json(plan: Plan) -> dict[str, Any]:
    """Returns the plan as data, for ``--dryrun --format json``. Secrets are only names."""
    recorded_keys = ("priority", "budget_usd", "config", "config_sha256", "data_sha256", "model_sha256")
    return {
        "run_id": plan.run_id,
        "infra": plan.infra,
        "bucket": plan.bucket,
        **{name: getattr(plan.record, name) for name in recorded_keys},
        "task": plan.submission.task,
        "workdir": plan.submission.workdir,
        "secrets": sorted(plan.submission.secrets),
        "preemptions": list(plan.submission.preemptions),
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


def promote(source: str, options: TrainOptions, workspace: Workspace) -> Plan:
    """Plans ``train --from RUN``: a new run from the config file and overrides of ``source``, in another profile.

    Raises InputError if the config, data, model or code is not what ``source`` ran with: what was tried is what goes to
    production. The new command line's overrides come on top.
    """
    history = Run.find(workspace, source).history
    if not history:
        raise InputError(source, "has no run.json in its bucket")
    record = history[-1]
    then = load_config(record.config_path, record.profile, record.overrides, record.kind, record.allowed_env)
    if fingerprint(then) not in (record.config_sha256, fingerprint(recorded(record.config))):
        raise InputError(source, f"{record.config_path} has changed since", remedy="submit the config itself")
    options = replace(
        options,
        config_path=record.config_path,
        overrides=(*record.overrides, *options.overrides),
        save_every=options.save_every or record.save_every,
        stall_after=options.stall_after or record.stall_after,
    )
    plan = make_plan(options, workspace)
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


def _content(file: dict[str, object]) -> tuple[object, ...]:
    return tuple(file.get(name) for name in ("source", "size", "sha256", "checksum"))


# The facts of ``spotune check``: about a config and its rows, or about this machine and project.


class RowsRefused(InputError):
    """A row does not fit. The message is the trainer's own."""

    def __init__(self, message: str) -> None:
        SpotuneError.__init__(self, message)


def check_rows(
    config: Mapping[str, Any], path: str, environ: Mapping[str, str], folder: Path, most_bytes: int = 16 << 20
) -> dict[str, Any]:
    """Reads rows of a config's local data files, by the trainer's Python, since the launcher's cannot read Parquet.

    Returns ``{rows_read: number, rows_not_read: [file or reason, …]}``. Raises InputError if a row, or all of a
    source's rows together, do not fit.

    Args:
        config: the resolved config.
        path: its file, for messages.
        environ: the shell's environment.
        folder: the project's folder.
        most_bytes: about how much to read; the default takes less than a second.
    """
    if not config.get("data"):
        return {"rows_read": 0, "rows_not_read": ["only rows of data: are read here"]}
    try:
        python = tasks.find_trainer(environ, folder)
    except InputError as error:
        return {"rows_read": 0, "rows_not_read": [str(error)]}
    asked = json.dumps({"config": config, "config_path": path, "most_bytes": most_bytes}, default=str)
    source = str(Path(__file__).resolve().parents[2])
    child = {**environ, "PYTHONPATH": os.pathsep.join([source, *filter(None, [environ.get("PYTHONPATH", "")])])}
    command = [python, "-m", "spotune.sft.sources"]
    ended = subprocess.run(command, input=asked, env=child, cwd=folder, capture_output=True, text=True, check=False)
    try:
        found = json.loads(ended.stdout)
    except ValueError:
        last = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
        return {"rows_read": 0, "rows_not_read": [f"{python} cannot read them: {last}"]}
    if found["error"]:
        raise RowsRefused(found["error"])
    return {"rows_read": found["rows"], "rows_not_read": found["partly"]}


def survey_config(
    path: str, profile: str, overrides: Iterable[str], workspace: Workspace, allow_env: Collection[str] = ()
) -> dict[str, Any]:
    """Returns facts about a config that is valid in all of its profiles. Raises InputError for all of its faults."""
    profiles = list(profiles_of(read_config(path), path))
    errors: list[InputError] = []
    configs: list[dict[str, Any]] = []
    for name, given, default in ((profile, overrides, "prod"), *((name, (), "") for name in profiles)):
        try:
            configs.append(load_config(path, name, given, default, allow_env))
        except InputError as error:
            errors.append(error)
    raise_all(errors)
    config = configs[0]
    check_local_files(config, path)
    training = Training.read(config, path, workspace.env.cache)
    rows = check_rows(config, path, workspace.environ, workspace.cwd)
    return {
        "config": path,
        "profiles": profiles,
        "profile": profile or ("prod" if "prod" in profiles else ""),
        "model": f"{config['model_name_or_path']} ({check_model(config, path)})",
        "data_files": [file["url"] for file in training.data_files],
        **rows,
        "notices": notices(config.get("data"), path),
        **{name: getattr(training, name) for name in ("data_sha256", "model_sha256", "config_sha256")},
    }


def survey_machine(workspace: Workspace) -> dict[str, Any]:
    """Returns facts about this machine and project. Raises SpotuneError if the bucket cannot be reached."""
    gpus = find_gpus(workspace.environ)
    task_path, _ = tasks.load_task(workspace.cwd)
    runs = workspace.store().folders(RUNS)
    try:
        trainer = tasks.find_trainer(workspace.environ, workspace.cwd)
    except InputError as error:
        trainer = f"missing: {error}"
    return {
        "settings": list(workspace.settings.files),
        "home": str(workspace.env.home),
        "bucket": workspace.env.bucket,
        "runs_in_bucket": len(runs),
        "task": str(task_path),
        "infra": workspace.settings.infra,
        "gpus": [gpu.name for gpu in gpus],
        "slots": workspace.settings.local.slots or len(gpus) or 1,
        "trainer": trainer,
    }


def survey_place(workspace: Workspace, infra: str = "") -> dict[str, Any]:
    """Returns facts about ``--infra NAME``, or else about the infrastructure that the settings name.

    If SkyPilot's API server does not answer, raises InfraError for a named one; else that is one of the problems.
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
