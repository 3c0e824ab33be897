"""A task, SkyPilot's YAML as data: finds, reads, checks and fills it in. Also finds the Python that trains."""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import spotune
from spotune.core import environment, errors
from spotune.core.config import read_yaml, refuse_dates
from spotune.core.errors import InputError, shown
from spotune.core.fingerprint import read_user_file

# Finds the Python that trains. The launcher's own environment has neither torch nor TRL: see
# docs/explanation/technology.md.

DEFAULT = Path(".venv-train/bin/python")


def find_trainer(environ: Mapping[str, str], folder: Path) -> str:
    """Returns the path of the trainer's Python; the launcher's own has neither torch nor TRL.

    In this order: ``SPOTUNE_PYTHON`` of ``environ``, relative to ``folder``; ``.venv-train`` of the project's
    ``folder``; ``.venv-train`` of spotune's own checkout; this Python, if TRL is installed beside the launcher.
    Raises InputError if there is none, or if ``SPOTUNE_PYTHON`` is not a program.
    """
    if given := environment.setting(environ, environment.PYTHON):
        return _program(given, environ, folder)
    checkout = Path(spotune.__file__).parents[2]
    for place in (folder / DEFAULT, checkout / DEFAULT):
        if _is_program(place):
            return str(place.absolute())  # not resolved: the link makes it this environment's Python
    if find_spec("trl"):
        return sys.executable
    remedy = f"make setup-train, or {environment.PYTHON}=PYTHON"
    raise InputError(environment.PYTHON, f"no Python that trains: {folder / DEFAULT} is missing", remedy=remedy)


def trainer_of(task: Mapping[str, Any], environ: Mapping[str, str], folder: Path) -> str:
    """Returns the trainer's Python for a task on this machine; empty if there is none and the task needs none.

    A task needs it if its ``setup`` or ``run`` names ``SPOTUNE_PYTHON``; any other task starts its own interpreter. The
    task's ``envs`` override the shell's environment. Raises InputError if the task needs one and there is none.
    """
    given = (task.get("envs") or {}).get(environment.PYTHON)
    try:
        return find_trainer({**environ, environment.PYTHON: str(given)} if given else environ, folder)
    except InputError:
        if environment.PYTHON in f"{task.get('setup')} {task.get('run')}":
            raise
        return ""


def _program(given: str, environ: Mapping[str, str], folder: Path) -> str:
    """Returns the path of ``SPOTUNE_PYTHON``. Raises InputError if it cannot be started."""
    if "/" in given:
        found = str(folder / given) if _is_program(folder / given) else None
    else:
        found = shutil.which(given, path=environ.get("PATH"))
    if not found:
        what = f"{shown(given)} is not an executable file"
        raise InputError(environment.PYTHON, what, remedy="the path of a Python that has spotune[trainer], or unset it")
    return found


