"""Settings of a project and of a person, and the workspace that a verb runs in."""

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
from spotune.launch.task import shipped_file

# Settings of a project and of a person: ``config/spotune.yaml``, overlaid by ``$SPOTUNE_HOME/config.yaml``.

PROJECT = "config/spotune.yaml"
PERSONAL = "config.yaml"
_MOST_USD = 1e12
_MOST_SLOTS = 1024


@dataclass(frozen=True)
class Price:
    """US dollars an hour."""

    on_demand: float
    spot: float


@dataclass(frozen=True)
class LocalSettings:
    """This machine as an infrastructure; ``prices`` by GPU name, and ``cpu`` for the whole machine without one."""

    slots: int | None = None
    prices: dict[str, Price] = field(default_factory=dict)


@dataclass(frozen=True)
class SlurmSettings:
    """What SkyPilot does not say of Slurm clusters.

    Attributes:
        shared: folders that all machines of a cluster, and this one, see under the same path.
        preemptible: partitions, ``CLUSTER/PARTITION``, whose jobs may be thrown out for others. None: Slurm is asked.
        nice: of a job of priority 0; what a job's priority is above it makes its ``sbatch --nice`` smaller, down to 0.
            Slurm lets no user raise a job above others', only lower one: this is what is given up to be raised from.
            The highest priority there is, so that every two of them differ.
    """

    shared: tuple[str, ...] = ()
    preemptible: tuple[str, ...] | None = None
    nice: int = 1000


@dataclass(frozen=True)
class MonthlyBudget:
    """What a user or a team may spend in a month of the calendar, UTC.

    ``owner``: ``user alice``. ``key``, ``file``: where that is said, for errors.
    """

    owner: str
    limit_usd: float
    key: str
    file: str


@dataclass(frozen=True)
class Budgets:
    """Monthly budgets by name; ``*`` is that of each one who is not named."""

    users: dict[str, MonthlyBudget] = field(default_factory=dict)
    teams: dict[str, MonthlyBudget] = field(default_factory=dict)

    def of(self, user: str, team: str) -> list[MonthlyBudget]:
        """Those that what this user spends for this team comes out of."""
        found = []
        for kind, name, budgets in (("user", user, self.users), ("team", team, self.teams)):
            budget = budgets.get(name) or budgets.get("*")
            if name and budget:
                found.append(replace(budget, owner=f"{kind} {name}"))
        return found


@dataclass(frozen=True)
class Settings:
    """What holds for every run of a project unless the command line says otherwise."""

    infra: str = "local"
    bucket: str = ""
    team: str = ""
    local: LocalSettings = LocalSettings()
    slurm: SlurmSettings = SlurmSettings()
    budgets: Budgets = Budgets()
    files: tuple[str, ...] = ()


def load_settings(cwd: Path, home: Path) -> Settings:
    """Reads both files where they exist; raises InputError naming file and key."""
    settings: dict[str, Any] = {}
    files: list[str] = []
    for path in (shipped_file(PROJECT, cwd), home / PERSONAL):
        if path is not None and os.path.lexists(path):  # a folder or a broken link is an error: budgets may be meant
            raw = read_yaml(path, remedy="infra: local", may_be_empty=True)
            settings = _overlay(settings, _check(raw, path))
            files.append(str(path))
    local = settings.pop("local", {})
    prices = {name: Price(**price) for name, price in local.pop("prices", {}).items()}
    given = settings.pop("slurm", {})
    lists: dict[str, Any] = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    slurm = SlurmSettings(**{**given, **lists})
    budgets = Budgets(**settings.pop("budgets", {}))
    machine = LocalSettings(**local, prices=prices)
    return Settings(**settings, budgets=budgets, local=machine, slurm=slurm, files=tuple(files))


def _overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {name: _overlay(below[name], above[name]) for name in above if isinstance(below.get(name), dict)}
    return {**below, **above, **both}


