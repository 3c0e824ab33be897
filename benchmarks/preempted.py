"""One managed job on the lab, preempted again and again: does it lose a step, and does it ever end FAILED?

    make lab
    .venv/bin/python benchmarks/preempted.py [--times 10] [--grace 25 | --grace 0]

Real SkyPilot on real Slurm (docs/contributing/lab.md), ``tasks/train.yaml`` as it is shipped, and
``config/runs/demo.yaml`` with as many steps as it takes. The same training, undisturbed and on this machine alone,
says what the weights have to be.
With ``--grace 0`` the node vanishes without a word: what was trained since the last checkpoint is trained again.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from spotune.core.store import Store  # noqa: E402
from tests.lab import nodes, sky  # noqa: E402
from tests.lab.layout import Layout  # noqa: E402
from tests.lab.managed import Managed  # noqa: E402
from tests.lab.reference import undisturbed  # noqa: E402

STEPS = 40  # an attempt makes, at most, until it is preempted
RESOURCES = ["--infra", "slurm/lab/spot", "--no-use-spot", "--gpus", "L4:1", "--cpus", "2", "--memory", "3"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--grace", type=int, default=25, help="seconds; 0: no notice at all")
    asked = parser.parse_args()
    lab = Layout.read(os.environ)
    nodes.set_grace(lab, asked.grace)
    config = write_config(lab, STEPS * (asked.times + 1))
    with tempfile.TemporaryDirectory() as home:
        expected = undisturbed(Path(home), str(config))
    managed = launch(lab, f"grace{asked.grace}", config)
    rows = [preempt(managed, number, asked.grace) for number in range(1, asked.times + 1)]
    weights = managed.wait_for_success(seconds=600)
    print("| preempted | after step | notice | training again after | from step | made again |")
    print("|---|---|---|---|---|---|")
    attempts, again = managed.attempts(), managed.replayed()
    for number, wait_s in rows:
        lost, next_one = attempts[number - 1], attempts[number]
        notice = ", ".join(lost.notices) or "none"
        print(f"| {number} | {lost.last_step} | {notice} | {wait_s:.0f} s | {next_one.restored} | {again[number]} |")
    same = (
        "identical to the undisturbed run's" if weights == expected else f"NOT those of the undisturbed run: {expected}"
    )
    print(f"\n{managed.job.status}, {managed.job.recoveries} recoveries, weights {weights[:16]}, {same}")
    return 0 if weights == expected else 1


def write_config(lab: Layout, steps: int) -> Path:
    """The demo's config with so many steps, where the jobs can read it."""
    path = lab.shared / f"steps-{steps}.yaml"
    config = yaml.safe_load((ROOT / "config/runs/demo.yaml").read_text())
    path.write_text(yaml.safe_dump({**config, "max_steps": steps, "profiles": {}}))
    return path


def launch(lab: Layout, name: str, config: Path) -> Managed:
    bucket = f"file://{lab.shared}/bucket"
    envs = ["--env", f"SPOTUNE_BUCKET={bucket}", "--env", f"SPOTUNE_PYTHON={lab.job_python}"]
    envs += ["--env", f"SPOTUNE_CONFIG={config}"]
    job_id = sky.launch_job(lab, "tasks/train.yaml", "-n", name, *RESOURCES, *envs, cwd=ROOT)
    print(f"managed job {job_id}", file=sys.stderr)
    return Managed(lab, job_id, name, Store(bucket))


def preempt(managed: Managed, number: int, grace_s: int) -> tuple[int, float]:
    """Takes the node once the attempt trains; returns how long it took until a step was made again."""
    managed.wait_for_attempt(number, steps=8, commits=0 if grace_s else 1)
    (node,) = managed.nodes()
    at = time.monotonic()
    if grace_s:
        nodes.preempt(managed.lab, node, seconds=5)
    else:
        nodes.vanish(managed.lab, node)
    managed.wait_for_attempt(number + 1, steps=1)
    if not grace_s:
        nodes.restore(managed.lab, node)
    print(f"{number}: training again after {time.monotonic() - at:.0f} s", file=sys.stderr)
    return number, time.monotonic() - at


if __name__ == "__main__":
    sys.exit(main())
