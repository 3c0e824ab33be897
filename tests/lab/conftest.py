"""One lab for all tests of this folder: from nothing before the first, down after the last."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spotune.contracts.keys import Keys
from spotune.contracts.records import Certificate
from spotune.contracts.store import Store
from tests.lab import sky
from tests.lab.down import down
from tests.lab.layout import LabError, Layout
from tests.lab.machine import check_machine
from tests.lab.managed import Managed
from tests.lab.up import up

ROOT = Path(__file__).parents[2]
RESOURCES = ["--infra", "slurm/lab/spot", "--no-use-spot", "--gpus", "L4:1", "--cpus", "2", "--memory", "3"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all that can happen to a job, not the shortest way alone")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    is_rest = collection_path.name in ("test_full.py", "test_infra.py")
    return True if is_rest and not config.getoption("--full", False) else None


@pytest.fixture(scope="session")
def lab() -> Iterator[Layout]:
    """A lab that nobody has touched. ``SPOTUNE_LAB_KEEP=1`` uses one that is up, and leaves it."""
    keep = bool(os.environ.get("SPOTUNE_LAB_KEEP"))
    try:
        check_machine()
    except LabError as error:
        pytest.exit(str(error), returncode=2)
    found = Layout.read()
    if not (keep and found.root.exists()):
        down(found)
    up(found)
    sky.start_server(found)
    yield found
    if not keep:
        down(found)


Launch = Callable[..., Managed]


@pytest.fixture(scope="session")
def launch(lab: Layout) -> Launch:
    """Launches ``tasks/train.yaml`` with ``sky`` alone: ``launch(name, *words, bucket=…, NAME=value)``."""

    def launch_job(name: str, *words: str, bucket: str = "", task: str = "tasks/train.yaml", **envs: str) -> Managed:
        bucket = bucket or f"file://{lab.shared}/bucket"
        envs = {"SPOTUNE_BUCKET": bucket, "SPOTUNE_PYTHON": str(lab.job_python), **envs}
        flags = [word for pair in envs.items() for word in ("--env", "=".join(pair))]
        job_id = sky.launch_job(lab, task, "-n", name, *RESOURCES, *flags, *words, cwd=ROOT)
        return Managed(lab, job_id, name, Store(bucket))

    return launch_job


@pytest.fixture(scope="session")
def reference(lab: Layout, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """``weights_sha256`` of a run on ``--infra local`` with nothing taken away; each config is trained once."""
    found: dict[tuple[str, ...], str] = {}

    def train(config: str, *words: str) -> str:
        if (config, *words) not in found:
            found[config, *words] = _train(tmp_path_factory.mktemp("local"), config, *words)
        return found[config, *words]

    return train


def _train(home: Path, config: str, *words: str) -> str:
    spotune = str(Path(sys.executable).with_name("spotune"))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SPOTUNE_", "SKYPILOT_"))}
    command = [spotune, "train", config, "--infra", "local", "--name", "reference", "-y", *words]
    done = subprocess.run(
        command, env={**kept, "SPOTUNE_HOME": str(home)}, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    data = Store(f"file://{home}/bucket").read(Keys("reference").completed)
    assert data
    return Certificate.from_bytes(data).weights_sha256
