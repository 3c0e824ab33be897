"""``spotune``'s own verbs on the lab: a dev cluster from up to down, and two jobs that want the same GPU."""

import json
from pathlib import Path

import pytest

from spotune.core.keys import Keys
from spotune.core.store import Store
from tests.lab import nodes, slurm
from tests.lab.conftest import MACHINE, Spotune
from tests.lab.daemons import wait_until
from tests.lab.layout import Layout
from tests.lab.managed import START_S

pytestmark = pytest.mark.lab
CONFIG = "config/runs/demo.yaml"


def test_a_dev_cluster_from_up_to_down(lab: Layout, spotune: Spotune) -> None:
    spotune("dev", "up", *MACHINE, "-i", "10", "--down", "--env", f"SPOTUNE_PYTHON={lab.job_python}")
    try:
        (cluster,) = json.loads(spotune("dev", "ls", "--format", "json"))
        run = ["dev", "run", CONFIG, "-c", cluster["name"], "--set", "max_steps=3"]
        run += ["--env", f"SPOTUNE_PYTHON={lab.job_python}"]
        assert "certified" in spotune(*run, "--name", "tried")
        promoted = spotune("train", "--from", "tried", *MACHINE, "--dryrun", "--format", "json")
        assert json.loads(promoted)["config"]["max_steps"] == 3
        spotune(*run, "--set", "adam_beta1=2.0", code=1)
        assert spotune("dev", "ssh", "hostname").strip() in [node.name for node in lab.nodes]
        spotune("dev", "ssh", "exit 7", code=7)
    finally:
        spotune("dev", "down", "-y")
    wait_until(lambda: not slurm.jobs(lab), 120, "the cluster's Slurm job is still there")
    assert json.loads(spotune("dev", "ls", "--format", "json")) == []
    (paid,) = json.loads(spotune("cost", "--clusters", "--format", "json"))
    assert (paid["name"], paid["is_up"], paid["price_usd_per_hour"]) == (cluster["name"], False, pytest.approx(0.25))
    assert paid["runs"]
    assert all(run["paid_s"] > 0 for run in paid["runs"])
    assert sum(run["cost_usd"] for run in paid["runs"]) + paid["idle_usd"] == pytest.approx(paid["cost_usd"])


def test_of_two_jobs_that_wait_for_a_gpu_the_one_of_higher_priority_runs_first(
    lab: Layout, spotune: Spotune, tmp_path: Path
) -> None:
    for node in lab.nodes:
        nodes.preempt(lab, node, seconds=int(START_S))
    try:
        for name, priority in (("low", "0"), ("high", "5")):
            words = ["--name", name, "--priority", priority, "--set", "max_steps=3", "-y", "-d"]
            spotune("train", CONFIG, *MACHINE, *words, "--env", f"SPOTUNE_PYTHON={lab.job_python}")
        wait_until(lambda: len(waiting(lab)) == 2, 300, "the two are not in Slurm's queue")
        nodes.restore(lab, lab.nodes[0])
        for name in ("low", "high"):
            spotune("logs", name, "--follow")
    finally:
        for node in lab.nodes:
            nodes.restore(lab, node)
    store = Store(f"file://{lab.shared}/verbs-{tmp_path.name}")
    low, high = (json.loads(store.read(Keys(name).attempt(1)) or "")["claimed_at"] for name in ("low", "high"))
    assert high < low


def waiting(lab: Layout) -> list[str]:
    return [line for line in slurm.jobs(lab, "%j %T") if line.startswith(("low-", "high-")) and "PENDING" in line]
