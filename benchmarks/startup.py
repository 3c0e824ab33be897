"""CPU time of the verbs that people type: ``make bench`` prints the table that benchmarks/README.md records.

Each command is run ``--runs`` times as a process of its own, after one run that is not counted; user and system time
of the process are taken from the operating system.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from spotune.launch.task import find_trainer

ROOT = Path(__file__).resolve().parent.parent
SPOTUNE = str(Path(sys.executable).with_name("spotune"))
COMMANDS = {
    "spotune --help": [SPOTUNE, "--help"],
    "spotune train --help": [SPOTUNE, "train", "--help"],
    "spotune check CONFIG": [SPOTUNE, "check", "config/runs/demo.yaml"],
    "spotune queue": [SPOTUNE, "queue"],
    "spotune cost": [SPOTUNE, "cost"],
    "python -c 'import click'": [sys.executable, "-c", "import click"],
    "python -c 'import pydantic'": [sys.executable, "-c", "import pydantic; pydantic.BaseModel"],
    "python -c 'from trl import SFTTrainer'": [find_trainer(os.environ, ROOT), "-c", "from trl import SFTTrainer"],
    "python -c 'import sky'": [sys.executable, "-c", "import sky"],
}


def cpu_seconds(command: list[str], environ: dict[str, str], expected: int = 0) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of one run that ends with the code ``expected``; its children are included."""
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != expected:
        sys.exit(f"{' '.join(command)} ended with exit code {process.returncode}")
    return usage.ru_utime + usage.ru_stime, time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10)
    runs = parser.parse_args().runs
    print("| command | CPU, median | CPU, worst | wall, median |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as home:
        environ = {**os.environ, "SPOTUNE_HOME": home}
        for name, command in COMMANDS.items():
            cpu_seconds(command, environ)
            measured = [cpu_seconds(command, environ) for _ in range(runs)]
            cpu, wall = [row[0] for row in measured], [row[1] for row in measured]
            figures = (statistics.median(cpu), max(cpu), statistics.median(wall))
            print(f"| `{name}` | " + " | ".join(f"{1000 * figure:.0f} ms" for figure in figures) + " |", flush=True)


if __name__ == "__main__":
    main()
