"""The whole product in miniature: dev run, production job that loses its machine twice, scores, cost report.

    python examples/demo/demo.py [--undisturbed]

Leaves .demo/cost.json, .demo/cost.html and .demo/model (``--undisturbed``: .demo/undisturbed.json).
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from spotune.core.environment import RunEnvironment
from spotune.core.keys import Keys
from spotune.core.records import Certificate
from spotune.core.store import Store
from spotune.launch.task import find_trainer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RESULTS = ROOT / ".demo"
CONFIG = "config/runs/demo.yaml"
SPOTUNE = str(Path(sys.executable).with_name("spotune"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--undisturbed", action="store_true", help="the same job with nothing taken away")
    undisturbed = parser.parse_args().undisturbed
    if not undisturbed:
        shutil.rmtree(RESULTS, ignore_errors=True)
    RESULTS.mkdir(exist_ok=True)
    started = time.monotonic()
    if undisturbed:
        run = train("undisturbed", [])
        report = cost(run, RESULTS / "undisturbed.json")
    else:
        headline("before: the base model on orders that it has not seen")
        score(HERE / "base")
        headline("interactive: 30 steps with profile dev, streaming; Ctrl-C would stop it")
        spotune("dev", "run", CONFIG)
        headline("production: the same config as a job; its machine is taken away twice, once without notice")
        run = train("demo", ["--preemptions", str(HERE / "preemptions.jsonl")])
        headline("after: the fine-tuned model on the same orders")
        fetch_model(run)
        score(RESULTS / "model")
        headline("where the time and the money went")
        report = cost(run, RESULTS / "cost.json", RESULTS / "cost.html")
    summary(run, report, time.monotonic() - started)


def headline(text: str) -> None:
    print(f"\n── {text} ──\n", flush=True)


def call(*command: str) -> None:
    """Runs a command as it is; ends with its exit code when that is not 0."""
    print("$", " ".join(Path(command[0]).name if n == 0 else word for n, word in enumerate(command)), flush=True)
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)


def spotune(*words: str) -> None:
    call(SPOTUNE, *words)


def score(model: Path) -> None:
    call(find_trainer(os.environ, ROOT), "examples/demo/score.py", str(model))


def train(name: str, flags: list[str]) -> str:
    """Submits the job and follows it to its end; returns the run id."""
    run = f"{name}-{''.join(random.choices('abcdefghjkmnpqrstuvwxyz23456789', k=4))}"
    spotune("train", CONFIG, "--infra", "local", "--name", run, "-y", *flags)
    return run


def cost(run: str, target: Path, page: Path | None = None) -> dict[str, object]:
    """Writes the report as JSON (and as a page), prints it as a table; returns it."""
    spotune("cost", run, *(["--html", str(page)] if page else []))
    done = subprocess.run([SPOTUNE, "cost", run, "--format", "json"], cwd=ROOT, check=True, stdout=subprocess.PIPE)
    target.write_bytes(done.stdout)
    found: dict[str, object] = json.loads(done.stdout)
    return found


def fetch_model(run: str) -> None:
    """The certified result, from the bucket to .demo/model."""
    store, keys = Store(RunEnvironment.read(os.environ).bucket), Keys(run)
    certificate = Certificate.from_bytes(store.read(keys.completed) or b"", keys.completed)
    shutil.rmtree(RESULTS / "model", ignore_errors=True)
    for name in certificate.files:
        store.download(f"{keys.output}/{name}", RESULTS / "model" / name)


def summary(run: str, report: dict[str, object], seconds: float) -> None:
    headline("done")
    attempts = report["attempts"]
    assert isinstance(attempts, list)
    weights = str(report["weights_sha256"])
    print(f"{run}: {report['state']}, {len(attempts)} attempt(s), weights {weights[:16]}, {seconds:.0f} s in all")
    other = RESULTS / "cost.json"
    if run.startswith("undisturbed") and other.exists():
        before = json.loads(other.read_text())
        same = before["weights_sha256"] == weights
        print(f"{before['run_id']}: weights {before['weights_sha256'][:16]}: {'identical' if same else 'NOT THE SAME'}")
        if not same:
            sys.exit(1)
    for name in sorted(path.name for path in RESULTS.iterdir()):
        print(f"  .demo/{name}")


if __name__ == "__main__":
    main()
