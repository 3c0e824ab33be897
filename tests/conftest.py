"""What every test gets: a clean environment, and object stores on loopback for those that ask."""

import os
import signal
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from drill import servers
from spotune.core.store import Store
from tests.real_sky import RealSky, real_sky
from tests.script import end_attempts

# The launcher's environment has no torch and the trainer's no SkyPilot: each runs what it can import.
HAS_TRAINER, HAS_LAUNCHER = (find_spec(name) is not None for name in ("trl", "sky"))
collect_ignore = [] if HAS_TRAINER else ["trainer", "chaos"]
collect_ignore += [] if HAS_LAUNCHER else ["unit", "e2e", "contract", "lab"]

pytest.register_assert_rewrite("tests.contract.infra_contract")  # no module of tests, but it asserts
FOREIGN = ("SPOTUNE_", "SKYPILOT_", "SLURM_", "WANDB_")

# A machine that stands still for a moment is no slow test.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell has it for what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the caller's own runs leaks in, nothing of a test leaks out, and no hub is asked."""
    for name in list(os.environ):
        if name.startswith(FOREIGN):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SPOTUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # two threads of a tiny model wait for each other on a busy machine
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


@pytest.fixture(autouse=True)
def no_attempt_outlives_its_test() -> Iterator[None]:
    yield
    end_attempts()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """An S3 server on loopback with a bucket ``spotune``; yields its endpoint. It takes small parts."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("S3_UPLOAD_PART_MIN_SIZE", "1")
        with servers.s3_server() as endpoint:
            yield endpoint


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[str]:
    """A GCS emulator on loopback with a bucket ``spotune``; yields its endpoint."""
    with servers.gcs_server() as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def sky_says(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealSky]:
    """A process that has imported SkyPilot, to be asked by any test."""
    with real_sky(tmp_path_factory.mktemp("sky")) as made:
        yield made


def reach(scheme: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets the environment that leads to the store of ``scheme`` on loopback, which is started when it is not there."""
    found: dict[str, str] = {}
    if scheme == "s3":
        found = servers.s3_environment(request.getfixturevalue("s3_server"))
    if scheme == "gs":
        found = servers.gcs_environment(request.getfixturevalue("gcs_server"))
    for name, value in found.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=["file", "s3", "gs"])
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The URL of an empty place in each kind of bucket, with the environment that reaches it."""
    reach(request.param, request, monkeypatch)
    if request.param == "file":
        return f"file://{tmp_path}/bucket"
    return f"{request.param}://spotune/{tmp_path.name}-{time.time_ns()}"


@pytest.fixture
def store(bucket: str) -> Store:
    return Store(bucket)


@pytest.fixture
def local_store(tmp_path: Path) -> Store:
    return Store(f"file://{tmp_path}/bucket")
