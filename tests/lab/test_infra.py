"""SkyPilot's infrastructure on the lab: the contract of all infrastructures, on real SkyPilot over real Slurm.

Each test has a SPOTUNE_HOME and a bucket of its own, so that several run side by side: `make lab-contract`.
"""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

import spotune
from spotune.core.errors import InfraError, InputError
from spotune.core.store import Store
from spotune.launch.skypilot.engine import SkyInfra
from tests.contract.infra_contract import CERTIFY, RUN, UP, WAIT, Bench, InfraContract
from tests.lab.layout import Layout

pytestmark = [pytest.mark.lab, pytest.mark.filterwarnings("ignore")]  # SkyPilot's own, when it is imported
PLACE = "slurm/lab/spot"


def in_step(script: str) -> str:
    """In a Slurm step of its own, as the guard starts its workers: only the first process of a step is signalled."""
    step = "srun --overlap --jobid=$SLURM_JOB_ID --nodes=1 --ntasks=1 --unbuffered bash -c"
    return f"exec {step} {shlex.quote(script)}"


# It stays: an exit while Slurm takes the allocation away may end the job for good, see guard/leaving.py.
HEEDS = in_step(f"trap 'echo told to go; touch {RUN}/told' TERM URG; {UP}; {WAIT}")
DEAF = in_step(f"trap '' TERM URG; {UP}; {WAIT}")


@pytest.fixture
def lab_environ(lab: Layout, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """This process's environment as the lab's, in which ``sky`` talks to the lab alone."""
    script = f". {lab.root}/env && env -0"
    told = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    environ = dict(pair.partition("=")[::2] for pair in told.split("\0") if pair)
    environ["PYTHONPATH"] = f"{Path(spotune.__file__).parents[1]}:{environ.get('PYTHONPATH', '')}"
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    return environ


@pytest.fixture
def bench(lab: Layout, lab_environ: dict[str, str], tmp_path: Path) -> Iterator[Bench]:
    shared = lab.shared / f"infra-{os.getpid()}-{time.time_ns()}"
    shared.mkdir(mode=0o777)
    shared.chmod(0o777)
    workdir = tmp_path / "work"
    workdir.mkdir()
    bench = Bench(
        SkyInfra(tmp_path / "home", lab_environ),
        Store(f"file://{shared}"),
        str(workdir),
        pause=partial(time.sleep, 3.0),
        limit_s=1500.0,  # three machines, on two cores that others use too
        heeds=HEEDS,
        deaf=DEAF,
        resources={"cpus": "1", "memory": "1"},
        place=PLACE,
        one_slot=False,
        keeps_logs=False,
        knows_setup=False,
        kills_silently=False,  # Slurm ends a job with a SIGTERM first
        reads_bucket=False,
    )
    yield bench
    for run_id in set(bench.submitted):
        bench.infra.cancel(run_id)


class TestSkyInfra(InfraContract):
    """The contract, on the lab."""


def test_a_second_home_does_not_see_it(bench: Bench, lab_environ: dict[str, str], tmp_path: Path) -> None:
    """Unless it asks: then it sees it by its own mark, with user and bucket, and may cancel it."""
    bench.submit("run-a", bench.heeds)
    assert SkyInfra(tmp_path / "other", lab_environ).jobs(["run-a"]) == []
    asking = SkyInfra(tmp_path / "other", lab_environ, asks=True)
    mine = [job for job in asking.jobs(everyone=True) if job.bucket == bench.store.url]
    assert [(job.run_id, job.user) for job in mine] == [("run-a", "tester")]
    with pytest.raises(InputError, match="not submitted from here"):
        asking.resume("run-a")


def test_a_secret_reaches_the_job_and_nothing_that_is_kept(bench: Bench, tmp_path: Path) -> None:
    run = f'[ "$(echo $TOKEN | rev)" = password ] && {CERTIFY}'
    bench.submit("run-a", run, secrets={"TOKEN": "drowssap"})
    assert bench.end("run-a").state == "SUCCEEDED"
    for path in (tmp_path / "home").rglob("*"):
        assert not path.is_file() or b"drowssap" not in path.read_bytes(), path


def test_what_has_ended_is_known_without_skypilot(bench: Bench, tmp_path: Path) -> None:
    bench.submit("run-a", CERTIFY)
    bench.end("run-a")
    bench.until(lambda: all(row.ended_at for row in bench.infra.history("run-a")))
    code = (
        "import sys; from pathlib import Path; from spotune.launch.skypilot.engine import SkyInfra\n"
        f"infra = SkyInfra(Path({str(tmp_path / 'home')!r}), {{}})\n"
        "print(infra.jobs()[0].state, infra.history('run-a')[0].end_reason, 'sky' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "SUCCEEDED exited False\n"


def test_what_cannot_be_had_is_one_line_and_leaves_nothing(bench: Bench) -> None:
    try:
        bench.submit("run-a", "true", resources={"accelerators": "H100:8"})
        reason = bench.end("run-a").reason
    except InfraError as error:
        reason = str(error)
    assert reason
    assert "\n" not in reason
