"""Where a verb is run: directory, environment, settings, and from these the bucket and the infrastructure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from spotune.contracts import environment
from spotune.contracts.environment import RunEnvironment
from spotune.contracts.errors import InputError
from spotune.contracts.store import Store
from spotune.launch.infra import BACKENDS, Infra, infra_of, open_infra
from spotune.launch.settings import Settings, load_settings


@dataclass(frozen=True)
class Workspace:
    """Read once at the start of a verb; what it opens, it opens once."""

    cwd: Path
    environ: Mapping[str, str]
    env: RunEnvironment
    settings: Settings
    _stores: dict[str, Store] = field(default_factory=dict)
    _infras: dict[str, Infra] = field(default_factory=dict)

    @classmethod
    def open(cls, environ: Mapping[str, str], cwd: Path) -> "Workspace":
        """Raises InputError for an environment or settings that cannot be."""
        env = RunEnvironment.read(environ)
        settings = load_settings(cwd, env.home)
        if settings.bucket and not environ.get(environment.BUCKET):
            env = RunEnvironment.read({**environ, environment.BUCKET: settings.bucket})
        return cls(cwd, environ, env, settings)

    def store(self, bucket: str = "") -> Store:
        url = bucket or self.env.bucket
        if url not in self._stores:
            self._stores[url] = Store(url)
        return self._stores[url]

    def infra(self, name: str = "local") -> Infra:
        backend = infra_of(name)
        if backend not in self._infras:
            options = {"home": self.env.home, "environ": self.environ, "slots": self.settings.local.slots}
            self._infras[backend] = open_infra(backend, **options)
        return self._infras[backend]

    def known_infras(self) -> list[str]:
        return list(BACKENDS)

    def check_bucket_reaches(self, infra: str) -> None:
        """Raises InputError when machines of ``infra`` would not see the bucket."""
        if infra_of(infra) != "local" and self.env.bucket.startswith("file://"):
            what = f"machines of {infra} cannot see {self.env.bucket}"
            raise InputError(environment.BUCKET, what, remedy="s3://bucket/prefix or gs://bucket/prefix")
