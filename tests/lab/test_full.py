"""What else can happen to a managed job, on real SkyPilot and real Slurm: `make lab-test-full`."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from drill import servers
from spotune.launch.local.machine import is_live
from tests.lab import nodes, sky, slurm
from tests.lab.daemons import wait_until
from tests.lab.layout import Layout
from tests.lab.machine import find_user
from tests.lab.managed import START_S, Managed

pytestmark = pytest.mark.lab
CONFIG = "config/runs/demo.yaml"
ROOT = Path(__file__).parents[2]
Launch = Callable[..., Managed]
Reference = Callable[..., str]


@pytest.fixture(scope="module")
def failing(lab: Layout, launch: Launch) -> Managed:
    """A job whose training raises; SkyPilot repeats it while other tests run."""
    config = yaml.safe_load((ROOT / CONFIG).read_text()) | {"adam_beta1": 2.0}
    path = lab.shared / "failing.yaml"
    path.write_text(yaml.safe_dump(config))
    return launch("failing", SPOTUNE_CONFIG=str(path))


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    with servers.s3_server() as endpoint, pytest.MonkeyPatch.context() as patch:
        found = servers.s3_environment(endpoint)
        for name, value in found.items():
            patch.setenv(name, value)
        yield found


def test_cancelled_by_slurm_then_a_rank_killed_with_the_checkpoints_in_s3(
    lab: Layout, launch: Launch, reference: Reference, failing: Managed, s3: dict[str, str]
) -> None:
    managed = launch("s3", bucket=f"s3://{servers.BUCKET}/lab", **s3)
    expected = reference(CONFIG)
    managed.wait_for_attempt(1, steps=30, commits=1)
    slurm.ask(lab, "scancel", managed.slurm_id())
    managed.wait_for_attempt(2, steps=30, commits=1)
    (rank,) = ranks(managed)
    rank.kill()
    assert managed.wait_for_success() == expected
    reasons = [reason for _, _, reason in sky.job_events(lab, managed.job_id)]
    assert any("75" in reason for reason in reasons), managed.story()
    _, second, third = managed.attempts()
    assert 25 <= second.restored < third.restored
    assert managed.job.recoveries == 2


def test_cancel_ends_everything_but_the_checkpoints(lab: Layout, launch: Launch) -> None:
    managed = launch("cancelled")
    managed.wait_for_attempt(1, steps=30, commits=1)
    kept = managed.commits(1)
    sky.sky(lab, "jobs", "cancel", "-y", str(managed.job_id))
    assert sky.wait_for_end(lab, managed.job_id, START_S).status == "CANCELLED"
    wait_until(lambda: not managed.slurm_id(), 120, "its Slurm job is still there")
    wait_until(lambda: not trainers(managed), 120, "its processes are still there")
    now = managed.commits(1)
    assert max(kept) <= max(now)  # those before it go as it trains on
    newest = managed.read(max(now))
    folder = managed.keys.checkpoint(newest["step"], newest["attempt"])
    assert newest["files"].keys() <= {key.removeprefix(f"{folder}/") for key in managed.store.keys(folder)}
    assert not managed.weights


def test_a_real_failure_is_made_once_however_often_the_job_is_repeated(lab: Layout, failing: Managed) -> None:
    job = sky.wait_for_end(lab, failing.job_id, START_S)
    assert job.status == "FAILED", failing.story()
    assert failing.count_attempts() == 1
    assert failing.read(failing.keys.failed)["exit_code"] == 1
    assert job.recoveries <= 3


def test_a_failed_node_comes_back_with_a_trainer_that_must_not_write(
    lab: Layout, launch: Launch, reference: Reference
) -> None:
    managed = launch("failednode")
    managed.wait_for_attempt(1, steps=30, commits=1)
    (node,) = managed.nodes()
    lost = trainers(managed)
    for process in lost:  # else it would be done before anybody has noticed
        process.send_signal(signal.SIGSTOP)
    nodes.fail(lab, node)
    try:
        managed.wait_for_attempt(2, steps=3)
        before = managed.commits(1)
        assert all(is_live(process) for process in lost)
        for process in lost:
            process.send_signal(signal.SIGCONT)
        assert managed.wait_for_success() == reference(CONFIG)
        wait_until(lambda: not trainers(managed), 120, "the node's trainer goes on")
    finally:
        nodes.restore(lab, node)
    assert managed.commits(1) == before or set(managed.commits(1)) < set(before)
    first, second = managed.attempts()
    assert first.end in ("lost", ""), managed.story()
    assert second.restored in first.steps


def test_two_nodes_one_of_them_preempted(lab: Layout, launch: Launch, reference: Reference) -> None:
    managed = launch("twonodes", "--num-nodes", "2", SPOTUNE_PROFILE="dev")
    expected = reference(CONFIG, "--profile", "dev", "--env", "SPOTUNE_NUM_PROCESSES=2")
    managed.wait_for_attempt(1, steps=5)
    assert len(managed.nodes()) == 2
    nodes.preempt(lab, lab.nodes[1], seconds=5)
    managed.wait_for_attempt(2)
    assert managed.wait_for_success() == expected
    assert managed.replayed() == [0, 0], managed.story()


def test_a_dev_cluster_by_sky_alone(lab: Layout) -> None:
    words = ["--infra", "slurm/lab/spot", "--no-use-spot", "--gpus", "L4:1", "--cpus", "2", "--memory", "3"]
    environ = ["--env", f"SPOTUNE_PYTHON={lab.job_python}"]
    sky.sky(lab, "launch", "-y", "-c", "dev", "tasks/dev.yaml", *words, *environ, cwd=ROOT)
    try:
        assert "cuda 0" in sky.sky(lab, "exec", "--gpus", "L4:1", "dev", "echo cuda $CUDA_VISIBLE_DEVICES")
    finally:
        sky.sky(lab, "down", "-y", "dev")
    wait_until(lambda: not slurm.jobs(lab), 120, "the cluster's Slurm job is still there")


def trainers(managed: Managed, module: str = "spotune.sft") -> list[psutil.Process]:
    """The guards and the ranks of a job: what runs the module in its cluster's home."""
    entry = find_user(managed.lab)
    assert entry
    home = f"/{managed.name}-{managed.job_id}-"
    found = []
    for process in psutil.process_iter():
        try:
            is_ours = process.uids().real == entry.pw_uid and is_live(process) and process.name() != "srun"
            if is_ours and home in process.cwd() and any(word.startswith(module) for word in process.cmdline()[:5]):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def ranks(managed: Managed) -> list[psutil.Process]:
    return trainers(managed, "spotune.sft.worker")
