"""Seconds of ``spotune check``: wall time and CPU time of whole processes, for right configs and for wrong ones.

Each command runs ``--runs`` times, after one run that is not counted. The wrong configs are those of ``WRONG``: what
the launcher says of them is what a machine would otherwise say minutes later.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

from startup import ROOT, SPOTUNE, cpu_seconds

WRONG = {
    "one wrong key": "learning_rat: 1\n",
    "a recipe with six old keys": "torch_dtype: bfloat16\nmax_seq_length: 2048\nwarmup_ratio: 0.1\n"
    "overwrite_output_dir: true\nchat_template: x\nevaluation_strategy: epoch\n",
    "strategies that do not go together": "load_best_model_at_end: true\neval_strategy: epoch\nlogging_steps: 1.5\n",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10)
    runs = parser.parse_args().runs
    print("| `spotune check` of | wall, median | wall, worst | CPU, median |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as home:
        environ = {**os.environ, "SPOTUNE_HOME": home}
        configs = {f"`{path.relative_to(ROOT)}`": (path, 0) for path in (ROOT / "config/runs/demo.yaml",)}
        for number, (name, text) in enumerate(WRONG.items()):
            path = Path(home, f"{number}.yaml")
            path.write_text(f"model_name_or_path: org/model\ndataset_name: org/rows\n{text}")
            configs[name] = (path, 2)
        for name, (path, code) in configs.items():
            command = [SPOTUNE, "check", str(path)]
            cpu_seconds(command, environ, code)
            measured = [cpu_seconds(command, environ, code) for _ in range(runs)]
            cpu, wall = [row[0] for row in measured], [row[1] for row in measured]
            figures = (statistics.median(wall), max(wall), statistics.median(cpu))
            print(f"| {name} | " + " | ".join(f"{figure:.2f} s" for figure in figures) + " |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
