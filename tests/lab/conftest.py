"""One lab for all tests of this folder: from nothing before the first, down after the last."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from spotune.core.store import Store
from tests.lab import sky
from tests.lab.down import down
from tests.lab.layout import LabError, Layout
from tests.lab.machine import check_machine
from tests.lab.managed import Managed
from tests.lab.reference import undisturbed
from tests.lab.up import up

ROOT = Path(__file__).parents[2]
RESOURCES = ["--infra", "slurm/lab/spot", "--no-use-spot", "--gpus", "L4:1", "--cpus", "2", "--memory", "3"]
MACHINE = ["--infra", "slurm/lab/spot", "--gpus", "L4:1", "--cpus", "3", "--memory", "3"]


@pytest.fixture(scope="session")
def lab(testrun_uid: str) -> Iterator[Layout]:
    """A lab that nobody has touched, one for all of xdist's workers. ``SPOTUNE_LAB_KEEP=1`` takes one that is up."""
    keep = bool(os.environ.get("SPOTUNE_LAB_KEEP"))
    try:
        check_machine()
    except LabError as error:
        pytest.exit(str(error), returncode=2)
    found = Layout.read()
    users = Path(tempfile.gettempdir(), f"spotune-lab-{testrun_uid}")
    lock = FileLock(users.with_suffix(".lock"))
    with lock:
        others = int(users.read_text()) if users.exists() else 0
        if not others:
            bring_up(found, keep)
        users.write_text(str(others + 1))
    yield found
    with lock:
        others = int(users.read_text()) - 1
        users.write_text(str(others))
        if not others:
            for path in (users, users.with_suffix(".lock")):
                path.unlink()
            if not keep:
                down(found)


def bring_up(lab: Layout, keep: bool) -> None:
    if not (keep and lab.root.exists()):
        down(lab)
    up(lab)
    sky.start_server(lab)


Launch = Callable[..., Managed]
Spotune = Callable[..., str]


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
def demo(lab: Layout) -> Callable[[int], str]:
    """Writes the demo's config with fewer steps to where all nodes see it; returns its path."""

    def write(steps: int) -> str:
        text = (ROOT / "config/runs/demo.yaml").read_text()
        path = lab.shared / f"demo-{steps}.yaml"
        path.write_text(text.replace("max_steps: 200", f"max_steps: {steps}"))
        assert path.read_text() != text
        return str(path)

    return write


@pytest.fixture
def spotune(lab: Layout, tmp_path: Path) -> Spotune:
    """Runs ``spotune WORDS`` in the lab; returns its output once its exit code is the expected one."""
    bucket = lab.shared / f"verbs-{tmp_path.name}"
    bucket.mkdir()
    bucket.chmod(0o777)  # the jobs' account writes there too
    (tmp_path / "config.yaml").write_text(f"slurm: {{shared: [{lab.shared}]}}\n")
    environ = {**sky.environ(lab), "SPOTUNE_HOME": str(tmp_path), "SPOTUNE_BUCKET": f"file://{bucket}"}

    def run(*words: str, code: int = 0) -> str:
        program = str(Path(sys.executable).with_name("spotune"))
        done = subprocess.run([program, *words], env=environ, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    return run


@pytest.fixture(scope="session")
def reference(lab: Layout, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """``weights_sha256`` of a run on ``--infra local`` with nothing taken away; each config is trained once."""
    found: dict[tuple[str, ...], str] = {}

    def train(config: str, *words: str) -> str:
        if (config, *words) not in found:
            found[config, *words] = undisturbed(tmp_path_factory.mktemp("local"), config, *words)
        return found[config, *words]

    return train
