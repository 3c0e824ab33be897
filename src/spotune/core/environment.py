"""Environment variables, and durations as people write them.

Nothing else reads ``os.environ``.
"""

import getpass
import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spotune.core.errors import InputError, shown

# The names of the environment, and how both sides read it. Nobody else touches ``os.environ``.
#
# ``RunEnvironment`` is what the launcher hands to the machine (seam 1); SkyPilot's own names are
# read on the machine's side only, see ``guard/journal.py``.

BUCKET = "SPOTUNE_BUCKET"
HOME = "SPOTUNE_HOME"
RUN_ID = "SPOTUNE_RUN_ID"
CONFIG = "SPOTUNE_CONFIG"
PROFILE = "SPOTUNE_PROFILE"
PYTHON = "SPOTUNE_PYTHON"  # the trainer's interpreter, which a task runs; default: .venv-train/bin/python
ATTEMPT = "SPOTUNE_ATTEMPT"  # the engine's count of machines, where it keeps one: claims then have the same numbers
STATUS_FILE = "SPOTUNE_STATUS_FILE"  # a local file that the guard keeps current: progress without a bucket's delay
SAVE_EVERY = "SPOTUNE_SAVE_EVERY"  # `50` steps or `5m`; for a bare launch, `train --save-every` freezes it in run.json
STALL_AFTER = "SPOTUNE_STALL_AFTER"  # `10m`, `0` for never; for a bare launch, as SAVE_EVERY
PATIENCE = "SPOTUNE_BUCKET_PATIENCE"  # for how long training goes on while the bucket is away; default 30m
ALLOW_CONFIG_CHANGE = "SPOTUNE_ALLOW_CONFIG_CHANGE"  # `1`, for a bare launch: `--allow-config-change` of the script
ALLOW_ENV = "SPOTUNE_ALLOW_ENV"  # names that a config's `env:` may set all the same; the launcher or a user sets it
GPU_SHARE = "SPOTUNE_GPU_SHARE"  # on a dev cluster: GPUs of each node that the run asked for, 0.5 for half of one
KIND = "SPOTUNE_KIND"  # `dev` or `prod`, for a bare launch: whose money it is counted as; TEAM and USER likewise
TEAM = "SPOTUNE_TEAM"
USER = "SPOTUNE_USER"
FAILPOINTS = "SPOTUNE_FAILPOINTS"  # tests only, see failpoints.py
FAILPOINT_DIR = "SPOTUNE_FAILPOINT_DIR"
WORKER = "SPOTUNE_WORKER"  # tests only: a program that stands in for `python -m`, see guard/ranks.py
NUM_PROCESSES = "SPOTUNE_NUM_PROCESSES"  # ranks on this machine; default one per GPU, 1 on CPU
GRACE_S = "SPOTUNE_GRACE_S"  # seconds from a notice to the kill, where the notice does not say it itself
GUARD_PID = "SPOTUNE_GUARD_PID"  # set by the guard itself for what it starts: whom to die with
OWN_STEP = "SPOTUNE_OWN_STEP"  # set by the guard itself: the Slurm job in which it has a step of its own

# Where the clouds' metadata services are, for a machine that reaches them elsewhere: the clouds' own names, where
# they have one. Read by the guard's watcher only, see guard/notice_sources.py.
AWS_METADATA = "AWS_EC2_METADATA_SERVICE_ENDPOINT"  # a URL
AWS_METADATA_DISABLED = "AWS_EC2_METADATA_DISABLED"
GCP_METADATA = "GCE_METADATA_HOST"  # host or host:port
AZURE_METADATA = "SPOTUNE_AZURE_METADATA_ENDPOINT"  # a URL


@dataclass(frozen=True)
class RunEnvironment:
    """Where a run's state lives and what it is called, as the environment says."""

    home: Path
    bucket: str
    run_id: str
    config: str
    profile: str
    save_every: str
    status_file: str
    attempt: int
    user: str
    patience_s: float
    grace_s: float | None
    allow_config_change: bool = False
    gpu_share: float = 0.0
    kind: str = "prod"
    team: str = ""
    stall_after: str = ""
    allow_env: tuple[str, ...] = ()

    @property
    def cache(self) -> Path:
        """What this machine keeps between runs, and can make again."""
        return self.home / "cache"

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> "RunEnvironment":
        try:
            home = Path(setting(environ, HOME) or "~/.spotune").expanduser().absolute()
            home.exists()
        except (RuntimeError, OSError, ValueError) as error:  # no such user, or none at all; a name that is too long
            raise InputError(HOME, str(error), remedy="an absolute path") from error
        bucket = setting(environ, BUCKET) or f"file://{home}/bucket"
        return cls(
            home=home,
            bucket=check_bucket(bucket),
            run_id=setting(environ, RUN_ID),
            config=setting(environ, CONFIG),
            profile=setting(environ, PROFILE),
            save_every=setting(environ, SAVE_EVERY),
            status_file=setting(environ, STATUS_FILE),
            attempt=int(count) if re.fullmatch("[0-9]{1,9}", count := setting(environ, ATTEMPT)) else 1,
            user=user_name(environ),
            patience_s=_read_patience(setting(environ, PATIENCE) or "30m"),
            grace_s=read_grace(environ),
            allow_config_change=setting(environ, ALLOW_CONFIG_CHANGE).lower() in ("1", "true", "yes"),
            gpu_share=_read_share(setting(environ, GPU_SHARE)),
            kind="dev" if setting(environ, KIND) == "dev" else "prod",
            team=setting(environ, TEAM),
            stall_after=setting(environ, STALL_AFTER),
            allow_env=tuple(setting(environ, ALLOW_ENV).replace(",", " ").split()),  # blanks or commas between names
        )


