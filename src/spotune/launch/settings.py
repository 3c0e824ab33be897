"""The settings, ``config/spotune.yaml`` overlaid by ``$SPOTUNE_HOME/config.yaml``, and the workspace of a verb."""

import difflib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from spotune.core import environment
from spotune.core.config import read_yaml
from spotune.core.environment import RunEnvironment, check_bucket
from spotune.core.errors import InputError, shown
from spotune.core.keys import MOST_USD_PER_HOUR, clock_fault
from spotune.core.store import FOR_VERBS, Store
from spotune.launch.engine import BACKENDS, LOCAL, SKYPILOT, Infra, cloud_of, infra_of, open_backend
from spotune.launch.task import is_amount, shipped_file


@dataclass(frozen=True)
class Price:
    """US dollars an hour."""

    on_demand: float
    spot: float


@dataclass(frozen=True)
class LocalSettings:
    """This machine as an infrastructure. ``prices``: by GPU name; ``cpu`` for a whole machine without GPUs."""

    slots: int | None = None
    prices: dict[str, Price] = field(default_factory=dict)


@dataclass(frozen=True)
class SlurmSettings:
    """What SkyPilot does not know about Slurm clusters.

    Attributes:
        shared: folders that all machines of a cluster, and this one, have under the same path.
        preemptible: partitions, ``CLUSTER/PARTITION``, whose jobs may be preempted. None: Slurm is asked.
        nice: ``sbatch --nice`` of a job of priority 0. A higher priority lowers it, down to 0, since Slurm lets a user
            only lower a job's rank. The default is the highest priority, so that any two priorities differ.
    """

    shared: tuple[str, ...] = ()
    preemptible: tuple[str, ...] | None = None
    nice: int = 1000


@dataclass(frozen=True)
class MonthlyBudget:
    """What a user or a team may spend in a calendar month, UTC.

    ``owner``: ``user alice``. ``key``, ``file``: where it is set, for errors.
    """

    owner: str
    limit_usd: float
    key: str
    file: str


@dataclass(frozen=True)
class BudgetSettings:
    """Monthly budgets by name; ``*`` is the budget of each one who is not named."""

    users: dict[str, MonthlyBudget] = field(default_factory=dict)
    teams: dict[str, MonthlyBudget] = field(default_factory=dict)

    def of(self, user: str, team: str) -> list[MonthlyBudget]:
        """Returns the budgets that pay for what this user spends for this team."""
        found = []
        for kind, name, budgets in (("user", user, self.users), ("team", team, self.teams)):
            budget = budgets.get(name) or budgets.get("*")
            if name and budget:
                found.append(replace(budget, owner=f"{kind} {name}"))
        return found


@dataclass(frozen=True)
class Settings:
    """Defaults for every run of a project; the command line overrides them."""

    infra: str = "local"
    bucket: str = ""
    team: str = ""
    local: LocalSettings = LocalSettings()
    slurm: SlurmSettings = SlurmSettings()
    budgets: BudgetSettings = BudgetSettings()
    files: tuple[str, ...] = ()


def load_settings(cwd: Path, home: Path) -> Settings:
    """Reads both files if they exist. Raises InputError with the file and the key."""
    settings: dict[str, Any] = {}
    files: list[str] = []
    for path in (shipped_file("config/spotune.yaml", cwd), home / "config.yaml"):
        if path is not None and os.path.lexists(path):  # a broken link is an error: it may be meant as budgets
            raw = read_yaml(path, remedy="infra: local", may_be_empty=True)
            settings = _overlay(settings, _check(raw, path))
            files.append(str(path))
    local = settings.pop("local", {})
    prices = {name: Price(**price) for name, price in local.pop("prices", {}).items()}
    given = settings.pop("slurm", {})
    lists: dict[str, Any] = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    slurm = SlurmSettings(**{**given, **lists})
    budgets = BudgetSettings(**settings.pop("budgets", {}))
    machine = LocalSettings(**local, prices=prices)
    return Settings(**settings, budgets=budgets, local=machine, slurm=slurm, files=tuple(files))


def _overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {name: _overlay(below[name], above[name]) for name in above if isinstance(below.get(name), dict)}
    return {**below, **above, **both}


