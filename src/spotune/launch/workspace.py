"""Where a verb is run: directory, environment, settings, and from these the bucket and the infrastructure."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spotune.contracts import environment
from spotune.contracts.environment import RunEnvironment
from spotune.contracts.errors import InputError
from spotune.contracts.shapes import clock_fault
from spotune.contracts.store import FOR_VERBS, Store
from spotune.launch.infra import BACKENDS, LOCAL, SKYPILOT, Infra, cloud_of, infra_of, open_backend
from spotune.launch.settings import Settings, load_settings


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