def setting(environ: Mapping[str, str], name: str) -> str:
    """A value of the environment without blanks and line ends around it; empty where it is not set.

    ``export X="$(cat file)"`` and files of a secret's store leave some there. Raises InputError for one inside.
    """
    return without_controls(environ.get(name) or "", name)


def without_controls(text: str, where: object) -> str:
    """The text without blanks around it; raises InputError where a character that nobody sees is in it."""
    text = text.strip()
    unseen = next((one for one in text if unicodedata.category(one) in ("Cc", "Cf", "Zl", "Zp")), "")
    if unseen:
        what = f"{shown(text)} has a control character inside ({unseen!a})"
        raise InputError(where, what, remedy="write it in one line, of visible characters")
    return text


def read_grace(environ: Mapping[str, str]) -> float | None:
    """Seconds that the user says there are from a notice to the kill, None when not said; raises InputError."""
    text = setting(environ, GRACE_S)
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise InputError(GRACE_S, f"{shown(text)} is not a number of seconds", remedy="30")
    return seconds


def _read_share(text: str) -> float:
    """GPUs; 0 where none are named, or nothing that could be."""
    try:
        share = float(text or 0.0)
    except ValueError:
        return 0.0
    return share if 0 < share < math.inf else 0.0


def _read_patience(text: str) -> float:
    seconds = parse_duration(text, PATIENCE)
    if seconds <= 0:
        raise InputError(PATIENCE, f"{shown(text)} is no time at all", remedy="30m, as when it is not set")
    return seconds


def user_name(environ: Mapping[str, str]) -> str:
    """Who submits: SkyPilot's user on a machine, else the login name."""
    try:
        return setting(environ, USER) or setting(environ, "SKYPILOT_USER") or getpass.getuser()
    except (OSError, KeyError):  # a container's user id without a name
        return "unknown"


def check_bucket(url: str, where: object = BUCKET) -> str:
    """Returns the bucket's URL without blanks around it or a slash at its end; raises InputError for no bucket."""
    remedy = "file:///absolute/path, s3://bucket/prefix or gs://bucket/prefix"
    url = without_controls(url, where)
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in ("file", "s3", "gs", "gcs"):
        raise InputError(where, f"{shown(url)} is not a bucket", remedy=remedy)
    if not rest.strip("/") or (scheme == "file" and not rest.startswith("/")):
        raise InputError(where, f"{shown(url)} names no place", remedy=remedy)
    return url.rstrip("/")


# Durations as people write them: ``30s``, ``5m``, ``1.5h``, ``2d``; ``--save-every`` and ``--stall-after``.

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
STALL_AFTER_S = 600.0


def parse_duration(text: str, where: str) -> float:
    """Seconds, from ``30s``, ``5m``, ``1.5h``, ``2d`` or a bare number of seconds. Raises InputError."""
    found = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]+)?)\s*([smhd]?)", text.strip())
    if not found:
        raise InputError(where, f"{shown(text)} is not a duration", remedy="30s, 5m, 1.5h or 2d")
    return float(found[1]) * _UNITS_S[found[2] or "s"]


def parse_stall_after(text: str, where: str = "--stall-after") -> float:
    """Seconds, 0 for never; empty is the default. Raises InputError."""
    return parse_duration(text, where) if text else STALL_AFTER_S


@dataclass(frozen=True)
class SaveEvery:
    """When to save: after so many steps, or so many seconds; neither: as the config says."""

    steps: int | None = None
    seconds: float | None = None


def parse_save_every(text: str, where: str = "--save-every") -> SaveEvery:
    """``50`` is steps, ``5m`` is time, empty is neither. Raises InputError."""
    if not text:
        return SaveEvery()
    if re.fullmatch("[0-9]{1,12}", text) and int(text) > 0:
        return SaveEvery(steps=int(text))
    if text[-1:] in _UNITS_S and (seconds := parse_duration(text, where)) > 0:
        return SaveEvery(seconds=seconds)
    raise InputError(where, f"{shown(text)} is neither steps nor a duration", remedy="50 (steps) or 5m")