def _is_program(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


_EXAMPLE = '{"after_s": 20, "notice_s": 0} or {"at_step": 40, "notice_s": 30}'


def read_preemptions(path: Path) -> tuple[dict[str, float], ...]:
    """Reads ``--preemptions FILE``, one JSON object a line. Raises InputError with the line that is wrong."""
    lines = read_user_file(path).splitlines()
    return tuple(_parse(line, path, f"line {number}") for number, line in enumerate(lines, 1) if line.strip())


def _parse(line: str, path: Path, row: str) -> dict[str, float]:
    try:
        planned = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(path, f"not JSON: {error}", key=row, remedy=_EXAMPLE) from error
    if not isinstance(planned, dict) or ("after_s" in planned) == ("at_step" in planned):
        raise InputError(path, "needs either after_s or at_step", key=row, remedy=_EXAMPLE)
    for key, value in planned.items():
        if key not in ("after_s", "at_step", "notice_s"):
            raise InputError(path, f"unknown key {shown(key)}", key=row, remedy=_EXAMPLE)
        if not is_amount(value, 1e9):
            raise InputError(path, f"{key} {shown(value)} is not a number from 0", key=row, remedy=_EXAMPLE)
    return {key: float(value) for key, value in planned.items()}


def is_amount(value: Any, most: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= most


def due(planned: Sequence[Mapping[str, float]], fired: Sequence[int], elapsed_s: float, step: int | None) -> int | None:
    """Returns the index of the first planned preemption that is due and has not fired, or None."""
    for index, preemption in enumerate(planned):
        is_late = elapsed_s >= preemption.get("after_s", float("inf"))
        is_there = step is not None and step >= preemption.get("at_step", float("inf"))
        if index not in fired and (is_late or is_there):
            return index
    return None


LISTS = ("any_of", "ordered")  # a task's alternatives; an entry overrides the keys above the list


def each_of(resources: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns every alternative as complete resources, in order; the resources themselves if there is none."""
    common = {name: value for name, value in resources.items() if name not in LISTS}
    listed = [one for name in LISTS for one in resources.get(name) or [] if isinstance(one, Mapping)]
    return [{**common, **one} for one in listed] or [common]


def may_be_spot(resources: Mapping[str, Any]) -> bool:
    return any(one.get("use_spot") for one in each_of(resources))


def override(resources: Mapping[str, Any], changes: Mapping[str, Any], without: Sequence[str] = ()) -> dict[str, Any]:
    """Returns ``resources`` with ``changes`` and without the keys ``without``, in every alternative.

    Alternatives that become equal are merged. What is not a mapping stays, for SkyPilot to refuse.
    """
    drop = {*changes, *without}
    wanted = {**{name: value for name, value in resources.items() if name not in without}, **changes}
    for name in LISTS:
        if isinstance(wanted.get(name), list):
            left = [
                {key: value for key, value in one.items() if key not in drop} if isinstance(one, Mapping) else one
                for one in wanted.pop(name)
            ]
            distinct = [one for index, one in enumerate(left) if one not in left[:index]]
            if distinct not in ([], [{}]):
                wanted[name] = distinct
    return wanted


TRAIN = "tasks/train.yaml"
_MOST = 10**9  # of any count
_CPUS = re.compile(r"(?=.*[1-9])[0-9]{0,9}(\.[0-9]{1,9})?\+?")  # SkyPilot's syntax, as below
_GPUS = re.compile(r"([A-Za-z][A-Za-z0-9-]*)(?::(?!0+$)([0-9]{1,6}))?")
_MEMORY = re.compile(r"[0-9]{0,9}(?<=[0-9])(\.[0-9]{1,9})?([kmgtp]?b)?[+x]?", re.IGNORECASE)  # 0: Slurm's own
_RESERVED = (
    *(environment.RUN_ID, environment.CONFIG, environment.PROFILE, environment.HOME, environment.STATUS_FILE),
    environment.BUCKET,
    environment.ALLOW_ENV,  # set by --allow-env, so that the plan shows it
    environment.ALLOW_CONFIG_CHANGE,  # set by its flag only, since the record has the flag
)


@dataclass(frozen=True)
class Resources:
    """What the command line changes in each alternative of a task's ``resources``. None: no change."""

    gpus: str | None = None
    num_nodes: int | None = None
    use_spot: bool | None = None
    priority: int | None = None
    cpus: str | None = None
    memory: str | None = None


@dataclass(frozen=True)
class Demand:
    """What a job asks of an infrastructure, by its task.

    Attributes:
        gpu: name of the first accelerator, empty for none; ``gpus``: how many of them on each node.
        use_spot: whether any alternative is a spot machine.
        max_restarts: ``max_restarts_on_errors``.
        recover_codes: ``recover_on_exit_codes``.
    """

    gpu: str = ""
    gpus: int = 0
    num_nodes: int = 1
    use_spot: bool = False
    priority: int = 0
    max_restarts: int = 0
    recover_codes: tuple[int, ...] = (errors.PREEMPTED,)


def shipped_file(name: str, cwd: Path) -> Path | None:
    """Finds a file of the project: in ``cwd``, in spotune's own checkout, or as installed with the package.

    Also finds a FIFO or a broken link, for its reader to refuse.
    """
    package = Path(spotune.__file__).parent
    places = (cwd / name, package.parents[1] / name, package / "shipped" / name)
    return next((place for place in places if os.path.lexists(place)), None)


def load_task(cwd: Path, name: str = TRAIN) -> tuple[Path, dict[str, Any]]:
    """Returns the path and the content of the task's YAML. Raises InputError if it cannot be used."""
    path = shipped_file(name, cwd)
    if path is None:
        raise InputError(name, "no such file", remedy="run from a checkout of the project")
    task = read_yaml(path, remedy="run: exec python -m spotune.sft …")
    if not isinstance(task.get("run"), str) or not task["run"].strip():
        raise InputError(path, "a task needs commands", key="run", remedy="run: exec python -m spotune.sft …")
    if not isinstance(task.get("setup") or "", str):
        raise InputError(path, "must be text", key="setup")
    if isinstance(given := task.get("secrets"), list):  # SkyPilot's list of ``secrets:NAME``: values are added later
        if bad := [name for name in given if not (isinstance(name, str) and name.startswith("secrets:"))]:
            what = f"{shown(bad[0])} does not name a secret"
            raise InputError(path, what, key="secrets", remedy="- secrets:NAME, or NAME: null")
        task = {**task, "secrets": dict.fromkeys(given)}
    for section in ("envs", "resources", "secrets", "config"):
        if not isinstance(task.get(section) or {}, dict):
            raise InputError(path, "must be a mapping", key=section)
    for name in LISTS:
        listed = (task.get("resources") or {}).get(name) or []
        if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
            raise InputError(path, "must be a list of resources", key=f"resources.{name}", remedy="- {infra: aws}")
    refuse_dates({key: value for key, value in task.items() if key != "envs"}, path)  # envs become text
    demand_of(task, path)
    return path, task


def fill_in(task: Mapping[str, Any], envs: Mapping[str, str], resources: Resources, run_id: str) -> dict[str, Any]:
    """Returns a copy of the task with the run's name, environment and resources. Raises InputError."""
    texts = {str(name): "" if value is None else str(value) for name, value in (task.get("envs") or {}).items()}
    filled = {**task, "name": run_id, "envs": {**texts, **envs}}
    given = {name: getattr(resources, name) for name in ("use_spot", "priority", "cpus", "memory")}
    if resources.gpus is not None:
        parse_gpus(resources.gpus, "--gpus")
        given["accelerators"] = resources.gpus
    check_amounts(resources.cpus, resources.memory)
    changes = {name: value for name, value in given.items() if value is not None}
    machine = ("instance_type",) if resources.gpus is not None else ()  # the task's has other GPUs
    if wanted := override(task.get("resources") or {}, changes, without=machine):
        filled["resources"] = wanted
    if resources.num_nodes is not None:
        filled["num_nodes"] = resources.num_nodes
    return filled


def check_amounts(cpus: str | None, memory: str | None) -> None:
    """Raises InputError for CPUs or memory that SkyPilot cannot read. None: not given."""
    for flag, text, spelling, remedy in (
        ("--cpus", cpus, _CPUS, "4, or 4+"),
        ("--memory", memory, _MEMORY, "16, 16+ or 16GB"),
    ):
        if text is not None and not spelling.fullmatch(text):
            raise InputError(flag, f"{shown(text)} is not an amount", remedy=remedy)


def env_pairs(pairs: Iterable[str]) -> dict[str, str]:
    """Returns ``--env K=V`` as a mapping. Raises InputError, also for a name that spotune sets."""
    given: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise InputError("--env", f"{shown(pair)} is not NAME=value", remedy="--env NCCL_DEBUG=INFO")
        if name in _RESERVED:
            remedy = f"export {environment.BUCKET}=… for the bucket"
            raise InputError("--env", f"{name} is for spotune to set", remedy=remedy)
        given[name] = value
    return given


def demand_of(task: Mapping[str, Any], where: object = "task") -> Demand:
    """Returns what the task asks for. Raises InputError for a value that cannot be read."""
    wanted = task.get("resources") or {}
    resources = each_of(wanted)[0]
    recovery = resources.get("job_recovery")
    recovery = recovery if isinstance(recovery, dict) else {}
    gpu, gpus = _first_accelerator(resources.get("accelerators"), where)
    codes = recovery.get("recover_on_exit_codes", [])
    codes = codes if isinstance(codes, list) else [] if codes is None else [codes]
    kept = "resources.job_recovery"
    return Demand(
        gpu=gpu,
        gpus=gpus,
        num_nodes=_whole(task.get("num_nodes"), 1, where, "num_nodes"),
        use_spot=may_be_spot(wanted),
        priority=_whole(resources.get("priority"), 0, where, "resources.priority"),
        max_restarts=_whole(recovery.get("max_restarts_on_errors"), 0, where, f"{kept}.max_restarts_on_errors"),
        recover_codes=tuple(_whole(code, 0, where, f"{kept}.recover_on_exit_codes") for code in codes),
    )


def _whole(value: Any, default: int, where: object, key: str) -> int:
    """Returns a whole number of a task, also one in quotes. Raises InputError with the key."""
    if value is None:
        return default
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = _MOST + 1
    if abs(number) > _MOST:
        raise InputError(where, f"{shown(value)} is not a whole number", key=key)
    return number


def parse_gpus(text: str, where: object) -> tuple[str, int]:
    """Returns name and count of ``L4:1`` or ``L4``. Raises InputError."""
    found = _GPUS.fullmatch(text.strip())
    if not found:
        raise InputError(where, f"{shown(text)} is not an accelerator", remedy="L4:1")
    return found[1], int(found[2] or 1)


def _first_accelerator(wanted: Any, where: object) -> tuple[str, int]:
    """Returns name and count of the first of ``L4:1``, ``{L4: 1, A10G: 1}`` or ``[L4:1, A10G:1]``."""
    if not wanted:
        return "", 0
    if isinstance(wanted, dict):
        name, count = next(iter(wanted.items()))
        count = _whole(count, 1, where, f"resources.accelerators.{name}")
        return parse_gpus(f"{name}:{count}", f"{where}: resources.accelerators")
    first = wanted[0] if isinstance(wanted, list) else wanted
    return parse_gpus(str(first), f"{where}: resources.accelerators")