def _check(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    _known(raw, ("infra", "bucket", "team", "local", "slurm", "budgets"), path, "")
    for name in ("infra", "bucket", "team"):
        if not isinstance(raw.get(name, ""), str):
            raise InputError(path, f"{shown(raw[name])} is not text", key=name)
    if raw.get("bucket"):
        check_bucket(raw["bucket"], f"{path}: bucket")
    if "infra" in raw:
        infra_of(raw["infra"], f"{path}: infra")
    local = _mapping(raw.get("local"), path, "local")
    _known(local, ("slots", "prices"), path, "local.")
    slots = local.get("slots", 1)
    if isinstance(slots, bool) or not isinstance(slots, int) or not 1 <= slots <= _MOST_SLOTS:
        raise InputError(
            path, f"{shown(slots)} is not a number of jobs", key="local.slots", remedy=f"1 to {_MOST_SLOTS}"
        )
    prices = _mapping(local.get("prices"), path, "local.prices")
    for name, price in prices.items():
        _check_price(_mapping(price, path, f"local.prices.{name}"), path, f"local.prices.{name}")
    sections = {"local": {**local, "prices": prices}, "slurm": _check_slurm(raw, path), "budgets": _budgets(raw, path)}
    return {**raw, **sections}


def _check_slurm(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    slurm = _mapping(raw.get("slurm"), path, "slurm")
    _known(slurm, ("shared", "preemptible", "nice"), path, "slurm.")
    nice = slurm.get("nice", 0)
    if isinstance(nice, bool) or not isinstance(nice, int) or nice < 0:
        raise InputError(path, f"{shown(nice)} is not a number from 0 on", key="slurm.nice", remedy="nice: 1000")
    for name, values in ((name, slurm[name]) for name in ("shared", "preemptible") if name in slurm):
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise InputError(path, f"{shown(values)} is not a list of texts", key=f"slurm.{name}")
    if relative := next((folder for folder in slurm.get("shared", ()) if not Path(folder).is_absolute()), None):
        raise InputError(path, f"{shown(relative)} is not an absolute path", key="slurm.shared")
    return slurm


def _budgets(raw: dict[str, Any], path: Path) -> dict[str, dict[str, MonthlyBudget]]:
    given = _mapping(raw.get("budgets"), path, "budgets")
    _known(given, ("users", "teams"), path, "budgets.")
    budgets: dict[str, dict[str, MonthlyBudget]] = {"users": {}, "teams": {}}
    for kind, found in budgets.items():
        for name, amount in _mapping(given.get(kind), path, f"budgets.{kind}").items():
            key = f"budgets.{kind}.{name}"
            if not _is_amount(amount):
                raise InputError(path, f"{shown(amount)} is not dollars a month", key=key, remedy=f"{name}: 200")
            found[str(name)] = MonthlyBudget("", float(amount), key, str(path))
    return budgets


def _is_amount(value: Any, most: float = _MOST_USD) -> bool:
    """Whether it is a number of dollars, 0 or more."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= most


def _check_price(price: dict[str, Any], path: Path, key: str) -> None:
    _known(price, ("on_demand", "spot"), path, f"{key}.")
    for kind in ("on_demand", "spot"):
        amount = price.get(kind)
        if not _is_amount(amount, MOST_USD_PER_HOUR):
            raise InputError(path, f"{shown(amount)} is not dollars an hour", key=f"{key}.{kind}")


def _mapping(value: Any, path: Path, key: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise InputError(path, "must be a mapping", key=key, remedy="NAME: VALUE")
    return dict(value or {})


def _known(given: Mapping[str, Any], known: tuple[str, ...], path: Path, prefix: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"one of {', '.join(known)}"
            raise InputError(path, "unknown key", key=f"{prefix}{key}", remedy=remedy)


# Where a verb is run: directory, environment, settings, and from these the bucket and the infrastructure.


@dataclass(frozen=True)
class Workspace:
    """Read once at the start of a verb; what it opens, it opens once. ``waiting``: told of a bucket that is silent."""

    cwd: Path
    environ: Mapping[str, str]
    env: RunEnvironment
    settings: Settings
    waiting: Callable[[str], None] | None = None
    _stores: dict[str, Store] = field(default_factory=dict)
    _infras: dict[str, Infra] = field(default_factory=dict)

    @classmethod
    def open(cls, environ: Mapping[str, str], cwd: Path, waiting: Callable[[str], None] | None = None) -> "Workspace":
        """Raises InputError for an environment or settings that cannot be, and for a clock that is not set."""
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
        """The engine that serves ``--infra NAME``."""
        return self._engine(infra_of(name))

    def engines(self) -> list[Infra]:
        """All engines there are; one that has nothing to say costs nothing."""
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
        """Raises InputError when machines of ``infra`` would not see the bucket."""
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