def _check(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    _section(raw, path, "", ("infra", "bucket", "team", "local", "slurm", "budgets"))
    for name in ("infra", "bucket", "team"):
        if not isinstance(raw.get(name, ""), str):
            raise InputError(path, f"{shown(raw[name])} is not text", key=name)
    if raw.get("bucket"):
        check_bucket(raw["bucket"], f"{path}: bucket")
    if "infra" in raw:
        infra_of(raw["infra"], f"{path}: infra")
    local = _section(raw.get("local"), path, "local", ("slots", "prices"))
    slots = local.get("slots", 1)
    if isinstance(slots, bool) or not isinstance(slots, int) or not 1 <= slots <= 1024:
        raise InputError(path, f"{shown(slots)} is not a number of jobs", key="local.slots", remedy="1 to 1024")
    prices = _section(local.get("prices"), path, "local.prices")
    for name, price in prices.items():
        key, kinds = f"local.prices.{name}", ("on_demand", "spot")
        amounts = _section(price, path, key, kinds)
        for kind in kinds:
            if not is_amount(amounts.get(kind), MOST_USD_PER_HOUR):
                what = f"{shown(amounts.get(kind))} is not dollars an hour"
                raise InputError(path, what, key=f"{key}.{kind}")
    sections = {"local": {**local, "prices": prices}, "slurm": _check_slurm(raw, path), "budgets": _budgets(raw, path)}
    return {**raw, **sections}


def _check_slurm(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    slurm = _section(raw.get("slurm"), path, "slurm", ("shared", "preemptible", "nice"))
    nice = slurm.get("nice", 0)
    if isinstance(nice, bool) or not isinstance(nice, int) or nice < 0:
        raise InputError(path, f"{shown(nice)} is not a number from 0 on", key="slurm.nice", remedy="nice: 1000")
    for name, values in slurm.items():
        if name == "nice":
            continue
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise InputError(path, f"{shown(values)} is not a list of texts", key=f"slurm.{name}")
    if relative := next((folder for folder in slurm.get("shared", ()) if not Path(folder).is_absolute()), None):
        raise InputError(path, f"{shown(relative)} is not an absolute path", key="slurm.shared")
    return slurm


def _budgets(raw: dict[str, Any], path: Path) -> dict[str, dict[str, MonthlyBudget]]:
    given = _section(raw.get("budgets"), path, "budgets", ("users", "teams"))
    budgets: dict[str, dict[str, MonthlyBudget]] = {"users": {}, "teams": {}}
    for kind, found in budgets.items():
        for name, amount in _section(given.get(kind), path, f"budgets.{kind}").items():
            key = f"budgets.{kind}.{name}"
            if not is_amount(amount, 1e12):
                raise InputError(path, f"{shown(amount)} is not dollars a month", key=key, remedy=f"{name}: 200")
            found[str(name)] = MonthlyBudget("", float(amount), key, str(path))
    return budgets


def _section(value: Any, path: Path, key: str, known: tuple[str, ...] = ()) -> dict[str, Any]:
    """Returns a copy of a mapping. Raises InputError if it is none, or has another key than the known ones."""
    if value is not None and not isinstance(value, dict):
        raise InputError(path, "must be a mapping", key=key, remedy="NAME: VALUE")
    for name in value or ():
        if known and name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"one of {', '.join(known)}"
            raise InputError(path, "unknown key", key=f"{key}.{name}" if key else str(name), remedy=remedy)
    return dict(value or {})


@dataclass(frozen=True)
class Workspace:
    """A verb's directory, environment and settings, read once; opens each bucket and engine once.

    ``waiting`` gets a line when a bucket does not answer.
    """

    cwd: Path
    environ: Mapping[str, str]
    env: RunEnvironment
    settings: Settings
    waiting: Callable[[str], None] | None = None
    _stores: dict[str, Store] = field(default_factory=dict)
    _infras: dict[str, Infra] = field(default_factory=dict)

    @classmethod
    def open(cls, environ: Mapping[str, str], cwd: Path, waiting: Callable[[str], None] | None = None) -> "Workspace":
        """Raises InputError for an invalid environment, invalid settings, or a clock that is not set."""
        if fault := clock_fault(time.time()):
            raise InputError("this machine", fault, remedy="set it: timedatectl set-time")
        env = RunEnvironment.read(environ)
        settings = load_settings(cwd, env.home)
        if settings.bucket and not environment.setting(environ, environment.BUCKET):
            env = RunEnvironment.read({**environ, environment.BUCKET: settings.bucket})
        return cls(cwd, environ, env, settings, waiting)

    def store(self, bucket: str = "") -> Store:
        url = bucket or self.env.bucket
        if url not in self._stores:
            self._stores[url] = Store(url, FOR_VERBS, waiting=self.waiting)
        return self._stores[url]

    def infra(self, name: str = LOCAL) -> Infra:
        return self._engine(infra_of(name))

    def engines(self) -> list[Infra]:
        """Returns all engines. One that has no jobs costs nothing."""
        return [self._engine(backend) for backend in BACKENDS]

    def _engine(self, backend: str) -> Infra:
        if backend not in self._infras:
            options: dict[str, Any] = {"home": self.env.home, "environ": self.environ}
            if backend == LOCAL:
                options |= {"slots": self.settings.local.slots}
            else:
                options |= {"settings": self.settings.slurm, "asks": infra_of(self.settings.infra) == SKYPILOT}
            self._infras[backend] = open_backend(backend, **options)
        return self._infras[backend]

    def check_bucket_reaches(self, infra: str) -> None:
        """Raises InputError if machines of ``infra`` cannot see the bucket."""
        bucket = self.env.bucket
        if infra_of(infra) == LOCAL or not bucket.startswith("file://"):
            return
        remedy = "s3://bucket/prefix or gs://bucket/prefix"
        if cloud_of(infra) == "slurm":
            place = Path(bucket.removeprefix("file://"))
            if any(place.is_relative_to(shared) for shared in self.settings.slurm.shared):
                return
            remedy += ", or a folder below slurm.shared of the settings"
        raise InputError(environment.BUCKET, f"machines of {infra} cannot see {bucket}", remedy=remedy)
