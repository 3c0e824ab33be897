"""What spotune's verbs cost over bare ``sky`` for the same work, in CPU time, on a SkyPilot whose server is up.

    . /var/tmp/skylab/env && python benchmarks/launcher.py --infra slurm/lab/spot --bucket file:///var/tmp/skylab/shared/bench

The two of a pair are run in turn, so that what else the machine does meets both: ``spotune queue`` with
``sky jobs queue``, and ``spotune train --dryrun`` (config, fingerprints, prices, what SkyPilot would refuse) with
``sky launch --dryrun``, which validates and optimizes the same task. User and system time of the process and of its
children, which is what a person waits for on an idle machine; the server's own work is not in it.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
GOAL_S = 0.3


@dataclass
class Command:
    """A command line and what it took: CPU and wall seconds of each run."""

    name: str
    words: list[str]
    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)

    def run(self, environ: dict[str, str], is_counted: bool) -> None:
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        done = subprocess.run(
            self.words, cwd=ROOT, env=environ, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
        )
        wall_s, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            sys.exit(f"{' '.join(self.words)} ended with exit code {done.returncode}: {done.stderr.strip()[-500:]}")
        if is_counted:
            self.cpu_s.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
            self.wall_s.append(wall_s)


def pairs(infra: str) -> list[tuple[Command, Command]]:
    spotune, sky = str(BIN / "spotune"), str(BIN / "sky")
    size = ["--cpus", "2", "--memory", "4"] if infra.startswith("slurm") else []
    bare = [sky, "launch", "tasks/train.yaml", "--dryrun", "-y", "--infra", infra, "--gpus", "L4:1", *size]
    bare += ["--env", "SPOTUNE_BUCKET=file:///nowhere"] + (["--no-use-spot"] if infra.startswith("slurm") else [])
    ours = [spotune, "train", "config/runs/demo.yaml", "--infra", infra, "--gpus", "L4:1", "--dryrun"]
    return [
        (Command("spotune queue", [spotune, "queue"]), Command("sky jobs queue", [sky, "jobs", "queue"])),
        (Command("spotune train --dryrun", ours), Command("sky launch --dryrun", bare)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--infra", required=True)
    parser.add_argument("--bucket", required=True, help="a bucket that the infra's machines see")
    parser.add_argument("--runs", type=int, default=7)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        # As somebody works whose runs are SkyPilot's: `queue` asks it, and a folder below shared storage is a bucket.
        shared = str(Path(asked.bucket.removeprefix("file://")).parent)
        Path(home, "config.yaml").write_text(f"infra: {asked.infra}\nslurm: {{shared: [{shared}]}}\n")
        environ = {**os.environ, "SPOTUNE_HOME": home, "SPOTUNE_BUCKET": asked.bucket}
        print("| command | CPU, median | CPU, worst | wall, median |\n|---|---|---|---|")
        for ours, bare in pairs(asked.infra):
            for round_ in range(asked.runs + 1):
                for command in (ours, bare) if round_ % 2 else (bare, ours):
                    command.run(environ, is_counted=round_ > 0)
            for command in (ours, bare):
                figures = (statistics.median(command.cpu_s), max(command.cpu_s), statistics.median(command.wall_s))
                print(f"| `{command.name}` | " + " | ".join(f"{figure:.2f} s" for figure in figures) + " |", flush=True)
            over_s = statistics.median(ours.cpu_s) - statistics.median(bare.cpu_s)
            print(f"| … over bare `sky` | {over_s:+.2f} s | goal < {GOAL_S:g} s | |", flush=True)


if __name__ == "__main__":
    main()
